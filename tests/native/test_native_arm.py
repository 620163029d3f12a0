"""The native kernels as a 64-bit Arm CPU runs them, in an emulator."""

import shutil

import pytest

from sanitized import (
    SANITIZED,
    SOURCES,
    WARNINGS,
    Tools,
    driver,
    kernel_objects,
    kinds_that_agree,
    random_steps,
)

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
MISSING = [
    package
    for package, found in [("g++-aarch64-linux-gnu", COMPILER), ("qemu-user", EMULATOR)]
    if not found
]
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(MISSING), reason=f"Debian's {' and '.join(MISSING)} missing here"),
]

FLAGS = {  # ASan's programs do not start in this emulator: fence.cpp watches the ends of memory
    "as users build them": (f"{WARNINGS} -O3 -static", str(SOURCES / "fence.cpp")),
    "sanitized": (f"{SANITIZED} -fsanitize=undefined -static", "-lubsan -lstdc++"),
}
CPUS = {"neoverse-n1": ["neon", "portable"], "cortex-a72": ["portable"]}
"""Kinds that each has: the older one lacks dot products of bytes."""


def tools(flags, cpu):
    return Tools(COMPILER, *FLAGS[flags], (EMULATOR, "-cpu", cpu))


@pytest.fixture(scope="module", params=FLAGS)
def built(request, tmp_path_factory):
    """The name of the flags, and the kernels compiled with them."""
    folder = tmp_path_factory.mktemp("kernels")
    return request.param, kernel_objects(folder, tools(request.param, ""))


@pytest.mark.parametrize("name", ["driver", "packed"])
@pytest.mark.parametrize("cpu", CPUS)
def test_kernels_agree_with_plain_loops(cpu, name, built, tmp_path):
    flags, objects = built
    program = driver(name, objects, tmp_path, tools(flags, cpu))
    assert kinds_that_agree(program) == CPUS[cpu]


@pytest.mark.parametrize("built", ["sanitized"], indirect=True)
def test_random_decode_steps(built, tmp_path):
    flags, objects = built
    program = driver("steps", objects, tmp_path, tools(flags, "neoverse-n1"))
    counts = random_steps(program, steps=400, seed=1)
    assert min(counts["neon"], counts["portable"], counts["compared"]) >= 100
