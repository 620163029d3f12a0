"""What was observed and what was learnt before, pooled; and the masks that follow from both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.selection import MaskSelector as Selector
from dart_llm.pruning.selection import check_fits
from dart_llm.pruning.statistics import LayerPrior, Sum, pooled
from dart_llm.pruning.statistics import LayerStatistics as LayerEvidence
from dart_llm.pruning.weights import FfnWeights
from dart_llm.pruning.weights import with_prior as knowing
from prior_cases import CONFIG
from synthetic import make_layers

CURVATURE = torch.tensor([1.0, 2.0])


def prior(basis: Tensor | None = None, **sums: tuple[list[float], float]) -> LayerPrior:
    made = {name: Sum(torch.tensor(total), weight) for name, (total, weight) in sums.items()}
    return LayerPrior(LayerEvidence(made), CURVATURE, basis)


def evidence(**sums: tuple[list[float], Tensor | float]) -> LayerEvidence:
    return LayerEvidence({name: Sum(torch.tensor(t), weight) for name, (t, weight) in sums.items()})


def test_means_are_pooled_by_tokens() -> None:
    """10 observed tokens of mean (2, 3), and a prior of mean (5, 1) that counts as 30."""
    known = prior(score=([500.0, 100.0], 100.0))
    found = pooled(evidence(score=([20.0, 30.0], 10.0)), known, 30)
    assert found.sums["score"].total.tolist() == [170, 60]
    assert found.sums["score"].weight == 40
    assert found.sums["score"].mean.tolist() == [4.25, 1.5]


def test_the_size_of_the_priors_own_text_does_not_matter() -> None:
    seen = evidence(score=([20.0, 30.0], 10.0))
    short, long = prior(score=([5.0, 1.0], 1.0)), prior(score=([5e4, 1e4], 1e4))
    assert pooled(seen, short, 7).sums["score"].total.tolist() == [55, 37]
    assert pooled(seen, long, 7).sums["score"].total.tolist() == [55, 37]


@pytest.mark.parametrize("weight", [0.0, torch.tensor(0.0)])
def test_where_nothing_was_observed_the_prior_decides(weight: Tensor | float) -> None:
    found = pooled(evidence(score=([0.0, 0.0], weight)), prior(score=([5.0, 1.0], 1.0)), 128)
    assert found.sums["score"].mean.tolist() == [5, 1]
    assert float(found.sums["score"].weight) == 128
    found = pooled(LayerEvidence(), prior(score=([10.0, 2.0], 2.0)), 128)
    assert found.sums["score"].mean.tolist() == [5, 1]


def test_names_of_one_side_alone() -> None:
    seen = evidence(score=([4.0, 4.0], 2.0), stream=([6.0], 3.0))
    found = pooled(seen, prior(score=([1.0, 1.0], 1.0), signed=([8.0, -8.0], 4.0)), 10)
    assert set(found.sums) == {"score", "stream", "signed"}
    assert found.sums["stream"] is seen.sums["stream"]
    assert found.sums["signed"].total.tolist() == [20, -20]
    assert found.sums["signed"].weight == 10
    assert found.sums["score"].total.tolist() == [14, 14] and found.sums["score"].weight == 12


def test_without_a_prior_or_tokens_nothing_changes() -> None:
    seen, known = evidence(score=([4.0, 4.0], 2.0)), prior(score=([1.0, 1.0], 1.0))
    assert pooled(seen, None, 128) is seen
    assert pooled(seen, known, 0) is seen
    assert pooled(seen, known, -1) is seen


def test_neither_side_is_changed() -> None:
    """The prior is shared by all runs, and the evidence goes on growing."""
    seen, known = evidence(score=([4.0, 4.0], 2.0)), prior(score=([1.0, 3.0], 1.0))
    first = pooled(seen, known, 10)
    first.sums["score"].total += 100
    assert seen.sums["score"].total.tolist() == [4, 4] and seen.sums["score"].weight == 2
    assert known.evidence.sums["score"].total.tolist() == [1, 3]
    alone = pooled(LayerEvidence(), known, 1)
    alone.sums["score"].total += 100
    assert known.evidence.sums["score"].total.tolist() == [1, 3]


# masks


def _learnt(layers: tuple[FfnWeights, ...], scale: float = 1.0) -> tuple[FfnWeights, ...]:
    """Made-up priors: the score and the mean of each neuron, and its curvature."""
    generator = torch.Generator().manual_seed(4)

    def values(width: int) -> Tensor:
        return scale * torch.rand(width, generator=generator)

    return knowing(
        layers,
        learnt=[
            LayerPrior(
                LayerEvidence(
                    {
                        "score": Sum(50 * values(layer.width), 50.0),
                        "signed": Sum(50 * values(layer.width), 50.0),
                    }
                ),
                values(layer.width),
            )
            for layer in layers
        ],
    )


@pytest.mark.parametrize(("count", "tokens"), [(0, 0), (0, 16), (1, 16), (40, 0), (40, 16)])
def test_fisher_ranks_all_neurons_of_the_model(count: int, tokens: int) -> None:
    """mean u^2 of text and prior together, times g^2, in one ranking; compensation likewise."""
    layers = _learnt(make_layers())
    config = CONFIG.replace({"compensation_rank": 0, "prior": {"tokens": tokens}})
    generator = torch.Generator().manual_seed(9)
    u = [torch.randn(count, layer.width, generator=generator) for layer in layers]
    seen = [
        LayerEvidence(
            {"score": Sum(t.square().sum(0), float(count)), "signed": Sum(t.sum(0), float(count))}
        )
        for t in u
    ]
    found = Selector(config, layers).select(seen)
    scores, means = [], []
    for t, layer in zip(u, layers, strict=True):
        assert layer.learnt is not None
        known = {name: s.total / 50 for name, s in layer.learnt.evidence.sums.items()}
        total = max(count + tokens, 1)
        scores.append(
            (t.square().sum(0) + tokens * known["score"]) / total * layer.learnt.curvature
        )
        means.append((t.sum(0) + tokens * known["signed"]) / total)
    for score, mine in zip(scores, found.scores, strict=True):
        torch.testing.assert_close(mine, score)
    assert sum(found.counts) == 30 and min(found.counts) >= 2
    if not count + tokens:
        return
    floors = [score.index_fill(0, score.topk(2).indices, torch.inf) for score in scores]
    flat = torch.cat(floors)  # two of twenty stay in every layer
    wanted = sorted(flat.argsort(descending=True)[:30].tolist())
    kept = [20 * i + int(n) for i, mask in enumerate(found.masks) if mask for n in mask.ids]
    assert kept == wanted
    for mask, layer, mean in zip(found.masks, layers, means, strict=True):
        assert mask is not None and mask.bias is not None and mask.low_rank is None
        removed = mask.removed()
        torch.testing.assert_close(mask.bias, layer.down[:, removed] @ mean[removed])


def test_a_score_that_learns_wants_its_prior() -> None:
    with pytest.raises(ConfigError, match=r'^score "fisher" needs a prior: give prior=\{\} too$'):
        check_fits(PruneConfig(sparsity=0.5, score="fisher"), make_layers())
    with pytest.raises(ConfigError, match="is a mean over all tokens alike: drop the ema_decay"):
        check_fits(CONFIG.replace({"score": {"ema_decay": 0.5}}), make_layers())
    seen = [LayerEvidence({"score": Sum(torch.ones(20), 1.0)}) for _ in range(3)]
    with pytest.raises(RuntimeError, match="score fisher needs the layers' priors"):
        Selector(CONFIG, make_layers()).scores(seen)
