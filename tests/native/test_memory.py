"""Weights in huge pages: where they lie and what they hold stays; a loaded model left its file."""

import sys
from pathlib import Path

import pytest
import torch

from dart_llm import prune
from dart_llm.native.memory import LEAST, PAGE, into_huge_pages

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_kilobytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


def test_values_and_addresses_stay():
    x = torch.arange(LEAST // 4, dtype=torch.float32)
    before, wanted = x.data_ptr(), x.clone()
    given = into_huge_pages([x])
    assert 0 <= given <= LEAST // PAGE + 1
    assert x.data_ptr() == before and torch.equal(x, wanted)
    assert into_huge_pages([x[:100]]) == 0  # too little to be worth it


@pytest.mark.skipif(
    sys.platform != "linux" or not SWITCH.is_file() or "[never]" in SWITCH.read_text(),
    reason="this system gives no huge pages",
)
@pytest.mark.usefixtures("native")
def test_weights_of_a_pruned_model_lie_in_them(smollm2):
    model, _ = smollm2
    size = sum(one.nbytes for one in model.parameters()) // 1024
    with prune(model, method="griffin", sparsity=0.5, executor="slim"):
        assert huge_kilobytes() > 0.8 * size
