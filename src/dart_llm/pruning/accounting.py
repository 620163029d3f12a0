"""Bytes and achieved sparsity: from the states of a run to its report.

Bytes are counted from the shapes and dtypes that exist (docs/reference.md, "Accounting").
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from dart_llm.pruning.records import HeadReport, LayerStat, RunReport, SequenceReport
from dart_llm.pruning.registry import TOKEN_RULES
from dart_llm.pruning.sequence import MaskSpan, SequenceState
from dart_llm.pruning.token_level import TokenMask, candidate_count
from dart_llm.pruning.token_rules.rule import LayerCost, TokenRule
from dart_llm.pruning.weights import FfnWeights, in_blocks, stored_bytes

IF_COMPACT = "if compact"
"""Stands for an executor that reads each forward's winners once, from the model's weights."""

BFLOAT16 = 2
"""Bytes of a weight, or of a value of the cache, in the unit that bytes per token are given in."""


@dataclass(frozen=True)
class TokenTraffic:
    """What one decoded token reads, weights that are not in blocks and cache counted at bfloat16.

    ``dense``: of all weights, if all were bfloat16.  ``ffn``, ``attention``, ``others`` (head,
    norms, ...): bytes of the weights as they are, blocks as stored.  ``cache``: bytes of one
    position, and how many positions are seen at most (None: all), of layers that are alike.
    ``head``: of ``others`` those of the output head.
    """

    dense: float
    ffn: float
    attention: float
    others: float
    cache: tuple[tuple[float, int | None], ...] = ()
    head: float = 0.0

    def share(
        self,
        context: float,
        ffn: float | None = None,
        attention: float = 1.0,
        head: float = 1.0,
    ) -> float:
        """Bytes that a token reads over those of the dense model at bfloat16.

        ``context``: positions of the cache.  ``ffn``: bytes of FFNs, selection included, None: all;
        ``attention``, ``head``: shares of the bytes of attention's projections, of the head.
        """
        cache = sum(
            each * (context if most is None else min(context, most)) for each, most in self.cache
        )
        ffn_bytes = self.ffn if ffn is None else ffn
        others = self.others - (1 - head) * self.head
        return (ffn_bytes + attention * self.attention + others + cache) / (self.dense + cache)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; ``TokenTraffic(**data)`` is this again."""
        return {**asdict(self), "cache": [list(entry) for entry in self.cache]}


@dataclass(frozen=True)
class Costs:
    """Bytes of the FFN of all layers, per dense decode step of one row."""

    layers: tuple[FfnWeights, ...]
    total_bytes: int
    """Bytes of all weights that one decoded token reads."""
    low_rank: bool = False
    """Whether masks come with low-rank compensation, where a layer has a basis for it."""
    traffic: TokenTraffic | None = None
    """Of a token, all its weights; None: bytes per token are unknown."""
    width: int | None = None
    """Bytes of a weight that is not in blocks; None: as it is stored."""

    def rank(self, layer: FfnWeights) -> int:
        """Features that low-rank compensation reads of the layer's input; 0: none."""
        return len(layer.basis) if self.low_rank and layer.basis is not None else 0

    def bytes(self, kept: Sequence[int] | None, skips: bool = True, *, copied: bool = False) -> int:
        """Under masks that keep ``kept`` neurons per layer (None: dense).

        ``skips``: removed neurons are not read.  ``copied``: those of a mask are read from compact
        weights, which are in the model's dtype.
        """
        total = 0.0
        for index, layer in enumerate(self.layers):
            count = layer.width if kept is None else kept[index]
            masked = count < layer.width
            neuron = self._copy(layer) if copied and masked else self._neuron(layer)
            total += (count if skips else layer.width) * neuron + self._linear(layer) * masked
        return round(total)

    def _neuron(self, layer: FfnWeights) -> float:
        """Bytes of one neuron: its input rows and its output column."""
        return sum(stored_bytes(m, self.width) for m in layer.matrices) / layer.width

    def _copy(self, layer: FfnWeights) -> int:
        """Bytes of one neuron in the model's dtype, in whatever blocks it is stored."""
        return layer.hidden * len(layer.matrices) * self._weight(layer)

    def _weight(self, layer: FfnWeights) -> int:
        """Bytes of one weight that is not in blocks."""
        return layer.down.element_size() if self.width is None else self.width

    def _linear(self, layer: FfnWeights) -> int:
        """Bytes of the two matrices of low-rank compensation."""
        return 2 * self.rank(layer) * layer.hidden * self._weight(layer)

    def observe_bytes(self) -> int:
        """Sums read and written, float32, for one observed token in all layers."""
        ranks = [(layer.width, self.rank(layer)) for layer in self.layers]
        return sum(16 * width + 8 * (width + rank) * rank for width, rank in ranks)

    def build_bytes(
        self, kept: Sequence[int], compact: bool, compensates: bool, *, copied: bool = False
    ) -> int:
        """One mask: compact weights read and written, removed columns that compensation reads."""
        total = 0.0
        for count, layer in zip(kept, self.layers, strict=True):
            if compact and count < layer.width:
                written = self._copy(layer) if copied else self._neuron(layer)
                total += count * (self._neuron(layer) + written) + self._linear(layer)
            if compensates:
                removed = layer.width - count
                total += removed * stored_bytes(layer.down, self.width) / layer.width
        return round(total)


