"""The job of ``dart-llm drift``: its folder, resuming, failed cells, sentences for bad input."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from dart_llm.evaluation.perplexity import score_window
from dart_llm.evaluation.windows import Window
from dart_llm.experiments import index as drift_rows
from dart_llm.experiments.comparison import read_row
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting.console import Ui
from dart_llm.session.run import Run
from dart_llm.studies.drift import losses as drift_losses
from drift_cases import (
    PROMPT,
    THREE,
    TWO,
    draw_nothing,
    forced,
    free,
    lines,
    load_json,
    results,
    study,
)
from lm_cases import loaded
from stopping import Stopping

METHODS = "never,interval:40,dart@0.3,fresh:4,decay:8"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures have tests of their own."""
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished forced study."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        return study(forced(folder, methods=METHODS, remask_at_change=20))


def test_every_cell_is_a_row_in_grid_order(whole: Any) -> None:
    labels = ["dense", "never@0.5", "interval:40@0.5", "dart@0.3", "fresh:4@0.5", "decay:8@0.5"]
    rows = lines(whole.path / "results.jsonl")
    assert [row["key"] for row in rows] == [
        f"forced/{source}/{label}/0" for source in ("two", "three") for label in labels
    ]
    for row in rows:
        assert (row["status"], row["error"], row["finish"]) == ("done", None, "end")
        assert row["metrics"] is None and row["prompt_tokens"] == PROMPT
        assert row["cell"]["dtype"] == "float32" and row["cell"]["mode"] == "forced"
    assert rows[2]["cell"]["method"] == "interval:40" and rows[3]["cell"]["sparsity"] == 0.3
    assert rows[0]["accounting"] is None and rows[0]["cell"]["sparsity"] == 0.0
    assert [t["start"] for t in rows[-1]["topics"]] == [0, *(c - PROMPT for c in THREE["changes"])]
    config = load_json(whole.path / "config.json")
    assert (config["kind"], config["status"], config["mode"]) == ("drift", "complete", "forced")
    assert len(config["cells"]) == 12 and config["sources"][0]["text"] == TWO["text"]
    assert not (whole.path / "parts.jsonl").exists() and not (whole.path / "texts.jsonl").exists()


def test_a_row_is_what_a_run_of_the_library_gives(whole: Any) -> None:
    model, tokenizer = loaded()
    ids = tokenizer(TWO["text"], return_tensors="pt").input_ids[0]
    row = results(whole)["forced/two/interval:40@0.5/0"]
    changes = {"rule": "interval 40", "min_distance": 0, "max_dense_share": None}
    with Run(model, PruneConfig.build("dart", sparsity=0.5, drift=changes)) as run:
        scored = score_window(model, run, Window(ids, PROMPT + 1))
        report = run.report()
    assert [mask["step"] for mask in row["remasks"]] == [
        r.step for r in report.sequences[0].remasks
    ]
    assert row["accounting"]["achieved_sparsity"] == pytest.approx(report.achieved_sparsity)
    assert row["accounting"]["method"] == "interval:40"
    (start,) = (change - PROMPT for change in TWO["changes"])
    after = scored.losses[start - 1 :]  # the first token after the prompt has no loss
    topic = row["loss"]["topics"][1]
    assert (topic["start"], topic["tokens"]) == (start, len(after))
    assert topic["mean_loss"] == pytest.approx(sum(after) / len(after), abs=1e-6)
    assert topic["first"][1] == pytest.approx(sum(after[16:32]) / 16, abs=1e-6)
    assert topic["later"]["mean_loss"] == pytest.approx(sum(after[20:]) / len(after[20:]), abs=1e-6)
    tokens = {one["key"]: one for one in lines(whole.path / "tokens.jsonl")}
    own, dense = (tokens[f"forced/two/{m}/0"]["losses"] for m in ("interval:40@0.5", "dense"))
    assert own[1:] == pytest.approx(list(scored.losses), abs=1e-6)
    assert row["loss"]["recovery"] == drift_losses.recovery(own, dense, [0, start])
    assert "".join(tokens[row["key"]]["pieces"]) == TWO["text"][PROMPT:]
    assert row["decoded_tokens"] == len(own) == row["accounting"]["decoded_tokens"] + 1


