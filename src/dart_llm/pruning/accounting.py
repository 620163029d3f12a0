"""The report of a run: achieved sparsity and bytes read, computed from its sequence states.

Bytes follow from the shapes and dtypes of the tensors (docs/reference.md, "Accounting").
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.records import HeadReport, LayerStat, RunReport, SequenceReport
from dart_llm.pruning.registry import TOKEN_RULES
from dart_llm.pruning.sequence import SequenceState
from dart_llm.pruning.token_level import TokenMask
from dart_llm.pruning.token_rules.rule import LayerCost, TokenRule
from dart_llm.pruning.weights import FfnWeights, in_blocks, stored_bytes

IF_COMPACT = "if compact"
"""A hypothetical executor that reads only the kept neurons' stored weights, once per forward."""

BFLOAT16 = 2
"""Bytes of one bfloat16 value.  Bytes per token are counted as if cached values, and weights that
are not quantized, had this size."""


@dataclass(frozen=True)
class TokenTraffic:
    """Bytes that one decoded token reads.

    Quantized weights count as stored; other weights and the KV cache count as bfloat16.  ``dense``:
    bytes of all weights in bfloat16.  ``ffn``, ``attention`` and ``others`` (head, norms, ...):
    bytes of these weights.  ``cache``: a pair for each group of layers with the same attention
    window: the group's bytes per cached position, and the window in positions (None means all).
    ``head``: bytes of the output head, which ``others`` includes.
    """

    dense: float
    ffn: float
    attention: float
    others: float
    cache: tuple[tuple[float, int | None], ...] = ()
    head: float = 0.0

    def share(
        self, context: float, ffn: float | None = None, attention: float = 1.0, head: float = 1.0
    ) -> float:
        """Bytes that a token reads, divided by those of the dense model in bfloat16.

        ``context``: number of cached positions.  ``ffn``: bytes read in FFNs, including those for
        per-token selection; None means all FFN weights.  ``attention``: share of the attention
        projections' bytes that is read.  ``head``: share of the head's bytes that is read.
        """
        cache = sum(
            position * (context if limit is None else min(context, limit))
            for position, limit in self.cache
        )
        ffn_bytes = self.ffn if ffn is None else ffn
        others = self.others - (1 - head) * self.head
        return (ffn_bytes + attention * self.attention + others + cache) / (self.dense + cache)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data, from which ``TokenTraffic(**data)`` builds an equal object."""
        return {**asdict(self), "cache": [list(entry) for entry in self.cache]}


@dataclass(frozen=True)
class Costs:
    """Bytes that the FFNs read when a batch of one row decodes a token."""

    layers: tuple[FfnWeights, ...]
    total_bytes: int
    """Bytes of all weights of the model that one decoded token reads."""
    low_rank: bool = False
    """Whether masks have low-rank compensation, in layers with a basis for it."""
    traffic: TokenTraffic | None = None
    """Bytes that one token reads in the whole model; None if unknown."""
    weight_bytes: int | None = None
    """Bytes to count for a weight that is not quantized; None means as stored."""
    reads_all: bool = False
    """Whether per-token selection by activations reads the down rows of unselected neurons."""

    def rank(self, layer: FfnWeights) -> int:
        """Number of input features that low-rank compensation reads in this layer, or 0."""
        return len(layer.basis) if self.low_rank and layer.basis is not None else 0

    def bytes(self, kept: Sequence[int] | None, skips: bool = True, *, copied: bool = False) -> int:
        """Bytes that a token reads under masks.  ``kept``: keep counts, or None for no masks.

        ``skips``: whether removed neurons are not read.  ``copied``: whether kept neurons are read
        from compact weights, which are copies in the model's dtype.
        """
        total = 0.0
        for index, layer in enumerate(self.layers):
            count = layer.width if kept is None else kept[index]
            masked = count < layer.width
            neuron = self._neuron(layer, copied and masked)
            total += (count if skips else layer.width) * neuron + self._linear(layer) * masked
        return round(total)

    def _neuron(self, layer: FfnWeights, copied: bool = False) -> float:
        """Bytes of one neuron's weights: as stored, or in compact weights if ``copied``."""
        if copied:
            return layer.hidden * len(layer.matrices) * self._weight(layer)
        return sum(stored_bytes(m, self.weight_bytes) for m in layer.matrices) / layer.width

    def _weight(self, layer: FfnWeights) -> int:
        """Bytes of one weight that is not quantized."""
        return layer.down.element_size() if self.weight_bytes is None else self.weight_bytes

    def _linear(self, layer: FfnWeights) -> int:
        """Bytes of the two matrices of low-rank compensation."""
        return 2 * self.rank(layer) * layer.hidden * self._weight(layer)

    def observe_bytes(self) -> int:
        """Bytes of float32 sums that observing one token reads and writes, in all layers."""
        ranks = [(layer.width, self.rank(layer)) for layer in self.layers]
        return sum(16 * width + 8 * (width + rank) * rank for width, rank in ranks)

    def build_bytes(
        self, kept: Sequence[int], compact: bool, compensates: bool, *, copied: bool = False
    ) -> int:
        """Bytes read and written to build one mask for each layer.

        ``compact``: whether kept neurons are copied.  ``compensates``: whether the mask needs
        compensation.  ``copied``: as in ``bytes``.
        """
        total = 0.0
        for count, layer in zip(kept, self.layers, strict=True):
            if compact and count < layer.width:
                read_and_written = self._neuron(layer) + self._neuron(layer, copied)
                total += count * read_and_written + self._linear(layer)
            if compensates:
                removed = layer.width - count
                total += removed * stored_bytes(layer.down, self.weight_bytes) / layer.width
        return round(total)


