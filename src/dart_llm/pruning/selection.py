"""From evidence to masks: scores, layer counts, kept neurons, compensation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dart_llm.errors import AttachError, ConfigError, DartError
from dart_llm.pruning.budgets import LayerView, align_counts, blend_counts
from dart_llm.pruning.clamp import NO_CLAMP, Clamp
from dart_llm.pruning.compensation import CompensationInputs, compensation, low_rank
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.layer_table import AUTO, parse_layer_spec
from dart_llm.pruning.masks import LayerMask, Masks, auto_count, split
from dart_llm.pruning.registry import BUDGETS, SCORES
from dart_llm.pruning.scores import mix_ranks
from dart_llm.pruning.statistics import Choice, LayerStatistics, Statistics, pooled
from dart_llm.pruning.token_level import candidate_count, token_mask
from dart_llm.pruning.weights import FfnWeights


@dataclass(frozen=True)
class MaskSelection:
    """Masks of all layers, their counts and the scores behind."""

    masks: Masks
    counts: tuple[int, ...]
    scores: tuple[Tensor, ...]


@dataclass(frozen=True)
class MaskSelector:
    """The policy of one configuration over the layers of one model; holds no run state.

    ``clamp``: neurons that masks never keep, whose activations are fixed.
    """

    config: PruneConfig
    layers: tuple[FfnWeights, ...]
    clamp: Clamp = NO_CLAMP

    def __post_init__(self) -> None:
        self.targets  # noqa: B018 - raises early when the table does not fit the model
        score = self.config.score
        rule = SCORES.get(score.name)
        if score.ema_decay is not None and rule.undecayed and not self.removes_nothing:
            raise ConfigError(f'score "{score.name}" {rule.undecayed}: drop the ema_decay')
        if rule.learns and self.config.prior is None:
            raise ConfigError(f'score "{score.name}" needs a prior: give prior={{}} too')

    @cached_property
    def targets(self) -> tuple[int | str | None, ...]:
        """Per layer: a fixed count, ``auto``, or None (dense)."""
        if self.config.budget.table is None:
            return (AUTO,) * len(self.layers)
        widths = [layer.width for layer in self.layers]
        return tuple(parse_layer_spec(self.config.budget.table).resolve(widths))

    @cached_property
    def statistics(self) -> Statistics:
        """What must be summed over the observed tokens."""
        config, score = self.config, SCORES.get(self.config.score.name)
        needs = set[str]()
        if config.score.strategy == "topk" and AUTO in self.targets:
            needs.update(*(BUDGETS.get(name).needs for name in config.budget.parts()))
        if config.compensation:
            needs.add("signed")
            if config.token is not None or config.compensation_rank:
                needs.add("features" if config.token is None else "lost")
        decay = config.score.ema_decay
        return Statistics(score.per_token, decay, frozenset(needs), score.spread, score.average)

    def choice(self, layers: Sequence[int]) -> Choice | None:
        """How the tokens of some layers choose, for ``Statistics.add``; None where they do not."""
        if "lost" not in self.statistics.needs:
            return None
        worth = torch.stack([self.layers[layer].unit_worth for layer in layers])
        return Choice(worth, tuple(self.keeps(layer) for layer in layers))

    def keeps(self, layer: int) -> float:
        """Share of a layer's neurons that is kept, before a budget is asked."""
        target = self.targets[layer]
        if isinstance(target, int):
            return target / self.layers[layer].width
        return 1.0 if target is None else 1 - self.config.target

    @property
    def needs_evidence(self) -> bool:
        return self.statistics.per_token is not None or bool(self.statistics.needs)

    @cached_property  # asked at every token
    def removes_nothing(self) -> bool:
        """Whether no neuron can ever be removed (sparsity 0, or a table of ones)."""
        if self.config.score.strategy == "auto":
            return False
        return all(
            target is None or target == layer.width or (target == AUTO and self.config.target == 0)
            for target, layer in zip(self.targets, self.layers, strict=True)
        )

    @property
    def asks_total(self) -> bool:
        """Whether the sparsity asked for is one of the whole model, not of some layers."""
        return self.config.score.strategy == "topk" and all(t == AUTO for t in self.targets)

    def select(
        self, evidence: Sequence[LayerStatistics], counts: Sequence[int] | None = None
    ) -> MaskSelection:
        """Masks from evidence; ``counts``: keep these instead of allocating again.

        Raises ``DartError`` when a score is not finite.
        """
        tokens = 0 if self.config.prior is None else self.config.prior.tokens
        known = zip(evidence, self.layers, strict=True)
        evidence = [pooled(observed, layer.learnt, tokens) for observed, layer in known]
        scores = self.scores(evidence)
        if (weight := self.config.score.prior_weight) is not None:
            priors = [layer.prior for layer in self.layers if layer.prior is not None]
            if len(priors) < len(self.layers):
                raise RuntimeError("a score with a prior_weight needs the layers' priors")
            pairs = zip(scores, priors, strict=True)
            scores = [mix_ranks(score, prior, weight) for score, prior in pairs]
        if counts is None:
            counts = self.counts(scores, evidence)
        counts = [self.clamp.most(index, count) for index, count in enumerate(counts)]
        masks = self._masks(self.clamp.last(scores), evidence, counts)
        return MaskSelection(self.clamp.of(masks), tuple(counts), tuple(scores))

    def scores(self, evidence: Sequence[LayerStatistics]) -> list[Tensor]:
        """What the neuron score says of each layer, [I].

        Raises ``ConfigError`` unless there is one number per neuron, ``DartError`` unless finite.
        """
        rule = SCORES.get(self.config.score.name)
        scores = [
            rule(self.statistics.score_input(known, layer.width, layer.device), layer)
            for known, layer in zip(evidence, self.layers, strict=True)
        ]
        for score, layer in zip(scores, self.layers, strict=True):
            if score.shape != (layer.width,):  # a short one cuts neurons unasked
                raise ConfigError(
                    f"score {self.config.score.name!r} gave {list(score.shape)} numbers for "
                    f"[{layer.width}] neurons: it must return one number per neuron"
                )
        sums = torch.stack([score.sum().to(scores[0].device) for score in scores])
        if bad := (~sums.isfinite()).nonzero().flatten().tolist():
            raise self._overflow(bad[0], "scores")
        return scores

    def preview(self, evidence: Sequence[LayerStatistics] | None) -> Masks:
        """The masks of ``select``; raises ``AttachError`` where evidence is needed and missing."""
        if self.removes_nothing:
            return (None,) * len(self.layers)
        if evidence is None:
            if self.needs_evidence:
                raise AttachError("no token has been observed yet: run a prompt first")
            evidence = [LayerStatistics() for _ in self.layers]
        return self.select(evidence).masks

    def counts(self, scores: Sequence[Tensor], evidence: Sequence[LayerStatistics]) -> list[int]:
        """How many neurons each layer keeps."""
        host = [score.cpu().double() for score in scores]
        if self.config.score.strategy == "auto":
            return [auto_count(score) for score in host]
        counts = [
            layer.width if target is None else 0 if isinstance(target, str) else target
            for target, layer in zip(self.targets, self.layers, strict=True)
        ]
        automatic = [index for index, target in enumerate(self.targets) if target == AUTO]
        if automatic:
            views = [self._view(index, host[index], evidence[index]) for index in automatic]
            for index, count in zip(automatic, self._allocate(views), strict=True):
                counts[index] = count
        return counts

    def _allocate(self, views: Sequence[LayerView]) -> list[int]:
        widths = [view.width for view in views]
        keep = round((1 - self.config.target) * sum(widths))
        found = [BUDGETS.get(name)(views, keep) for name in self.config.budget.parts()]
        counts = found[0] if len(found) == 1 else blend_counts(found[0], found[1], widths)
        return align_counts(counts, widths, self.config.budget.multiple)

    def _view(self, index: int, score: Tensor, evidence: LayerStatistics) -> LayerView:
        layer, sums = self.layers[index], evidence.sums
        impact = None
        if "squares" in sums:
            gain = sums["gain"].mean / sums["stream"].total.clamp_min(1e-30)
            impact = (sums["squares"].total * layer.down_norm.square() * gain).cpu().double()
            if not bool(impact.isfinite().all()):
                raise self._overflow(index, "output energies")
        return LayerView(
            layer.width,
            layer.depth,
            score,
            self._sensitivity(index, evidence, ""),
            self._sensitivity(index, evidence, "-residual"),
            impact,
        )

    def _sensitivity(self, index: int, evidence: LayerStatistics, suffix: str) -> float | None:
        """S_l = (1 - mean cosine) x mean relative change."""
        if f"cosine{suffix}" not in evidence.sums:
            return None
        cosine = float(evidence.sums[f"cosine{suffix}"].mean)
        change = float(evidence.sums[f"change{suffix}"].mean)
        if not math.isfinite(cosine * change):
            raise self._overflow(index, "sensitivities")
        return (1 - cosine) * change

    def _masks(
        self, scores: Sequence[Tensor], evidence: Sequence[LayerStatistics], counts: Sequence[int]
    ) -> Masks:
        masks = list[LayerMask | None]()
        gone = dict[int, CompensationInputs]()
        for index, known in enumerate(evidence):
            layer, score, count = self.layers[index], scores[index], counts[index]
            basis = None if layer.learnt is None else layer.learnt.basis
            if count >= layer.width:
                masks.append(None)
            elif (mask := self._token_mask(index, score, known, count)) is not None:
                masks.append(mask)
            else:
                kept, removed = split(score, count)
                removed = self.clamp.without(index, removed)
                bias = None
                if self.config.compensation and "features" in known.sums and basis is not None:
                    gone[index] = CompensationInputs(layer.down, known, basis, removed)
                elif self.config.compensation:
                    bias = compensation(layer.down, known.sums["signed"].mean, removed)
                masks.append(LayerMask(kept, layer.width, bias))
        for index, (bias, linear) in zip(gone, low_rank(list(gone.values())), strict=True):
            mask = masks[index]
            masks[index] = None if mask is None else replace(mask, bias=bias, low_rank=linear)
        return tuple(masks)

    def _token_mask(
        self, index: int, score: Tensor, evidence: LayerStatistics, count: int
    ) -> LayerMask | None:
        """Candidates among which each token chooses; None where tokens choose nothing."""
        if (token := self.config.token) is None:
            return None
        layer = self.layers[index]
        wide = self.clamp.most(index, candidate_count(token.candidates, layer.width, count))
        if wide <= count:
            return None
        mean = None
        if self.config.compensation:
            mean = self.clamp.silent(index, evidence.mean_when_lost())
        worth = None if layer.learnt is None else layer.unit_worth
        return token_mask(score, wide, count, layer.down, mean, worth)

    def _overflow(self, layer: int, what: str) -> DartError:
        dtype = str(self.layers[layer].up.dtype).removeprefix("torch.")
        return DartError(
            f"the {what} of layer {layer} are not finite: the model's activations overflow in "
            f"{dtype}; try dtype float32"
        )


def check_fits(
    config: PruneConfig, layers: Sequence[FfnWeights], clamp: Clamp = NO_CLAMP
) -> MaskSelector:
    """A ``MaskSelector``, or ``ConfigError`` when the configuration cannot work on this model."""
    if not layers:
        raise ConfigError("the model has no FFN layers")
    return MaskSelector(config, tuple(layers), clamp)
