"""``dart-llm bench speed`` on tiny models: files, order, sittings, what cannot run, the command."""

import csv
import json
from pathlib import Path

import pytest
import torch

from dart_llm.errors import ConfigError, LoadError
from dart_llm.experiments.index import read_info
from dart_llm.experiments.study import run_study
from dart_llm.experiments.timing import shuffled
from dart_llm.patching import executors
from dart_llm.reporting import figures
from dart_llm.reporting.console import Ui
from dart_llm.studies.speed import study, summary
from dart_llm.studies.speed.settings import EXECUTORS
from dart_llm.studies.speed.study import SpeedStudy
from lm_cases import call
from speed_cases import PROMPT, TOKENS, job, settings, shape, steady
from stopping import Stopping

pytestmark = pytest.mark.usefixtures("native")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(native, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "repetition", steady)
        return job(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(figures, "save", lambda folder, wanted, style: [])


def test_rows_say_what_ran(whole):
    found = read(whole.path / "speed.json")
    labels = [row["row"] for row in found["rows"]]
    methods = [f"griffin 50 %, {executor}" for executor in ("compact", "native", "slim")]
    assert labels == ["transformers", "dense, slim", *methods]
    assert found["own_dense"] == "dense, slim" and found["left_out"] == {}
    # masks of 24 of 48 neurons in 4 layers of width 48; every timed token is pruned
    for row in found["rows"][2:]:
        assert row["achieved_sparsity"] == pytest.approx(0.5)
        assert row["dense_token_share"] == 0 and row["remasks"] == 0
        saved = found["bytes_per_dense_token"] - row["bytes_per_token"]
        assert saved == pytest.approx(found["weights"]["ffn_bytes"] / 2)
    # a key and a value of 2 heads of size 8 in 4 layers, float32
    assert found["weights"]["cache_bytes_per_position"] == 4 * 2 * 2 * 8 * 4
    assert found["weights"]["ffn_bytes"] == pytest.approx(4 * 3 * 48 * 32 * 4)
    assert found["read_bandwidth"]["bytes_per_second"] > 1e6
    assert found["mean_context"] == PROMPT + 2 + (TOKENS + 1) / 2
    # repetitions are interleaved, each in an order of its own
    assert found["orders"] == [shuffled(labels, 0, 0), shuffled(labels, 0, 1)]
    for order, one in zip(found["orders"], lines(whole.path), strict=True):
        assert order == one["order"] == list(one["samples"])
        sizes = {(len(s["warm_s"]), len(s["steps_s"])) for s in one["samples"].values()}
        assert sizes == {(2, TOKENS)}


def test_tables_plot_and_what_is_kept(whole, monkeypatch):
    found, config = read(whole.path / "speed.json"), read(whole.path / "config.json")
    assert config["checkpoint"]["name"] == "llama (random weights)"
    assert len(config["settings"]["inputs"]["shape"]) == 64
    info = read_info(whole.path, whole.path.parents[1])
    assert (info.kind, info.status, info.tasks) == ("speed", "complete", ("speed",))
    assert info.problems == () and info.sparsities == (0.5,)
    text = (whole.path / "speed.md").read_text(encoding="utf-8")
    assert text == summary.markdown(found) and "- `limit`: 1 / (1 - f s)" in text
    assert all(f"| {row['row']} |" in text for row in found["rows"])
    table = list(csv.DictReader((whole.path / "speed.csv").read_text("utf-8").splitlines()))
    assert [line["row"] for line in table] == [row["row"] for row in found["rows"]]
    assert float(table[1]["tg_ms"]) == pytest.approx(found["rows"][1]["tg_ms"])
    assert table[0]["attach_ms"] == ""


def test_the_plot_has_the_limit_as_a_line(whole):
    from matplotlib.figure import Figure

    (plot,) = summary.make(whole.summary)
    figure = Figure()
    with figures._style() as palette:
        plot.draw(figure, palette, False)
    line, *points = figure.axes[1].lines
    share = whole.summary["ffn_share_of_bytes_read"]
    x, y = (list(map(float, values)) for values in line.get_data())
    assert y == pytest.approx([1 / (1 - share * value / 100) for value in x])
    heights = [float(point.get_ydata()[0]) for point in points]
    assert heights == pytest.approx([0.5, 1.0, *[2 / 1.8] * 3])  # of what ``steady`` takes
    assert heights == pytest.approx([row["times_own_dense"] for row in whole.summary["rows"]])
    dense = [row for row in whole.summary["rows"] if not row["variant"]]
    assert summary.make({**whole.summary, "rows": dense}) == []
    assert set(summary.COLOURS) == {None, "llama.cpp", *EXECUTORS}
    assert len(set(summary.COLOURS.values())) == len(summary.COLOURS)


@pytest.mark.usefixtures("no_plots")
def test_what_cannot_run_is_named(tmp_path, monkeypatch):
    done = job(tmp_path, "stablelm", repeats=1, executors="compact,native,slim")
    (note,) = [note for note in done.summary["notes"] if "left out" in note]
    assert "dense, slim; griffin 50 %, slim are left out: executor" in note
    assert "which is a stablelm model, not one of gemma, gemma2," in note
    rows = [row["row"] for row in done.summary["rows"]]
    assert rows[:2] == ["transformers", "dense, native"] == ["transformers", done.own]
    assert rows[2:] == ["griffin 50 %, compact", "griffin 50 %, native"]
    assert done.summary["rows"][1]["achieved_sparsity"] == 0
    assert all(note in (done.path / "speed.md").read_text() for note in done.summary["notes"])
    monkeypatch.setattr(executors, "why_not", lambda: "the native kernels could not be built (x)")
    done = job(tmp_path, repeats=1)
    assert [row["executor"] for row in done.summary["rows"]] == [None, "compact"]
    assert done.summary["kernels"] is None
    assert "the native kernels could not be built (x)" in done.summary["notes"][0]


@pytest.mark.usefixtures("no_plots")
def test_an_interrupted_job_keeps_whole_repetitions(tmp_path):
    asked = {"executors": "compact", "repeats": 3}
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, ui=Stopping(5), **asked)  # in the second repetition of three rows
    (left,) = (tmp_path / "results").glob("*/*")
    (kept,) = lines(left)
    again = job(tmp_path, **asked)
    assert again.path == left and again.summary["sittings"] == 2
    assert len(again.lines) == 3 and lines(left)[0] == kept
    assert job(tmp_path, **{**asked, "seed": 1}).folder.resumed is False


@pytest.mark.usefixtures("no_plots")
def test_masks_are_rebuilt_during_the_run(tmp_path):
    found = job(tmp_path, rebuild_every=3, executors="compact", repeats=1).summary
    row = found["rows"][-1]
    # tokens 0 1 2 pruned, 3 observed, ... 11 observed, 12 13 pruned; the first two are not timed
    assert row["remasks"] == 3 and row["dense_token_share"] == pytest.approx(3 / 12)
    assert row["achieved_sparsity"] == pytest.approx(0.5 * 9 / 12)


def test_models_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"514 tokens are longer than the context of llama, 512"):
        job(tmp_path, prompt_tokens=500, tokens=12)
    asked = settings(tmp_path)
    shape(tmp_path).write_text('{"model_type": "none"}', encoding="utf-8")
    with pytest.raises(LoadError, match=r"llama\.json holds no model's configuration"):
        run_study(SpeedStudy(asked, Ui(quiet=True)))


@pytest.mark.usefixtures("no_plots")
def test_the_command_ends_in_one_json_line(tmp_path, monkeypatch):
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