def tracing_flops(
    costs: Costs, observed: int, kept: Sequence[int] | None = None, compensates: bool = False
) -> int:
    """FLOPs of observing tokens, which the DART paper calls tracing, and of building masks.

    The paper (arXiv 2601.22632) claims that they add 0.1 %.  ``observed``: number of tokens.
    ``kept``: keep counts of one mask per layer; None means that no mask is built.  A multiply-add
    counts as 2.  Scores and mean activations take 8 per neuron and token.  The layer sensitivity
    S_l takes 8 per hidden unit and token.  A mask takes a sort, and a fit if ``compensates``.
    """
    total = 0
    for index, layer in enumerate(costs.layers):
        rank = costs.rank(layer)
        total += observed * 8 * (layer.width + layer.hidden)
        total += observed * 2 * (layer.width + layer.hidden + rank) * rank
        if kept is not None:
            total += layer.width * layer.width.bit_length()
        if kept is not None and compensates:
            removed = layer.width - kept[index]
            total += 2 * removed * layer.hidden * (1 + rank)
            total += 2 * (layer.width + rank) * rank**2
    return total


class _SequenceBytes:
    """Bytes that the FFNs read for one sequence under ``executor`` (or ``IF_COMPACT``).

    ``max_rows``: the largest batch for which the executor reads only the neurons that each token
    selects.  In larger batches it computes all neurons; the executor ``masked`` always does.
    """

    def __init__(self, state: SequenceState, costs: Costs, executor: str, max_rows: int) -> None:
        self.state, self.costs, self.executor, self.max_rows = state, costs, executor, max_rows
        self.widths = [layer.width for layer in costs.layers]
        fixed = state.fixed_masks
        static = fixed is not None and not any(isinstance(mask, TokenMask) for mask in fixed)
        self.token = None if static else state.config.token
        biased = any(mask is not None and mask.bias is not None for mask in fixed or ())
        self.compensates = biased or (state.config.compensation and fixed is None)

    def total(self) -> tuple[float, float]:
        """Returns bytes for forwards and mask builds, then bytes for per-token selection."""
        read = selection = 0.0
        copied = self.executor == "compact"  # IF_COMPACT reads weights as stored instead
        compact, skips = copied or self.executor == IF_COMPACT, self.executor != "masked"
        for span in self.state.mask_spans:
            if self.state.selector.needs_evidence:
                read += span.observed * self.costs.observe_bytes()
            if self.token is None or span.kept is None:
                read += span.forwards * self.costs.bytes(span.kept, skips, copied=copied)
                continue
            computed = self._computed(span.kept, float(span.tokens) / max(1, span.forwards))
            read += span.forwards * self.costs.bytes(computed)
            selection += span.forwards * self._selection(self.token, span.kept, computed)
        for remask in self.state.remasks:
            kept = [
                k if self.token is None or k == w else 0
                for k, w in zip(remask.kept, self.widths, strict=True)
            ]
            read += self.costs.build_bytes(kept, compact, self.compensates, copied=copied)
        return read, selection

    def _computed(self, kept: Sequence[int], tokens: float) -> list[int]:
        """For each layer, how many neurons one forward reads, if it has ``tokens`` tokens."""
        rows = self.state.rows
        if self.executor == IF_COMPACT or tokens <= rows <= self.max_rows:
            pairs = zip(kept, self.widths, strict=True)
            return [min(width, math.ceil(count * tokens)) for count, width in pairs]
        return self.widths

    def _selection(self, token: TokenConfig, kept: Sequence[int], computed: Sequence[int]) -> float:
        """Bytes that a forward reads to select neurons, without ``computed`` neurons' weights."""
        quantized = all(in_blocks(layer.stored_up) for layer in self.costs.layers)
        rule: type[TokenRule] = TOKEN_RULES.get(token.rule).for_weights(token, quantized)
        layers = zip(self.costs.layers, kept, computed, strict=True)
        more = self.costs.weight_bytes, self.costs.reads_all
        costs = [LayerCost(*layer, *more) for layer in layers]
        selecting = [cost for cost in costs if cost.winners < cost.layer.width]
        return round(sum(rule.selection_bytes(token, cost) for cost in selecting))


def _ffn_bytes(
    states: Sequence[SequenceState], costs: Costs, executor: str, token_rows: int = 0
) -> tuple[float, float]:
    """Two shares of the dense FFN bytes: all bytes read, and those for per-token selection."""
    totals = [_SequenceBytes(state, costs, executor, token_rows).total() for state in states]
    forwards = sum(span.forwards for state in states for span in state.mask_spans)
    if not forwards:
        return 1.0, 0.0
    dense, selection = forwards * costs.bytes(None), sum(part for _, part in totals)
    return (sum(read for read, _ in totals) + selection) / dense, selection / dense


