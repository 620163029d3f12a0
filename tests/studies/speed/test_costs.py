"""benchmarks/costs.py: two rows in turns, neither disturbs the other; costs by hand."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from dart_llm.session.run import prune
from dart_llm.studies.speed.summary import WARM
from shells import ROOT
from speed_cases import sample
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


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("costs")


def test_both_rows_go_on_where_they_stopped(model, costs, monkeypatch) -> None:
    monkeypatch.setattr(costs, "TURN", 3)
    ids = tokens(1, 8, seed=3)
    wanted = greedy(model, ids, 3 * (3 + WARM))
    settings = {"sparsity": 0.5, "masking_step": 1000, "executor": "masked"}
    listened = Listened(model)
    make = lambda: prune(model, "griffin", **settings)  # noqa: E731
    turns = costs.paired_timing(model, ids, 9, make, lambda: None)
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


def test_masks_that_are_built_in_a_turn_are_told_apart(model, costs, monkeypatch) -> None:
    monkeypatch.setattr(costs, "TURN", 4)
    make = lambda: prune(  # noqa: E731
        model, "griffin", sparsity=0.5, masking_step=WARM + 2, executor="masked"
    )
    (turn,) = costs.paired_timing(model, tokens(1, 8, seed=3), 4, make, lambda: None)
    assert turn["own"]["built"] == [2]
    assert turn["own"]["phases"] == ["observe"] * 2 + ["pruned"] * 2
    assert torch.is_inference_mode_enabled() is False


def turns(*pairs: tuple[list[float], list[float]], phases: str = "o") -> list[dict[str, Any]]:
    """What the row and the one it is held against took, turn by turn."""
    names = ("own", "base")
    return [
        {name: sample(ms, phases * len(ms)) for name, ms in zip(names, pair, strict=True)}
        for pair in pairs
    ]


def test_costs_by_hand(costs) -> None:
    attached = turns(([41, 41, 90], [40, 40, 40]), ([46, 46], [44, 44]))
    assert costs.differences("attaching", attached) == pytest.approx([1, 2])  # medians
    observed = turns(([11.0, 13.0], [10.0, 10.0]))
    assert costs.differences("observing", observed) == pytest.approx([2])  # rare steps count
    # a method whose masks are made beforehand observes nothing
    assert costs.differences("observing", turns(([11.0], [10.0]), phases="p")) == []
    one = {
        "own": sample([8.0, 8.9, 30.0, 40.0], "pppo", built=(2,)),
        "base": sample([8.0, 8.0, 8.0], "ppp"),
    }
    assert costs.differences("drift checks", [one]) == pytest.approx([0.45])
    assert costs.builds(sample([10, 10, 10, 20, 14, 10], "pppopp", built=(4,))) == [
        pytest.approx(4)
    ]
    assert costs.builds(sample([10], "o")) == []


def test_every_cost_of_a_method_is_measured(costs, model) -> None:
    cases = costs.cases("dart", 0.5, "compact", 12)
    kinds = ["attaching", "observing", "drift checks", "a re-mask"]
    assert [case.kind for case in cases] == kinds
    slim = [case.row for case in costs.cases("griffin", 0.5, "slim", 12)]
    assert slim[2:] == ["griffin observing, slim", "griffin re-masking, slim"]
    rows = costs.measure(
        model, None, tokens(1, 8, seed=3), costs.cases("griffin", 0.5, "compact", 12), 12, 1
    )
    assert [row["cost"] for row in rows] == ["attaching", "observing", "a re-mask"]
    assert rows[2]["values"] == 4  # two pruned tokens, one observed, a mask, and so on
    assert all(row["share_of_token"] is not None and row["what"] for row in rows)
