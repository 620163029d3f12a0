"""What a model teaches about itself before it is first pruned: parts, and where each is kept.

A part is one thing that scores, budgets or compensation read: the gradients, the basis of
compensation, a sum over the tokens of the model's own text, or the reach towards the vocabulary.
Each is kept under a key of what decides it alone, so that configurations share what they can.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.calibration import cache
from dart_llm.calibration.collect import (
    BACKWARD,
    BASIS_TOKENS,
    collect_statistics,
    evaluating,
    find_bases,
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
    weights_of,
)
from dart_llm.calibration.self_text import (
    WRITTEN,
    opening_ids,
    own_start,
    sample_continuations,
)
from dart_llm.errors import ConfigError, LoadError
from dart_llm.models.checkpoint import remember_tokenizer
from dart_llm.models.fingerprint import digest_of, fingerprint
from dart_llm.patching.patch import check_free
from dart_llm.pruning.config import PriorConfig, PruneConfig
from dart_llm.pruning.registry import SCORES
from dart_llm.pruning.selection import MaskSelector
from dart_llm.pruning.statistics import LayerPrior, LayerStatistics, Statistics, Sum
from dart_llm.pruning.weights import FfnWeights, reach_of, with_prior

logger = logging.getLogger("dart_llm")

VERSION = 3
"""Of what is learnt and how: another one finds nothing of the old in the cache.

In which dtype it is computed does not enter: that is rounding.
"""

STATES = "states"
"""The part that a screened head is made from: hidden states."""

TEXT, REACH, CURVATURE, BASIS, SCORE = "text", "reach", "curvature", "basis", "score"
"""Parts that are no sums over tokens under a name of their own (``SUMS``), and a score's sum."""

SUMS = {
    "signed": ("signed",),
    "features": ("features", "moments", "cross"),
    "squares": ("squares", "gain", "stream"),
    "sensitivity": ("cosine", "change"),
    "sensitivity-residual": ("cosine-residual", "change-residual"),
}
"""Parts that are sums: what a configuration needs (``Statistics.needs``), and its sums' names."""

Part = list[LayerStatistics]

MakePart = Callable[[Any, Tensor, Advance], Tensor]
"""Makes a part with a model from texts ids [n, T]."""

BASES, WEIGHTS = "features of compensation", "reach of weights"
"""Stages of learning beside ``WRITING`` and ``READING``, in words."""

LEARNING = "learning from the model's own text, once per model"


