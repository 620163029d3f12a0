"""Times of a run: interleaved repetitions, and no speed-up above the bandwidth limit."""

import json
import re
import subprocess
import sys

import pytest
import torch

from dart_llm.cli.commands import _print_json
from dart_llm.experiments import timing
from dart_llm.experiments.stats import DISTURBED
from dart_llm.experiments.study import load_model
from dart_llm.models import float32_products
from dart_llm.reporting.console import Ui
from dart_llm.studies.generate import pace, report
from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.generate.study import RunStudy, run_job
from html_page import Page
from steps import shared_model
from tiny import tokens

BUSY = "while True: pass"

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

    monkeypatch.setattr(pace, "interleave", interleave)


def told(study, capsys):
    """All that a run printed and wrote for people."""
    said = capsys.readouterr()
    page = Page((study.path / "report.html").read_text(encoding="utf-8"))
    logs = [path.read_text(encoding="utf-8") for path in study.path.glob("*.log")]
    return "\n".join([said.out, said.err, page.text.replace("\xa0", " "), *study.ui.log, *logs])


def ratios(study, text):
    """Every speed-up that a run shows, as numbers; "disturbed" is none."""
    page = Page((study.path / "report.html").read_text(encoding="utf-8"))
    cell = dict(zip(page.row("decoding"), page.row("pruned"), strict=True))["x dense"]
    cards = [card[0] for card in report.cards(study.view()) if "speed" in card[1]]
    shown = " ".join([cell, *cards])
    found = re.findall(r"(\d+(?:\.\d+)?) x as fast", text)
    return [float(one) for one in (*found, *re.findall(r"\d+\.\d+", shown))]


