"""Statistics that are collected from a model once, before it is pruned, and cached.

``calibrate`` computes static masks from a text (``wanda``, ``flap``).  For ``glass`` it computes a
prior instead: scores of the neurons on text that the model generates.  ``self_calibrate`` learns,
also from text that the model generates, the statistics that scores, budgets and compensation use in
addition to the prompt.  ``learn_screen`` learns a screened head, which computes exact scores only
for some vocabulary entries (docs/reference.md, "Self-calibration").
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
from dart_llm.calibration.collect import (
    BACKWARD,
    BASIS_TOKENS,
    WRITTEN,
    Needs,
    collect,
    evaluating,
    find_bases,
    last_states,
    opening_ids,
    rows_at_once,
    sample_continuations,
    start_ids,
    start_tokens,
)
from dart_llm.calibration.progress import Progress, Say, graph_bytes, learning, text_bytes
from dart_llm.data import documents
from dart_llm.errors import ConfigError, LoadError
from dart_llm.models.checkpoint import digest_of, fingerprint, remember_tokenizer
from dart_llm.models.describe import describe
from dart_llm.models.packed import place_of
from dart_llm.models.screen import Screen
from dart_llm.patching.patch import check_free
from dart_llm.pruning.config import BudgetConfig, PruneConfig, SelfStatsConfig
from dart_llm.pruning.masks import Masks
from dart_llm.pruning.registry import SCORES, TOKEN_RULES
from dart_llm.pruning.selection import MaskSelector
from dart_llm.pruning.statistics import (
    FISHER,
    UP,
    LayerStatistics,
    SelfStats,
    from_tensors,
    to_tensors,
)
from dart_llm.pruning.weights import FfnWeights, with_parts

logger = logging.getLogger("dart_llm")

WRITING, READING = "the model writes text", "the model reads it"
BASES = "features of compensation"
"""Names of stages in progress lines."""

ONE_BY_ONE = 3
"""Generating a token takes as long as reading this many: a step with few sequences is slow."""

LEARNING = "learning from self-generated text, once per model"

BASIS, SCORE, STATES = "basis", "score", "states"
"""Names of learned statistics: ``BASIS`` for the basis of low-rank compensation, ``SCORE`` for the
score's sum, ``STATES`` for last hidden states.  Others are ``FISHER`` and those in ``SUMS``."""

SUMS = ("signed", "features", "sensitivity", UP)
"""Names of sums that a configuration may need (``Statistics.needs``)."""


def _keep(model: Any, key: str, cache_dir: str | None, tensors: cache.Tensors, say: Say) -> None:
    """Store tensors in the cache; if their file cannot be written, only report that."""
    try:
        cache.keep(model, key, cache_dir, tensors, {"note": "what dart_llm learned of a model"})
    except LoadError as error:
        say(f"the learned statistics were not cached: {error}")


def _memory(
    model: Any, sequences: int, length: int, backward: bool = False, *, writes: bool
) -> int:
    """Approximate bytes, besides the model, to read a text; ``writes``: to generate it too."""
    rows = min(rows_at_once(model, length, backward), sequences)
    to_write = text_bytes(model, min(WRITTEN, sequences), length) if writes else 0
    return max(to_write, graph_bytes(model, rows * length, backward))


# Masks and priors


@dataclass(frozen=True)
class Calibrated:
    """Either masks or a prior (scores [I] per layer); ``note`` names the text it is made from."""

    fixed_masks: Masks | None
    prior: tuple[Tensor, ...] | None
    note: str


