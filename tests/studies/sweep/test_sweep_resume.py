"""A sweep that is killed at random and resumed writes the same bytes as one that is left alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sweep_fakes
from dart_llm.studies.sweep.cells import read_timing
from sweep_fakes import SLOW, cells, write_cells
from tiny_gpt2 import write_gpt2

KILLS = 3
TABLES = ("results.jsonl", "masks.safetensors", "cells.csv")


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """Run the sweep of ``folder`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, sweep_fakes.__file__, str(folder)],
        env={**os.environ, SLOW: str(seconds)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder: Path) -> Path:
    """Run to the end; returns the results folder."""
    process = start(folder, 0)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return Path(out.strip())


def finished(folder: Path) -> int:
    return len(list(folder.glob("results/sweep/*/cells/[!.]*/result.json")))


def kill_after(folder: Path, number: int, pause: float) -> None:
    """Kill the sweep ``pause`` seconds after it has ``number`` more finished cells."""
    before = finished(folder)
    process = start(folder, 0.2)
    end = time.monotonic() + 60
    while finished(folder) < before + number and time.monotonic() < end:
        assert process.poll() is None, "the sweep ended before it was killed"
        time.sleep(0.005)
    time.sleep(pause)
    process.kill()
    process.communicate(timeout=30)
    assert finished(folder) >= before + number


@pytest.mark.parametrize("seed", [3])
def test_killed_three_times_at_random(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    write_gpt2(tmp_path / "model")
    sweep_fakes.write_text(tmp_path)
    wanted = cells(
        tmp_path,
        methods=["dense", "griffin", "dart"],
        seeds=[0, 1],
        tasks=[f"perplexity:{tmp_path / 'text.txt'}"],
        sparsities=[0.25, 0.5],
        overrides={"drift": "interval 8", "min_evidence": 4},
        protocols=["decode"],
    )
    wanted = (*wanted, *cells(tmp_path, tasks=["perplexity:embedded"])[:2])
    assert len(wanted) == 12
    folders = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        write_cells(folder, wanted)
        folders.append(folder)
    whole = finish(folders[0])
    for _ in range(KILLS):
        kill_after(folders[1], chance.randint(1, 2), chance.uniform(0, 0.25))
    assert KILLS <= finished(folders[1]) < len(wanted)
    times = {cell.key: read_timing(_only(folders[1]) / "cells" / cell.key) for cell in wanted}
    killed = finish(folders[1])
    assert killed == _only(folders[1])
    for name in TABLES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    rows = [json.loads(line) for line in (killed / "results.jsonl").open(encoding="utf-8")]
    assert [row["key"] for row in rows] == [cell.key for cell in wanted]
    assert {row["status"] for row in rows} == {"done"}
    for cell in wanted:  # what was finished was not computed again
        after = read_timing(killed / "cells" / cell.key)
        assert times[cell.key] in ({}, after)
    processes = {read_timing(killed / "cells" / cell.key)["process"] for cell in wanted}
    assert len(processes) == KILLS + 1


def _only(folder: Path) -> Path:
    (found,) = (folder / "results" / "sweep").iterdir()
    return found
