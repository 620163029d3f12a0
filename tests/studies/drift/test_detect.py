"""``dart-llm detect``: passages in tokens, settings, document.

That it resumes, and what it answers, is tested for all studies in tests/experiments.
"""

import json
import re

import pytest

from dart_llm.data.passages import Topic
from dart_llm.errors import ConfigError
from dart_llm.experiments.study import run_study
from dart_llm.files import write_lines
from dart_llm.reporting.console import Ui
from dart_llm.settings import merge
from dart_llm.studies.drift import detect_report
from dart_llm.studies.drift.detect import DetectionStudy, study_passage, watchers
from dart_llm.studies.drift.replay import outcome, rates
from dart_llm.studies.drift.settings import DetectSettings
from dart_llm.studies.drift.sources import Source, load_passages, read_passage
from detect_cases import folder, passage
from written import lines, read


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
    text, tokenizer = "a bb dd\n\ncc d", Spans()
    tokenizer.is_fast = is_fast
    source = Source("x", text, (Topic("a", "a"), Topic("b", "b")), (text.index("cc"),))
    assert read_passage(source, tokenizer, 2, None).changes == (4,)  # special, a, bb, dd, cc


REFUSED = [
    ({"method": "dart"}, 'unknown setting "method"'),
    ({"signals": "hiden"}, "did you mean hidden"),
    ({"signals": " , "}, "--signals is empty"),
    ({"thresholds": "0,x"}, "thresholds.1 = 'x': input should be a valid number"),
    ({"thresholds": "0,inf"}, "finite"),
    ({"counts": "0,1"}, "0 is too small: give 1 or more"),
    ({"attn_implementation": "sdpa"}, "only eager attention gives: drop"),
    ({"rules": "griffin"}, "griffin never re-masks"),
]


@pytest.mark.parametrize(("given", "error"), REFUSED)
def test_bad_settings_are_one_sentence(given, error):
    with pytest.raises(ConfigError, match=error):
        watchers(merge(DetectSettings, given, environment={}))


def settings(root, **more):
    file = root / "passages.jsonl"
    write_lines(file, [passage(number).to_dict() for number in (1, 2, 3)])
    given = {"model": str(folder()), "passages": str(file), "device": "cpu"}
    given |= {"results_dir": str(root / "results"), "prompt_tokens": 120, "horizon": 60}
    given |= {"thresholds": "0,2", "counts": "1,2"}
    return merge(DetectSettings, {**given, **more}, environment={})


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return run_study(DetectionStudy(settings(tmp_path_factory.mktemp("whole")), Ui(quiet=True)))


def test_a_line_is_the_study_of_a_passage(job):
    found = lines(job.path / "results.jsonl")
    assert [line["key"] for line in found] == ["p1", "p2", "p3"]
    assert job.model.config._attn_implementation == "eager"
    reading = read_passage(load_passages(job.settings)[1], job.tokenizer, 120, None)
    assert reading.changes == passage(2).changes  # one token per character
    again = study_passage(job.model, reading, job.settings)
    assert found[1] == json.loads(json.dumps(again))
    assert found[1]["passage"]["changes"] == list(reading.changes)


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
    assert all([p["k"] for p in curve["points"]] == [0, 2] for curve in curves)
    for curve in curves:  # a lower threshold never gives more alarms at n0 = 1
        many, few = (point["alarms_per_1000"] for point in curve["points"])
        assert few <= many or curve["n0"] > 1
    assert [s["layers"] for s in found["signals"]] == [[3], [2], [2, 3], [], [3]]
    assert all(0 <= signal["auc"] <= 1 for signal in found["signals"])


def test_blind_line_by_hand():
    for name, rate, want in (
        ("rate", 0.005, 0.64),
        ("rate", 0.05, 1.0),
        ("delay_with_misses", 0.0, 128),
        ("delay_with_misses", 1 / 128, 64),
        ("delay_with_misses", 0.02, 25),
    ):
        assert detect_report.blind_rule(name, rate, 128) == pytest.approx(want)
