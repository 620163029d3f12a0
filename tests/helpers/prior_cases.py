"""The configuration with a prior that the tests use, and what is learnt under it."""

import torch

from dart_llm.calibration.collect import Needs, collect
from dart_llm.calibration.self_calibration import choose, observing
from dart_llm.calibration.self_calibration import self_calibrate as learn
from dart_llm.models.describe import describe
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.statistics import LayerStatistics as LayerEvidence
from dart_llm.pruning.statistics import Statistics, squared
from dart_llm.session.run import Run, prune
from tiny import tokens

SMALL = {"sequences": 2, "length": 24, "opening": 0}
"""A prior that is learnt in no time."""

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


def files(cache):
    return sorted((cache / "dart-llm" / "calibration").glob("*"))


def layers_of(model):
    return describe(model).weights("output", 0)


def learnt(model, cache, config=CONFIG, news=None):
    """The model's layers with what it taught."""
    return learn(model, config, layers_of(model), str(cache), ([] if news is None else news).append)


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


PARTS = 2
"""Files of what a configuration learns: the text, and what it shows."""

ONE_BY_ONE = [1] * 23
"""Two sequences of 24 tokens, of which the first is given."""

ALL = [*ONE_BY_ONE, 24, 24]
"""Then a forward for the bases, and one forward and backward."""


def attached(model, config=CONFIG, **changes):
    return lambda: prune(model, config, **changes).attach().detach()


def tensors(layers):
    found = []
    for layer in layers:
        assert layer.self_stats is not None
        sums = layer.self_stats.evidence.sums
        found += [sums[name].mean for name in sorted(sums)]
        found += [t for t in (layer.fisher, layer.basis) if t is not None]
    return found


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, second, strict=True)
    )


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
