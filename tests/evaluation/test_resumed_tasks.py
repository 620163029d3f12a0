"""Interrupted measurements of every task resume to the same bytes and compute nothing twice."""

import json
from pathlib import Path

import pytest

from dart_llm.evaluation import tasks
from dart_llm.session.run import BoundMethod, prepare
from lm_cases import Forwards, candidate, loaded, options
from summary_cases import DOCUMENTS as ROWS
from summary_cases import Kept, write_documents

SLICES = {"limit": 4, "prompt_tokens": 40, "scored_tokens": 30}
INTERVAL = {
    "min_evidence": 0,
    "drift": {"rule": "interval 8", "min_distance": 0, "max_dense_share": 1.0},
    "remask": {"observe_tokens": 3},
}
TEXT, DOCUMENTS = "perplexity:text.txt", "summarize:four.jsonl"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "".join(f"number {n * n} comes before {n * 7}. " for n in range(60))
    Path("text.txt").write_text(text, encoding="utf-8")
    write_documents(Path("four.jsonl"))


def everything(result):
    """All that is kept of a measurement, as bytes would be."""
    return json.dumps([result.to_dict(), list(result.samples)])


def resumed(method, task, options):
    """A measurement after two interruptions."""

    def stop(items):
        raise InterruptedError

    parts, steps = Kept(), []
    for _ in range(2):
        with pytest.raises(InterruptedError):
            tasks.measure(method, task, options, parts, stop)
    whole = tasks.measure(method, task, options, parts, steps.append)
    count = tasks.count(task, options, method.tokenizer, method.model)
    assert sum(steps) == count == len(whole.items)  # not per repeat
    return whole


@pytest.mark.contract("resume gives the same bytes")
@pytest.mark.parametrize(
    ("task", "method", "settings", "how"),
    [
        ("tiny_choice", "griffin", {}, {"protocol": "published"}),
        ("tiny_short", "griffin", {}, {"protocol": "full"}),
        ("tiny_roll", "dart", {}, {"prompt_tokens": 80, "scored_tokens": 30}),
        ("tiny_draw", "griffin", {}, {}),
        ("tiny_group", "dart", {}, {}),
        (TEXT, "dart", INTERVAL, SLICES),
        (TEXT, "griffin", {}, {**SLICES, "protocol": "published"}),
        (TEXT, "dart", {}, {"protocol": "standard", "window": 100, "limit": 4}),
        (DOCUMENTS, "dart", {}, {"max_output": 12}),
        (DOCUMENTS, "griffin", {}, {"max_output": 12, "protocol": "full"}),
    ],
)
def test_nothing_is_computed_twice_and_the_result_is_the_same(task, method, settings, how):
    bound, asked = candidate(method, **settings), options(**how)
    with bound.run():  # what the model teaches is learnt before anything is counted
        pass
    with Forwards(bound.model) as ran:
        whole = tasks.measure(bound, task, asked, Kept())
    with Forwards(bound.model) as again:
        assert everything(resumed(bound, task, asked)) == everything(whole)
    assert sorted(again.shapes) == sorted(ran.shapes)


def test_masks_that_were_chosen_beforehand_resume_alike(tmp_path):
    config = candidate("wanda", calibration={"sequences": 4, "length": 64}).config
    calibrated = prepare(*loaded(), config, "text.txt", str(tmp_path / "cache"))
    assert calibrated.fixed_masks is not None
    given = BoundMethod(*loaded(), candidate("griffin").config, {0: [1, 2, 3], 2: [5, 7]})
    for bound in (calibrated, given):
        whole = tasks.measure(bound, "tiny_choice", options(), Kept())
        assert everything(resumed(bound, "tiny_choice", options())) == everything(whole)
        assert 0 < whole.accounting["achieved_sparsity"] < 1


@pytest.mark.parametrize(
    ("task", "how", "other"),
    [
        ("tiny_choice", {}, {"num_fewshot": 1}),
        (TEXT, SLICES, {"scored_tokens": 31}),
        (DOCUMENTS, {"max_output": 12}, {"max_output": 13}),
    ],
)
def test_parts_serve_only_what_they_were_computed_for(task, how, other):
    griffin, parts, measured = candidate("griffin"), Kept(), []
    methods = [(griffin, {}), (griffin, {"protocol": "full"}), (griffin, other)]
    methods += [(candidate(), {}), (candidate("griffin", 0.25), {})]
    for ids in [[1, 2]] if task == "tiny_choice" else [[1, 2], [1, 3]]:
        methods.append((BoundMethod(*loaded(), griffin.config, {0: ids}), {}))
    for number, (method, changes) in enumerate(methods, 1):
        measured.append(tasks.measure(method, task, options(**{**how, **changes}), parts))
        assert len(parts.parts) == 4 * number
    again = tasks.measure(griffin, task, options(**how), parts)
    assert everything(again) == everything(measured[0])
    assert len(parts.parts) == 4 * len(measured)


def test_parts_of_a_text_or_document_are_not_those_of_another():
    griffin, parts, documents = candidate("griffin"), Kept(), {"max_output": 12}
    for task, how in ((TEXT, SLICES), (DOCUMENTS, documents)):
        tasks.measure(griffin, task, options(**how), parts)
    Path("text.txt").write_text(Path("text.txt").read_text("utf-8")[::-1], encoding="utf-8")
    rows = [{**row, "summary": "another one."} for row in ROWS]
    write_documents(Path("four.jsonl"), *rows)
    tasks.measure(griffin, TEXT, options(**SLICES), parts)
    assert len(parts.parts) == 12
    result = tasks.measure(griffin, DOCUMENTS, options(**documents), parts)
    assert len(parts.parts) == 16
    assert [sample["reference"] for sample in result.samples] == ["another one."] * 4
    assert result.items == tasks.measure(griffin, DOCUMENTS, options(**documents), Kept()).items
