"""``dart-llm bench speed`` on tiny models: files, order, resuming, what cannot run, the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dart_llm.errors import ConfigError, LoadError
from dart_llm.experiments.index import read_info
from dart_llm.experiments.study import run_study
from dart_llm.reporting import figures as plots
from dart_llm.reporting.console import Ui
from dart_llm.studies.speed import summary as speed_plot
from dart_llm.studies.speed.settings import EXECUTORS
from dart_llm.studies.speed.study import SpeedStudy, shuffled
from dart_llm.studies.speed.summary import markdown
from lm_cases import call
from speed_cases import PROMPT, TOKENS, job, settings, shape
from stopping import Stopping

pytestmark = pytest.mark.usefixtures("native")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(native: None, tmp_path_factory: pytest.TempPathFactory) -> SpeedStudy:
    return job(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "save", lambda folder, wanted: [])


def test_every_file_is_written(whole: SpeedStudy) -> None:
    stamp = whole.path.name
    assert {path.name for path in whole.path.iterdir()} == {
        *("config.json", "results.jsonl", "speed.json", "speed.md", "speed.csv", "timing.json"),
        *(f"output_{stamp}.log", f"timing_{stamp}.log", "plots"),
    }
    config = read(whole.path / "config.json")
    assert (config["kind"], config["status"]) == ("speed", "complete")
    assert config["checkpoint"]["name"] == "llama (random weights)"
    assert len(config["settings"]["inputs"]["shape"]) == 64
    assert (whole.path / "plots" / "speed.png").stat().st_size > 10_000
    info = read_info(whole.path, whole.path.parents[1])
    assert (info.kind, info.status, info.tasks) == ("speed", "complete", ("speed",))
    assert info.problems == () and info.sparsities == (0.5,)


def test_rows_say_what_ran(whole: SpeedStudy) -> None:
    found = read(whole.path / "speed.json")
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == [
        "transformers",
        "dense, slim",
        *(f"griffin 50 %, {executor}" for executor in ("compact", "native", "slim")),
    ]
    assert found["own_dense"] == "dense, slim" and found["left_out"] == {}
    # masks of 24 of 48 neurons in 4 layers of width 48; every timed token is pruned
    pruned = [row for row in found["rows"] if row["variant"]]
    assert [row["achieved_sparsity"] for row in pruned] == [pytest.approx(0.5)] * 3
    assert all(row["dense_token_share"] == 0 and row["remasks"] == 0 for row in pruned)
    assert all(row["bytes_per_token"] == pytest.approx(
        found["bytes_per_dense_token"] - found["weights"]["ffn_bytes"] / 2) for row in pruned
    )  # fmt: skip
    # a key and a value of 2 heads of size 8 in 4 layers, float32
    assert found["weights"]["cache_bytes_per_position"] == 4 * 2 * 2 * 8 * 4
    assert found["weights"]["ffn_bytes"] == pytest.approx(4 * 3 * 48 * 32 * 4)
    assert found["read_bandwidth"]["bytes_per_second"] > 1e6
    assert found["mean_context"] == PROMPT + 2 + (TOKENS + 1) / 2


def test_repetitions_are_interleaved_in_a_known_order(whole: SpeedStudy) -> None:
    found = read(whole.path / "speed.json")
    lines = (whole.path / "results.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert [one["order"] for one in kept] == found["orders"]
    labels = [row["row"] for row in found["rows"]]
    assert found["orders"] == [shuffled(labels, 0, 0), shuffled(labels, 0, 1)]
    for one in kept:
        assert list(one["samples"]) == one["order"]
        assert all(len(s["steps_s"]) == TOKENS for s in one["samples"].values())
        assert all(len(s["warm_s"]) == 2 for s in one["samples"].values())


def test_tables_hold_the_numbers_of_the_file(whole: SpeedStudy) -> None:
    found = read(whole.path / "speed.json")
    text = (whole.path / "speed.md").read_text(encoding="utf-8")
    assert text == markdown(found)
    for row in found["rows"]:
        assert f"| {row['row']} |" in text
    assert "- `limit`: 1 / (1 - f s)" in text
    with (whole.path / "speed.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [line["row"] for line in table] == [row["row"] for row in found["rows"]]
    assert float(table[1]["tg_ms"]) == pytest.approx(found["rows"][1]["tg_ms"])
    assert table[0]["attach_ms"] == ""


def test_the_plot_has_the_limit_as_a_line(whole: SpeedStudy) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    (plot,) = speed_plot.make(whole.summary)
    figure = Figure()
    with plots._style() as palette:
        plot.draw(figure, palette, False)
    line, *points = figure.axes[1].lines
    share = whole.summary["ffn_share_of_bytes_read"]
    x, y = (list(map(float, values)) for values in line.get_data())
    assert y == pytest.approx([1 / (1 - share * value / 100) for value in x])
    heights = [float(point.get_ydata()[0]) for point in points]
    assert heights == pytest.approx([row["times_own_dense"] for row in whole.summary["rows"]])
    dense = [row for row in whole.summary["rows"] if not row["variant"]]
    assert speed_plot.make({**whole.summary, "rows": dense}) == []


def test_every_executor_has_its_look_in_the_plot(whole: SpeedStudy, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert set(speed_plot.LOOKS) == {None, *EXECUTORS}
    assert len(set(speed_plot.LOOKS.values())) == len(speed_plot.LOOKS)
    rows = [{**row, "executor": "graph"} for row in whole.summary["rows"]]
    (path, *_) = plots.save(tmp_path, speed_plot.make({**whole.summary, "rows": rows}))
    assert path.stat().st_size > 10_000


@pytest.mark.usefixtures("no_plots")
def test_what_cannot_run_is_named(tmp_path: Path) -> None:
    done = job(tmp_path, "gpt2", repeats=1)
    (note,) = [note for note in done.summary["notes"] if "left out" in note]
    assert "dense, slim; griffin 50 %, slim are left out: executor" in note
    assert "which is a gpt2 model, not one of llama, mistral, qwen2, qwen3" in note
    rows = {row["row"] for row in done.summary["rows"]}
    assert {"dense, native", "griffin 50 %, compact", "griffin 50 %, native"} < rows
    assert not any("slim" in row for row in rows) and done.summary["own_dense"] == "dense, native"
    assert all(note in (done.path / "speed.md").read_text() for note in done.summary["notes"])


@pytest.mark.usefixtures("no_plots")
def test_the_kernels_alone_are_a_dense_path_too(tmp_path: Path) -> None:
    done = job(tmp_path, "olmo2", repeats=1, executors="native")
    rows = {row["row"]: row for row in done.summary["rows"]}
    assert list(rows) == ["transformers", "dense, native", "griffin 50 %, native"]
    assert rows["dense, native"]["achieved_sparsity"] == 0
    assert done.summary["own_dense"] == "dense, native"


@pytest.mark.usefixtures("no_plots")
def test_without_a_compiler_compact_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dart_llm.patching import executors as executor

    monkeypatch.setattr(executor, "why_not", lambda: "the native kernels could not be built (x)")
    done = job(tmp_path, repeats=1)
    assert [row["executor"] for row in done.summary["rows"]] == [None, "compact"]
    assert done.summary["kernels"] is None
    assert "the native kernels could not be built (x)" in done.summary["notes"][0]


@pytest.mark.usefixtures("no_plots")
def test_an_interrupted_job_keeps_whole_repetitions(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"executors": "compact", "repeats": 3}
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, ui=Stopping(5), **asked)  # in the second repetition of three rows
    (left,) = (tmp_path / "results").glob("*/*")
    assert read(left / "config.json")["status"] == "interrupted"
    kept = [json.loads(line) for line in (left / "results.jsonl").read_text().splitlines()]
    assert len(kept) == 1
    again = job(tmp_path, **asked)
    assert (again.path, again.folder.resumed) == (left, True)
    lines = [json.loads(line) for line in (left / "results.jsonl").read_text().splitlines()]
    assert lines[0] == kept[0] and len(lines) == 3
    assert again.summary["sittings"] == 2 and not (left / "parts.jsonl").exists()
    assert job(tmp_path, **{**asked, "seed": 1}).folder.resumed is False


@pytest.mark.usefixtures("no_plots")
def test_masks_are_rebuilt_during_the_run(tmp_path: Path) -> None:
    found = job(tmp_path, rebuild_every=3, executors="compact", repeats=1).summary
    row = found["rows"][-1]
    # tokens 0 1 2 pruned, 3 observed, ... 11 observed, 12 13 pruned; the first two are not timed
    assert row["remasks"] == 3 and row["dense_token_share"] == pytest.approx(3 / 12)
    assert row["achieved_sparsity"] == pytest.approx(0.5 * 9 / 12)


def test_texts_longer_than_the_context_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"514 tokens are longer than the context of llama, 512"):
        job(tmp_path, prompt_tokens=500, tokens=12)


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    asked = settings(tmp_path)
    shape(tmp_path).write_text('{"model_type": "none"}', encoding="utf-8")
    with pytest.raises(LoadError, match=r"llama\.json holds no model's configuration"):
        run_study(SpeedStudy(asked, Ui(quiet=True)))


# the command


@pytest.mark.usefixtures("no_plots")
def test_the_command_ends_in_one_json_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dart_llm.studies.speed.study.read_bandwidth", lambda device, mib: 1e9)
    fixed = ["bench", "speed", "--model-config", shape(tmp_path), "--device", "cpu"]
    fixed += ["--dtype", "float32", "--methods", "griffin", "--sparsities", "0.5"]
    fixed += ["--executors", "compact", "--prompt-tokens", PROMPT, "--tokens", TOKENS]
    fixed += ["--repeats", 1, "--no-costs", "--threads", 1, "--results-dir", tmp_path / "r"]
    threads = torch.get_num_threads()
    done = call(*fixed)
    assert done.code == 0 and done.out.count("\n") == 1
    rows = done.json["rows"]
    assert rows[-1]["row"] == "griffin 50 %, compact" and rows[-1]["tg_ms"] > 0
    assert torch.get_num_threads() == threads
    told = call(*fixed, "--json", "--fresh")
    assert (told.code, told.err, told.out.count("\n")) == (0, "", 1)
    assert told.json["machine"]["threads"] == 1
    kept = read(Path(told.json["folder"], "speed.json"))
    assert {name: told.json[name] for name in kept} == kept
    bad = call(*fixed, "--executors", "slm")
    assert (bad.code, bad.out) == (2, "")
    assert bad.err == "UnknownName: unknown executor 'slm'; did you mean slim?\n"
