"""An interrupted lm-eval measurement computes nothing twice and ends with the same bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dart_llm.evaluation.masks_seen import TakenMasks
from dart_llm.evaluation.measurement import Measurement
from dart_llm.session.prepare import PreparedMethod as Candidate
from dart_llm.session.prepare import prepare
from dart_llm.session.run import Run
from lm_cases import Forwards, candidate, loaded, measured, options
from summary_cases import Kept


class Stop(Exception):
    """The interruption."""


def stopping(after: int) -> Any:
    """An ``advance`` that interrupts when ``after`` documents are done."""
    seen: list[int] = []

    def advance(documents: int) -> None:
        seen.extend([1] * documents)
        if len(seen) >= after:
            raise Stop

    return advance


def everything(found: Measurement) -> str:
    """All that is kept of a measurement, as bytes would be."""
    counts = [count.tolist() for count in found.counts]
    return json.dumps([found.to_dict(), list(found.samples), counts])


def resumed(
    found: Candidate, task: str, after: int, **how: Any
) -> tuple[Measurement, list[tuple[int, int]]]:
    """Interrupted twice, then finished; and every forward that ran."""
    parts = Kept()
    with Forwards(found.model) as ran:
        for _ in range(2):
            with pytest.raises(Stop):
                measured(found, task, options(**how), parts, stopping(after))
        return measured(found, task, options(**how), parts), ran.shapes


@pytest.mark.contract("resume gives the same bytes")
@pytest.mark.parametrize(
    ("task", "method", "how"),
    [
        ("tiny_choice", None, {}),
        ("tiny_choice", "dart", {}),
        ("tiny_choice", "griffin", {"protocol": "full"}),
        ("tiny_choice", "griffin", {"protocol": "published"}),
        ("tiny_choice", "static", {}),
        ("tiny_short", "griffin", {}),
        ("tiny_roll", "dart", {"prompt_tokens": 80, "scored_tokens": 30}),
        ("tiny_write", "griffin", {}),
        ("tiny_draw", None, {}),
        ("tiny_draw", "griffin", {}),
        ("tiny_group", "griffin", {}),
    ],
)
def test_no_context_is_computed_twice_and_the_result_is_the_same(task, method, how):
    found = candidate(method)
    with Forwards(found.model) as ran:
        whole = measured(found, task, options(**how))
    again, shapes = resumed(found, task, 1, **how)
    assert everything(again) == everything(whole)
    assert len(shapes) == len(ran.shapes)
    assert sorted(shapes) == sorted(ran.shapes)


def test_masks_that_were_chosen_beforehand_count_alike_after_an_interruption(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the tide comes in twice a day and goes out again. " * 60, encoding="utf-8")
    settings = {"calibration": {"sequences": 4, "length": 64}}
    config = candidate("wanda", **settings).config
    own = prepare(*loaded(), config, str(text), str(tmp_path / "cache"))
    assert own.held is not None
    given = Candidate(*loaded(), candidate("griffin").config, {0: [1, 2, 3], 2: [5, 7]})
    for found in (own, given):
        whole = measured(found, "tiny_choice")
        again, _ = resumed(found, "tiny_choice", 1)
        assert everything(again) == everything(whole)
        assert whole.masks == 4  # one per context, as for masks that are chosen from it
    assert whole.counts[0].tolist()[:5] == [0, 4, 4, 4, 0]
    assert len(whole.counts[1]) == 0


def test_parts_of_one_method_or_protocol_are_not_those_of_another():
    parts = Kept()
    first = measured(candidate("griffin"), "tiny_choice", options(), parts)
    size = len(parts.parts)
    for found, how in (
        (candidate("griffin", 0.25), options()),
        (candidate(), options()),
        (candidate("griffin"), options(protocol="full")),
        (candidate("griffin"), options(num_fewshot=1)),
    ):
        other = measured(found, "tiny_choice", how, parts)
        assert everything(other) == everything(measured(found, "tiny_choice", how))
        assert everything(other) != everything(first)
        assert len(parts.parts) == size + 4
        size = len(parts.parts)
    assert measured(candidate("griffin"), "tiny_choice", options(), parts) == first
    assert len(parts.parts) == size


def test_masks_that_are_announced_twice_count_once():
    model = loaded()[0]
    config = candidate("griffin").config
    counter = TakenMasks()
    with Run(model, config) as run, torch.no_grad():
        run.on_masks = counter
        for text in (range(3, 33), range(20, 50)):
            run.hold(None)
            model(torch.tensor([list(text)]))
            run.hold(run.select())  # announced when chosen ...
            with run.decoding(prompt=True):
                model(torch.tensor([list(text)]))  # ... and when applied
    assert len(counter.take()) == 2
