"""The native kernels under ASan and UBSan, without torch."""

import os

import pytest

from sanitized import COMPILER, driver, kernel_objects, kinds_that_agree, random_steps

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
