"""The native kernels under ASan, UBSan and TSan, without torch."""

import os

import pytest

from sanitized import (
    COMPILER,
    THREADS,
    Tools,
    driver,
    kernel_objects,
    kinds_that_agree,
    random_steps,
)

pytestmark = pytest.mark.skipif(
    COMPILER is None and "CI" not in os.environ, reason="no C++ compiler is here"
)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return kernel_objects(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("name", ["driver", "packed"])
def test_kernels_touch_only_what_is_theirs_and_agree(name, objects, tmp_path):
    assert kinds_that_agree(driver(name, objects, tmp_path))[-1] == "portable"


def test_random_decode_steps(objects, tmp_path):
    """benchmarks/sanitized_steps.py makes many more."""
    counts = random_steps(driver("steps", objects, tmp_path), steps=400, seed=1)
    assert counts["steps"] >= 400 and counts["compared"] >= 200
    assert counts["portable"] >= 10 and min(counts.values()) >= 3
    assert counts["float32"] + counts["bfloat16"] == counts["steps"]


def test_threads_of_a_step_do_not_race(tmp_path):
    """Two and three threads in the same step, under ThreadSanitizer."""
    tools = Tools(flags=THREADS)
    objects = kernel_objects(tmp_path, tools)
    counts = random_steps(driver("steps", objects, tmp_path, tools), steps=200, seed=1)
    assert counts["two_threads"] >= 50
    assert kinds_that_agree(driver("driver", objects, tmp_path, tools))[-1] == "portable"
