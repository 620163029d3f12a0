"""What a model teaches about itself before it is first pruned (docs/method.md, "Prior").

A configuration learns the parts that it reads, once, and finds those that another one has learnt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.attach import check_free
from dart_llm.config import PruneConfig
from dart_llm.curvature import evaluating
from dart_llm.errors import ConfigError
from dart_llm.evidence import LayerEvidence
from dart_llm.layer_prior import LayerPrior
from dart_llm.lesson import BASIS, CURVATURE, REACH, SCORE, SUMS, Lesson, Part, Say, basis_of
from dart_llm.own_text import remember_tokenizer
from dart_llm.registry import SCORES
from dart_llm.select import Selector
from dart_llm.weights import FfnWeights, knowing

logger = logging.getLogger("dart_llm")


def learn(
    model: Any,
    config: PruneConfig,
    layers: Sequence[FfnWeights],
    cache_dir: str | None = None,
    say: Say = logger.info,
    tokenizer: Any = None,
) -> tuple[FfnWeights, ...]:
    """The layers with what ``config`` reads of the model; as they are when it reads nothing.

    ``tokenizer``: belongs to the model; None: the one that is known of it already, if any.
    Raises ``AttachError`` for a model that is being pruned, ``ConfigError`` for one that is
    offloaded, has no head or was made in inference mode where gradients are to be learnt,
    ``DartError`` where its numbers are not finite.
    """
    names = wanted(config, layers)
    if not names:
        return _knowing(config, layers, {})
    check_free(model)
    if tokenizer is not None:
        remember_tokenizer(model, tokenizer)
    _check_learnable(model, config.method, layers, CURVATURE in names)
    # what is kept must serve later forwards of any mode; dropout would draw random numbers
    with torch.inference_mode(False), evaluating(model):
        lesson = Lesson(model, config, tuple(layers), cache_dir, say)
        found = lesson.find(names)
        if REACH in names and REACH not in found:
            found[REACH] = lesson.reach()
        if missing := [name for name in names if name not in found]:
            found |= lesson.learn(missing, found)
    return _knowing(config, layers, found)


def recall(
    model: Any, config: PruneConfig, layers: Sequence[FfnWeights], cache_dir: str | None = None
) -> tuple[FfnWeights, ...] | None:
    """As ``learn``, also while the model is being pruned; None where it would have to learn."""
    names = wanted(config, layers)
    if not names:
        return _knowing(config, layers, {})
    with torch.inference_mode(False):
        found = Lesson(model, config, tuple(layers), cache_dir, logger.info).find(names)
    return None if len(found) < len(names) else _knowing(config, layers, found)


def wanted(config: PruneConfig, layers: Sequence[FfnWeights]) -> list[str]:
    """Names of the parts that ``config`` reads.

    The gradients are read by scores that learn and where tokens choose, the basis by low-rank
    compensation, and sums where the prior weighs anything beside what is observed.
    """
    rule = SCORES.get(config.score.name)
    names = [REACH] if rule.reach and _can_reach(layers) else []
    if config.prior is None:
        return names
    statistics = Selector(config, tuple(layers)).statistics
    if rule.learns or config.token is not None:
        names.append(CURVATURE)
    if "features" in statistics.needs:
        names.append(BASIS)
    if config.prior.tokens:
        names += [SCORE] if statistics.per_token is not None else []
        names += [name for name in SUMS if name in statistics.beside_score]
    return names


def _can_reach(layers: Sequence[FfnWeights]) -> bool:
    """Whether the weights are at hand and fit; where not, the score says what is wrong."""
    return all(
        one.embedding is not None
        and one.embedding.shape[1] == one.hidden
        and not one.down.is_meta
        and not one.embedding.is_meta
        for one in layers
    )


def _check_learnable(
    model: nn.Module, method: str, layers: Sequence[FfnWeights], backward: bool
) -> None:
    source, why, other = "gradients", "", "dart-prompt or griffin"
    if any(layer.down.is_meta for layer in layers):
        source, why = "its own text", "which an offloaded model does not write: load it whole"
        other = "griffin"
    elif backward and any(p.is_inference() for p in model.parameters()):
        why = "which weights made in torch.inference_mode() have not: load the model outside it"
    if why:
        raise ConfigError(f'method "{method}" learns from {source}, {why}, or use {other}')


def _knowing(
    config: PruneConfig, layers: Sequence[FfnWeights], found: dict[str, Part]
) -> tuple[FfnWeights, ...]:
    """The layers with the parts ``found``; those of a prior without parts have an empty one."""
    known = tuple(layers)
    if REACH in found:
        known = knowing(known, known_reach=[_reach(one) for one in found[REACH]])
    if config.prior is None:
        return known
    return knowing(known, learnt=[_prior(found, place, layer) for place, layer in enumerate(known)])


def _reach(found: LayerEvidence) -> tuple[Tensor, Tensor]:
    return found.sums["max"].total, found.sums["mean"].total


def _prior(found: dict[str, Part], place: int, layer: FfnWeights) -> LayerPrior:
    sums = {
        name: total
        for part, each in found.items()
        if part not in (REACH, CURVATURE, BASIS)
        for name, total in each[place].sums.items()
    }
    curvature = found[CURVATURE][place].sums[CURVATURE].total if CURVATURE in found else None
    return LayerPrior(LayerEvidence(sums), curvature, basis_of(found, place, layer))