def tracing_flops(
    costs: Costs, observed: int, kept: Sequence[int] | None = None, compensates: bool = False
) -> int:
    """FLOPs of tracing ``observed`` tokens and of building one mask (``kept``), if any.

    For the paper's claim that tracing costs 0.1 %.  A multiply-add is 2; 8 per neuron and token for
    scores and signed means, and per hidden unit for S_l; a mask sorts, and fits its compensation.
    """
    total = 0
    for index, layer in enumerate(costs.layers):
        rank = costs.rank(layer)
        total += observed * 8 * (layer.width + layer.hidden)
        total += observed * 2 * (layer.width + layer.hidden + rank) * rank
        if kept is not None:
            total += layer.width * layer.width.bit_length()
            if compensates:
                removed = layer.width - kept[index]
                total += 2 * removed * layer.hidden * (1 + rank)
                total += 2 * (layer.width + rank) * rank**2
    return total


@dataclass(frozen=True)
class TokenCosts:
    """What per-token selection reads (docs/reference.md, "Per-token selection").

    ``rows``: of the largest batch of which the executor reads each token's winners alone; in others
    it computes all neurons (``masked``: those of fixed masks too).
    """

    state: SequenceState
    costs: Costs
    rows: int
    executor: str

    @property
    def rule(self) -> type[TokenRule]:
        assert self.state.config.token is not None
        blocks = all(in_blocks(layer.stored_up) for layer in self.costs.layers)
        rule: type[TokenRule] = TOKEN_RULES.get(self.state.config.token.rule)
        return rule.for_weights(self.state.config.token, blocks)

    def candidates(self, kept: Sequence[int]) -> list[int]:
        """Neurons per layer that are ranked for each token; 0 where there is nothing to select."""
        assert self.state.config.token is not None
        share = self.state.config.token.candidates
        pairs = zip(self.costs.layers, kept, strict=True)
        counts = [(candidate_count(share, layer.width, keep), keep) for layer, keep in pairs]
        return [n if n > keep else 0 for n, keep in counts]

    def fixed(self, kept: Sequence[int]) -> list[int]:
        """Neurons per layer that the sequence's mask keeps; 0 where every token selects."""
        pairs = zip(self.candidates(kept), kept, strict=True)
        return [0 if n else keep for n, keep in pairs]

    def computed(self, kept: Sequence[int], tokens: float) -> list[int]:
        """Neurons per layer whose rows a forward of ``tokens`` reads."""
        fixed, widths = self.fixed(kept), [layer.width for layer in self.costs.layers]
        rows = self.state.rows
        if self.executor == IF_COMPACT or tokens <= rows <= self.rows:
            most = [min(w, math.ceil(k * tokens)) for k, w in zip(kept, widths, strict=True)]
            return [k or most_layer for k, most_layer in zip(fixed, most, strict=True)]
        masked = self.executor == "masked"
        return [width if masked else k or width for k, width in zip(fixed, widths, strict=True)]

    def selection_bytes(self, kept: Sequence[int], computed: Sequence[int]) -> float:
        """Bytes that selecting reads per forward, beside the rows of ``computed``."""
        config = self.state.config.token
        assert config is not None
        each = zip(self.costs.layers, self.candidates(kept), kept, computed, strict=True)
        return round(
            sum(
                self.rule.selection_bytes(config, LayerCost(*counts, self.costs.width))
                for counts in each
                if counts[1]
            )
        )


