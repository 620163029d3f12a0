"""``dart-llm bench speed`` on tiny models: files, order, resuming, what cannot run, the command."""

import csv
import json
from pathlib import Path

import pytest
import torch

from dart_llm.errors import ConfigError, LoadError
from dart_llm.experiments.study import run_study
from dart_llm.experiments.timing import shuffled
from dart_llm.native import build
from dart_llm.patching import executors
from dart_llm.reporting import figures
from dart_llm.reporting.console import Ui
from dart_llm.studies.bench import report, study
from dart_llm.studies.bench.speed import SpeedStudy
from lm_cases import call
from speed_cases import PROMPT, TOKENS, job, settings, shape, steady
from stopping import Stopping
from written import axes_of, lines, read

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def whole(native, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "repetition", steady)
        return job(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(figures, "save", lambda folder, wanted, style: [])


def test_rows_of_methods_beside_dense(whole):
    document = read(whole.path / "speed.json")
    labels = [row["row"] for row in document["rows"]]
    methods = [f"griffin 50 %, {executor}" for executor in ("compact", "native")]
    assert labels == ["transformers", "dense, native", *methods]
    assert document["base"] == "dense, native" and document["left_out"] == {}
    # masks of 24 of 48 neurons in 4 layers of width 48; every timed token is pruned
    sizes = document["formats"]["dense"]["weights"]
    for row in document["rows"][2:]:
        assert row["achieved_sparsity"] == pytest.approx(0.5)
        assert row["dense_token_share"] == 0 and row["remasks"] == 0
        saved = document["bytes_per_dense_token"] - row["bytes_per_token"]
        assert saved == pytest.approx(sizes["ffn_bytes"] / 2)
    # a key and a value of 2 heads of size 8 in 4 layers, float32
    assert sizes["cache_bytes_per_position"] == 4 * 2 * 2 * 8 * 4
    assert sizes["ffn_bytes"] == pytest.approx(4 * 3 * 48 * 32 * 4)
    assert document["read_bandwidth"]["bytes_per_second"] > 1e6
    assert document["mean_context"] == PROMPT + 2 + (TOKENS + 1) / 2
    # repetitions are interleaved, each in an order of its own
    assert document["orders"] == [shuffled(labels, 0, 0), shuffled(labels, 0, 1)]
    for order, one in zip(document["orders"], lines(whole.path / "results.jsonl"), strict=True):
        assert order == one["order"] == list(one["samples"])
        steps = {(len(s["warm_s"]), len(s["steps_s"])) for s in one["samples"].values()}
        assert steps == {(2, TOKENS)}


def test_files_of_a_run(whole):
    document, config = read(whole.path / "speed.json"), read(whole.path / "config.json")
    assert config["checkpoint"]["name"] == "llama (random weights)"
    assert len(config["settings"]["inputs"]["shape"]) == 64
    text = (whole.path / "speed.md").read_text(encoding="utf-8")
    assert text == whole.markdown()
    assert all(f"| {row['row']} |" in text for row in document["rows"])
    table = list(csv.DictReader((whole.path / "speed.csv").read_text("utf-8").splitlines()))
    assert [line["row"] for line in table] == [row["row"] for row in document["rows"]]
    assert float(table[1]["ms"]) == pytest.approx(document["rows"][1]["ms"])
    assert table[0]["attach_ms"] == "" and str(whole.path.parents[2]) not in json.dumps(document)
    measured = [line for line in lines(whole.path / "rows.jsonl") if line["metric"] == "speed_up"]
    speed_ups = {line["label"]: line["value"] for line in measured}
    assert speed_ups == {row["row"]: row["times_dense"] for row in document["rows"]}
    last = measured[-1]
    assert (last["method"], last["task"], last["requested"]) == ("griffin", "speed", 0.5)
    assert (last["dtype"], last["weights"], last["dense_share"]) == ("float32", None, 0)
    sentence = whole.sentences()[0]  # of what ``steady`` takes, 1.8 and 2 ms
    assert "2.22 x as fast as transformers, 1.11 x as fast as dense, native" in sentence


def test_the_plot_has_a_bar_per_row(whole):
    (axes,) = axes_of(report.speed_plot(whole.summary))
    slowest_first = sorted(whole.summary["rows"], key=lambda row: -row["ms"])
    assert [bar.get_width() for bar in axes.patches] == [row["ms"] for row in slowest_first]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        row["row"] for row in slowest_first
    ]
    seconds = {float(line.get_xdata()[0]) for line in axes.lines}
    read_speed = whole.summary["read_bandwidth"]["bytes_per_second"]
    assert seconds == {1000 * row["bytes_per_token"] / read_speed for row in slowest_first}