def test_repetitions_are_interleaved_and_every_second_one_is_reversed():
    seen = []
    ways = {name: lambda name=name: seen.append(name) or 0.5 for name in "abc"}
    found = pace.interleave(ways)
    assert found == {name: [0.5] * pace.REPETITIONS for name in "abc"}
    assert "".join(seen) == "abccba" * (pace.REPETITIONS // 2)


def test_a_slow_machine_gets_fewer_repetitions(monkeypatch):
    monkeypatch.setattr(pace, "PATIENCE_S", -1.0)
    assert pace.interleave({"a": lambda: 1.0}) == {"a": [1.0] * pace.FEWEST_REPETITIONS}


def test_the_end_of_a_text_leaves_room_for_a_repetition():
    ids = torch.tensor([[1, 2, 3]])
    assert pace.text_end(ids, [4, 5], 8, None).tolist() == [[1, 2, 3, 4, 5]]
    long = list(range(100))
    assert pace.text_end(ids, long, 8, 1000).tolist() == [long[-pace.TAIL :]]
    assert pace.text_end(ids, long, 8, 8 + timing.WARM + 1 + 5).tolist() == [long[-5:]]


def test_the_dtype_in_which_transformers_decodes_fastest(monkeypatch):
    """Float32 is tried beside the model's own dtype, where there is memory for it."""
    model = shared_model("llama").bfloat16()
    took = {torch.bfloat16: 0.02, torch.float32: 0.01}
    monkeypatch.setattr(
        pace,
        "decode",
        lambda model, ids, tokens, make: {"steps_s": [9.0, took[model.dtype], 9.0]},
    )
    try:
        plain = list(pace.untouched(model, False, pytest.fail))
        assert [one.dtype for one in plain] == [torch.float32, torch.bfloat16]
        assert plain[1] is model
        assert pace.fastest(iter(plain), tokens()).dtype == torch.float32
        took[torch.float32] = 0.03
        assert pace.fastest(iter(plain), tokens()) is model
        monkeypatch.setattr(float32_products, "available", lambda: 0)
        assert list(pace.untouched(model, False, pytest.fail)) == [model]
        assert list(pace.untouched(model, True, lambda: "dequantised")) == ["dequantised"]
    finally:
        model.float()
    assert [one.dtype for one in pace.untouched(model, False, pytest.fail)] == [torch.float32]


def test_a_run_that_was_disturbed_shows_no_ratio(gpt2, tmp_path, monkeypatch, capsys):
    """Another program took the machine from the middle on, while dense was timed."""
    slowed = [0.010] * 4 + [0.060] * 4
    with_times(monkeypatch, {"dense": slowed, "pruned": [0.009] * 8})
    study = run_job(settings(gpt2, tmp_path), Ui())
    found = json.loads((study.path / "timing.json").read_text(encoding="utf-8"))
    accounting = study.summary["accounting"]
    assert found["speed_up"] is None and found["disturbed"] == DISTURBED
    assert found["bytes_limit"] == pytest.approx(accounting["bytes_limit"])
    assert found["scatter"] > 0.25
    assert found["repetitions"] == {"dense": slowed, "pruned": [0.009] * 8}
    assert found["seconds_per_token"] == pytest.approx({"dense": 0.035, "pruned": 0.009})
    everything = told(study, capsys)
    assert ratios(study, everything) == [] and " x slower" not in everything
    assert "9.0 ms: disturbed: measure with dart-llm bench speed" in everything
    names = [card for card in report.cards(study.view()) if card[0] == "disturbed"]
    assert names == [
        (
            "disturbed",
            "speed of decoding over dense by transformers",
            "measure with dart-llm bench speed",
        )
    ]
    _print_json(study.answer())
    assert '"speed_up": null' in capsys.readouterr().out


def test_a_quiet_run_shows_the_ratio_up_to_its_limit(gpt2, tmp_path, monkeypatch, capsys):
    with_times(monkeypatch, {"dense": [0.0105] * 8, "pruned": [0.010] * 8})
    study = run_job(settings(gpt2, tmp_path), Ui())
    limit = study.timing["bytes_limit"]
    assert 1.05 < limit < 1.2  # half the neurons of this model
    assert study.timing["speed_up"] == pytest.approx(1.05)
    everything = told(study, capsys)
    assert f"10.0 ms: 1.05 x as fast (bandwidth limit {limit:.2f} x)" in everything
    assert set(ratios(study, everything)) == {1.05} and "disturbed:" not in everything


def test_busy_loops_from_the_middle_on(gpt2, tmp_path, monkeypatch, capsys):
    """Whatever the machine does meanwhile, what is shown is never above the limit."""
    loops = []
    seconds, timed = pace.Decoding.seconds, []

    def disturbed(decoding, ids, count):
        timed.append(seconds(decoding, ids, count))
        if len(timed) == pace.REPETITIONS and not loops:  # half of those of two texts
            loops.extend(subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2))
        return timed[-1]

    monkeypatch.setattr(pace.Decoding, "seconds", disturbed)
    try:
        study = run_job(settings(gpt2, tmp_path), Ui())
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert len(loops) == 2 and len(study.timing["repetitions"]["dense"]) >= pace.FEWEST_REPETITIONS
    limit, speed_up = study.timing["bytes_limit"], study.timing["speed_up"]
    assert speed_up is None or speed_up <= limit
    assert all(one <= round(limit, 2) for one in ratios(study, told(study, capsys)))


def test_masking_skips_no_work(gpt2, tmp_path, monkeypatch):
    """So its limit is 1, and what is a little above it is shown as that."""
    with_times(monkeypatch, {"dense": [0.0201] * 4, "pruned": [0.02] * 4})
    study = run_job(settings(gpt2, tmp_path, executor="masked"), Ui(quiet=True))
    assert (study.timing["bytes_limit"], study.timing["speed_up"]) == (1.0, 1.0)
    sizes = study.timing["weight_bytes_per_token"]
    assert sizes["pruned"] == sizes["dense"]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("executor", ["native", "masked"])
def test_dense_is_timed_by_the_kernels_of_the_pruned_text(gpt2, tmp_path, executor):
    """So that a speed-up is due to pruning alone."""
    study = RunStudy(settings(gpt2, tmp_path, executor=executor), Ui(quiet=True))
    study.model, study.tokenizer, _ = load_model(study.settings, study.ui)
    study.bound = study.prepare(study.prune_config)
    dense = study._dense_run()
    assert (None if dense is None else dense.executor) == {"native": "native"}.get(executor)
