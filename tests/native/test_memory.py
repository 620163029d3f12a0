"""Weights in huge pages: where they lie and what they hold stays; a loaded model left its file."""

from pathlib import Path

import pytest
import torch

from dart_llm import prune
from dart_llm.native import memory
from dart_llm.native.memory import LEAST, PAGE, into_huge_pages
from maps import HUGE


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


def test_memory_that_is_left(tmp_path, monkeypatch):
    """The machine's, or what the limits of the control group leave."""
    group, of_machine = tmp_path / "group", tmp_path / "meminfo"
    monkeypatch.setattr(memory, "MEMORY", of_machine)
    monkeypatch.setattr(memory, "GROUP", group)
    assert memory.available() > 0  # of a system that has neither
    of_machine.write_text("MemTotal: 900 kB\nMemAvailable:  700 kB\n")
    assert memory.available() == 700 * 1024
    group.mkdir()
    (group / "memory.current").write_text("1000\n")
    for limit, wanted in (("max\n", 700 * 1024), ("5000\n", 4000), ("9000000\n", 700 * 1024)):
        (group / "memory.max").write_text(limit)
        assert memory.available() == wanted
    (group / "memory.max").write_text("5000\n")
    (group / "memory.stat").write_text("anon 600\ninactive_file 300\nactive_file 50\n")
    assert memory.available() == 4350  # files that lie in memory are dropped when it is needed


@pytest.mark.skipif(not HUGE, reason="this system gives no huge pages")
@pytest.mark.usefixtures("native")
def test_weights_of_a_pruned_model_lie_in_them(smollm2):
    model, _ = smollm2
    size = sum(one.nbytes for one in model.parameters()) // 1024
    with prune(model, method="griffin", sparsity=0.5, executor="native"):
        assert huge_kilobytes() > 0.8 * size