@pytest.mark.usefixtures("no_plots")
def test_what_cannot_run_is_named(tmp_path, monkeypatch):
    for module in (executors, build):
        monkeypatch.setattr(module, "why_not", lambda: "the native kernels could not be built (x)")
    done = job(tmp_path, repeats=1)
    assert [row["executor"] for row in done.summary["rows"]] == [None, "compact"]
    assert done.summary["kernels"] is None and done.summary["base"] == "transformers"
    assert "the native kernels could not be built (x)" in done.summary["notes"][0]


@pytest.mark.usefixtures("no_plots")
def test_an_interrupted_job_keeps_whole_repetitions(tmp_path):
    given = {"executors": "compact", "repeats": 3}
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, ui=Stopping(5), **given)  # in the second repetition of three rows
    (left,) = (tmp_path / "results").glob("*/*")
    (kept,) = lines(left / "results.jsonl")
    again = job(tmp_path, **given)
    assert again.path == left and again.summary["processes"] == 2
    assert len(again.lines) == 3 and lines(left / "results.jsonl")[0] == kept
    assert job(tmp_path, **{**given, "seed": 1}).folder.resumed is False


@pytest.mark.usefixtures("no_plots")
def test_masks_are_rebuilt_during_the_run(tmp_path):
    document = job(tmp_path, rebuild_every=3, executors="compact", repeats=1).summary
    row = document["rows"][-1]
    # tokens 0 1 2 pruned, 3 observed, ... 11 observed, 12 13 pruned; the first two are not timed
    assert row["remasks"] == 3 and row["dense_token_share"] == pytest.approx(3 / 12)
    assert row["achieved_sparsity"] == pytest.approx(0.5 * 9 / 12)


def test_models_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"514 tokens are longer than the context of llama, 512"):
        job(tmp_path, prompt_tokens=500, tokens=12)
    given = settings(tmp_path)
    shape(tmp_path).write_text('{"model_type": "none"}', encoding="utf-8")
    with pytest.raises(LoadError, match=r"llama\.json is not a model's configuration"):
        run_study(SpeedStudy(given, Ui(quiet=True)))


@pytest.mark.usefixtures("no_plots")
def test_the_command_ends_in_one_json_line(tmp_path, monkeypatch):
    monkeypatch.setattr("dart_llm.studies.bench.speed.read_bandwidth", lambda device, mib: 1e9)
    fixed = ["bench", "speed", "--model-config", shape(tmp_path), "--device", "cpu"]
    fixed += ["--dtype", "float32", "--methods", "griffin", "--sparsities", "0.5"]
    fixed += ["--executors", "compact", "--prompt-tokens", PROMPT, "--tokens", TOKENS]
    fixed += ["--repeats", 1, "--threads", 1, "--results-dir", tmp_path / "r"]
    threads = torch.get_num_threads()
    done = call(*fixed)
    assert done.code == 0 and done.out.count("\n") == 1
    rows = done.json["rows"]
    assert rows[-1]["row"] == "griffin 50 %, compact" and rows[-1]["ms"] > 0
    assert torch.get_num_threads() == threads
    whole = call(*fixed, "--json", "--fresh")
    assert (whole.code, whole.err, whole.out.count("\n")) == (0, "", 1)
    assert whole.json["machine"]["threads"] == 1
    kept = read(Path(whole.json["folder"], "speed.json"))
    assert {name: whole.json[name] for name in kept} == kept
    bad = call(*fixed, "--executors", "nativ")
    assert (bad.code, bad.out) == (2, "")
    assert bad.err == "UnknownName: unknown executor 'nativ'; did you mean native?\n"
