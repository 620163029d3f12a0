"""Computes masks from evidence (sums over tokens): first scores, then counts, then compensation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dart_llm.errors import ConfigError, DartError
from dart_llm.pruning.budgets import LayerView, blend_counts
from dart_llm.pruning.clamp import NO_CLAMP, Clamp
from dart_llm.pruning.compensation import CompensationInputs, compensation, low_rank
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.layer_table import AUTO, parse_layer_spec
from dart_llm.pruning.masks import LayerMask, Masks, auto_count, split, top_ids
from dart_llm.pruning.registry import BUDGETS, SCORES, TOKEN_RULES
from dart_llm.pruning.scores import Score, mix_ranks
from dart_llm.pruning.statistics import LayerStatistics, Statistics, TokenSelection, pooled
from dart_llm.pruning.token_level import TokenMask
from dart_llm.pruning.weights import FfnWeights


class MaskSelection(NamedTuple):
    """For each layer: its mask, the number of neurons that it keeps, and its neurons' scores."""

    masks: Masks
    counts: tuple[int, ...]
    scores: tuple[Tensor, ...]


@dataclass(frozen=True)
class MaskSelector:
    """Selects masks for one model by one configuration; it has no state that a run changes.

    ``clamp``: neurons whose activations are fixed; masks never keep them.  Raises ``ConfigError``
    if the configuration does not fit the model.
    """

    config: PruneConfig
    layers: tuple[FfnWeights, ...]
    clamp: Clamp = NO_CLAMP

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("the model has no FFN layers")
        self.targets  # noqa: B018 - raises early if the table does not fit the model
        score, reason = self.config.score, self.rule.no_decay_reason
        if score.ema_decay is not None and reason and not self.removes_nothing:
            raise ConfigError(f'score "{score.name}" {reason}: drop the ema_decay')
        if self.rule.needs_fisher and self.config.self_stats is None:
            raise ConfigError(
                f'score "{score.name}" needs learned statistics: give self_stats={{}} too'
            )
        if self.config.token is not None:
            TOKEN_RULES.get(self.config.token.rule).check(self.config)

    @cached_property
    def rule(self) -> Score:
        """The function that scores neurons."""
        return SCORES.get(self.config.score.name)  # type: ignore[no-any-return]

    @cached_property
    def targets(self) -> tuple[int | str | None, ...]:
        """What each layer keeps: a fixed count, ``auto`` (the budget decides), or None (dense)."""
        if self.config.budget.table is None:
            return (AUTO,) * len(self.layers)
        widths = [layer.width for layer in self.layers]
        return tuple(parse_layer_spec(self.config.budget.table).resolve(widths))

    @cached_property
    def statistics(self) -> Statistics:
        """The sums over observed tokens that this configuration needs."""
        config, score = self.config, self.rule
        needs = set[str]()
        if config.score.strategy == "topk" and AUTO in self.targets:
            needs.update(*(BUDGETS.get(name).needs for name in config.budget.parts()))
        if config.compensation:
            needs.add("signed")
            if config.token is not None or config.compensation_rank:
                needs.add("features" if config.token is None else "lost")
        decay = config.score.ema_decay
        return Statistics(score.per_token, frozenset(needs), score.spread, score.average, decay)

    def token_selection(self, layers: Sequence[int]) -> TokenSelection | None:
        """The argument ``selection`` of ``Statistics.add`` for ``layers``; None if not needed."""
        if "lost" not in self.statistics.needs:
            return None
        saliency = torch.stack([self.layers[layer].saliency for layer in layers])
        return TokenSelection(saliency, tuple(self.keeps(layer) for layer in layers))

    def keeps(self, layer: int) -> float:
        """Share of a layer's neurons to keep, before a budget changes this share."""
        target = self.targets[layer]
        if isinstance(target, int):
            return target / self.layers[layer].width
        return 1.0 if target is None else 1 - self.config.target

    @property
    def needs_evidence(self) -> bool:
        """Whether masks depend on the evidence."""
        return self.statistics.per_token is not None or bool(self.statistics.needs)

    @cached_property  # read at every token
    def removes_nothing(self) -> bool:
        """Whether masks would keep all neurons (sparsity 0, or a table that keeps them all)."""
        if self.config.score.strategy == "auto":
            return False
        return all(
            target is None or target == layer.width or (target == AUTO and self.config.target == 0)
            for target, layer in zip(self.targets, self.layers, strict=True)
        )

    @property
    def total_requested(self) -> bool:
        """Whether the requested sparsity applies to the whole model, not only to some layers."""
        return self.config.score.strategy == "topk" and all(t == AUTO for t in self.targets)

    def select(
        self, evidence: Sequence[LayerStatistics], counts: Sequence[int] | None = None
    ) -> MaskSelection:
        """Select masks from ``evidence``, the sums of each layer.

        ``counts``: how many neurons each layer keeps; None means that the budget decides.  Raises
        ``DartError`` if a score is not finite.
        """
        tokens = 0 if self.config.self_stats is None else self.config.self_stats.tokens
        pairs = list(zip(evidence, self.layers, strict=True))
        evidence = [pooled(observed, layer.self_stats, tokens) for observed, layer in pairs]
        scores = self.scores(evidence)
        if (weight := self.config.score.prior_weight) is not None:
            priors = [layer.prior for layer in self.layers if layer.prior is not None]
            ranked = zip(scores, priors, strict=True)
            scores = [mix_ranks(score, prior, weight) for score, prior in ranked]
        if counts is None:
            counts = self.counts(scores, evidence)
        counts = [self.clamp.most(index, count) for index, count in enumerate(counts)]
        masks = self._masks(self.clamp.last(scores), evidence, counts)
        return MaskSelection(self.clamp.of(masks), tuple(counts), tuple(scores))

    def scores(self, evidence: Sequence[LayerStatistics]) -> list[Tensor]:
        """For each layer, the scores of its neurons, [I].

        Raises ``ConfigError`` if a score function does not give one number per neuron, and
        ``DartError`` if a number is not finite.
        """
        scores = [
            self.rule(self.statistics.score_input(sums, layer.width, layer.device), layer)
            for sums, layer in zip(evidence, self.layers, strict=True)
        ]
        for score, layer in zip(scores, self.layers, strict=True):
            if score.shape != (layer.width,):  # a shorter tensor would drop neurons
                raise ConfigError(
                    f"score {self.config.score.name!r} gave {list(score.shape)} numbers for "
                    f"[{layer.width}] neurons: it must return one number per neuron"
                )
        sums = torch.stack([score.sum().to(scores[0].device) for score in scores])
        if bad := (~sums.isfinite()).nonzero().flatten().tolist():
            raise self._overflow(bad[0], "scores")
        return scores

    def counts(self, scores: Sequence[Tensor], evidence: Sequence[LayerStatistics]) -> list[int]:
        """How many neurons each layer keeps."""
        host = [score.cpu().double() for score in scores]
        if self.config.score.strategy == "auto":
            return [auto_count(score) for score in host]
        targets = list(zip(self.targets, self.layers, strict=True))
        counts = [t if isinstance(t, int) else layer.width for t, layer in targets]
        automatic = [index for index, (target, _) in enumerate(targets) if target == AUTO]
        if automatic:
            views = [self._view(index, host[index], evidence[index]) for index in automatic]
            widths = [view.width for view in views]
            keep = round((1 - self.config.target) * sum(widths))
            first, *second = [BUDGETS.get(name)(views, keep) for name in self.config.budget.parts()]
            allocated = blend_counts(first, second[0], widths) if second else first
            for index, count in zip(automatic, allocated, strict=True):
                counts[index] = count
        return counts

    def _view(self, index: int, score: Tensor, evidence: LayerStatistics) -> LayerView:
        layer, sensitivity = self.layers[index], None
        if "cosine" in evidence.sums:  # S_l = (1 - mean cosine) x mean relative change
            cosine, change = (float(evidence.sums[name].mean) for name in ("cosine", "change"))
            sensitivity = (1 - cosine) * change
            if not math.isfinite(sensitivity):
                raise self._overflow(index, "sensitivities")
        return LayerView(layer.width, layer.depth, score, sensitivity)

    def _masks(
        self, scores: Sequence[Tensor], evidence: Sequence[LayerStatistics], counts: Sequence[int]
    ) -> Masks:
        masks = list[LayerMask | None]()
        low_ranks = dict[int, CompensationInputs]()
        for index, (layer, score, sums, count) in enumerate(
            zip(self.layers, scores, evidence, counts, strict=True)
        ):
            mask = None if count >= layer.width else self._token_mask(index, score, sums, count)
            if mask is None and count < layer.width:
                kept, removed = split(score, count)
                removed = self.clamp.without(index, removed)
                bias = None
                if self.config.compensation and "features" in sums.sums and layer.basis is not None:
                    low_ranks[index] = CompensationInputs(layer.down, sums, layer.basis, removed)
                elif self.config.compensation:
                    bias = compensation(layer.down, sums.sums["signed"].mean, removed)
                mask = LayerMask(kept, layer.width, bias)
            masks.append(mask)
        for index, (bias, linear) in zip(low_ranks, low_rank([*low_ranks.values()]), strict=True):
            mask = masks[index]
            assert mask is not None
            masks[index] = replace(mask, bias=bias, low_rank=linear)
        return tuple(masks)

    def _token_mask(
        self, index: int, score: Tensor, evidence: LayerStatistics, count: int
    ) -> LayerMask | None:
        """The mask of a layer for per-token selection; None without per-token selection, or if a
        token would select all neurons that are not clamped."""
        layer = self.layers[index]
        unclamped = self.clamp.most(index, layer.width)
        if self.config.token is None or unclamped <= count:
            return None
        lost = evidence.mean_when_lost() if self.config.compensation else None
        mean = None if lost is None else self.clamp.silent(index, lost)
        saliency = None if layer.self_stats is None else layer.saliency
        whole = unclamped == layer.width
        ids = torch.arange(layer.width, device=score.device) if whole else top_ids(score, unclamped)
        bias = None if mean is None else compensation(layer.down, mean)
        return TokenMask(ids, layer.width, bias, winners=count, mean=mean, saliency=saliency)

    def _overflow(self, layer: int, what: str) -> DartError:
        """The error for values (``what``) of a layer that are not finite."""
        dtype = str(self.layers[layer].up.dtype).removeprefix("torch.")
        return DartError(
            f"the {what} of layer {layer} are not finite: the model's activations overflow in "
            f"{dtype}; try dtype float32"
        )