@dataclass
class Lesson:
    """The parts that one configuration reads of one model: where each is kept, how it is made."""

    model: Any
    config: PruneConfig
    layers: tuple[FfnWeights, ...]
    cache_dir: str | None
    say: Say

    def __post_init__(self) -> None:
        self.statistics = MaskSelector(self.config, self.layers).statistics
        self.digest = fingerprint(self.model)
        self.devices = [layer.device for layer in self.layers]
        self.unkept = False
        self.opening: Tensor | None = None
        self.text: Tensor | None = None
        if (prior := self.config.prior) is not None:
            self.start = own_start(self.model)
            self.opening = opening_ids(self.model, prior.sequences, prior.opening)

    def find(self, names: Sequence[str]) -> dict[str, Part]:
        """The parts of ``names`` that are known already: those of the text that is known."""
        found = dict[str, Part]()
        if any(name != REACH for name in names):
            self._read_text()
        for name in names:
            if name == REACH or self.text is not None:
                part = self._find(name, self.devices, found)
                found |= {} if part is None else {name: part}
        return found

    def learn(self, names: Sequence[str], known: dict[str, Part]) -> dict[str, Part]:
        """The parts of ``names``, made from the weights and the model's own text.

        ``known``: those that are.
        """
        of_text = [name for name in names if name != REACH]
        work = self._work(names)
        memory = self._memory(CURVATURE in names) if of_text else 0
        with learning(self.model, self.say, LEARNING, work, memory, INSTEAD) as (model, progress):
            if REACH in names:
                known = known | {REACH: self._reach(progress.stage(WEIGHTS))}
            if of_text and self.text is None:
                self._write_text(model, progress)
                known = known | self.find(of_text)  # of this very text: it alone was lost
            missing = [name for name in of_text if name not in known]
            return known | (self._read(model, missing, known, progress) if missing else {})

    def _read(
        self, model: Any, names: Sequence[str], known: dict[str, Part], progress: Progress
    ) -> dict[str, Part]:
        """The parts of ``names`` that the model's own text gives."""
        ids = self.text
        assert ids is not None
        bases: list[Tensor | None] = [None] * len(self.layers)
        if BASIS in known:
            bases = [basis_of(known, place, one) for place, one in enumerate(self.layers)]
        elif BASIS in names:
            rank = self.config.compensation_rank
            bases = find_bases(model, ids, rank, self.layers, progress.stage(BASES))
        advance = progress.stage(READING)
        evidence = collect_statistics(
            model, ids, self._missing(names), bases, self.layers, advance, CURVATURE in names
        )
        made = {name: _part_of(evidence, name) for name in names}
        for name, part in made.items():
            self._keep(name, part, known | made)
        return made

    def _reach(self, advance: Advance) -> Part:
        """``FfnWeights.reach`` of every layer."""
        found = []
        for number, layer in enumerate(self.layers):
            assert layer.embedding is not None
            high, mean = reach_of(layer.down.detach(), layer.embedding.detach())
            found.append(LayerStatistics({"max": Sum(high, 1.0), "mean": Sum(mean, 1.0)}))
            advance((number + 1) / len(self.layers))
        self._keep(REACH, found, {})
        return found

    def _work(self, names: Sequence[str]) -> dict[str, float]:
        """Multiply-adds of each stage that makes the parts of ``names``."""
        found: dict[str, float] = {}
        if REACH in names:
            rows = (len(one.embedding) for one in self.layers if one.embedding is not None)
            found[WEIGHTS] = sum(
                n * one.down.numel() for n, one in zip(rows, self.layers, strict=True)
            )
        of_text = [name for name in names if name != REACH]
        if not of_text:
            return found
        prior, weights = self.config.prior, weights_of(self.model)
        assert prior is not None
        tokens = prior.sequences * prior.length
        if self.text is None:
            found[WRITING] = float(ONE_BY_ONE * weights * tokens)
        if BASIS in names:
            forward = weights * min(tokens, BASIS_TOKENS)
            found[BASES] = 2.0 * forward  # the eigenvectors take as long again
        found[READING] = weights * tokens * (BACKWARD if CURVATURE in names else 1.0)
        return found

    def _memory(self, backward: bool) -> int:
        """Bytes that writing and reading the text take beside the model, about."""
        prior = self.config.prior
        assert prior is not None
        rows = rows_at_once(self.model, prior.length)
        tokens = min(rows, prior.sequences) * prior.length
        return max(
            text_bytes(self.model, min(WRITTEN, prior.sequences), prior.length),
            graph_bytes(self.model, tokens, backward),
        )

    def of_own_text(self, name: str, device: torch.device, make: MakePart, what: str) -> Tensor:
        """What ``make`` learns from the model's own text, kept under ``name``.

        ``what``: is learnt, for people.
        """
        self._read_text()
        known = None if self.text is None else self._find(name, [device], {})
        if known is None:
            known = self._of_text(name, device, make, what)
        return known[0].sums[name].total

    def _of_text(self, name: str, device: torch.device, make: MakePart, what: str) -> Part:
        work = self._work([name])
        with learning(self.model, self.say, what, work, self._memory(False)) as (model, progress):
            if self.text is None:
                self._write_text(model, progress)
            known = self._find(name, [device], {})
            if known is None:
                assert self.text is not None
                found = make(model, self.text, progress.stage(READING))
                known = [LayerStatistics({name: Sum(found, 1.0)})]
                self._keep(name, known, {})
        return known

    def _read_text(self) -> None:
        """The text, if it is known already."""
        if self.text is None:
            text = self._find(TEXT, [torch.device("cpu")], {})
            self.text = None if text is None else text[0].sums["ids"].total

    def _write_text(self, model: Any, progress: Progress) -> None:
        prior = self.config.prior
        assert prior is not None
        self.text = self._written(model, prior, progress.stage(WRITING))
        self._keep(TEXT, [LayerStatistics({"ids": Sum(self.text, 1.0)})], {})

    def _missing(self, names: Sequence[str]) -> Statistics:
        """The statistics of ``names`` alone."""
        per_token = self.statistics.per_token if SCORE in names else None
        return replace(
            self.statistics, per_token=per_token, needs=frozenset(names) & SUMS.keys(), spread=False
        )

    def _written(self, model: Any, prior: PriorConfig, advance: Advance) -> Tensor:
        """What the model writes by itself, [n, T] int64 on the host."""
        generator, opening = torch.Generator().manual_seed(self.config.seed), self.opening
        if opening is None:
            self.say("no tokenizer is at hand: the model's own text begins with its start token")
            vocabulary = int(self.model.config.get_text_config().vocab_size)
            opening = torch.randint(vocabulary, (prior.sequences, 1), generator=generator)
            if self.start:
                opening.fill_(self.start[0])
        written = sample_continuations(
            model, opening, prior.length, generator, advance, prior.temperature, prior.top_p
        )
        return written.clone()

    def _find(
        self, name: str, devices: Sequence[torch.device], known: dict[str, Part]
    ) -> Part | None:
        key = self._key(name, known)
        return cache.find(self.model, key, self.cache_dir, devices)

    def _keep(self, name: str, part: Part, known: dict[str, Part]) -> None:
        about, key = {"note": f"what dart_llm learnt of a model: {name}"}, self._key(name, known)
        try:
            cache.keep(self.model, key, self.cache_dir, part, about)
        except LoadError as error:
            if not self.unkept:  # one sentence is enough for all parts
                self.say(f"what was learnt is not kept for the next time: {error}")
            self.unkept = True

    @property
    def text_key(self) -> str:
        """Of the model and of what decides which text it writes."""
        return self._key(TEXT, {})

    def _key(self, name: str, known: dict[str, Part]) -> str:
        return cache.part_key(self.digest, VERSION, name, *self._decides(name, known))

    def _decides(self, name: str, known: dict[str, Part]) -> list[object]:
        """What decides a part beside the model.

        Of the text and the basis what is in them, not what was asked for: another machine rounds,
        and so writes, otherwise, and parts of two texts would not fit together.
        """
        if name == REACH:
            return [self.config.score.proxy_embedding]
        if name == TEXT:
            prior = self.config.prior
            assert prior is not None
            first = self.start if self.opening is None else digest_of(self.opening)
            return [first, prior.model_dump(exclude={"tokens"}), self.config.seed]
        assert self.text is not None
        text = digest_of(self.text)
        if name == BASIS:
            return [text, self.config.compensation_rank]
        if name == "features":
            each = [one.sums[BASIS].total for one in known.get(BASIS, []) if BASIS in one.sums]
            return [text, *map(digest_of, each)]
        if name == SCORE:
            return [text, cache.rule_of(self.statistics), self.statistics.ema_decay]
        return [text]


