"""``dart-llm bench quality``: settings, variants, files, resuming, the command."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from dart_llm.errors import ConfigError
from dart_llm.experiments.index import read_info
from dart_llm.pruning.registry import METHODS
from dart_llm.reporting import figures as plots
from dart_llm.studies.quality import report as quality_plot
from dart_llm.studies.quality.study import QualityStudy
from lm_cases import call, place
from quality_cases import PROMPT, TOKENS, job, write_texts
from shells import ROOT
from stopping import Stopping


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> QualityStudy:
    return job(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "save", lambda folder, wanted: [])


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("benchmarks", "scripts"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


# the job


def test_every_file_is_written(whole: QualityStudy) -> None:
    names = {path.name for path in whole.path.iterdir()}
    stamp = whole.path.name
    assert {
        *("config.json", "results.jsonl", "quality.json", "quality.md", "quality.csv", "plots"),
        *("timing.json", f"output_{stamp}.log", f"timing_{stamp}.log"),
    } == names
    config = read(whole.path / "config.json")
    assert (config["kind"], config["status"]) == ("quality", "complete")
    assert config["checkpoint"]["dtype"] == "float32"
    assert config["settings"]["presets"]["dart"] == METHODS.get("dart").to_dict()
    assert set(config["settings"]["inputs"]["texts"]) == {"bees", "loans"}
    assert len(config["settings"]["inputs"]["model"]["model"]) == 64
    assert (whole.path / "plots" / "quality.png").stat().st_size > 10_000
    timing = read(whole.path / "timing.json")
    assert set(timing["variants_s"]) == {
        f"model, {label}" for label in ("dense", "griffin", "dart", "dart (oracle)")
    }


def test_every_measurement_is_one_line_and_made_once(whole: QualityStudy) -> None:
    rows = lines(whole.path / "results.jsonl")
    keys = [(r["model"], r["cell"], r["variant"], r["sparsity"], r["slice"]) for r in rows]
    assert len(set(keys)) == len(keys)
    slices = ["bees/0", "bees/1", "loans/0", "loans/1"]
    by_place: dict[Any, list[str]] = {}
    for _, cell, variant, sparsity, name in keys:
        by_place.setdefault((cell, variant, sparsity), []).append(name)
    assert all(names == slices for names in by_place.values())
    assert {(cell, variant) for cell, variant, _ in by_place} == {
        *((cell, label) for cell in ("continuation", "topic-shift")
          for label in ("dense", "griffin", "dart")),
        ("topic-shift", "dart (oracle)"),
    }  # fmt: skip
    assert all(row["tokens"] == TOKENS for row in rows)


def test_rows_follow_from_the_lines(whole: QualityStudy) -> None:
    """Recomputed from results.jsonl without the code that made them."""
    found, rows = read(whole.path / "quality.json"), lines(whole.path / "results.jsonl")

    def loss(cell: str, variant: str, sparsity: float) -> float:
        own = [
            r["loss"]
            for r in rows
            if (r["cell"], r["variant"], r["sparsity"]) == (cell, variant, sparsity)
        ]
        assert len(own) == 4
        return sum(own) / 4

    compared = 0
    for row in found["cells"]:
        cell, dense = row["cell"], loss(row["cell"], "dense", 0.0)
        own = loss(cell, row["variant"], row["sparsity"])
        assert row["gap"] == pytest.approx(own - dense)
        assert row["perplexity"] == pytest.approx(math.exp(own))
        for column in ("equal_sparsity", "equal_bytes"):
            if row["variant"] == "griffin":
                assert row[column] is None
                continue
            at = row[column]["sparsity"]
            wanted = row["achieved_sparsity"] if column == "equal_sparsity" else (
                1 - row["ffn_bytes_share"])  # fmt: skip
            # low-rank maps weigh more than the FFN of this tiny model: then dense is as cheap
            assert at == max(0.0, round(wanted, 3))
            griffin = loss(cell, "griffin" if at else "dense", at) - dense
            assert row[column]["griffin_gap"] == pytest.approx(griffin)
            if griffin > 0:
                assert row[column]["gap_closed"] == pytest.approx(1 - (own - dense) / griffin)
                compared += 1
            else:
                assert row[column]["gap_closed"] is None
    assert compared >= 5  # of 12: griffin is no worse than dense elsewhere, or dense itself
    for row in found["pooled"]:
        cells = [
            one
            for one in found["cells"]
            if (one["cell"], one["variant"]) == (row["cell"], row["variant"])
        ]
        assert [one["sparsity"] for one in cells] == row["sparsities"] == [0.5, 0.7]
        for column in ("equal_sparsity", "equal_bytes"):
            gaps = sum(one["gap"] for one in cells)
            griffin = sum(one[column]["griffin_gap"] for one in cells)
            wanted = 1 - gaps / griffin if griffin > 0 else None
            assert row[column]["gap_closed"] == (wanted and pytest.approx(wanted))
    assert len(found["pooled"]) == 3 and found["slices"] == {"model": 4}


@pytest.mark.contract("resume gives the same bytes")
@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("after", [1, 61])
def test_an_interrupted_job_resumes_to_the_same_bytes(
    whole: QualityStudy, tmp_path: Path, after: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, Stopping(after))
    (left,) = (tmp_path / "results").glob("*/*")
    assert read(left / "config.json")["status"] == "interrupted"
    kept = len(lines(left / "parts.jsonl"))
    assert kept >= after == len(lines(left / "results.jsonl"))
    again = job(tmp_path)
    assert (again.path, again.folder.resumed) == (left, True)
    assert not (left / "parts.jsonl").exists()
    for name in ("results.jsonl", "quality.json", "quality.md", "quality.csv"):
        mine, other = (root / name for root in (left, whole.path))
        paths = (str(tmp_path), str(whole.path.parents[2]))
        assert mine.read_text().replace(paths[0], "") == other.read_text().replace(paths[1], "")


@pytest.mark.usefixtures("no_plots")
def test_another_preset_or_text_is_another_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, Stopping(3))
    variants = tmp_path / "v.yaml"
    variants.write_text("plain: {compensation: false}\n", encoding="utf-8")
    asked = {"cells": "continuation", "sparsities": "0.5", "slices": 1, "oracle": "none"}
    one = job(tmp_path, variants=str(variants), **asked)
    assert not one.folder.resumed
    variants.write_text("plain: {compensation: true}\n", encoding="utf-8")
    two = job(tmp_path, variants=str(variants), **asked)
    assert one.identity != two.identity
    rows = {row["variant"]: row for row in two.summary["cells"]}
    assert list(rows) == ["griffin", "dart", "plain"]
    assert rows["plain"]["perplexity"] == rows["dart"]["perplexity"]  # the preset compensates
    other = {row["variant"]: row for row in one.summary["cells"]}
    assert other["plain"]["perplexity"] != other["dart"]["perplexity"]
    assert two.summary["pool"] == [0.5]


@pytest.mark.usefixtures("no_plots")
def test_two_models_have_rows_of_their_own_and_common_ones(tmp_path: Path) -> None:
    models = [str(place() / name) for name in ("model", "chatty")]
    asked = {"cells": "continuation", "sparsities": "0.5", "slices": 1}
    done = job(tmp_path, model=models, **asked)
    assert [row["model"] for row in done.summary["pooled"]] == ["model", "chatty", "all models"]
    config = read(done.path / "config.json")
    assert config["checkpoint"] is None and list(config["checkpoints"]) == ["model", "chatty"]
    info = read_info(done.path, tmp_path / "results")
    assert (info.kind, info.status, info.models) == ("quality", "complete", ("model", "chatty"))
    assert info.tasks == ("quality:continuation",) and info.problems == ()
    first, second, both = (row["equal_sparsity"] for row in done.summary["pooled"])
    assert both["gap"] == pytest.approx(first["gap"] + second["gap"])


def test_the_plot_shows_the_gaps(whole: QualityStudy) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    (plot,) = quality_plot.make(whole.summary)
    for narrow in (False, True):
        figure = Figure()
        with plots._style() as palette:
            plot.draw(figure, palette, narrow)
        panels = figure.axes[1:]
        assert len(panels) == 2
        names = [label.get_text() for label in panels[1].get_yticklabels()]
        assert names[:2] == ["dart, 50 %", "dart (oracle), 50 %"] and names[-1].endswith("pooled")
        containers = panels[1].containers
        x = [float(value) for box in containers for value in box.lines[0].get_xdata()]
        rows = [r for r in (*whole.summary["cells"], *whole.summary["pooled"])
                if r["cell"] == "topic-shift" and r["equal_sparsity"]]  # fmt: skip
        known = [
            100 * row[column]["gap_closed"]
            for column in ("equal_sparsity", "equal_bytes")
            for row in rows
            if row[column]["gap_closed"] is not None
        ]
        assert sorted(x) == pytest.approx(sorted(known))
    alone = [row for row in whole.summary["cells"] if row["variant"] == "griffin"]
    assert quality_plot.make({**whole.summary, "pooled": [], "cells": alone}) == []


@pytest.mark.usefixtures("beside")
def test_slices_longer_than_the_context_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("\n\n".join(["a" * 1200, "b" * 1200]), encoding="utf-8")
    with pytest.raises(ConfigError, match="of up to 1104 tokens are longer than the context of"):
        job(tmp_path, prompt_tokens=1000, slices=1, text=[str(text)], cells="continuation")
    (left,) = (tmp_path / "results").glob("*/*")
    assert read(left / "config.json")["status"] == "failed"
    with pytest.raises(SystemExit, match="is no finished run"):
        importlib.import_module("keep").gather_quality([left])


# the command


def test_the_command_speaks_json(tmp_path: Path) -> None:
    text, rows = write_texts(tmp_path)
    fixed = ["bench", "quality", "--model", place() / "model", "--device", "cpu", "--json"]
    fixed += ["--results-dir", tmp_path / "results", "--dtype", "float32"]
    fixed += ["--prompt-tokens", PROMPT, "--tokens", TOKENS, "--slices", 1, "--sparsities", "0.5"]
    done = call(*fixed, "--text", text, "--text", f"{rows}:text", "--cells", "continuation")
    assert (done.code, done.err) == (0, "")
    assert done.out.count("\n") == 1
    found = done.json
    assert [one["label"] for one in found["texts"]] == ["bees", "loans:text"]
    assert [row["variant"] for row in found["cells"]] == ["griffin", "dart"]
    assert found["versions"]["torch"] and found["checkpoints"]["model"]["sha256"]
    kept = read(Path(found["folder"], "quality.json"))
    assert {name: found[name] for name in kept} == kept and found["timing"]["total_s"] > 0
    bad = call(*fixed, "--text", text, "--slices", 90)
    assert (bad.code, bad.out) == (2, "")
    assert bad.err.startswith('ConfigError: the text "bees" has 8 slices of 134 tokens in its set')
    assert len(bad.err.splitlines()) == 1


# what is kept of it


@pytest.mark.usefixtures("beside")
def test_a_run_is_kept_and_shown(whole: QualityStudy, tmp_path: Path) -> None:
    keeper = importlib.import_module("keep")
    kept = keeper.gather_quality([whole.path])
    assert kept["cells"] == read(whole.path / "quality.json")["cells"]
    assert "path" not in kept["checkpoints"]["model"] and str(tmp_path) not in json.dumps(kept)
    lines = keeper.quality_items(keeper.lines(whole.path))
    assert all(set(line) == {"model", "cell", "variant", "sparsity", "losses"} for line in lines)
    with pytest.raises(SystemExit, match="the runs share a model"):
        keeper.gather_quality([whole.path, whole.path])
