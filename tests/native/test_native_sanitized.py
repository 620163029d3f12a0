"""The native kernels under ASan, UBSan and TSan, without torch; and on a 64-bit Arm CPU."""

import os
import shutil

import pytest

from sanitized import (
    COMPILER,
    SANITIZED,
    SOURCES,
    THREADS,
    WARNINGS,
    Tools,
    driver,
    kernel_objects,
    kinds_that_agree,
    random_steps,
)

COMPILED = pytest.mark.skipif(
    COMPILER is None and "CI" not in os.environ, reason="no C++ compiler is here"
)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return kernel_objects(tmp_path_factory.mktemp("kernels"))


@COMPILED
@pytest.mark.parametrize("name", ["driver", "packed"])
def test_kernels_touch_only_what_is_theirs_and_agree(name, objects, tmp_path):
    assert kinds_that_agree(driver(name, objects, tmp_path))[-1] == "portable"


@COMPILED
def test_random_decode_steps(objects, tmp_path):
    """benchmarks/sanitized_steps.py makes many more."""
    counts = random_steps(driver("steps", objects, tmp_path), steps=400, seed=1)
    assert counts["steps"] >= 400 and counts["compared"] >= 200
    assert counts["portable"] >= 10 and min(counts.values()) >= 3
    assert counts["float32"] + counts["bfloat16"] == counts["steps"]


@COMPILED
def test_threads_of_a_step_do_not_race(tmp_path):
    """Two and three threads in the same step, under ThreadSanitizer."""
    tools = Tools(flags=THREADS)
    objects = kernel_objects(tmp_path, tools)
    counts = random_steps(driver("steps", objects, tmp_path, tools), steps=200, seed=1)
    assert counts["two_threads"] >= 50
    assert kinds_that_agree(driver("driver", objects, tmp_path, tools))[-1] == "portable"


ARM, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
ARM_FLAGS = {  # ASan's programs do not start there: fence.cpp watches the ends of memory
    "as users build them": (f"{WARNINGS} -O3 -static", str(SOURCES / "fence.cpp")),
    "sanitized": (f"{SANITIZED} -fsanitize=undefined -static", "-lubsan -lstdc++"),
}
CPUS = {"neoverse-n1": ["neon", "portable"], "cortex-a72": ["portable"]}
"""Kinds that each has: the older one lacks dot products of bytes."""


@pytest.mark.full
@pytest.mark.skipif(not (ARM and EMULATOR), reason="g++-aarch64-linux-gnu or qemu-user is missing")
@pytest.mark.parametrize("flags", ARM_FLAGS)
def test_arm(flags, tmp_path):
    def tools(cpu=""):
        return Tools(ARM, *ARM_FLAGS[flags], (EMULATOR, "-cpu", cpu))

    objects = kernel_objects(tmp_path, tools())
    for name in ("driver", "packed"):
        for cpu, kinds in CPUS.items():
            assert kinds_that_agree(driver(name, objects, tmp_path, tools(cpu))) == kinds
    if flags == "sanitized":
        program = driver("steps", objects, tmp_path, tools("neoverse-n1"))
        counts = random_steps(program, steps=400, seed=1)
        assert min(counts["neon"], counts["portable"], counts["compared"]) >= 100
