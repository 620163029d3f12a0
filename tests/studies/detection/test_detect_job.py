"""``dart-llm detect``: passages in tokens, settings, document, tables and plots.

That it resumes, and what it answers, is tested for all studies in tests/experiments.
"""

import csv
import json
import re

import pytest
import torch

from dart_llm.cli.options import parameters
from dart_llm.data.passages import Passage, Text, Topic, check, digest, shipped, tokens
from dart_llm.data.passages import tokenised_passages as passages
from dart_llm.errors import ConfigError
from dart_llm.experiments.study import run_study
from dart_llm.files import write_lines
from dart_llm.reporting import figures
from dart_llm.reporting.console import Ui
from dart_llm.settings import merge
from dart_llm.studies.detection import report
from dart_llm.studies.detection.replay import outcome, rates
from dart_llm.studies.detection.settings import DetectSettings
from dart_llm.studies.detection.signals import SIGNALS
from dart_llm.studies.detection.study import DetectionStudy, plan, read_passage
from detect_cases import folder, passage

# Passages as tokens.


class Spans:
    """A tokenizer of words with a special token ahead, and blanks that belong to the next word."""

    is_fast = True

    def __call__(self, text, verbose=True, **more):
        self.spans = [(0, 0), *((m.start(), m.end()) for m in re.finditer(r"\s*\S+", text))]
        self.text = text
        assert self.is_fast or not more, "only fast tokenizers know places"
        return {"input_ids": list(range(len(self.spans))), "offset_mapping": self.spans}

    def decode(self, ids, skip_special_tokens):
        return "".join(self.text[start:end] for start, end in (self.spans[i] for i in ids))


@pytest.mark.parametrize("is_fast", [True, False])
def test_a_token_that_holds_the_break_too_belongs_to_the_new_topic(is_fast):
    one, tokenizer = Passage("x", "a bb\n\ncc d", (Topic("a", "a"), Topic("b", "b")), (6,)), Spans()
    tokenizer.is_fast = is_fast
    assert tokens(one, tokenizer).changes == (3,)  # special, a, bb, then the break with cc


def test_what_does_not_fit_is_refused_by_name():
    text = Text("07", torch.zeros(900, dtype=torch.long), (300,), ("a", "b"))
    check([text], 299, 900)
    check([text], 299, None)
    with pytest.raises(ConfigError, match='first change of passage "07" is its token 300, within'):
        check([text], 300, None)
    with pytest.raises(ConfigError, match="has 900 tokens, and the model's context holds 899"):
        check([text], 100, 899)
    assert all(passages(name, None) == shipped() for name in (None, "", "shipped"))
    assert digest(passages(None, 2)) == digest(shipped()[:2]) != digest(shipped())


# Settings.


REFUSED = [
    ({"method": "dart"}, "leave out method"),
    ({"sparsity": 0.5}, "leave out sparsity"),
    ({"signals": "hiden"}, "did you mean hidden"),
    ({"signals": " , "}, "--signals is empty"),
    ({"thresholds": "0,x"}, 'thresholds "0,x" must be numbers'),
    ({"thresholds": "0,inf"}, "finite"),
    ({"windows": "1"}, "1 is too small: give 2 or more"),
    ({"counts": "0,1"}, "0 is too small: give 1 or more"),
    ({"attn_implementation": "sdpa"}, "only eager attention gives: drop"),
    ({"rules": "papr"}, "did you mean paper"),
    ({"rules": "griffin"}, "griffin never re-masks"),
]


@pytest.mark.parametrize(("given", "error"), REFUSED)
def test_bad_settings_are_one_sentence(given, error):
    with pytest.raises(ConfigError, match=error):
        plan(merge(DetectSettings, given, environment={}))


def test_defaults_and_what_a_study_of_signals_does_not_take():
    asked = merge(DetectSettings, {}, environment={})
    assert asked.rule_names() == ("dart", "paper", "published", "interval 64", "dart-prompt")
    assert asked.experiment == "detect-smollm2-135m" and len(plan(asked).sweep) == 3 * 11
    names = {parameter.name for parameter in parameters(DetectSettings)}
    assert {"model", "seed", "signals", "horizon", "results_dir"} <= names
    assert not names & {"method", "sparsity", "masks", "drift", "budget", "executor"}


# A study on the tiny model.


