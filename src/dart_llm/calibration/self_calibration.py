"""Self-calibration: statistics collected once per model from self-generated text, and their cache.

They come in parts, each one thing that scores, budgets or compensation read: the squared gradients,
the basis of compensation, or a sum over the tokens.  Each is cached under a key of what decides it
alone, so that configurations share what they can.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dart_llm.calibration import cache
from dart_llm.calibration.cache import Tensors
from dart_llm.calibration.collect import (
    BACKWARD,
    BASIS_TOKENS,
    FISHER,
    Needs,
    collect,
    evaluating,
    find_bases,
    last_states,
    rows_at_once,
)
from dart_llm.calibration.progress import (
    INSTEAD,
    ONE_BY_ONE,
    READING,
    WRITING,
    Advance,
    Progress,
    Say,
    graph_bytes,
    learning,
    text_bytes,
)
from dart_llm.calibration.self_text import (
    WRITTEN,
    opening_ids,
    sample_continuations,
    start_ids,
    start_tokens,
)
from dart_llm.errors import ConfigError, LoadError
from dart_llm.models.checkpoint import digest_of, fingerprint, remember_tokenizer
from dart_llm.models.packed import place_of
from dart_llm.models.screen import Screen
from dart_llm.patching.patch import check_free
from dart_llm.pruning.config import PruneConfig, SelfStatsConfig
from dart_llm.pruning.registry import SCORES
from dart_llm.pruning.selection import MaskSelector
from dart_llm.pruning.statistics import (
    LayerStatistics,
    SelfStats,
    from_tensors,
    to_tensors,
)
from dart_llm.pruning.weights import FfnWeights, with_parts

logger = logging.getLogger("dart_llm")

VERSION = 4
"""Of what is learned and how: another one finds nothing of the old in the cache.

In which dtype it is computed does not enter: that is rounding.
"""

TEXT, BASIS, SCORE, STATES = "text", "basis", "score", "states"
"""Parts beside ``FISHER`` and ``SUMS``; ``STATES``: last hidden states, for a screened head."""

SUMS = {
    "signed": ("signed",),
    "features": ("features", "moments", "cross"),
    "sensitivity": ("cosine", "change"),
}
"""Parts that are sums: what a configuration needs (``Statistics.needs``), and its sums' names."""

BASES = "features of compensation"
"""A stage beside ``WRITING`` and ``READING``, for people."""

LEARNING = "learning from self-generated text, once per model"

Parts = dict[str, Tensors]


