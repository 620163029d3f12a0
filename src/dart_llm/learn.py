"""What a model teaches about itself before it is first pruned (docs/method.md, "Prior").

Learnt once: kept in memory with the model, and on disk by its weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm import calibration_cache
from dart_llm.activations import Seen, tap
from dart_llm.arch import describe
from dart_llm.attach import check_free
from dart_llm.config import PriorConfig, PruneConfig
from dart_llm.curvature import evaluating, gradients
from dart_llm.drift import SINKS
from dart_llm.errors import ConfigError, DartError, LoadError
from dart_llm.evidence import LayerEvidence, Sum
from dart_llm.layer_prior import LayerPrior
from dart_llm.low_rank import find_basis
from dart_llm.own_text import go_on, opening_ids, own_start, remember_tokenizer
from dart_llm.select import Selector
from dart_llm.token_statistics import Statistics
from dart_llm.weights import FfnWeights, knowing

logger = logging.getLogger("dart_llm")
Say = Callable[[str], None]

VERSION = 2
"""Of what is learnt and how: another one finds nothing of the old in the cache."""

BASIS_TOKENS = 1024
"""Tokens from which the basis of low-rank compensation is found."""

_versions: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, tuple[LayerPrior, ...]]]] = (
    WeakKeyDictionary()
)


def learn(
    model: Any,
    config: PruneConfig,
    layers: Sequence[FfnWeights],
    cache_dir: str | None = None,
    say: Say = logger.info,
    tokenizer: Any = None,
) -> tuple[FfnWeights, ...]:
    """The layers with what ``config.prior`` asks for; as they are when it asks for nothing.

    ``tokenizer``: belongs to the model; None: the one that is known of it already, if any.
    Raises ``AttachError`` for a model that is being pruned, ``ConfigError`` for one that is
    offloaded, has no head or was made in inference mode, ``DartError`` where its numbers are not
    finite.
    """
    if config.prior is None:
        return tuple(layers)
    check_free(model)
    if tokenizer is not None:
        remember_tokenizer(model, tokenizer)
    _check_learnable(model, config.method, layers)
    known = recall(model, config, layers)
    if known is None:
        wanted = _wanted(config.prior, config, layers)
        # what is kept must serve later forwards of any mode; dropout would draw random numbers
        with torch.inference_mode(False), evaluating(model):
            found = _find(model, wanted, layers, cache_dir, say)
        _versions[model][wanted.name] = _state(model), found
        known = knowing(layers, learnt=found)
    return known


def recall(
    model: Any, config: PruneConfig, layers: Sequence[FfnWeights]
) -> tuple[FfnWeights, ...] | None:
    """As ``learn``, also while the model is being pruned; None where it would have to learn."""
    if config.prior is None:
        return tuple(layers)
    wanted = _wanted(config.prior, config, layers)
    known = _versions.setdefault(model, {}).get(wanted.name)
    if known is None or known[0] != _state(model):
        return None
    return knowing(layers, learnt=known[1])


def _state(model: Any) -> list[tuple[int, int, torch.device]]:
    return [(p.data_ptr(), p._version, p.device) for p in model.parameters()]


def _wanted(prior: PriorConfig, config: PruneConfig, layers: Sequence[FfnWeights]) -> _Wanted:
    return _Wanted(prior, Selector(config, tuple(layers)).statistics, config)


def _check_learnable(model: nn.Module, method: str, layers: Sequence[FfnWeights]) -> None:
    why, other = "", "dart-prompt or griffin"
    if any(layer.down.is_meta for layer in layers):
        why, other = "which an offloaded model has not: load it without offloading", "griffin"
    elif any(p.is_inference() for p in model.parameters()):
        why = "which weights made in torch.inference_mode() have not: load the model outside it"
    if why:
        raise ConfigError(f'method "{method}" learns from gradients, {why}, or use {other}')


class _Wanted:
    """What is to be learnt, and its name."""

    def __init__(self, prior: PriorConfig, statistics: Statistics, config: PruneConfig) -> None:
        self.prior, self.statistics = prior, statistics
        self.rank = config.compensation_rank if "features" in statistics.needs else 0
        self.seed = config.seed
        text = prior.model_dump(exclude={"tokens"})
        rule = getattr(statistics.per_token, "__qualname__", None)
        needs = sorted(statistics.beside_score)
        self.name = repr([text, rule, statistics.ema_decay, needs, self.rank, self.seed])


def _find(
    model: Any, wanted: _Wanted, layers: Sequence[FfnWeights], cache_dir: str | None, say: Say
) -> tuple[LayerPrior, ...]:
    start = own_start(model)
    opening = opening_ids(model, wanted.prior.sequences, wanted.prior.opening)
    first = start if opening is None else calibration_cache.digest_of(opening)
    key = calibration_cache.make_key(
        model, wanted.statistics, f"prior {VERSION} {first} {wanted.name}"
    )
    devices = [layer.device for layer in layers]
    evidence = calibration_cache.find(model, key, cache_dir, devices)
    if evidence is None:
        prior = wanted.prior
        say(
            f"learning from {prior.sequences} x {prior.length} tokens of the model's own text, once"
        )
        ids = _write(model, opening, start, wanted, say)
        evidence = study(model, ids, wanted.statistics, wanted.rank, layers, say)
        try:
            about = {"note": "what dart_llm learnt from the model's own text"}
            calibration_cache.keep(model, key, cache_dir, evidence, about)
        except LoadError as error:
            say(f"what was learnt is not kept for the next time: {error}")
    return tuple(_as_prior(found, layer) for found, layer in zip(evidence, layers, strict=True))


def _write(
    model: Any, opening: Tensor | None, start: list[int], wanted: _Wanted, say: Say
) -> Tensor:
    prior = wanted.prior
    generator = torch.Generator().manual_seed(wanted.seed)
    if opening is None:
        say("no tokenizer is at hand: the model's own text begins with its start token")
        vocabulary = int(model.config.get_text_config().vocab_size)
        opening = torch.randint(vocabulary, (prior.sequences, 1), generator=generator)
        if start:
            opening.fill_(start[0])
    written = go_on(model, opening, prior.length, generator, say, prior.temperature, prior.top_p)
    return written.clone()


def _as_prior(found: LayerEvidence, layer: FfnWeights) -> LayerPrior:
    sums = dict(found.sums)
    curvature = sums.pop("curvature").total
    basis = sums.pop("basis").total.to(layer.down.dtype) if "basis" in sums else None
    return LayerPrior(LayerEvidence(sums), curvature, basis)


def study(
    model: Any,
    ids: Tensor,
    statistics: Statistics,
    rank: int,
    layers: Sequence[FfnWeights],
    say: Say = lambda text: None,
) -> list[LayerEvidence]:
    """The sums over ids [n, T] of every layer, with ``curvature`` [I] and ``basis`` [r, D] in them.

    Raises ``DartError`` when the gradients are not finite.
    """
    found = [LayerEvidence() for _ in layers]
    bases = find_bases(model, ids, rank, layers)
    for evidence, basis in zip(found, bases, strict=True):
        if basis is not None:
            evidence.sums["basis"] = Sum(basis.float(), 1.0)

    def take(layer: int, seen: Seen, gradient: Tensor) -> None:
        with torch.no_grad():
            basis = bases[layer]
            f = None if basis is None else F.linear(seen.h, basis)
            statistics.update(found[layer], seen.u, seen.z, seen.x, seen.r, None, f)
            found[layer].add("curvature", gradient.flatten(0, 1).float().square(), None)

    gradients(model, ids, take, say)
    if any(not bool(evidence.sums["curvature"].total.isfinite().all()) for evidence in found):
        raise DartError(
            "the gradients of this model's own text are not finite: load it in float32 or bfloat16"
        )
    for evidence in found:  # the mean itself, so that it is held once
        evidence.sums["curvature"] = Sum(evidence.sums["curvature"].mean, 1.0)
    return found


@torch.no_grad()
def find_bases(
    model: Any, ids: Tensor, rank: int, layers: Sequence[FfnWeights]
) -> list[Tensor | None]:
    """Per layer the basis [r, D] of its FFN's input over ids [n, T], in the model's dtype.

    None where the FFN's input never reaches what is replaced while pruning: inline blocks.
    """
    if not rank:
        return [None] * len(layers)
    inline = {block.index for block in describe(model).blocks if block.inline}
    held: dict[int, list[Tensor]] = {}
    each = ids.shape[1] - SINKS
    rows = min(len(ids), max(1, -(-BASIS_TOKENS // each)))

    def take(layer: int, seen: Seen) -> None:
        held.setdefault(layer, []).append(seen.h[:, SINKS:].flatten(0, 1))

    with torch.inference_mode(False), tap(model, take):
        for part in torch.split(ids[:rows].clone(), 4):
            model(part.to(model.device), use_cache=False, logits_to_keep=1)
    bases: list[Tensor | None] = []
    for layer in layers:
        if layer.index in inline:
            bases.append(None)
            continue
        h = torch.cat(held[layer.index]).float()
        if not bool(h.isfinite().all()):
            raise DartError(f"the FFN inputs of layer {layer.index} are not finite: try float32")
        bases.append(find_basis(h, rank).to(layer.down.dtype))
    return bases