def calibrate(
    model: Any,
    tokenizer: Any,
    config: PruneConfig,
    source: str | None,
    cache_dir: str | None,
    say: Say,
) -> Calibrated:
    """The masks or prior that ``config.calibration`` requests.

    ``source``: name of the text for masks (see data/documents.py); None means C4.

    Raises ``ConfigError`` for an unusable text, ``LoadError`` for one that cannot be loaded.
    """
    part, layers = config.calibration, _layers(model, config)
    assert part is not None
    statistics = observing(config, layers).statistics
    ids, name = None, "self-generated text"
    tokens = f"self {part.sequences} {part.length} {start_tokens(model)} {config.seed}"
    if part.source == "text":
        texts = documents.load(documents.calibration_source(source))
        ids = documents.sequences(tokenizer, texts, part.sequences, part.length)
        tokens, name = digest_of(ids), documents.calibration_source(source).label
    count = part.sequences if ids is None else len(ids)
    short = "" if count == part.sequences else f" of {part.sequences}"
    size = f"{count}{short} sequences of {part.length} tokens ({count * part.length:,} tokens)"
    note = f"calibration: {size} of {name}"
    sums = cache.rule_of(statistics), sorted(statistics.beside_score)
    key = cache.key_of(fingerprint(model), *sums, tokens)
    tensors = cache.find(model, key, cache_dir)
    if tensors is None:
        check_free(model)
        work = {READING: float(count * part.length)}
        work = {WRITING: ONE_BY_ONE * work[READING], **work} if ids is None else work
        memory = _memory(model, count, part.length, writes=ids is None)
        what = f"calibrating {config.method}, once per model ({note})"
        with learning(model, say, what, work, memory) as (faster, progress):
            if ids is None:
                generator = torch.Generator().manual_seed(config.seed)
                first = start_ids(faster, part.sequences, generator)
                write = progress.stage(WRITING)
                ids = sample_continuations(faster, first, part.length, generator, write)
            tensors = to_tensors(collect(faster, ids, Needs(statistics), progress.stage(READING)))
        _keep(model, key, cache_dir, tensors, say)
    masks, prior = choose(model, config, from_tensors(tensors, len(layers)))
    return Calibrated(masks, prior, note)


def observing(config: PruneConfig, layers: Sequence[FfnWeights]) -> MaskSelector:
    """A selector that collects statistics for ``config``, whatever the sparsity and layer table.

    For masks, mean activations are collected even without compensation.  Raises ``ConfigError`` for
    a score that needs learned gradients.
    """
    if SCORES.get(config.score.name).needs_fisher:
        raise ConfigError(
            f'score "{config.score.name}" reads gradients, which only self-calibration computes: '
            "drop the calibration"
        )
    masks = config.calibration is not None and config.calibration.purpose == "masks"
    observed = PruneConfig(
        method=config.method,
        sparsity=0.5,
        score=config.score.model_copy(update={"strategy": "topk", "prior_weight": None}),
        budget=BudgetConfig(name=config.budget.name if masks else "uniform"),
        compensation=masks,
        seed=config.seed,
    )
    return MaskSelector(observed, tuple(layers))


@torch.no_grad()
def choose(
    model: Any, config: PruneConfig, evidence: Sequence[LayerStatistics]
) -> tuple[Masks | None, tuple[Tensor, ...] | None]:
    """Compute ``(masks, None)`` or ``(None, prior)``, depending on the calibration's purpose."""
    part, layers = config.calibration, _layers(model, config)
    assert part is not None
    for layer, statistics in zip(layers, evidence, strict=True):
        for entry in statistics.sums.values():
            entry.total = entry.total.to(layer.device)
    with torch.inference_mode(False):
        if part.purpose == "masks":
            return MaskSelector(config, layers).select(evidence).masks, None
        return None, tuple(observing(config, layers).scores(evidence))


def _layers(model: Any, config: PruneConfig) -> tuple[FfnWeights, ...]:
    return describe(model).weights(config.score.proxy_embedding, config.seed)


# Learned statistics and the screened head


def self_calibrate(
    model: Any,
    config: PruneConfig,
    layers: Sequence[FfnWeights],
    cache_dir: str | None = None,
    say: Say = logger.info,
    tokenizer: Any = None,
) -> tuple[FfnWeights, ...]:
    """``layers`` with the learned statistics that ``config`` needs.

    ``tokenizer``: the model's; None means the tokenizer that was loaded with the model, if any.
    Raises ``AttachError`` for a model that is being pruned, and ``DartError`` for values that are
    not finite.  Raises ``ConfigError`` for a model that is offloaded or has no head, and, if
    gradients are needed, for weights that were created in inference mode.
    """
    names = wanted(config, layers)
    if not names:
        return _with_statistics(config, layers, {})
    _check_learnable(model, config.method, layers, FISHER in names)
    learned = _SelfText(model, config, tuple(layers), cache_dir, say, tokenizer).learned(names)
    return _with_statistics(config, layers, learned)


def cached_calibration(
    model: Any, config: PruneConfig, layers: Sequence[FfnWeights], cache_dir: str | None = None
) -> tuple[FfnWeights, ...] | None:
    """Like ``self_calibrate``, but reads only the cache, even for pruned models; None if absent."""
    names = wanted(config, layers)
    learned: cache.Tensors | None = {}
    if names:
        with torch.inference_mode(False):
            source = _SelfText(model, config, tuple(layers), cache_dir, logger.info)
            learned = source.cached(names)
    return None if learned is None else _with_statistics(config, layers, learned)