def selects_per_token(state: SequenceState) -> bool:
    """Whether the tokens of ``state`` select for themselves."""
    fixed = state.fixed_masks
    by_hand = fixed is not None and not any(isinstance(mask, TokenMask) for mask in fixed)
    return state.config.token is not None and not by_hand


def known_bytes(layers: Iterable[FfnWeights], prior: Iterable[Tensor] | None) -> int:
    """Bytes of what was there before a run: calibrated ``prior`` [I] per layer, and learned."""
    calibrated = sum(part.nbytes for part in prior or ())
    learned = [layer.self_stats for layer in layers if layer.self_stats is not None]
    return calibrated + sum(stats.nbytes() for stats in learned)


class _Decoded:
    """Decoded tokens of some states by their keep counts (None: dense)."""

    def __init__(self, states: Iterable[SequenceState], widths: Sequence[int]) -> None:
        spans: list[MaskSpan] = [span for state in states for span in state.mask_spans]
        self.spans = [(span.kept, float(span.tokens)) for span in spans]
        self.widths = widths
        self.tokens = sum(tokens for _, tokens in self.spans)
        self.dense = sum(tokens for kept, tokens in self.spans if kept is None)
        self.dense_share = self.dense / self.tokens if self.tokens else 0.0

    def sparsity(self, layers: slice = slice(None)) -> float:
        """Mean over decoded tokens of the fraction removed, of all layers or of some."""
        width = sum(self.widths[layers])
        removed = 0.0
        for kept, tokens in self.spans:
            if kept is not None:
                removed += tokens * (1 - sum(kept[layers]) / width)
        return removed / self.tokens if self.tokens else 0.0

    @property
    def while_pruned(self) -> float:
        """The same over the tokens that ran with masks."""
        pruned = self.tokens - self.dense
        return self.sparsity() * self.tokens / pruned if pruned else 0.0


def _sequence_report(state: SequenceState) -> SequenceReport:
    decoded = _Decoded([state], [layer.width for layer in state.selector.layers])
    return SequenceReport(
        state.sequence,
        state.row,
        round(state.prompt_tokens),
        round(decoded.tokens),
        round(decoded.dense),
        decoded.sparsity(),
        tuple(state.remasks),
    )