@dataclass
class SelfCalibration:
    """Which statistics a configuration needs, and how each is found in the cache or computed."""

    model: Any
    config: PruneConfig
    layers: tuple[FfnWeights, ...]
    cache_dir: str | None
    say: Say

    def __post_init__(self) -> None:
        self.statistics = MaskSelector(self.config, self.layers).statistics
        self.digest = fingerprint(self.model)
        self.settings = self.config.self_stats or SelfStatsConfig(tokens=0)
        self.opening = opening_ids(self.model, self.settings.sequences, self.settings.opening)
        self.text: Tensor | None = None
        self._warned = False

    def parts(self, names: Sequence[str]) -> Parts:
        """The parts of ``names``; those that are not cached are computed."""
        parts = self.cached(names)
        missing = [name for name in names if name not in parts]
        return self._computed(missing, parts) if missing else parts

    def cached(self, names: Sequence[str]) -> Parts:
        """Those of the parts that are cached, of the text that is cached."""
        parts: Parts = {}
        if self.text is None:
            text = cache.find(self.model, self._key(TEXT, {}), self.cache_dir)
            self.text = None if text is None else text["ids"]
        for name in names if self.text is not None else ():
            part = cache.find(self.model, self._key(name, parts), self.cache_dir)
            parts |= {} if part is None else {name: part}
        return parts

    def _computed(self, names: Sequence[str], parts: Parts) -> Parts:
        work, memory = self._effort(names)
        with learning(self.model, self.say, LEARNING, work, memory, INSTEAD) as (model, progress):
            if self.text is None:
                self.text = self._written(model, progress.stage(WRITING))
                self._keep(TEXT, {"ids": self.text}, {})
                parts = parts | self.cached(names)  # of this very text: it alone was lost
            missing = [name for name in names if name not in parts]
            if STATES in missing:
                states = last_states(model, self.text, progress.stage(READING))
                self._keep(STATES, part := {"states": states.to(self.model.dtype)}, {})
                return parts | {STATES: part}
            return parts | (self._read(model, missing, parts, progress) if missing else {})

    def _read(self, model: Any, names: Sequence[str], parts: Parts, progress: Progress) -> Parts:
        """The parts of ``names`` that the self-generated text gives."""
        assert self.text is not None
        made: Parts = {}
        bases = [_of_layer(parts, BASIS, layer) for layer in self.layers]
        if BASIS in names:
            rank = self.config.compensation_rank
            bases = find_bases(model, self.text, rank, self.layers, progress.stage(BASES))
            each = enumerate(bases)
            made[BASIS] = {str(n): basis.float() for n, basis in each if basis is not None}
        statistics = replace(
            self.statistics,
            per_token=self.statistics.per_token if SCORE in names else None,
            needs=frozenset(names) & SUMS.keys(),
            spread=False,
        )
        needs = Needs(statistics, bases, FISHER in names, inner=True)
        evidence = collect(model, self.text, needs, progress.stage(READING))
        if FISHER in names:
            made[FISHER] = {str(n): layer.sums[FISHER].total for n, layer in enumerate(evidence)}
        for name in names:
            if name not in made:
                wanted = SUMS.get(name, (name,))
                sums = [{k: v for k, v in layer.sums.items() if k in wanted} for layer in evidence]
                made[name] = to_tensors([LayerStatistics(layer) for layer in sums])
        for name in names:
            self._keep(name, made[name], parts | made)
        return made

    def _effort(self, names: Sequence[str]) -> tuple[dict[str, float], int]:
        """Tokens of each stage that makes parts, and bytes beside the model, about."""
        count, length, backward = self.settings.sequences, self.settings.length, FISHER in names
        tokens = float(count * length)
        work = {WRITING: ONE_BY_ONE * tokens} if self.text is None else {}
        if BASIS in names:  # the eigenvectors take as long as the forwards
            work[BASES] = 2 * min(tokens, BASIS_TOKENS)
        work[READING] = tokens * (BACKWARD if backward else 1)
        rows = min(rows_at_once(self.model, length, backward), count)
        written = text_bytes(self.model, min(WRITTEN, count), length)
        return work, max(written, graph_bytes(self.model, rows * length, backward))

    def _written(self, model: Any, advance: Advance) -> Tensor:
        """Self-generated text, [n, T] int64 on the host."""
        settings, opening = self.settings, self.opening
        generator = torch.Generator().manual_seed(self.config.seed)
        if opening is None:
            self.say("without a tokenizer self-generated text begins with the model's start token")
            opening = start_ids(self.model, settings.sequences, generator)
        how = settings.temperature, settings.top_p
        return sample_continuations(model, opening, settings.length, generator, advance, *how)

    def _keep(self, name: str, part: Tensors, parts: Parts) -> None:
        about = {"note": f"what dart_llm learned of a model: {name}"}
        try:
            cache.keep(self.model, self._key(name, parts), self.cache_dir, part, about)
        except LoadError as error:
            if not self._warned:  # one sentence is enough for all parts
                self.say(f"what was learned is not kept for the next time: {error}")
            self._warned = True

    @property
    def text_key(self) -> str:
        """Of the model and of what decides which text it writes."""
        return self._key(TEXT, {})

    def _key(self, name: str, parts: Parts) -> str:
        """The part's name in the cache.

        Of the text and the basis what is in them decides, not what was requested: another machine
        rounds, and so writes, otherwise, and parts of two texts would not fit together.
        """
        if name == TEXT:
            first = start_tokens(self.model) if self.opening is None else digest_of(self.opening)
            decides: list[object] = [
                first,
                self.settings.model_dump(exclude={"tokens"}),
                self.config.seed,
            ]
        else:
            assert self.text is not None
            decides = [digest_of(self.text)]
            if name == BASIS:
                decides += [self.config.compensation_rank]
            elif name == "features":
                decides += [digest_of(parts[BASIS][n]) for n in sorted(parts.get(BASIS, ()))]
            elif name == SCORE:
                decides += [cache.rule_of(self.statistics), self.statistics.ema_decay]
        return cache.key_of(self.digest, VERSION, name, *decides)


def self_calibrate(
    model: Any,
    config: PruneConfig,
    layers: Sequence[FfnWeights],
    cache_dir: str | None = None,
    say: Say = logger.info,
    tokenizer: Any = None,
) -> tuple[FfnWeights, ...]:
    """The layers with the statistics that ``config`` reads; as they are when it reads none.

    ``tokenizer``: belongs to the model; None: the one that it was loaded with, if any.
    Raises ``AttachError`` for a model that is being pruned, ``ConfigError`` for one that is
    offloaded, has no head or was made in inference mode where gradients are to be learned,
    ``DartError`` where its numbers are not finite.
    """
    names = wanted(config, layers)
    if not names:
        return _with_parts(config, layers, {})
    check_free(model)
    if tokenizer is not None:
        remember_tokenizer(model, tokenizer)
    _check_learnable(model, config.method, layers, FISHER in names)
    # what is kept must serve later forwards of any mode; dropout would draw random numbers
    with torch.inference_mode(False), evaluating(model):
        parts = SelfCalibration(model, config, tuple(layers), cache_dir, say).parts(names)
    return _with_parts(config, layers, parts)