_screens: WeakKeyDictionary[nn.Module, tuple[object, Screen]] = WeakKeyDictionary()
"""Maps a model to a key, which identifies the inputs of its newest screen, and that screen."""


def learn_screen(
    model: Any,
    config: PruneConfig,
    layers: Sequence[FfnWeights],
    cache_dir: str | None = None,
    say: Say = logger.info,
    tokenizer: Any = None,
) -> Screen | None:
    """The screen of the model's output head (class ``Screen``); None if ``config`` needs none.

    Raises ``AttachError`` for a model that is being pruned, ``ConfigError`` for a head that cannot
    be screened.
    """
    if not config.screens:
        return None
    head = model.get_output_embeddings()
    weight: Any = getattr(head, "weight", None)
    if weight is None or getattr(head, "bias", None) is not None or weight.is_meta:
        raise ConfigError(
            f"{type(model).__name__} has no plain output head (one matrix without a bias, not "
            'offloaded), which a screened head needs: leave head.kind at "full"'
        )
    source = _SelfText(model, config, tuple(layers), cache_dir, say, tokenizer)
    key = source.text_key, place_of(weight.detach()), config.head.bytes
    newest = _screens.get(model)
    if newest is not None and newest[0] == key:
        return newest[1]
    states = source.learned([STATES])[STATES].to(weight.device)
    with torch.inference_mode(False), torch.no_grad():
        screen = Screen.of(weight.detach(), states, config.head.bytes)
    _screens[model] = key, screen
    return screen


class _SelfText:
    """The text that a model generates for one configuration, and the statistics learned from it.

    The text and the statistics are cached.  The key of the statistics depends on the text's tokens,
    not only on the settings of generation: rounding, and so the text, differs between machines.
    """

    def __init__(
        self,
        model: Any,
        config: PruneConfig,
        layers: tuple[FfnWeights, ...],
        cache_dir: str | None,
        say: Say,
        tokenizer: Any = None,
    ) -> None:
        if tokenizer is not None:
            remember_tokenizer(model, tokenizer)
        self.model, self.config, self.layers = model, config, layers
        self.cache_dir, self.say = cache_dir, say
        self.statistics = MaskSelector(config, layers).statistics
        self.settings = config.self_stats or SelfStatsConfig(tokens=0)
        self.opening = opening_ids(model, self.settings.sequences, self.settings.opening)
        self.digest = fingerprint(model)
        first = start_tokens(model) if self.opening is None else digest_of(self.opening)
        inputs = first, self.settings.model_dump(exclude={"tokens"}), config.seed
        self.text_key = cache.key_of(self.digest, "text", *inputs)

    def cached(self, names: Sequence[str]) -> cache.Tensors | None:
        """The learned statistics with these names, from the cache; None if they are not cached."""
        text = cache.find(self.model, self.text_key, self.cache_dir)
        key = None if text is None else self._key(names, text["ids"])
        return None if key is None else cache.find(self.model, key, self.cache_dir)

    def learned(self, names: Sequence[str]) -> cache.Tensors:
        """The learned statistics with these names, learned now if they are not cached."""
        check_free(self.model)
        # outside inference mode, so that later forwards in any mode can use the tensors; in
        # evaluation mode, so that there is no dropout
        with torch.inference_mode(False), evaluating(self.model):
            tensors = self.cached(names)
            if tensors is not None:
                return tensors
            text = cache.find(self.model, self.text_key, self.cache_dir)
            tokens = float(self.settings.sequences * self.settings.length)
            work = {WRITING: ONE_BY_ONE * tokens} if text is None else {}
            if BASIS in names:  # computing the eigenvectors takes as long as the forwards
                work[BASES] = 2 * min(tokens, BASIS_TOKENS)
            work[READING] = tokens * (BACKWARD if FISHER in names else 1)
            size, backward = (self.settings.sequences, self.settings.length), FISHER in names
            memory = _memory(self.model, *size, backward, writes=text is None)
            with learning(self.model, self.say, LEARNING, work, memory) as (faster, progress):
                if text is None:
                    text = {"ids": self._written(faster, progress)}
                    _keep(self.model, self.text_key, self.cache_dir, text, self.say)
                tensors = self._read(faster, text["ids"], names, progress)
            key = self._key(names, text["ids"])
            _keep(self.model, key, self.cache_dir, tensors, self.say)
            return tensors

    def _key(self, names: Sequence[str], ids: Tensor) -> str:
        rule = cache.rule_of(self.statistics)
        inputs = sorted(names), digest_of(ids)
        rank = self.config.compensation_rank if BASIS in names else 0
        return cache.key_of(self.digest, *inputs, rank, rule if SCORE in names else None)

    def _written(self, model: Any, progress: Progress) -> Tensor:
        """The text that ``model`` generates, [n, T] int64 on the host."""
        settings, opening = self.settings, self.opening
        generator = torch.Generator().manual_seed(self.config.seed)
        if opening is None:
            self.say("without a tokenizer self-generated text begins with the model's start token")
            opening = start_ids(self.model, settings.sequences, generator)
        sampling = progress.stage(WRITING), settings.temperature, settings.top_p
        return sample_continuations(model, opening, settings.length, generator, *sampling)

    def _read(
        self, model: Any, ids: Tensor, names: Sequence[str], progress: Progress
    ) -> cache.Tensors:
        if STATES in names:
            states = last_states(model, ids, progress.stage(READING))
            return {STATES: states.to(self.model.dtype)}
        tensors: cache.Tensors = {}
        bases: list[Tensor | None] = []
        if BASIS in names:
            rank = self.config.compensation_rank
            bases = find_bases(model, ids, rank, self.layers, progress.stage(BASES))
            layers = enumerate(bases)
            tensors = {f"{BASIS}.{n}": basis.float() for n, basis in layers if basis is not None}
        statistics = replace(
            self.statistics,
            per_token=self.statistics.per_token if SCORE in names else None,
            needs=frozenset(names) & {*SUMS},
            spread=False,
        )
        needs = Needs(statistics, bases, FISHER in names, inner=True)
        evidence = collect(model, ids, needs, progress.stage(READING))
        for number, layer in enumerate(evidence):
            if FISHER in names:
                tensors[f"{FISHER}.{number}"] = layer.sums.pop(FISHER).total
        return {**tensors, **to_tensors(evidence)}


