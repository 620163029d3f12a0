"""Times of a run: interleaved repetitions, and no speed-up above the bandwidth limit."""

import json
import re

import pytest
import torch

from dart_llm.experiments.stats import DISTURBED
from dart_llm.experiments.study import load_model
from dart_llm.experiments.timing import WARM
from dart_llm.reporting.console import Ui
from dart_llm.studies.generate import report, study
from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.generate.study import RunStudy, run_job
from html_page import Page

pytestmark = pytest.mark.usefixtures("no_pictures")


def settings(gpt2, folder, **more):
    given = {"model": str(gpt2), "prompt": "hello", "generation": 9, "results_dir": str(folder)}
    return RunSettings(**{**given, "method": "griffin", "sparsity": 0.5, **more})


def with_times(monkeypatch, seconds):
    """Runs are timed once, for their bytes, and take ``seconds`` by name."""

    def interleave(clocks):
        for clock in clocks.values():
            clock()
        return {name: list(seconds[name]) for name in clocks}

    monkeypatch.setattr(study, "interleave", interleave)


def told(run, capsys):
    """All that a run printed and wrote for people."""
    said = capsys.readouterr()
    page = Page((run.path / "report.html").read_text(encoding="utf-8"))
    return "\n".join([said.out, said.err, page.text.replace("\xa0", " "), *run.ui.log])


def test_repetitions_are_interleaved_and_every_second_one_is_reversed(monkeypatch):
    seen = []
    clocks = {name: lambda name=name: seen.append(name) or 0.5 for name in "abc"}
    assert study.interleave(clocks) == {name: [0.5] * study.REPETITIONS for name in "abc"}
    assert "".join(seen) == "abccba" * (study.REPETITIONS // 2)
    monkeypatch.setattr(study, "PATIENCE_S", -1.0)  # a slow machine gets fewer
    assert study.interleave({"a": lambda: 1.0}) == {"a": [1.0] * study.FEWEST_REPETITIONS}


def test_the_end_of_a_text_leaves_room_for_a_repetition():
    ids = torch.tensor([[1, 2, 3]])
    assert study.text_end(ids, [4, 5], 8, None).tolist() == [[1, 2, 3, 4, 5]]
    long = list(range(100))
    assert study.text_end(ids, long, 8, 1000).tolist() == [long[-study.TAIL :]]
    assert study.text_end(ids, long, 8, 8 + WARM + 1 + 5).tolist() == [long[-5:]]


def test_a_run_that_was_disturbed_shows_no_ratio(gpt2, tmp_path, monkeypatch, capsys):
    """Another program took the machine from the middle on, while dense was timed."""
    slowed = [0.010] * 4 + [0.060] * 4
    with_times(monkeypatch, {"dense": slowed, "pruned": [0.009] * 8})
    run = run_job(settings(gpt2, tmp_path), Ui())
    found = json.loads((run.path / "timing.json").read_text(encoding="utf-8"))
    assert found["speed_up"] is None and found["disturbed"] == DISTURBED
    assert found["bytes_limit"] == pytest.approx(run.summary["accounting"]["bytes_limit"])
    assert found["repetitions"] == {"dense": slowed, "pruned": [0.009] * 8}
    assert found["seconds_per_token"] == pytest.approx({"dense": 0.035, "pruned": 0.009})
    (row,) = [row for row in run.tables()[0].rows if row["name"].endswith("pruned")]
    assert row["over_dense"] == "disturbed"
    everything = told(run, capsys)
    assert not re.search(r"\d x (as fast|slower)", everything)
    assert "35.0" in everything and "disturbed" in everything


def test_a_quiet_run_shows_the_ratio_up_to_its_limit(gpt2, tmp_path, monkeypatch, capsys):
    with_times(monkeypatch, {"dense": [0.0105] * 8, "pruned": [0.010] * 8})
    run = run_job(settings(gpt2, tmp_path), Ui())
    limit = run.timing["bytes_limit"]
    assert 1.05 < limit < 1.2  # half the neurons of this model
    assert run.timing["speed_up"] == pytest.approx(1.05)
    everything = told(run, capsys)
    assert f"{limit:.2f} x" in everything
    (row,) = [row for row in run.tables()[0].rows if row["name"].endswith("pruned")]
    assert (
        row["over_dense"] == "1.05"
        and "disturbed" not in everything.split("results: ")[0].split("FFN neurons")[0]
    )


def test_masking_skips_no_work(gpt2, tmp_path, monkeypatch):
    """So its limit is 1, and what is a little above it is shown as that."""
    with_times(monkeypatch, {"dense": [0.0201] * 4, "pruned": [0.02] * 4})
    run = run_job(settings(gpt2, tmp_path, executor="masked"), Ui(quiet=True))
    assert (run.timing["bytes_limit"], run.timing["speed_up"]) == (1.0, 1.0)
    sizes = run.timing["weight_bytes_per_token"]
    assert sizes["pruned"] == sizes["dense"]


def test_ratios_over_transformers_agree_with_each_other():
    repetitions = {"dense": [2.0] * 4, "pruned": [1.0] * 4, "plain": [6.0] * 4, "x": [3.0] * 4}
    found = study.timing_document(repetitions, 2.5, "plain")
    over = {name: judged["speed_up"] for name, judged in found["over_transformers"].items()}
    assert over == {"dense": 3.0, "pruned": 6.0, "x": 2.0} and found["speed_up"] == 2.0
    found = study.timing_document(repetitions, 1.5, "plain")  # more than the bytes allow
    over = found["over_transformers"]["pruned"]
    assert over["speed_up"] is None and over["disturbed"] == DISTURBED == found["disturbed"]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("executor", ["native", "masked"])
def test_dense_is_timed_by_the_kernels_of_the_pruned_text(gpt2, tmp_path, executor):
    """So that a speed-up is due to pruning alone."""
    run = RunStudy(settings(gpt2, tmp_path, executor=executor), Ui(quiet=True))
    run.model, run.tokenizer, _ = load_model(run.settings, run.ui)
    run.bound = run.prepare(run.prune_config)
    dense = run._dense_run()
    assert (None if dense is None else dense.executor) == {"native": "native"}.get(executor)


TUNE = "dart-llm tune --quick."
PRUNE = "On this model griffin 50 % gains {} and multiplies perplexity by 2.1; on yours run "


@pytest.mark.parametrize(
    ("speed_up", "limit", "sentence"),
    [
        (1.04, 1.05, "On this model pruning gains 4 %: use it dense; on yours run "),
        (None, 1.05, "On this model pruning gains 5 % at most: use it dense; on yours run "),
        (0.9, 1.05, "On this model pruning is not faster: use it dense; on yours run "),
        (1.31, 1.42, PRUNE.format("31 %")),
        (None, 1.42, PRUNE.format("42 % at most")),
    ],
)
def test_the_verdict_of_a_demo(speed_up, limit, sentence):
    counted = {"method": "griffin", "requested_sparsity": 0.5, "bytes_limit": limit}
    timing = {"speed_up": speed_up}
    assert report.verdict(timing, 2.1, counted, is_default=True) == sentence + TUNE
    other = sentence.replace("on yours run", "other settings are measured by")
    assert report.verdict(timing, 2.1, counted, is_default=False) == other + TUNE
