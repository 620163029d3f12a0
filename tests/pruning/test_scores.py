"""Neuron scores against numbers computed by hand; and everything that is chosen by name."""

import math
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import Tensor

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.pruning import registry, statistics, weights
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.registry import ALL, SCORES, Registry
from dart_llm.pruning.scores import proxy, score, squared
from dart_llm.pruning.statistics import LayerStatistics, SelfStats, Statistics
from dart_llm.pruning.weights import FfnWeights

TOKENS = torch.tensor([[3.0, 4.0, 0.0], [0.0, -1.0, 2.0], [1.0, -2.0, -2.0]])
"""Norms 5, sqrt 5 and 3."""

LAYER = FfnWeights(
    index=2,
    depth=1.0,
    stored_up=torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, -2.0]]),  # norms 1, 5, 2
    gate=torch.tensor([[2.0, 0.0], [0.0, 3.0], [-6.0, 8.0]]),  # norms 2, 3, 10
    down=torch.tensor([[3.0, 1.0, 0.0], [-4.0, 0.0, 2.0]]),  # norms 5, 1, 2
    embedding=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]),
    self_stats=SelfStats(LayerStatistics(), torch.tensor([0.5, 3.0, 0.75])),
)
# columns times rows: (3, -4, 7), (1, 0, 1), (0, 2, -2)
MAX, MEAN = torch.tensor([7.0, 1, 2]), torch.tensor([14 / 3, 2 / 3, 4 / 3])
MAGNITUDE = torch.tensor([10.0, 21, 8]).sqrt()
GOLDEN = {
    "magnitude": MAGNITUDE,
    "normalized": torch.tensor([0.36 + 0 + 1 / 9, 0.64 + 0.2 + 4 / 9, 0 + 0.8 + 4 / 9]).sqrt(),
    "contribution": MAGNITUDE * torch.tensor([5, 1, 2]),
    "wanda": MAGNITUDE * torch.tensor([7, 1, 2]),  # L1 norms
    "fisher": torch.tensor([5 / 3, 21, 2]),  # mean squares 10/3, 7, 8/3
    # variances 10/3 - (4/3)^2, 21/3 - (1/3)^2, 8/3
    "flap": torch.tensor([25 * 14 / 9, 1 * 62 / 9, 4 * 8 / 3]),
    "max": MAGNITUDE * MAX,
    "mean": MAGNITUDE * MEAN,
    "combined": MAGNITUDE * (MAX + MEAN),
    "product": MAGNITUDE**2 * MAX * MEAN,
    "weight": torch.tensor([5.0 * 1 * 2, 1 * 5 * 3, 2 * 2 * 10]),
}


def scored(name, chunks, weights=None, layer=LAYER):
    """The score of [B, T, I] ``chunks`` that arrive one after the other."""
    rule = SCORES.get(name)
    sums = Statistics(rule.per_token, frozenset(), rule.spread, rule.average)
    evidence = LayerStatistics()
    for index, chunk in enumerate(chunks):
        w = None if weights is None else weights[index]
        sums.add([evidence], LayerObservation(chunk[None]), w)
    return rule(sums.score_input(evidence, layer.width, layer.device), layer)


def same(result, wanted, rel=1e-6):
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx(wanted.tolist(), rel=rel, abs=rel)


@pytest.mark.parametrize("name", [name for name in SCORES.names() if name != "random"])
@pytest.mark.parametrize("cuts", [[3], [1, 2]])
def test_golden(name, cuts, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_ELEMENTS", 3 * len(cuts))  # tokens are summed in chunks
    same(scored(name, TOKENS[None].split(cuts, 1)), GOLDEN[name])


def test_rows_of_a_batch_are_summed():
    """A finished or padded row does not enter the sum."""
    other = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 0.0], [4.0, 4.0, 4.0]])
    both, weights = torch.stack([TOKENS, other]), torch.tensor([[1.0, 1, 1], [0, 1, 0]])
    squares = TOKENS.square().sum(0)
    same(scored("magnitude", [both]), (squares + other.square().sum(0)).sqrt())
    same(scored("magnitude", [both], [weights]), (squares + other[1].square()).sqrt())


def test_odd_tokens_and_weights(monkeypatch):
    tokens = torch.cat([torch.zeros(1, 2, 3), TOKENS[None]], 1)
    same(scored("normalized", [tokens]), GOLDEN["normalized"])
    plain = FfnWeights(0, 0.0, LAYER.up, None, LAYER.down)
    assert SCORES.get("weight")(torch.zeros(3), plain).tolist() == [5 * 1, 1 * 5, 2 * 2]
    monkeypatch.setattr(weights, "REACH_CHUNK", 2)  # three rows: a chunk of two and one of one
    layer = replace(LAYER)
    high, mean = proxy(layer)
    same(high, MAX)
    same(mean, MEAN)
    assert proxy(layer)[0] is high
    for rows in (None, torch.zeros(4, 5)):
        with pytest.raises(ConfigError, match="an embedding as wide as the FFN's output"):
            SCORES.get("max")(torch.ones(3), replace(plain, embedding=rows))


@pytest.mark.parametrize("table", ALL, ids=lambda table: table.kind)
def test_names(table, snapshot):
    assert table.names() == snapshot
    for name in table.names():
        result = table.get(name)
        assert name in table and table.check(name) == name and table.get(name) is result
        assert result.__doc__
        if table.kind in ("score", "budget"):
            assert result.function.__doc__ and result.source
    near, own = table.names()[0], r" \(one of your own: --plugin FILE\)"
    with pytest.raises(UnknownName, match=f"^unknown {table.kind} '{near}x'; did you mean {near}"):
        table.get(f"{near}x")
    with pytest.raises(UnknownName, match=f"known: {', '.join(table.names())}{own}$"):
        table.get("%%%")


def test_a_newcomer_registers_and_leaves():
    @score(squared, "a test")
    def backwards(a: Tensor, weights: FfnWeights) -> Tensor:
        """Keeps the weakest neurons."""
        return -a

    SCORES.register("backwards", backwards)
    try:
        assert "backwards" in SCORES.names()
        assert PruneConfig(score="backwards").score.name == "backwards"
        for name in ("backwards", "magnitude"):
            with pytest.raises(ConfigError, match=f"'{name}' is already registered"):
                SCORES.register(name, backwards)
    finally:
        SCORES.unregister("backwards")
    with pytest.raises(UnknownName):
        PruneConfig(score="backwards")
    SCORES.unregister("magnitude")
    assert "magnitude" in SCORES, "a built-in stays"


def test_entry_points_are_found_but_never_replace_a_built_in(monkeypatch):
    values = {"mine": "math:pi", "yours": "math:e"}
    points = [EntryPoint(name, value, "tests.numbers") for name, value in values.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: {"tests.numbers": points}[group])
    table = Registry("number", "tests.numbers", {"yours": "math:tau"})
    assert table.names() == ("mine", "yours")
    assert (table.get("mine"), table.get("yours")) == (math.pi, math.tau)
