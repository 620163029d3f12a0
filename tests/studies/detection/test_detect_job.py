"""``dart-llm detect``: lines, document, tables and plots; its folder: tests/experiments."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dart_llm.cli.app import app
from dart_llm.data.passages import tokens
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments.study import run_study
from dart_llm.files import write_lines
from dart_llm.models.capture import layer_count
from dart_llm.reporting import figures as plots
from dart_llm.reporting.console import Ui
from dart_llm.settings import merge
from dart_llm.studies.detection import report as detection_plot
from dart_llm.studies.detection.replay import outcome, rates, to_dict
from dart_llm.studies.detection.settings import DetectSettings
from dart_llm.studies.detection.signals import SIGNALS
from dart_llm.studies.detection.study import DetectionStudy, plan, read_passage
from detect_cases import folder, passage


def settings(root: Path, **more: Any) -> DetectSettings:
    file = root / "passages.jsonl"
    write_lines(file, [passage(number).to_dict() for number in (1, 2, 3)])
    given = {
        "model": str(folder()),
        "passages": str(file),
        "results_dir": str(root / "results"),
        "device": "cpu",
        "prompt_tokens": 120,
        "horizon": 60,
        "thresholds": "0,2",
        "counts": "1,2",
    }
    return merge(DetectSettings, {**given, **more}, environment={})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> DetectionStudy:
    return run_study(DetectionStudy(settings(tmp_path_factory.mktemp("whole")), Ui(quiet=True)))


# the job


def test_the_model_runs_dense_with_eager_attention_for_its_weights(job: DetectionStudy) -> None:
    config = read(job.path / "config.json")
    assert config["prune"]["method"] == "dense" and "sparsity" not in config["settings"]
    assert job.model.config._attn_implementation == "eager"
    assert "eager attention, for all signals" in job.ui.log[0]


def test_a_line_is_the_study_of_a_passage(job: DetectionStudy) -> None:
    found = lines(job.path / "results.jsonl")
    assert [line["key"] for line in found] == ["p1", "p2", "p3"]
    text = tokens(passage(2), job.tokenizer)
    again = read_passage(job.model, text, plan(job.settings))
    assert found[1] == json.loads(json.dumps(again))
    assert found[1]["passage"]["changes"] == list(text.changes)
    keys = [(rule["signal"], rule["rule"]) for rule in found[0]["rules"]]
    windowed = [(s, r) for r in ("dart", "paper", "published") for s in SIGNALS]
    assert keys == [*windowed, ("none", "interval 64"), *((s, "dart-prompt") for s in SIGNALS)]


def test_detection_json_pools_the_lines(job: DetectionStudy) -> None:
    found, rows = read(job.path / "detection.json"), lines(job.path / "results.jsonl")
    assert list(found)[:4] == ["schema", "rows", "curves", "signals"]
    for place, row in enumerate(found["rows"]):
        outcomes = [
            outcome(
                line["rules"][place]["triggers"],
                line["passage"]["changes"],
                120,
                line["passage"]["tokens"],
                60,
            )
            for line in rows
        ]
        want = json.loads(json.dumps(to_dict(rates(outcomes))))
        assert {name: row[name] for name in want} == want
        assert row["changes"] == 3 and set(row) - set(want) == {"signal", "rule"}
    blind = next(row for row in found["rows"] if row["rule"] == "interval 64")
    assert blind["signal"] == "none" and blind["alarms"] > 0
    curves = found["curves"]
    assert [(c["signal"], c["n0"]) for c in curves] == [(s, n) for s in SIGNALS for n in (1, 2)]
    assert all([p["k"] for p in curve["points"]] == [0, 2] for curve in curves)
    for curve in curves:  # a lower threshold never gives more alarms at n0 = 1
        many, few = (point["alarms_per_1000"] for point in curve["points"])
        assert few <= many or curve["n0"] > 1
    assert [s["layers"] for s in found["signals"]] == [[3], [2], [2, 3], [], [3]]
    assert all(0 <= signal["auc"] <= 1 for signal in found["signals"])
    assert found["checkpoint"]["dtype"] and found["settings"]["inputs"]["passages"]
    assert found["notes"] and found["definitions"]["blind_rate"]
    assert job.answer()["rows"] == json.loads(json.dumps(found["rows"]))


def test_tables_show_the_rows(job: DetectionStudy) -> None:
    found = read(job.path / "detection.json")
    with (job.path / "detection.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(found["rows"]) == 21
    for row, record in zip(found["rows"], table, strict=True):
        assert record["rule"] == row["rule"]
        assert float(record["rate"]) == row["rate"]
        assert float(record["gain_interval.high"]) == row["gain_interval"][1]
    text = (job.path / "detection.md").read_text(encoding="utf-8")
    assert text.count("\n| attention-scores | ") == 4 + 1 + 4  # rules, signal, curves
    assert "3 changes in 3 passages, prompt 120 tokens, horizon 60 tokens" in text
    assert "Largest gain over a blind rule" in text


def test_the_plot_shows_the_points(job: DetectionStudy) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    found = read(job.path / "detection.json")
    (plot,) = detection_plot.make_curves(found)
    for narrow in (False, True):
        figure = Figure()
        with plots._style() as palette:
            plot.draw(figure, palette, narrow)
        panels = figure.axes[1:]
        assert len(panels) == 4
        labels = [axes.get_ylabel().partition(" (")[0] for axes in panels]
        named = ["changes detected", "mean delay"]
        # wide: only the left panels of each row are named
        assert labels == (named * 2 if narrow else [named[0], "", named[1], ""])
        for axes in panels:
            curves = {line.get_label(): line for line in axes.lines}
            assert set(curves) == {*SIGNALS, detection_plot.BLIND}
    first = next(axes for axes in panels if axes.get_ylabel().startswith("changes"))
    line = next(line for line in first.lines if line.get_label() == "hidden")
    (curve,) = (c for c in found["curves"] if (c["signal"], c["n0"]) == ("hidden", 1))
    want = sorted((p["false_alarms_per_1000"], 100 * p["rate"]) for p in curve["points"])
    found_points = sorted(zip(*line.get_data(), strict=True))
    for point, expected in zip(found_points, want, strict=True):
        assert point == pytest.approx(expected)


def test_blind_line_by_hand() -> None:
    assert detection_plot.blind_rules("rate", 0.005, 128) == pytest.approx(0.64)
    assert detection_plot.blind_rules("rate", 0.05, 128) == 1.0
    assert detection_plot.blind_rules("delay_with_misses", 0.0, 128) == 128
    assert detection_plot.blind_rules("delay_with_misses", 1 / 128, 128) == pytest.approx(64)
    assert detection_plot.blind_rules("delay_with_misses", 0.02, 128) == pytest.approx(25)


def test_without_the_scores_attention_is_as_asked(tmp_path: Path) -> None:
    asked = settings(
        tmp_path, signals="attention", attn_implementation="sdpa", limit=1, windows="5,10"
    )
    done = run_study(DetectionStudy(asked, Ui(quiet=True)))
    assert done.model.config._attn_implementation == "sdpa"
    assert "notes" not in done.summary
    assert [len(done.summary[name]) for name in ("rows", "curves", "passages")] == [5, 4, 1]
    assert [plot.name for plot in detection_plot.make_curves(done.summary)] == [
        "detection",
        "detection-w10",
    ]
    assert done.summary["rows"][0]["rate_interval"] is None
    assert layer_count(done.model) == 4


def test_a_prompt_beyond_the_change_fails_before_any_forward(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='first change of passage "p1"'):
        run_study(DetectionStudy(settings(tmp_path, prompt_tokens=400), Ui(quiet=True)))
    (left,) = (tmp_path / "results").glob("*/*")
    assert read(left / "config.json")["status"] == "failed"


# the command


def test_help_has_the_flags_and_examples() -> None:
    done = CliRunner().invoke(app, ["detect", "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    for words in ("--signals", "--horizon", "--passages", "dart-llm detect --signals attention"):
        assert words in done.output
    assert "--sparsity" not in done.output and "--method" not in done.output


def test_an_unknown_name_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UnknownName):
        run_study(DetectionStudy(settings(tmp_path, rules="papr"), Ui(quiet=True)))
    assert not (tmp_path / "results").exists()
