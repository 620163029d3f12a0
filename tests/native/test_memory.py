"""Memory of the kernels: what is left, huge pages under weights, and room for copies in them."""

from pathlib import Path

import pytest
import torch

from dart_llm import prune
from dart_llm.native import memory
from dart_llm.native.memory import LEAST, PAGE, into_huge_pages
from packed_cases import HUGE, mapped, packed


def test_values_and_addresses_stay():
    x = torch.arange(LEAST // 4, dtype=torch.float32)
    before, wanted = x.data_ptr(), x.clone()
    pages = into_huge_pages([x])
    assert 0 <= pages <= LEAST // PAGE + 1
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
    # files that lie in memory are dropped when it is needed
    (group / "memory.stat").write_text("anon 600\ninactive_file 300\nactive_file 50\n")
    for limit, wanted in (("max\n", 700 * 1024), ("5000\n", 4350), ("9000000\n", 700 * 1024)):
        (group / "memory.max").write_text(limit)
        assert memory.available() == wanted


@pytest.mark.usefixtures("native")
def test_the_speed_of_memory_is_not_that_of_a_cache(tmp_path, monkeypatch):
    def read(free):
        monkeypatch.setattr(memory, "available", lambda: free)
        memory._uncached.cache_clear()
        return memory._uncached().nbytes

    try:
        monkeypatch.setattr(memory, "CACHES", tmp_path)
        assert memory.largest_cache() == 0 and read(64 << 30) == memory.UNCACHED
        for level, size in enumerate(("48K", "2048K", "102400K")):
            (tmp_path / f"index{level}").mkdir()
            (tmp_path / f"index{level}" / "size").write_text(size + "\n")
        assert memory.largest_cache() == 100 << 20 and read(64 << 30) == 200 << 20
        assert read(1 << 30) == memory.UNCACHED  # too little memory for more
        assert memory.read_speed() > 1e8
    finally:
        memory._uncached.cache_clear()


@pytest.mark.skipif(not HUGE, reason="this system gives no huge pages")
@pytest.mark.usefixtures("native")
def test_weights_of_a_pruned_model_lie_in_them(smollm2):
    model, _ = smollm2
    size = sum(weight.nbytes for weight in model.parameters()) // 1024
    with prune(model, method="griffin", sparsity=0.5, executor="native"):
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (huge,) = (int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))
    assert huge > 0.8 * size


def room_for(size):
    return torch.classes.dart_llm.HugeRoom(size)


def taken(room, tiles, count):
    """A copy of ``count`` rows that lies in ``room``."""
    return torch.ops.dart_llm.packed_kept([tiles], None, torch.arange(count).int(), [], room)[0]


def spans(copy):
    return [(part.data_ptr(), part.data_ptr() + part.nbytes) for part in copy.parts()]


@pytest.fixture(scope="module")
def tiles(native):
    """4096 rows of 1024 weights: 2 MiB of levels, 256 KiB of scales."""
    return packed("q4_0", 4096, 1024, "tiles")[0]


def test_what_is_taken_lies_one_after_the_other_and_comes_back(tiles):
    for size, wanted in ((0, 0), (1, PAGE), (PAGE, PAGE), (3 * PAGE + 1, 4 * PAGE)):
        assert room_for(size).left() == wanted  # before anything is written
    room = room_for(8 * PAGE)
    first, second, third = (taken(room, tiles, count) for count in (1024, 160, 2048))
    places = [span for copy in (first, second, third) for span in spans(copy)]
    gaps = [begin - end for (_, end), (begin, _) in zip(places, places[1:], strict=False)]
    assert all(0 <= gap < 64 for gap in gaps) and places[0][0] % PAGE == 0
    used = sum(-(-(end - begin) // 64) * 64 for begin, end in places)
    assert room.left() == 8 * PAGE - used
    place = spans(second)[0]
    del second
    assert room.left() > 8 * PAGE - used
    again = taken(room, tiles, 160)  # where the one before lay
    assert spans(again)[0] == place and room.left() == 8 * PAGE - used
    del first, third, again
    assert room.left() == 8 * PAGE
    whole = taken(room, tiles, 4096)  # pieces that came back are one again
    assert spans(whole)[0][0] == places[0][0]


def test_a_room_grows_and_goes_with_the_last_that_lies_in_it(tiles):
    """Beyond what it was made for, and beyond the map that was added; in huge pages."""
    room, alone = room_for(PAGE), taken(room_for(0), tiles, 4096)
    copies = [taken(room, tiles, 4096) for _ in range(40)]
    places = sorted(span for copy in copies for span in spans(copy))
    assert all(end <= begin for (_, end), (begin, _) in zip(places, places[1:], strict=False))
    assert all(map(torch.equal, copies[-1].parts(), alone.parts()))
    room, copy = room_for(16 * PAGE), taken(room_for(16 * PAGE), tiles, 16)
    address = copy.parts()[0].data_ptr()
    assert mapped(address)["Size"] >= 16 * PAGE // 1024
    assert not HUGE or mapped(address)["AnonHugePages"] > 0.8 * 16 * PAGE // 1024
    del copy
    assert mapped(address).get("Size", 0) < 16 * PAGE // 1024
    assert room.left() == 16 * PAGE


@pytest.mark.usefixtures("native")
def test_packed_weights_share_a_room_of_which_maps_go_when_they_are_empty():
    def zeros(rows):
        return torch.ops.dart_llm.packed_zeros("q8_0", rows, 1024, "tiles")

    first, large = zeros(4096), zeros(80 << 10)  # the second needs a map of its own
    (begin, end), *_ = spans(large)
    assert not HUGE or mapped(begin)["AnonHugePages"] > 0.8 * (end - begin) // 1024
    del large
    assert mapped(begin) == {} and mapped(end - 1) == {}
    (place, _), *_ = spans(first)
    torch.ops.dart_llm.packed_round(first, 0, torch.ones(4096, 1024))
    assert all(part.any() for part in first.parts())
    other = zeros(16)  # so that the room stays
    del first
    again = zeros(4096)
    assert spans(again)[0][0] == place and not any(part.any() for part in again.parts())
    assert spans(other)[0][0] != place