def _part_of(evidence: Sequence[LayerStatistics], name: str) -> Part:
    wanted = SUMS.get(name, (name,))
    return [
        LayerStatistics({one: found.sums[one] for one in wanted if one in found.sums})
        for found in evidence
    ]


def basis_of(found: dict[str, Part], place: int, layer: FfnWeights) -> Tensor | None:
    """The basis [r, D] of one layer, in its dtype; None where it has none."""
    held = found[BASIS][place].sums if BASIS in found else {}
    return held[BASIS].total.to(layer.down.dtype) if BASIS in held else None


# What a model teaches about itself before it is first pruned (docs/method.md, "Prior").
#
# A configuration learns the parts that it reads, once, and finds those that another one has
# learnt.


def self_calibrate(
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
        if missing := [name for name in names if name not in found]:
            found = lesson.learn(missing, found)
    return _knowing(config, layers, found)


def cached_calibration(
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
    # where the weights are not at hand or do not fit, the score says what is wrong
    reachable = all(
        one.embedding is not None
        and one.embedding.shape[1] == one.hidden
        and not one.down.is_meta
        and not one.embedding.is_meta
        for one in layers
    )
    names = [REACH] if rule.reach and reachable else []
    if config.prior is None:
        return names
    statistics = MaskSelector(config, tuple(layers)).statistics
    if rule.learns or config.token is not None:
        names.append(CURVATURE)
    if "features" in statistics.needs:
        names.append(BASIS)
    if config.prior.tokens:
        names += [SCORE] if statistics.per_token is not None else []
        names += [name for name in SUMS if name in statistics.beside_score]
    return names


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
        sums = [one.sums for one in found[REACH]]
        known = with_prior(known, known_reach=[(s["max"].total, s["mean"].total) for s in sums])
    if config.prior is None:
        return known
    return with_prior(
        known, learnt=[_prior(found, place, layer) for place, layer in enumerate(known)]
    )


def _prior(found: dict[str, Part], place: int, layer: FfnWeights) -> LayerPrior:
    sums = dict[str, Sum]()
    for part, each in found.items():
        if part not in (REACH, CURVATURE, BASIS):
            sums |= each[place].sums
    curvature = found[CURVATURE][place].sums[CURVATURE].total if CURVATURE in found else None
    return LayerPrior(LayerStatistics(sums), curvature, basis_of(found, place, layer))
