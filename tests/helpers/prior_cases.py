"""The configuration of the tests that learns, and sums of tokens by its statistics."""

from dart_llm.calibration.collect import Needs, collect
from dart_llm.calibration.self_calibration import choose, observing
from dart_llm.models.describe import describe
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.statistics import LayerStatistics as LayerEvidence
from dart_llm.pruning.statistics import Statistics, squared
from dart_llm.session.run import Run
from tiny import tokens

SMALL = {"sequences": 2, "length": 24, "opening": 0}
"""Statistics that are learned in no time."""

RANK = {"compensation": True, "compensation_rank": 8}
CONFIG = PruneConfig(
    method="x",
    sparsity=0.5,
    score="fisher",
    budget="ranked",
    skip_sinks=True,
    self_stats=SMALL,
    **RANK,
)

STATISTICS = Statistics(squared, frozenset({"signed", "features"}), average=True)
"""What ``CONFIG`` sums."""


def layers_of(model):
    return describe(model).weights("output", 0)


def seen(u, h, basis, weights=None, cuts=()):
    """The sums over tokens u [T, I] with FFN inputs h [T, D], in pieces of ``cuts``."""
    evidence, start = LayerEvidence(), 0
    for size in cuts or (len(u),):
        part = slice(start, start + size)
        w = None if weights is None else weights[None, part]
        f = h[None, None, part] @ basis.T
        STATISTICS.add([evidence], LayerObservation(u[None, None, part]), w, f)
        start += size
    return evidence


def observed(model, config, ids):
    """What a calibration collects from ids [n, T]."""
    return collect(model, ids, Needs(observing(config, layers_of(model)).statistics))


def ready(model, method, **settings):
    """As ``prune``; a method that calibrates does so on 6 sequences of 24 tokens first."""
    config = PruneConfig.build(method, **settings)
    if config.calibration is None or config.target == 0:
        return Run(model, config)
    masks, prior = choose(model, config, observed(model, config, tokens(6, 24, seed=9)))
    return Run(model, config, fixed_masks=masks, prior=prior)
