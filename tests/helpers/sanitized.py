"""The drivers of tests/native, built with the kernels under ASan and UBSan, without torch."""

import os
import shutil
import subprocess
from importlib import resources
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "native"
KERNELS = Path(str(resources.files("dart_llm.native"))) / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = (
    "-std=c++17 -O1 -g -Wall -Wextra -Werror -pthread "
    "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
)


def compile_with(folder, *arguments):
    assert COMPILER is not None
    command = [COMPILER, *FLAGS.split(), "-I", str(KERNELS), *arguments]
    subprocess.run(command, check=True, timeout=600, cwd=folder)


def kernel_objects(folder):
    """Everything native but the operators of torch, compiled into ``folder``."""
    files = [str(one) for one in sorted(KERNELS.glob("*.cpp")) if not one.match("*ops.cpp")]
    compile_with(folder, "-c", *files)
    return [str(one) for one in sorted(folder.glob("*.o"))]


def driver(name, objects, folder):
    compile_with(folder, str(SOURCES / f"{name}.cpp"), *objects, "-o", name)
    return folder / name


def random_steps(program, steps, seed, first=0):
    """Counts of what was decoded, by name; raises ``RuntimeError`` with what a sanitizer said."""
    command = [str(program), str(seed), str(first), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or done.stderr:
        raise RuntimeError(f"rc {done.returncode}\n{done.stdout}\n{done.stderr}")
    return {name: int(n) for name, n in map(str.split, done.stdout.splitlines())}