def wanted(config: PruneConfig, layers: Sequence[FfnWeights]) -> list[str]:
    """Names of the learned statistics that ``config`` needs.

    Gradients are needed by some scores and by most per-token rules, and the basis by low-rank
    compensation.  Sums are needed if they count in addition to the tokens that a run observes.
    """
    if config.self_stats is None:
        return []
    statistics = MaskSelector(config, tuple(layers)).statistics
    names = [FISHER] if SCORES.get(config.score.name).needs_fisher else []
    if config.token is not None and TOKEN_RULES.get(config.token.rule).learns not in names:
        names.append(TOKEN_RULES.get(config.token.rule).learns)
    if "features" in statistics.needs:
        names.append(BASIS)
    if config.self_stats.tokens:
        names += [SCORE] if statistics.per_token is not None else []
        names += [name for name in SUMS if name in statistics.beside_score]
    return names


def _check_learnable(
    model: nn.Module, method: str, layers: Sequence[FfnWeights], backward: bool
) -> None:
    """Raise ``ConfigError`` if statistics cannot be learned; ``backward``: with gradients."""
    problem = ""
    if any(layer.down.is_meta for layer in layers):
        problem = "self-generated text, which an offloaded model cannot write: do not offload it"
    elif backward and any(p.is_inference() for p in model.parameters()):
        problem = (
            "gradients, which weights made in torch.inference_mode() lack: load the model outside "
            "that mode"
        )
    if problem:
        raise ConfigError(f'method "{method}" learns from {problem}, or use griffin')


def _with_statistics(
    config: PruneConfig, layers: Sequence[FfnWeights], learned: cache.Tensors
) -> tuple[FfnWeights, ...]:
    """``layers`` with the statistics in ``learned`` (may be empty), each on its layer's device."""
    if config.self_stats is None:
        return tuple(layers)
    sums = {name: tensor for name, tensor in learned.items() if name[0].isdigit()}
    stats = []
    for layer, evidence in zip(layers, from_tensors(sums, len(layers)), strict=True):
        for entry in evidence.sums.values():
            entry.total = entry.total.to(layer.device)
        fisher, basis = (learned.get(f"{name}.{layer.index}") for name in (FISHER, BASIS))
        fisher = None if fisher is None else fisher.to(layer.device)
        basis = None if basis is None else basis.to(layer.device, layer.down.dtype)
        stats.append(SelfStats(evidence, fisher, basis))
    return with_parts(layers, self_stats=stats)