def test_masks_and_windows_have_files(whole: Any) -> None:
    rows = results(whole)
    names = {path.name for path in (whole.path / "masks").iterdir()}
    pruned = [row for row in rows.values() if row["accounting"]]
    assert names == {f"{row['key'].replace('/', '-')}.safetensors" for row in pruned}
    row = rows["forced/three/fresh:4@0.5/0"]
    with safe_open(whole.path / "masks" / "forced-three-fresh:4@0.5-0.safetensors", "pt") as file:
        assert file.metadata()["method"] == "fresh:4@0.5"
        for number, mask in enumerate(row["remasks"]):
            kept = [len(file.get_tensor(f"remask{number}.layer{k}.ids")) for k in range(4)]
            assert kept == mask["kept"] and min(kept) > 0
    assert [mask["cause"] for mask in row["remasks"]] == ["first", "forced", "forced"]
    csv = (whole.path / "drift.csv").read_text(encoding="utf-8").splitlines()
    assert csv[0].startswith("key,sequence,row,step,layer,window,similarity,threshold")
    assert len(csv) - 1 == sum(len(row["checks"]) for row in rows.values()) > 0
    assert csv[1].startswith("forced/two/dart@0.3/0,0,0,10,3,1,")


def test_the_summary_follows_from_the_rows(whole: Any) -> None:
    rows = results(whole)
    summary = load_json(whole.path / "summary.json")
    found = {line["label"]: line for line in summary["rows"]}
    own = [rows[f"forced/{source}/never@0.5/0"] for source in ("two", "three")]
    topics = [topic for row in own for topic in row["loss"]["topics"][1:]]
    tokens = sum(topic["tokens"] for topic in topics)
    mean = math.fsum(topic["tokens"] * topic["mean_loss"] for topic in topics) / tokens
    line = found["never@0.5"]
    assert line["loss"]["after"]["mean"] == pytest.approx(mean, abs=1e-9)
    assert line["loss"]["after"]["n"] == 2 and line["loss"]["recovery"]["changes"] == 3
    gap = line["loss"]["after"]["mean"] - found["dense"]["loss"]["after"]["mean"]
    assert line["loss"]["after_minus_dense"]["mean"] == pytest.approx(gap, abs=1e-9)
    assert line["loss"]["after_minus_never"]["mean"] == 0.0
    assert found["dart@0.3"]["loss"]["after_minus_never"] is None  # no never at that sparsity
    assert found["dense"]["achieved_sparsity"] == 0.0 and found["dense"]["dense_token_share"] == 1.0
    weights = [row["accounting"]["decoded_tokens"] for row in own]
    achieved = [row["accounting"]["achieved_sparsity"] for row in own]
    assert line["achieved_sparsity"] == pytest.approx(
        sum(w * a for w, a in zip(weights, achieved, strict=True)) / sum(weights)
    )
    assert found["fresh:4@0.5"]["remasks"] == 3 and found["fresh:4@0.5"]["remasks_per_cell"] == 1.5
    assert found["fresh:4@0.5"]["loss"]["from"] == 20
    markdown = (whole.path / "summary.md").read_text(encoding="utf-8")
    assert "| never@0.5 |" in markdown and "| from token 20 minus never |" in markdown
    header, *csv = (whole.path / "summary.csv").read_text(encoding="utf-8").splitlines()
    assert "loss.after_minus_never.low" in header.split(",") and len(csv) == 6
    assert whole.answer()["rows"][0]["label"] == "dense"


def test_times_are_told_by_phase_method_and_cell(whole: Any) -> None:
    timing = load_json(whole.path / "timing.json")
    assert set(timing["cells"]) == set(results(whole))
    assert timing["phases_s"]["cells"] == pytest.approx(sum(timing["cells"].values()))
    assert sum(timing["methods_s"].values()) == pytest.approx(timing["phases_s"]["cells"])
    assert all(seconds > 0 for seconds in timing["cells"].values())
    assert timing["phases_s"]["load"] > 0 and timing["total_s"] > timing["phases_s"]["cells"]


