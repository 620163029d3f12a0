"""The drivers of tests/native, built with the kernels under sanitizers, without torch."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "native"
KERNELS = Path(str(resources.files("dart_llm.native"))) / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
WARNINGS = "-std=c++17 -Wall -Wextra -Werror -pthread"
SANITIZED = f"{WARNINGS} -O1 -g1 -fno-sanitize-recover=all -fno-omit-frame-pointer"
FLAGS = f"{SANITIZED} -fsanitize=address,undefined"
THREADS = f"{SANITIZED} -fsanitize=thread"


@dataclass(frozen=True)
class Tools:
    """What builds a driver, and runs it."""

    compiler: str | None = COMPILER
    flags: str = FLAGS
    libraries: str = ""
    run: tuple[str, ...] = ()

    def compile(self, folder, *arguments):
        assert self.compiler is not None
        command = [self.compiler, *self.flags.split(), "-I", str(KERNELS), *map(str, arguments)]
        subprocess.run(command, check=True, timeout=600, cwd=folder)


NEEDED = {"avx512bf16": "avx512_bf16", "avx512": "avx512f", "avxvnni": "avx_vnni", "avx2": "avx2"}
"""Kinds of kernels that some CPUs lack, and what Linux calls a feature that they need."""


def never_run():
    """Files of kernels that this CPU lacks: a sanitizer has nothing to watch in them."""
    about = Path("/proc/cpuinfo")
    features = about.read_text().split() if about.exists() else NEEDED.values()
    return {KERNELS / f"kernels_{kind}.cpp" for kind in NEEDED if NEEDED[kind] not in features}


def kernel_objects(folder, tools=Tools()):
    """Everything native but the operators of torch, compiled into ``folder``."""
    torch = {*KERNELS.glob("*ops.cpp"), KERNELS / "huge_room.cpp"}
    watched = tools.flags in (FLAGS, THREADS)
    idle = never_run() if watched else set()
    slow = {KERNELS / "kernels_portable.cpp"} if watched else set()  # to be optimised: 40 seconds
    tools.compile(folder, "-c", *sorted({*KERNELS.glob("*.cpp")} - torch - idle - slow))
    if slow:
        Tools(flags=tools.flags.replace("-O1", "-O0")).compile(folder, "-c", *sorted(slow))
    objects = sorted(folder.glob("*.o"))
    if idle:  # last in the list, for a linker takes the first of equal inline functions
        (folder / "idle").mkdir()
        Tools(flags=f"{WARNINGS} -O0").compile(folder / "idle", "-c", *sorted(idle))
        objects += sorted((folder / "idle").glob("*.o"))
    return [str(path) for path in objects]


def driver(name, objects, folder, tools=Tools()):
    """The command that runs a driver."""
    source = str(SOURCES / f"{name}.cpp")
    tools.compile(folder, source, *objects, "-o", name, *tools.libraries.split())
    return [*tools.run, str(folder / name)]


def kinds_that_agree(program):
    """Names of the kinds that a driver compared; it says nothing else."""
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert all(line[1:] == ["agrees"] for line in lines)
    return [line[0] for line in lines]


def random_steps(program, steps, seed, first=0):
    """Counts of what was decoded, by name; raises ``RuntimeError`` with what a sanitizer said."""
    command = [*program, str(seed), str(first), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or done.stderr:
        raise RuntimeError(f"rc {done.returncode}\n{done.stdout}\n{done.stderr}")
    return {name: int(n) for name, n in map(str.split, done.stdout.splitlines())}
