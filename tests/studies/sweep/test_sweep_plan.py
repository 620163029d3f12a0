"""What ``--dry-run`` says: cells, downloads, disk and time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import sweep_fakes
from dart_llm.errors import LoadError, UnknownName
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.model_facts import ModelSize, model_size
from dart_llm.studies.sweep import study as sweep_plan
from dart_llm.studies.sweep.study import SweepPlace, flops, plan, plan_table, rough_tokens
from sweep_fakes import cells, quiet_sweep
from tiny_gpt2 import write_gpt2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_gpt2(folder / "model")
    sweep_fakes.write_text(folder)
    return folder


@pytest.fixture(autouse=True)
def _speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_plan, "flops", lambda: 1e9)


def test_before_and_after(base: Path, tmp_path: Path) -> None:
    place = SweepPlace(tmp_path / "results", "sweep")
    wanted = cells(base)
    before = plan(wanted, place)
    assert not place.root.exists()
    assert [row.status for row in before.rows] == 3 * ["to do"]
    weights = model_size(wanted[0]).weights
    assert weights is not None and 65_920 <= weights < 68_000  # and the file's header
    each = 2 * weights * 2 * (48 + 24) / 1e9 + 5
    assert before.seconds == pytest.approx(3 * each)
    assert before.rough and before.downloads == ()
    assert before.disk_bytes == 3 * 500_000
    assert plan(wanted, place, workers=2).seconds == pytest.approx(1.5 * each)
    quiet_sweep(wanted, place.root)
    after = plan(cells(base, sparsities=[0.25, 0.5, 0.75]), place)
    assert [row.status for row in after.rows] == [*3 * ["finished"], "to do"]
    assert [row.basis for row in after.rows] == ["", "", "", "measured"]
    assert not after.rough and after.seconds is not None and 0 < after.seconds < 5
    assert json.loads(json.dumps(after.to_dict()))["rows"][3]["label"] == "griffin@0.75"
    fresh = plan(wanted, SweepPlace(place.root, "sweep", fresh=True))
    assert [row.status for row in fresh.rows] == 3 * ["to do"]


def test_measured_time_grows_with_the_limit(base: Path, tmp_path: Path) -> None:
    place = SweepPlace(tmp_path, "sweep")
    quiet_sweep(cells(base), tmp_path)
    options = {"prompt_tokens": 48, "scored_tokens": 24}
    few, many = (
        plan(cells(base, options={**options, "limit": n}, seeds=1), place).seconds for n in (3, 30)
    )
    assert few is not None and many == pytest.approx(10 * few)


def test_sentences_and_table(base: Path, tmp_path: Path) -> None:
    found = plan(cells(base), SweepPlace(tmp_path, "sweep"))
    lines = found.sentences()
    assert lines[0] == "3 cells: 0 finished, 3 to do"
    assert lines[1] == "download: nothing"
    assert lines[-1] == "time: about 15 s, a rough guess for this machine as busy as it is"
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(plan_table(found))
    assert "perplexity:text.txt" in capture.get() and "~ 5.0 s" in capture.get()


def test_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sweep_plan, "model_size", lambda cell: SIZES[cell.model])
    tasks = ("perplexity:c4", "arc_easy", "summarize:xsum", "perplexity:embedded", "mine")
    wanted = [Cell(model, "dense", task) for model in SIZES for task in tasks]
    found = plan(wanted, SweepPlace(tmp_path, "sweep"))
    assert [(d.name, d.size) for d in found.downloads] == [
        ("a/large", 4_000_000),
        ("b/unknown", None),
        ("data set allenai/c4 (en, validation)", 41_000_000),
        ("data set allenai/ai2_arc (ARC-Easy, test)", 1_000_000),
        ("data set EdinburghNLP/xsum (test)", 338_000_000),
    ]
    assert found.seconds is None and "time: not known" in found.sentences()
    (tmp_path / "hub" / "datasets--allenai--c4").mkdir(parents=True)
    assert all("c4" not in d.name for d in plan(wanted, SweepPlace(tmp_path, "s")).downloads)


SIZES = {
    "a/large": ModelSize(4_000_000, 2_000_000),
    "b/unknown": ModelSize(None, None),
    "c/there": ModelSize(0, 1_000_000),
}


@pytest.mark.parametrize(
    ("task", "options", "tokens"),
    [
        ("perplexity:embedded", {"limit": 2}, 2 * 512),
        ("perplexity:embedded", {}, 100 * 512),
        ("summarize:xsum", {"limit": 1, "max_output": 10}, 1024 + 80),
        ("arc_easy", {"limit": 5, "num_fewshot": 4}, 5 * 400 * 5),
    ],
)
def test_rough_tokens(task: str, options: dict[str, Any], tokens: int) -> None:
    assert rough_tokens(Cell("m", "dense", task, options=MeasureOptions(**options))) == tokens


def test_a_matrix_product_is_measured() -> None:
    assert flops(0.01) > 1e6


def test_models_that_are_not_there() -> None:
    assert model_size(Cell("nobody/nothing", "dense", "x")) == ModelSize(None, None)
    with pytest.raises(LoadError, match="there is no file or folder"):
        model_size(Cell("./nothing", "dense", "x"))
    with pytest.raises(UnknownName, match="smollm2"):
        model_size(Cell("smolm2", "dense", "x"))