def known_bytes(layers: Iterable[FfnWeights], prior: Iterable[Tensor] | None) -> int:
    """Bytes of a calibrated ``prior`` (scores [I] per layer) and of learned statistics."""
    calibrated = sum(part.nbytes for part in prior or ())
    learned = [layer.self_stats for layer in layers if layer.self_stats is not None]
    return calibrated + sum(stats.nbytes() for stats in learned)


class _Decoded:
    """The decoded tokens of some sequences, counted by the keep counts under which they ran."""

    def __init__(self, states: Iterable[SequenceState], widths: Sequence[int]) -> None:
        spans = [span for state in states for span in state.mask_spans]
        self.spans = [(span.kept, float(span.tokens)) for span in spans]
        self.widths = widths
        self.tokens = sum(tokens for _, tokens in self.spans)
        self.dense = sum(tokens for kept, tokens in self.spans if kept is None)

    def sparsity(self, layers: slice = slice(None)) -> float:
        """Fraction of neurons removed in ``layers``, mean over decoded tokens."""
        width = sum(self.widths[layers])
        pruned = [(kept, tokens) for kept, tokens in self.spans if kept is not None]
        removed = sum(tokens * (1 - sum(kept[layers]) / width) for kept, tokens in pruned)
        return removed / self.tokens if self.tokens else 0.0


def _sequence_report(state: SequenceState, widths: Sequence[int]) -> SequenceReport:
    decoded = _Decoded([state], widths)
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
    head: HeadReport | None = None,
    token_rows: int = 0,
    selection: str | None = None,
) -> RunReport:
    """The report of a run.

    ``extra_bytes``: bytes of memory outside the states, such as compact weights.  ``requested``:
    the requested sparsity.  ``head``: report of a screened output head.  ``token_rows``: the
    largest batch for which ``executor`` reads only the neurons that each token selects.
    ``selection``: as in ``RunReport``.
    """
    widths = tuple(layer.width for layer in costs.layers)
    decoded = _Decoded(states, widths)
    causes = Counter(remask.cause for state in states for remask in state.remasks)
    last = states[-1].selection.counts if states and states[-1].selection else widths
    layers = tuple(
        LayerStat(index, width, kept, kept / width, decoded.sparsity(slice(index, index + 1)))
        for index, (width, kept) in enumerate(zip(widths, last, strict=True))
    )
    sparsity, pruned = decoded.sparsity(), decoded.tokens - decoded.dense
    compact, proxy = _ffn_bytes(states, costs, IF_COMPACT, token_rows)
    return RunReport(
        method=method,
        requested_sparsity=requested,
        achieved_sparsity=sparsity,
        sparsity_while_pruned=sparsity * decoded.tokens / pruned if pruned else 0.0,
        dense_token_share=decoded.dense / decoded.tokens if decoded.tokens else 0.0,
        prompt_tokens=round(sum(state.prompt_tokens * state.rows for state in states)),
        decoded_tokens=round(decoded.tokens),
        remasks=causes.total() - causes["first"] - causes["fixed"],
        remask_causes=dict(causes),
        layers=layers,
        executor=executor,
        ffn_bytes_share=_ffn_bytes(states, costs, executor, token_rows)[0],
        ffn_bytes_share_if_compact=compact,
        proxy_bytes_share=proxy,
        ffn_share_of_bytes=costs.bytes(None) / max(1, costs.total_bytes),
        extra_memory_bytes=extra_bytes + sum(state.nbytes() for state in states),
        sequences=tuple(_sequence_report(state, widths) for state in states),
        **_token_bytes(states, costs, decoded, head),
        head=head,
        selection=selection,
    )


def _token_bytes(
    states: Sequence[SequenceState], costs: Costs, decoded: _Decoded, head: HeadReport | None
) -> dict[str, float]:
    """The fields of ``RunReport`` about bytes per decoded token; {} if ``traffic`` is unknown."""
    traffic = costs.traffic
    if traffic is None:
        return {}
    weights = [max(1e-9, sum(float(span.tokens) for span in state.mask_spans)) for state in states]
    ends = (state.cached + state.prompt_tokens + (state.decoded + 1) / 2 for state in states)
    positions = zip(weights, ends, strict=True)
    context = sum(n * end for n, end in positions) / max(1e-9, sum(weights))
    ffn, _ = _ffn_bytes(states, replace(costs, weight_bytes=BFLOAT16), IF_COMPACT)
    rules = [TOKEN_RULES.get(s.config.token.rule) for s in states if s.config.token is not None]
    attention = 1 - decoded.sparsity() * any(rule.attention for rule in rules)
    head_share = 1.0 if head is None else head.read(decoded.tokens)
    return {
        "mean_context": context,
        "token_bytes_share": traffic.share(context, ffn * traffic.ffn, attention, head_share),
        "dense_token_bytes_share": traffic.share(context),
    }