def test_a_cell_whose_masks_were_lost_is_computed_again(tmp_path: Path) -> None:
    asked = forced(tmp_path, methods="never", limit=1)
    with pytest.raises(KeyboardInterrupt):
        study(asked, Stopping(2))
    (path,) = (tmp_path / "results").rglob("*.safetensors")
    path.unlink()
    job = study(asked)
    assert path.exists() and list(results(job)) == ["forced/two/dense/0", "forced/two/never@0.5/0"]


def test_seeds_are_averaged_within_a_source(tmp_path: Path) -> None:
    job = study(forced(tmp_path, methods="random", seeds="0,1", limit=1, min_evidence=None))
    rows = results(job)
    one, two = (rows[f"forced/two/random@0.5/{seed}"]["loss"]["topics"][1] for seed in (0, 1))
    assert one["mean_loss"] != two["mean_loss"]
    line = load_json(job.path / "summary.json")["rows"][1]
    assert (line["cells"], line["sources"], line["loss"]["after"]["n"]) == (2, 1, 1)
    both = (one["mean_loss"] + two["mean_loss"]) / 2
    assert line["loss"]["after"]["mean"] == pytest.approx(both)
    assert line["loss"]["after"]["low"] is None  # one source says nothing of the spread


def test_quantised_and_calibrated_presets_stand_beside_dart(tmp_path: Path) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("".join(f"the tide number {n * n} goes out by {n}. " for n in range(60)))
    asked = forced(
        tmp_path,
        methods="dense-8bit,wanda",
        limit=1,
        calibration=str(text),
        cache_dir=str(tmp_path / "cache"),
    )
    rows = results(study(asked))
    assert list(rows) == [f"forced/two/{m}/0" for m in ("dense", "dense-8bit", "wanda@0.5")]
    own = rows["forced/two/wanda@0.5/0"]
    assert own["accounting"]["achieved_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert own["remasks"][0]["cause"] == "given"
    eight, dense = (rows[f"forced/two/{m}/0"] for m in ("dense-8bit", "dense"))
    assert eight["accounting"] is None
    gap = eight["loss"]["topics"][1]["mean_loss"] - dense["loss"]["topics"][1]["mean_loss"]
    assert 0 < abs(gap) < 0.1


def test_progress_is_said_where_there_is_no_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dart_llm.reporting.console.EVERY", 0.0)
    ui = Ui(quiet=True)
    study(forced(tmp_path, methods="never", limit=1), ui)
    said = [line for line in ui.log if " cells, about " in line]
    assert len(said) == 1 and re.fullmatch(r"1 of 2 cells, about \d+ (s|min) left", said[0])


def test_a_study_is_listed_by_its_summary(whole: Any, tmp_path: Path) -> None:
    summary = load_json(whole.path / "summary.json")
    found = [read_row(cell) for cell in drift_rows.cells(summary)]
    assert [row.label for row in found] == [line["label"] for line in summary["rows"]]
    never = found[1]
    assert (never.task, never.metric, never.status) == ("drift:forced", "loss_after", "done")
    assert never.value == summary["rows"][1]["loss"]["after"]["mean"]
    assert not never.higher_is_better and never.achieved == pytest.approx(0.5, abs=0.01)
    job = study(free(tmp_path, methods="never", limit=1))
    summary = load_json(job.path / "summary.json")
    assert [(r.metric, r.value) for r in map(read_row, drift_rows.cells(summary))] == [
        ("tokens", 40.0)
    ] * 2
    summary["rows"][1]["metrics"] = {"rougeL": {"mean": 0.25}}
    (_, row) = map(read_row, drift_rows.cells(summary))
    assert (row.metric, row.value, row.higher_is_better) == ("rougeL", 0.25, True)
    summary["rows"][1] |= {"cells": 0, "failed": 1, "mean_tokens": None, "metrics": None}
    (_, row) = map(read_row, drift_rows.cells(summary))
    assert (row.status, row.error) == ("failed", "all 1 cells failed: results.jsonl says why")
    assert list(drift_rows.cells({})) == []