def cached_calibration(
    model: Any, config: PruneConfig, layers: Sequence[FfnWeights], cache_dir: str | None = None
) -> tuple[FfnWeights, ...] | None:
    """As ``self_calibrate``, also while the model is being pruned; None where parts are missing."""
    names = wanted(config, layers)
    if not names:
        return _with_parts(config, layers, {})
    with torch.inference_mode(False):
        parts = SelfCalibration(model, config, tuple(layers), cache_dir, logger.info).cached(names)
    return None if len(parts) < len(names) else _with_parts(config, layers, parts)


def wanted(config: PruneConfig, layers: Sequence[FfnWeights]) -> list[str]:
    """Names of the parts that ``config`` reads.

    The gradients are read by scores that need them and by per-token selection, the basis by
    low-rank compensation, and sums where they count beside what is observed.
    """
    if config.self_stats is None:
        return []
    names: list[str] = []
    rule = SCORES.get(config.score.name)
    statistics = MaskSelector(config, tuple(layers)).statistics
    if rule.needs_fisher or config.token is not None:
        names.append(FISHER)
    if "features" in statistics.needs:
        names.append(BASIS)
    if config.self_stats.tokens:
        names += [SCORE] if statistics.per_token is not None else []
        names += [name for name in SUMS if name in statistics.beside_score]
    return names


def _check_learnable(
    model: nn.Module, method: str, layers: Sequence[FfnWeights], backward: bool
) -> None:
    why = ""
    if any(layer.down.is_meta for layer in layers):
        why = "self-generated text, which an offloaded model does not write: load it whole, or use"
        why += " griffin"
    elif backward and any(p.is_inference() for p in model.parameters()):
        why = "gradients, which weights made in torch.inference_mode() have not: load the model"
        why += " outside it, or use dart-prompt or griffin"
    if why:
        raise ConfigError(f'method "{method}" learns from {why}')


def _with_parts(
    config: PruneConfig, layers: Sequence[FfnWeights], parts: Parts
) -> tuple[FfnWeights, ...]:
    """The layers with the parts; with ``self_stats`` and no parts they have empty statistics."""
    if config.self_stats is None:
        return tuple(layers)
    sums = [from_tensors(parts[n], len(layers)) for n in parts if n == SCORE or n in SUMS]
    stats = []
    for number, layer in enumerate(layers):
        evidence = LayerStatistics({k: v for entry in sums for k, v in entry[number].sums.items()})
        for entry in evidence.sums.values():
            entry.total = entry.total.to(layer.device)
        fisher, basis = (_of_layer(parts, name, layer) for name in (FISHER, BASIS))
        stats.append(SelfStats(evidence, fisher, basis))
    return with_parts(layers, self_stats=stats)


def _of_layer(parts: Parts, name: str, layer: FfnWeights) -> Tensor | None:
    """The tensor of one layer, on its device (a basis in its dtype); None where there is none."""
    tensor = parts.get(name, {}).get(str(layer.index))
    dtype = layer.down.dtype if name == BASIS else torch.float32
    return None if tensor is None else tensor.to(layer.device, dtype)


# The screened head, which is made from last hidden states of self-generated text.

_screens: WeakKeyDictionary[nn.Module, tuple[object, Screen]] = WeakKeyDictionary()
"""The newest screen of a model, and what it was made for."""


def learn_screen(
    model: Any,
    config: PruneConfig,
    layers: Sequence[FfnWeights],
    cache_dir: str | None = None,
    say: Say = logger.info,
    tokenizer: Any = None,
) -> Screen | None:
    """The screen of the head of ``model``; None where ``config`` uses the whole head.

    Raises ``AttachError`` for a model that is being pruned, ``ConfigError`` for a head that cannot
    be screened.
    """
    if not config.screens:
        return None
    weight = _screenable(model)
    check_free(model)
    if tokenizer is not None:
        remember_tokenizer(model, tokenizer)
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        learned = SelfCalibration(model, config, tuple(layers), cache_dir, say)
        mark = learned.text_key, place_of(weight), config.head.bytes
        newest = _screens.get(model)
        if newest is not None and newest[0] == mark:
            return newest[1]
        states = learned.parts([STATES])[STATES]["states"].to(weight.device)
        screen = Screen.of(weight, states, config.head.bytes)
    _screens[model] = mark, screen
    return screen


def _screenable(model: Any) -> Tensor:
    """The weight [V, D] of the head; raises ``ConfigError`` unless it is a plain linear layer."""
    head = model.get_output_embeddings()
    weight: Any = getattr(head, "weight", None)
    if weight is None or getattr(head, "bias", None) is not None or weight.is_meta:
        raise ConfigError(
            f'{type(model).__name__} has no plain output head: leave head.kind at "full"'
        )
    return weight.detach()  # type: ignore[no-any-return]
