"""Rows that have ended: no window, no trigger, no mask and no token of theirs counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from dart_llm.pruning.drift import Rule
from dart_llm.pruning.registry import DRIFT_RULES
from dart_llm.session.run import prune
from steps import Forced, apart, generate, shared_model
from tiny import tokens


@pytest.fixture(scope="module", autouse=True)
def _eager() -> Iterator[None]:
    """A drift rule that finds every window low."""
    DRIFT_RULES.register("eager", lambda: Rule(3, lambda mu, sigma: mu + 2, 2))
    yield
    DRIFT_RULES.unregister("eager")


@pytest.mark.contract("same report whatever the batch")
@pytest.mark.parametrize("rule", ["published", "eager", "interval 2"])
def test_windows_and_re_masks_of_rows_alone(rule: str) -> None:
    """Ended rows complete no window and trigger nothing; each row drifts on its own."""
    model, ids, length = shared_model(), tokens(3, 64, seed=3), 40
    chosen = [
        tokens(1, length, seed=20)[0].tolist(),
        [*tokens(1, 21, seed=21)[0].tolist(), 2],
        [*tokens(1, 33, seed=22)[0].tolist(), 2],
    ]
    settings: dict[str, Any] = {"method": "griffin", "sparsity": 0.5, "batch": "per_row"}
    settings |= {"drift": rule, "executor": "masked"}

    def run_rows(rows: list[int]) -> tuple[Any, Tensor]:
        with prune(model, **settings) as run:
            forced = Forced(64, [chosen[row] for row in rows])
            text = {"eos_token_id": 2, "logits_processor": [forced]}
            out = generate(model, ids[rows], length, **text)
        return run, torch.stack(out.logits, 1)

    run, logits = run_rows([0, 1, 2])
    for row in range(3):
        one, single = run_rows([row])
        mine = [check for check in run.drift_checks if check.row == row]
        assert [c.step for c in mine] == [c.step for c in one.drift_checks]
        for a, b in zip(mine, one.drift_checks, strict=True):
            assert a.similarity == pytest.approx(b.similarity, abs=1e-4)
            assert (a.counter, a.trigger, a.state) == (b.counter, b.trigger, b.state)
        a, b = run.report().sequences[row], one.report().sequences[0]
        assert [(m.step, m.cause, m.kept) for m in a.remasks] == [
            (m.step, m.cause, m.kept) for m in b.remasks
        ]
        assert a.dense_tokens == b.dense_tokens and a.decoded_tokens == b.decoded_tokens
        assert apart(logits[row, : single.shape[1]], single[0]) < 2e-5
    wanted = {
        # 39, 21 and 33 tokens are fed; eager: masks at 7 and 26 (then 4 windows arm it anew)
        "eager": {"first": 3, "drift": 2 + 1 + 2},
        "interval 2": {"first": 3, "interval": 12 + 6 + 10},
    }
    assert run.report().remask_causes == wanted.get(rule, {"first": 3})


@pytest.mark.parametrize("rule", ["published", "paper", "eager"])
def test_shared_windows_leave_ended_rows_out(rule: str) -> None:
    """A batch whose other rows have ended decides as its living row would."""
    model, ids, length = shared_model(), tokens(3, 64, seed=3), 60
    live = tokens(1, length, seed=20)[0].tolist()
    chosen = [[5, 2], live, [6, 2]]

    def run_rows(rows: list[int], masks: dict[int, Tensor]) -> Any:
        with prune(model, "griffin", sparsity=0.5, drift=rule, score="weight") as run:
            forced = Forced(64, [chosen[row] for row in rows])
            generate(model, ids[rows], length, eos_token_id=2, logits_processor=[forced])
        return run

    both, one = run_rows([0, 1, 2], {}), run_rows([1], {})
    mine = [(c.step, c.counter, c.trigger, c.state) for c in both.drift_checks if c.row == 1]
    assert mine == [(c.step, c.counter, c.trigger, c.state) for c in one.drift_checks]
    assert len(mine) > 4
    dead = {c.row for c in both.drift_checks if c.step > 5}
    assert dead == {1}, "ended rows complete no window"
    assert both.report().decoded_tokens == one.report().decoded_tokens + 2


def test_pad_tokens_that_a_living_row_chooses_still_count() -> None:
    model, ids = shared_model(), tokens(2, 20)
    rows = [[7, 0, 8, 9, 10, 11], [12, 13, 14, 2]]
    for end, decoded in ((2, 5 - 1 + 3), (None, 10)):
        with prune(model, "griffin", sparsity=0.5) as run:
            forced = [Forced(20, rows)]
            generate(model, ids, 6, eos_token_id=end, pad_token_id=0, logits_processor=forced)
        # with an end token, padding cannot be told from a chosen pad token: that one is left out
        assert run.report().decoded_tokens == decoded


def test_pad_token_that_is_the_end_token() -> None:
    model, ids = shared_model(), tokens(2, 20)
    rows = [[7, 6, 8, 9, 10, 11], [12, 13, 14, 2]]
    with prune(model, "griffin", sparsity=0.5) as run:
        generate(model, ids, 6, eos_token_id=2, pad_token_id=2, logits_processor=[Forced(20, rows)])
    assert run.report().decoded_tokens == 5 + 3


class _EndRow(StoppingCriteria):
    """Ends row 1 once it holds 23 tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        done[1] = input_ids.shape[1] >= 23
        return done


@pytest.mark.parametrize("batch", ["shared", "per_row"])
def test_rows_that_another_criterion_ends(batch: str) -> None:
    model, ids = shared_model(), tokens(2, 20)
    rows = [[7, 6, 8, 9, 10, 11, 12, 13], [12, 13, 14, 15, 16, 17, 18, 19]]
    with prune(model, "griffin", sparsity=0.5, batch=batch) as run:
        text: dict[str, Any] = {"eos_token_id": 2, "pad_token_id": 0}
        text["stopping_criteria"] = StoppingCriteriaList([_EndRow()])
        out = generate(model, ids, 8, logits_processor=[Forced(20, rows)], **text)
    assert out.sequences[1, 20:].tolist() == [12, 13, 14, 0, 0, 0, 0, 0]
    assert run.report().decoded_tokens == 7 + 3, "the last chosen token of row 1 is fed as well"


def test_several_end_tokens() -> None:
    model, ids = shared_model(), tokens(3, 20)
    rows = [[7, 6, 8, 9, 10, 11], [12, 13, 14, 2], [15, 5]]
    with prune(model, "griffin", sparsity=0.5) as run:
        forced = [Forced(20, rows)]
        generate(model, ids, 6, eos_token_id=[2, 5], pad_token_id=0, logits_processor=forced)
    assert run.report().decoded_tokens == 5 + 3 + 1
