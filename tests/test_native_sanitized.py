"""The native kernels under ASan and UBSan, without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

DRIVER = Path(__file__).parent / "native" / "driver.cpp"
KERNELS = Path(str(resources.files("dart_llm"))) / "native"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
CLEAN = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"


@pytest.mark.skipif(COMPILER is None and "CI" not in os.environ, reason="no C++ compiler is here")
def test_kernels_touch_only_what_is_theirs_and_agree(tmp_path: Path) -> None:
    assert COMPILER is not None
    program = tmp_path / "driver"
    files = [str(one) for one in KERNELS.glob("*.cpp") if one.name != "ops.cpp"]
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", *CLEAN.split()]
    command = [COMPILER, *flags, "-I", str(KERNELS), str(DRIVER), *files, "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    kinds = [line.split()[0] for line in done.stdout.splitlines()]
    assert kinds[-1] == "portable" and all("agrees" in line for line in done.stdout.splitlines())