def settings(root, **more):
    file = root / "passages.jsonl"
    write_lines(file, [passage(number).to_dict() for number in (1, 2, 3)])
    given = {"model": str(folder()), "passages": str(file), "device": "cpu"}
    given |= {"results_dir": str(root / "results"), "prompt_tokens": 120, "horizon": 60}
    given |= {"thresholds": "0,2", "counts": "1,2"}
    return merge(DetectSettings, {**given, **more}, environment={})


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return run_study(DetectionStudy(settings(tmp_path_factory.mktemp("whole")), Ui(quiet=True)))


def test_a_line_is_the_study_of_a_passage(job):
    found = lines(job.path / "results.jsonl")
    assert [line["key"] for line in found] == ["p1", "p2", "p3"]
    config = read(job.path / "config.json")
    assert config["prune"]["method"] == "dense" and "sparsity" not in config["settings"]
    assert job.model.config._attn_implementation == "eager"
    text = tokens(passage(2), job.tokenizer)
    assert text.changes == passage(2).changes  # one token per character
    again = read_passage(job.model, text, plan(job.settings))
    assert found[1] == json.loads(json.dumps(again))
    assert found[1]["passage"]["changes"] == list(text.changes)
    keys = [(rule["signal"], rule["rule"]) for rule in found[0]["rules"]]
    windowed = [(s, r) for r in ("dart", "paper", "published") for s in SIGNALS]
    assert keys == [*windowed, ("none", "interval 64"), *((s, "dart-prompt") for s in SIGNALS)]


def test_detection_json_pools_the_lines(job):
    found, rows = read(job.path / "detection.json"), lines(job.path / "results.jsonl")
    assert list(found)[:4] == ["schema", "rows", "curves", "signals"]
    for place, row in enumerate(found["rows"]):
        read_of = [(line["rules"][place]["triggers"], line["passage"]) for line in rows]
        want = rates([outcome(at, p["changes"], 120, p["tokens"], 60) for at, p in read_of])
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
    with (job.path / "detection.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(found["rows"]) == 21
    for row, record in zip(found["rows"], table, strict=True):
        assert (record["rule"], float(record["rate"])) == (row["rule"], row["rate"])
        assert float(record["gain_interval.high"]) == row["gain_interval"][1]
    text = (job.path / "detection.md").read_text(encoding="utf-8")
    assert text.count("\n| attention-scores | ") == 4 + 1 + 4  # rules, signal, curves
    assert "3 changes in 3 passages, prompt 120 tokens, horizon 60 tokens" in text
    assert "Largest gain over a blind rule" in text


def test_the_plot_shows_the_points(job):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    found = read(job.path / "detection.json")
    (plot,) = report.make_curves(found)
    for narrow in (False, True):
        figure = Figure()
        with figures._style() as palette:
            plot.draw(figure, palette, narrow)
        panels = figure.axes[1:]
        labels = [axes.get_ylabel().partition(" (")[0] for axes in panels]
        assert labels == ["changes detected", "mean delay"] * 2
        for axes in panels:
            assert {line.get_label() for line in axes.lines} == {*SIGNALS, report.BLIND}
    line = next(line for line in panels[0].lines if line.get_label() == "hidden")
    (curve,) = (c for c in found["curves"] if (c["signal"], c["n0"]) == ("hidden", 1))
    want = [(p["false_alarms_per_1000"], 100 * p["rate"]) for p in curve["points"]]
    assert list(zip(*line.get_data(), strict=True)) == [pytest.approx(point) for point in want]


def test_blind_line_by_hand():
    for name, rate, want in (
        ("rate", 0.005, 0.64),
        ("rate", 0.05, 1.0),
        ("delay_with_misses", 0.0, 128),
        ("delay_with_misses", 1 / 128, 64),
        ("delay_with_misses", 0.02, 25),
    ):
        assert report.blind_rules(name, rate, 128) == pytest.approx(want)


def test_without_the_scores_attention_is_as_asked(tmp_path):
    given = {"signals": "attention", "attn_implementation": "sdpa", "windows": "5,10"}
    done = run_study(DetectionStudy(settings(tmp_path, limit=1, **given), Ui(quiet=True)))
    assert done.model.config._attn_implementation == "sdpa"
    assert "notes" not in done.summary
    assert [len(done.summary[name]) for name in ("rows", "curves", "passages")] == [5, 4, 1]
    names = [plot.name for plot in report.make_curves(done.summary)]
    assert names == ["detection", "detection-w10"]
    assert done.summary["rows"][0]["rate_interval"] is None
