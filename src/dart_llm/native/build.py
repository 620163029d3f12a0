"""Builds and loads the native CPU kernels: C++ code that is compiled on first use.

No other file builds or loads them.  torch's extension loader compiles the library, which is stored
in the cache folder.  The library's file name contains a hash (of sources, torch's version, machine,
flags and compiler) and a digest of the file.  A damaged library is never loaded but built again.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from dart_llm import cache
from dart_llm.cache import cache_folder, make_folder
from dart_llm.errors import DartError, LoadError

logger = logging.getLogger("dart_llm")

NAME, SUFFIX = "dart_llm_native", ".so"

FLAGS = ("-O3", "-fopenmp")

WITHOUT = {
    "avx512_bf16": "-DDART_WITHOUT_AVX512BF16",
    "avx512f": "-DDART_WITHOUT_AVX512",
    "avx_vnni": "-DDART_WITHOUT_AVXVNNI",
}
"""Maps each CPU feature that some kernels need to the compiler flag that excludes the kernels."""

CPU = Path("/proc/cpuinfo")

SWITCH = "DART_NATIVE"
"""Environment variable that turns the native kernels off if it is ``0``."""

ELSEWHERE = "the native kernels need Linux"


def sources() -> dict[str, str]:
    """The texts of the C++ source files, by name."""
    folder = resources.files("dart_llm.native") / "csrc"
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith((".h", ".cpp")))
    return {name: (folder / name).read_text(encoding="utf-8") for name in names}


def built_name() -> str:
    """The hash in the file name of the library for these sources and this machine."""
    digest = hashlib.sha256()
    for name, text in sources().items():
        digest.update(f"{name}\n{text}\n".encode())
    about = (torch.__version__, platform.machine(), sys.platform, _flags(), _compiler())
    digest.update(repr(about).encode())
    return digest.hexdigest()[:24]


def _flags() -> tuple[str, ...]:
    """The compiler's options; they exclude kernels that this CPU is known not to support."""
    lines = CPU.read_text("utf-8", "replace").splitlines() if CPU.is_file() else []
    has = next((line.split() for line in lines if line.startswith("flags")), list(WITHOUT))
    return (*FLAGS, *(flag for name, flag in WITHOUT.items() if name not in has))


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _no_compiler() -> str:
    """An error message if there is no C++ compiler, else ""."""
    path = shutil.which(shlex.split(_compiler())[0])
    return "" if path else f"there is no C++ compiler {_compiler()}: install g++, or set CXX"


@functools.cache
def why_not() -> str:
    """Build the kernels if necessary; return why they cannot run here, or "" if they can."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 keeps the native kernels off"
    if sys.platform != "linux":
        return ELSEWHERE
    try:
        folder = cache_folder() / "native"
        library = cache.find(folder, built_name(), SUFFIX)
        if library is None or not _loads(library):
            _build(folder)
    except (OSError, RuntimeError, LoadError) as error:
        reason = f"the native kernels could not be built ({_reason(error)})"
        logger.warning("%s: pruned layers use the slower executor compact", reason)
        return reason
    return ""


def state(cache_dir: str | None = None) -> str:
    """The kernels in use, or why there are none, as text; a missing library is not built."""
    if os.environ.get(SWITCH) == "0":
        return f"off ({SWITCH}=0)"
    if cache.find(cache_folder(cache_dir) / "native", built_name(), SUFFIX) is not None:
        return why_not() or f"built: {kernels_in_use()}"
    if missing := ELSEWHERE if sys.platform != "linux" else _no_compiler():
        return f"none: {missing}"
    return "not built yet: they are compiled on first use"


def _loads(library: Path) -> bool:
    """Load an intact library; if this system cannot load it, delete it and return False."""
    try:
        if not _registered():
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        logger.warning("the native kernels cannot be loaded; building again: %s", _reason(error))
        library.unlink(missing_ok=True)
        return False
    return True


def _registered() -> bool:
    """Whether the operators are registered: registering them again would abort the process."""
    return hasattr(torch.ops.dart_llm, "cpu")


def _reason(error: BaseException) -> str:
    """The message's first line that contains ``error:``, or else its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wrong = (line for line in lines if "error:" in line)
    return next(wrong, lines[0] if lines else type(error).__name__)


def _build(folder: Path) -> None:
    """Compile, load and store the library, without waiting for locks of other processes."""
    if missing := _no_compiler():
        raise LoadError(missing)
    # otherwise PyTorch builds for CUDA log a warning on a machine without CUDA
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension

    logger.info("compiling the native CPU kernels, once (about a minute on two cores)")
    make_folder(folder)
    key = built_name()  # before the sources are read: they may change meanwhile
    before = os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory(dir=folder, prefix=cache.SCRATCH) as scratch:
        for name, text in sources().items():
            (Path(scratch) / name).write_text(text, encoding="utf-8")
        try:  # torch then finds pip's ninja even if the virtual environment is not activated
            os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
            cpp_extension.load(
                NAME,
                [str(Path(scratch) / name) for name in sources() if name.endswith(".cpp")],
                extra_cflags=list(_flags()),
                extra_ldflags=["-fopenmp"],
                build_directory=scratch,
                is_python_module=False,
            )
        finally:
            os.environ["PATH"] = before
        cache.write(folder, key, SUFFIX, (Path(scratch) / f"{NAME}.so").read_bytes())


def ops() -> Any:
    """The operators; raises ``DartError`` with a reason if the kernels cannot run."""
    if reason := why_not():
        raise DartError(f"{reason}: use executor compact")
    return torch.ops.dart_llm


def kernels_in_use() -> str:
    """The name of the kernels in use."""
    return str(ops().cpu())


if __name__ == "__main__":  # scripts/setup.sh builds them in advance
    sys.exit(why_not() or None)
