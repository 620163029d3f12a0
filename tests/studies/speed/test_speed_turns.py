"""Two rows in turns: what is timed, and that neither disturbs the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dart_llm.session.run import prune
from dart_llm.studies.speed import timing as speed_turns
from dart_llm.studies.speed.summary import WARM
from dart_llm.studies.speed.timing import paired_timing as in_turns
from tiny import tiny, tokens


class Listened:
    """A model that notes the tokens of every forward; attached or not does not matter."""

    def __init__(self, model: Any) -> None:
        self.model, self.fed = model, []
        model.register_forward_pre_hook(self._take, with_kwargs=True)

    def _take(self, module: Any, args: Any, kwargs: Any) -> None:
        self.fed.append((args[0] if args else kwargs["input_ids"]).tolist()[0])


def greedy(model: Any, ids: Tensor, count: int) -> list[int]:
    made = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return made[0, ids.shape[1] :].tolist()


@pytest.fixture
def model() -> Any:
    return tiny("llama")


def test_both_rows_go_on_where_they_stopped(model, monkeypatch) -> None:
    monkeypatch.setattr(speed_turns, "TURN", 3)
    ids = tokens(1, 8, seed=3)
    wanted = greedy(model, ids, 3 * (3 + WARM))
    settings = {"sparsity": 0.5, "masking_step": 1000, "executor": "masked"}
    listened = Listened(model)
    found = in_turns(model, ids, 9, lambda: prune(model, "griffin", **settings), lambda: None)
    turns = found["turns"]
    assert len(turns) == 3
    for turn in turns:
        assert [len(turn[name]["steps_s"]) for name in ("own", "base")] == [3, 3]
        assert turn["own"]["phases"] == ["observe"] * 3 and turn["base"]["phases"] == ["dense"] * 3
        assert turn["own"]["built"] == turn["base"]["built"] == []
    prompts = [at for at, fed in enumerate(listened.fed) if len(fed) == 8]
    assert len(prompts) == 2
    steps = [fed[0] for fed in listened.fed if len(fed) == 1]
    # nothing is pruned: both rows decode the same text, the base first in the first turn
    each = 3 + WARM
    order = [steps[k * each : (k + 1) * each] for k in range(6)]
    assert order[0] + order[3] + order[4] == wanted
    assert order[1] + order[2] + order[5] == wanted
    assert not any("forward" in vars(part) for part in model.modules())


def test_masks_that_are_built_in_a_turn_are_told_apart(model, monkeypatch) -> None:
    monkeypatch.setattr(speed_turns, "TURN", 4)
    make = lambda: prune(  # noqa: E731
        model, "griffin", sparsity=0.5, masking_step=WARM + 2, executor="masked"
    )
    (turn,) = in_turns(model, tokens(1, 8, seed=3), 4, make, lambda: None)["turns"]
    assert turn["own"]["built"] == [2]
    assert turn["own"]["phases"] == ["observe"] * 2 + ["pruned"] * 2
    assert torch.is_inference_mode_enabled() is False
