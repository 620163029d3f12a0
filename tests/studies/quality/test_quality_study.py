"""``dart-llm bench quality``: settings, variants, files, resuming, the command."""

import importlib
import json
from pathlib import Path

import pytest

from dart_llm.errors import ConfigError
from dart_llm.experiments.index import read_info
from dart_llm.pruning.registry import METHODS
from dart_llm.reporting import figures
from dart_llm.studies.quality import report
from lm_cases import call, place
from quality_cases import PROMPT, TOKENS, job, write_texts
from shells import ROOT


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return job(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(figures, "save", lambda folder, wanted: [])


@pytest.fixture
def beside(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_every_measurement_is_one_line_and_made_once(whole):
    config, rows = read(whole.path / "config.json"), lines(whole.path / "results.jsonl")
    assert config["settings"]["presets"]["dart"] == METHODS.get("dart").to_dict()
    assert set(config["settings"]["inputs"]["texts"]) == {"bees", "loans"}
    assert len(config["settings"]["inputs"]["model"]["model"]) == 64
    labels = ("dense", "griffin", "dart", "dart (oracle)")
    timing = read(whole.path / "timing.json")
    assert set(timing["variants_s"]) == {f"model, {label}" for label in labels}
    by_place = {}
    for row in rows:
        place = row["cell"], row["variant"], row["sparsity"]
        by_place.setdefault(place, []).append(row["slice"])
        assert (row["model"], row["tokens"]) == ("model", TOKENS)
    slices = ["bees/0", "bees/1", "loans/0", "loans/1"]
    assert all(names == slices for names in by_place.values())
    every = {(cell, label) for cell in ("continuation", "topic-shift") for label in labels[:3]}
    found = {(cell, variant) for cell, variant, _ in by_place}
    assert found == every | {("topic-shift", "dart (oracle)")}


def test_griffin_is_measured_where_each_method_asks_for_it(whole):
    found, rows = read(whole.path / "quality.json"), lines(whole.path / "results.jsonl")
    losses = {}
    for row in rows:
        losses.setdefault((row["cell"], row["variant"], row["sparsity"]), []).append(row["loss"])
    mean = {place: sum(own) / len(own) for place, own in losses.items()}
    for row in found["cells"]:
        cell, dense = row["cell"], mean[row["cell"], "dense", 0.0]
        assert row["gap"] == pytest.approx(mean[cell, row["variant"], row["sparsity"]] - dense)
        wanted = {"equal_sparsity": row["achieved_sparsity"]}
        # low-rank maps weigh more than the FFN of this tiny model: then dense is as cheap
        wanted["equal_bytes"] = max(0.0, 1 - row["ffn_bytes_share"])
        for column, sparsity in wanted.items() if row["variant"] != "griffin" else ():
            at = row[column]["sparsity"]
            assert at == round(sparsity, 3)
            griffin = mean[cell, "griffin" if at else "dense", at] - dense
            assert row[column]["griffin_gap"] == pytest.approx(griffin)
    pooled = [(row["cell"], row["variant"], row["sparsities"]) for row in found["pooled"]]
    assert pooled == [
        ("continuation", "dart", [0.5, 0.7]),
        ("topic-shift", "dart", [0.5, 0.7]),
        ("topic-shift", "dart (oracle)", [0.5, 0.7]),
    ]
    assert found["slices"] == {"model": 4}


@pytest.mark.usefixtures("no_plots")
def test_another_preset_is_another_run(tmp_path):
    variants, found = tmp_path / "v.yaml", []
    asked = {"cells": "continuation", "sparsities": "0.5", "slices": 1, "oracle": "none"}
    for text in ("plain: {compensation: false}\n", "plain: {compensation: true}\n"):
        variants.write_text(text, encoding="utf-8")
        done = job(tmp_path, variants=str(variants), **asked)
        rows = {row["variant"]: row["perplexity"] for row in done.summary["cells"]}
        assert list(rows) == ["griffin", "dart", "plain"] and done.summary["pool"] == [0.5]
        found.append((done.identity, rows["plain"] == rows["dart"]))
    assert found[0][0] != found[1][0]
    assert [same for _, same in found] == [False, True]  # the preset compensates


@pytest.mark.usefixtures("no_plots")
def test_two_models_have_rows_of_their_own_and_common_ones(tmp_path):
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


def test_the_plot_shows_the_gaps(whole):
    from matplotlib.figure import Figure

    assert (whole.path / "plots" / "quality.png").stat().st_size > 10_000
    (plot,) = report.make(whole.summary)
    figure = Figure()
    with figures._style() as palette:
        plot.draw(figure, palette, True)
    _, _, panel = figure.axes  # the legend, and a panel per cell
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names[:2] == ["dart, 50 %", "dart (oracle), 50 %"] and names[-1].endswith("pooled")
    x = [float(value) for box in panel.containers for value in box.lines[0].get_xdata()]
    known = [
        100 * row[column]["gap_closed"]
        for column in ("equal_sparsity", "equal_bytes")
        for row in (*whole.summary["cells"], *whole.summary["pooled"])
        if row["cell"] == "topic-shift" and row[column] and row[column]["gap_closed"] is not None
    ]
    assert sorted(x) == pytest.approx(sorted(known))
    alone = [row for row in whole.summary["cells"] if row["variant"] == "griffin"]
    assert report.make({**whole.summary, "pooled": [], "cells": alone}) == []


@pytest.mark.usefixtures("beside")
def test_slices_longer_than_the_context_are_refused(tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("\n\n".join(["a" * 1200, "b" * 1200]), encoding="utf-8")
    with pytest.raises(ConfigError, match="of up to 1104 tokens are longer than the context of"):
        job(tmp_path, prompt_tokens=1000, slices=1, text=[str(text)], cells="continuation")
    (left,) = (tmp_path / "results").glob("*/*")
    assert read(left / "config.json")["status"] == "failed"
    with pytest.raises(SystemExit, match="is no finished run"):
        importlib.import_module("keep").gather_quality([left])


def test_the_command_speaks_json(tmp_path):
    text, rows = write_texts(tmp_path)
    fixed = ["bench", "quality", "--model", place() / "model", "--device", "cpu", "--json"]
    fixed += ["--results-dir", tmp_path / "results", "--dtype", "float32", "--text", text]
    fixed += ["--prompt-tokens", PROMPT, "--tokens", TOKENS, "--slices", 1, "--sparsities", "0.5"]
    done = call(*fixed, "--text", f"{rows}:text", "--cells", "continuation")
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)
    found = done.json
    assert [one["label"] for one in found["texts"]] == ["bees", "loans:text"]
    assert [row["variant"] for row in found["cells"]] == ["griffin", "dart"]
    assert found["versions"]["torch"] and found["checkpoints"]["model"]["sha256"]
    kept = read(Path(found["folder"], "quality.json"))
    assert {name: found[name] for name in kept} == kept and found["timing"]["total_s"] > 0
    bad = call(*fixed, "--slices", 90)
    assert (bad.code, bad.out, bad.err.count("\n")) == (2, "", 1)
    assert bad.err.startswith('ConfigError: the text "bees" has 8 slices of 134 tokens in its set')


@pytest.mark.usefixtures("beside")
def test_a_run_is_kept(whole):
    keeper = importlib.import_module("keep")
    kept = keeper.gather_quality([whole.path])
    assert kept["cells"] == read(whole.path / "quality.json")["cells"]
    text = json.dumps(kept)
    assert "path" not in kept["checkpoints"]["model"] and str(whole.path.parents[2]) not in text
    items = keeper.quality_items(keeper.lines(whole.path))
    assert all(set(one) == {"model", "cell", "variant", "sparsity", "losses"} for one in items)
    with pytest.raises(SystemExit, match="the runs share a model"):
        keeper.gather_quality([whole.path, whole.path])