def run_report(
    states: Sequence[SequenceState],
    costs: Costs,
    executor: str,
    extra_bytes: int,
    method: str,
    requested: float | None,
    proxy_errors: tuple[float, float] | None = None,
    head: HeadReport | None = None,
    token_rows: int = 0,
) -> RunReport:
    """Accounting of a run; ``extra_bytes``: beside the states (compact weights, a prior).

    ``proxy_errors``: of the low-bit proxies, and of Gaussian matrices on their grid.  ``head``: of
    a screened output head.  ``token_rows``: of the largest batch of which ``executor`` reads each
    token's winners alone.
    """
    widths = tuple(layer.width for layer in costs.layers)
    decoded = _Decoded(states, widths)
    causes = Counter(remask.cause for state in states for remask in state.remasks)
    last = states[-1].selection.counts if states and states[-1].selection else widths
    layers = tuple(
        LayerStat(index, width, kept, kept / width, decoded.sparsity(slice(index, index + 1)))
        for index, (width, kept) in enumerate(zip(widths, last, strict=True))
    )
    compact, proxy = _ffn_bytes(states, costs, IF_COMPACT, token_rows)
    return RunReport(
        method=method,
        requested_sparsity=requested,
        achieved_sparsity=decoded.sparsity(),
        sparsity_while_pruned=decoded.while_pruned,
        dense_token_share=decoded.dense_share,
        prompt_tokens=round(sum(state.prompt_tokens * state.rows for state in states)),
        decoded_tokens=round(decoded.tokens),
        remasks=causes.total() - causes["first"] - causes["fixed"],
        remask_causes=dict(causes),
        layers=layers,
        executor=executor,
        ffn_bytes_share=_ffn_bytes(states, costs, executor, token_rows)[0],
        ffn_bytes_share_if_compact=compact,
        proxy_bytes_share=proxy,
        proxy_error=None if proxy_errors is None else proxy_errors[0],
        proxy_error_gaussian=None if proxy_errors is None else proxy_errors[1],
        ffn_share_of_bytes=costs.bytes(None) / max(1, costs.total_bytes),
        extra_memory_bytes=extra_bytes + sum(state.nbytes() for state in states),
        sequences=tuple(map(_sequence_report, states)),
        **_token_bytes(states, costs, decoded, head),
        head=head,
    )


def _token_bytes(
    states: Sequence[SequenceState], costs: Costs, decoded: _Decoded, head: HeadReport | None
) -> dict[str, float]:
    """Bytes per token over dense at bfloat16, if run compactly, and at which context."""
    traffic = costs.traffic
    if traffic is None:
        return {}
    weights = [max(1e-9, sum(float(span.tokens) for span in state.mask_spans)) for state in states]
    ends = (state.cached + state.prompt_tokens + (state.decoded + 1) / 2 for state in states)
    positions = zip(weights, ends, strict=True)
    context = sum(n * end for n, end in positions) / max(1e-9, sum(weights))
    ffn, _ = _ffn_bytes(states, replace(costs, width=BFLOAT16), IF_COMPACT)
    rules = [TOKEN_RULES.get(s.config.token.rule) for s in states if s.config.token is not None]
    attention = 1 - decoded.sparsity() * any(rule.attention for rule in rules)
    head_share = 1.0 if head is None else head.read(decoded.tokens)
    return {
        "mean_context": context,
        "token_bytes_share": traffic.share(context, ffn * traffic.ffn, attention, head_share),
        "dense_token_bytes_share": traffic.share(context),
    }


def _ffn_bytes(
    states: Sequence[SequenceState], costs: Costs, executor: str, token_rows: int = 0
) -> tuple[float, float]:
    """FFN bytes over those of dense decoding: all, and of these what per-token selection reads.

    ``executor``: one of the executors, or ``IF_COMPACT``.
    """
    total = selection = forwards = 0.0
    skips = executor != "masked"
    copied = executor == "compact"  # in the dtype; ``IF_COMPACT``: as they are stored
    for state in states:
        fixed = state.fixed_masks
        biased = any(mask is not None and mask.bias is not None for mask in fixed or ())
        compensates = biased or (state.config.compensation and fixed is None)
        per_token = selects_per_token(state)
        token = TokenCosts(state, costs, token_rows, executor)
        for span in state.mask_spans:
            forwards += span.forwards
            if state.selector.needs_evidence:
                total += span.observed * costs.observe_bytes()
            if not per_token or span.kept is None:
                total += span.forwards * costs.bytes(span.kept, skips, copied=copied)
                continue
            computed = token.computed(span.kept, float(span.tokens) / max(1, span.forwards))
            total += span.forwards * costs.bytes(computed)
            selection += span.forwards * token.selection_bytes(span.kept, computed)
        for remask in state.remasks:
            built = token.fixed(remask.kept) if per_token else remask.kept
            compact = copied or executor == IF_COMPACT
            total += costs.build_bytes(built, compact, compensates, copied=copied)
    if not forwards:
        return 1.0, 0.0
    dense = forwards * costs.bytes(None)
    return (total + selection) / dense, selection / dense
