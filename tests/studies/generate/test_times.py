"""Times of a run: interleaved repetitions, and no speed-up above the bandwidth limit."""

import re

import pytest
import torch

from dart_llm.experiments.stats import DISTURBED
from dart_llm.experiments.study import load_model, run_study
from dart_llm.experiments.timing import WARM
from dart_llm.reporting.console import Ui
from dart_llm.studies.generate import report, study
from dart_llm.studies.generate.study import RunStudy
from html_page import Page
from written import read

pytestmark = pytest.mark.usefixtures("no_pictures")


def timed(monkeypatch, capsys, settings, dense, pruned):
    """A run that takes these seconds per token; all that it printed or wrote for people; a row.

    Each text is timed once, for its bytes.
    """
    seconds = {"dense": dense, "pruned": pruned}

    def interleave(clocks):
        for clock in clocks.values():
            clock()
        return {name: list(seconds[name]) for name in clocks}

    monkeypatch.setattr(study, "interleave", interleave)
    run = run_study(RunStudy(settings, Ui()))
    page = Page((run.path / "report.html").read_text(encoding="utf-8"))
    shown = "\n".join([*capsys.readouterr(), page.text.replace("\xa0", " "), *run.ui.log])
    (row,) = [row for row in run.tables()[0].rows if row["name"].endswith("pruned")]
    return run, shown, row


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


def test_a_run_that_was_disturbed_shows_no_ratio(settings, monkeypatch, capsys):
    """Another program took the machine from the middle on, while dense was timed."""
    slowed = [0.010] * 4 + [0.060] * 4
    run, shown, row = timed(monkeypatch, capsys, settings(), slowed, [0.009] * 8)
    timing = read(run.path / "timing.json")
    assert timing["speed_up"] is None and timing["disturbed"] == DISTURBED
    assert timing["bytes_limit"] == pytest.approx(run.summary["accounting"]["bytes_limit"])
    assert timing["repetitions"] == {"dense": slowed, "pruned": [0.009] * 8}
    assert timing["seconds_per_token"] == pytest.approx({"dense": 0.035, "pruned": 0.009})
    assert row["over_dense"] == "disturbed"
    assert not re.search(r"\d x (as fast|slower)", shown)
    assert "35.0" in shown and "disturbed" in shown


def test_a_quiet_run_shows_the_ratio_up_to_its_limit(settings, monkeypatch, capsys):
    run, shown, row = timed(monkeypatch, capsys, settings(), [0.0105] * 8, [0.010] * 8)
    limit = run.timing["bytes_limit"]
    assert 1.05 < limit < 1.2  # half the neurons of this model
    assert run.timing["speed_up"] == pytest.approx(1.05)
    assert f"{limit:.2f} x" in shown and row["over_dense"] == "1.05"
    assert "disturbed" not in shown.split("results: ")[0].split("FFN neurons")[0]


def test_masking_skips_no_work(settings, monkeypatch, capsys):
    """So its limit is 1, and a ratio a little above it is shown as 1."""
    masked = settings(executor="masked")
    run, _, _ = timed(monkeypatch, capsys, masked, [0.0201] * 4, [0.02] * 4)
    assert (run.timing["bytes_limit"], run.timing["speed_up"]) == (1.0, 1.0)
    sizes = run.timing["weight_bytes_per_token"]
    assert sizes["pruned"] == sizes["dense"]


def test_ratios_over_transformers_agree_with_each_other():
    repetitions = {"dense": [2.0] * 4, "pruned": [1.0] * 4, "plain": [6.0] * 4, "x": [3.0] * 4}
    timing = study.timing_document(repetitions, 2.5, "plain")
    over = {name: judged["speed_up"] for name, judged in timing["over_transformers"].items()}
    assert over == {"dense": 3.0, "pruned": 6.0, "x": 2.0} and timing["speed_up"] == 2.0
    timing = study.timing_document(repetitions, 1.5, "plain")  # more than the bytes allow
    over = timing["over_transformers"]["pruned"]
    assert over["speed_up"] is None and over["disturbed"] == DISTURBED == timing["disturbed"]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("executor", ["native", "masked"])
def test_dense_is_timed_by_the_kernels_of_the_pruned_text(settings, executor):
    """So that a speed-up is due to pruning alone."""
    run = RunStudy(settings(executor=executor), Ui(quiet=True))
    run.model, run.tokenizer, _ = load_model(run.settings, run.ui)
    run.bound = run.prepare(run.prune_config)
    dense = run._dense_run()
    assert (None if dense is None else dense.executor) == {"native": "native"}.get(executor)


TUNE = "dart-llm tune --quick."
FASTER = "On this model pruning {}: use it dense; to test your model, run "
PRUNE = (
    "On this model griffin 50 % makes decoding {} faster and multiplies perplexity by 2.1; "
    "to test your model, run "
)


@pytest.mark.parametrize(
    ("speed_up", "limit", "sentence"),
    [
        (1.04, 1.05, FASTER.format("makes decoding 4 % faster")),
        (None, 1.05, FASTER.format("makes decoding at most 5 % faster")),
        (0.9, 1.05, FASTER.format("does not make decoding faster")),
        (1.31, 1.42, PRUNE.format("31 %")),
        (None, 1.42, PRUNE.format("at most 42 %")),
    ],
)
def test_the_verdict_of_a_demo(speed_up, limit, sentence):
    accounting = {"method": "griffin", "requested_sparsity": 0.5, "bytes_limit": limit}
    other = sentence.replace("your model", "other settings")
    for is_default, text in ((True, sentence), (False, other)):
        verdict = report.verdict({"speed_up": speed_up}, 2.1, accounting, is_default=is_default)
        assert verdict == text + TUNE
