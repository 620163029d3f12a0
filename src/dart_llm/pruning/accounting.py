"""Bytes, FLOPs, achieved sparsity: from the states of a run to its report.

Bytes and FLOPs are counted from the shapes and dtypes that exist (docs/method.md, "Accounting").  A
multiply-add is 2 FLOPs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.records import HeadReport, LayerStat, RunReport, SequenceReport
from dart_llm.pruning.sequence import SequenceState
from dart_llm.pruning.token_level import SCALE_BYTES, TokenMask, candidate_count, input_count
from dart_llm.pruning.weights import FfnWeights, in_blocks

IF_COMPACT = "if compact"
"""Stands for an executor that reads each forward's winners once, from where they lie."""

STEP_ROWS = 8
"""Rows of the largest batch that a native step, or Triton's kernels, take."""

WHOLE_STEPS = "native, whole steps"
"""How reports name executor native where it decoded by whole steps."""

READ_WINNERS = {"native": 1, WHOLE_STEPS: STEP_ROWS, "cuda": STEP_ROWS}
"""Executors that read the winners of a token alone, and of how many rows; all else is dense."""


def most_rows(executor: str, by_weights: bool) -> int:
    """As ``READ_WINNERS``; ``by_weights``: weights in blocks stand for copies of themselves."""
    known = READ_WINNERS.get(executor, 0)
    return STEP_ROWS if known and by_weights else known


NORM_BYTES = 4

STATISTIC_FLOPS = 8
"""FLOPs per neuron and observed token for scores and signed means; per hidden unit for S_l."""


@dataclass(frozen=True)
class TokenCosts:
    """What token-level selection costs beside the winners' rows (docs/method.md, "Token-level").

    ``copies``: per token and layer with C candidates the product with the low-bit copies counts
    like one with the dense gate and up, and the ranking C log2 C; of bytes, the copies' rows with
    their scales, and 4 per candidate for norm(w).  Copies that are read at some of the inputs are
    read with all of their scales; where weights in blocks rank themselves, gate and up of the
    candidates that lose, and as many norms.  ``gate``, ``up``: that projection of the losers.
    ``inputs``: the ranking of each matrix's inputs, and 4 bytes for each norm that weighs.
    """

    config: TokenConfig
    layers: tuple[FfnWeights, ...]

    @classmethod
    def of(cls, state: SequenceState, layers: tuple[FfnWeights, ...]) -> TokenCosts | None:
        """None where the tokens of ``state`` do not choose for themselves."""
        given = state.given
        by_hand = given is not None and not any(isinstance(mask, TokenMask) for mask in given)
        return None if state.config.token is None or by_hand else cls(state.config.token, layers)

    def _candidates(self, kept: Sequence[int]) -> list[int]:
        """Neurons that are ranked for each token; 0 where there is nothing to choose."""
        share = self.config.candidates
        counts = [
            candidate_count(share, layer.width, keep)
            for layer, keep in zip(self.layers, kept, strict=True)
        ]
        return [n if n > keep else 0 for n, keep in zip(counts, kept, strict=True)]

    def chosen_once(self, kept: Sequence[int]) -> list[int]:
        """Neurons per layer that the sequence's mask keeps; 0 where every token chooses."""
        ranked = self._candidates(kept)
        return [0 if n else keep for n, keep in zip(ranked, kept, strict=True)]

    def flops(self, kept: Sequence[int], computed: Sequence[int]) -> int:
        """Of estimates and ranking, per token; ``computed``: neurons per layer."""
        total = 0.0
        for count, keep, done, layer in self._choosing(kept, computed):
            ranking: float = count * count.bit_length()
            if self._by_weights(layer):
                ranking += 2 * layer.hidden * _matrices(layer) * max(0, count - done)
            elif self.config.rule == "copies":
                inputs = math.ceil(self.config.inputs * layer.hidden)
                ranking = count * (2 * inputs * _matrices(layer) + count.bit_length())
                if inputs < layer.hidden:
                    ranking += layer.hidden * layer.hidden.bit_length()
            elif self.config.rule == "inputs":
                each = layer.hidden * layer.hidden.bit_length()
                read = 2 * layer.width * self._more_inputs(layer, keep, done)
                ranking += _matrices(layer) * (each + read)
            else:
                ranking += 2 * layer.hidden * (layer.width - done)
            total += ranking
        return round(total)

    def bytes(self, kept: Sequence[int], read: Sequence[int], width: int | None = None) -> int:
        """Of what chooses, per forward; ``read``: neurons per layer that are read anyway.

        ``width``: bytes of a weight that is not in blocks; None: as it is stored.
        """
        total = 0.0
        for count, keep, done, layer in self._choosing(kept, read):
            if self._by_weights(layer):
                whole = sum(stored_bytes(m) for m in (layer.stored_up, layer.gate) if m is not None)
                total += whole * max(0, count - done) / layer.width + NORM_BYTES * count
            elif self.config.rule == "copies":
                total += count * (_matrices(layer) * self._row_bytes(layer.hidden) + NORM_BYTES)
            elif self.config.rule == "inputs":
                norms = _matrices(layer) * layer.hidden + layer.width
                total += NORM_BYTES * norms * self.config.weighted
                column = stored_bytes(layer.stored_up, width) / layer.hidden
                total += _matrices(layer) * column * self._more_inputs(layer, keep, done)
            else:
                gate = self.config.rule == "gate"
                exact = layer.gate if gate and layer.gate is not None else layer.stored_up
                total += stored_bytes(exact, width) * (1 - done / layer.width)
        return round(total)

    def _choosing(
        self, kept: Sequence[int], done: Sequence[int]
    ) -> Iterator[tuple[int, int, int, FfnWeights]]:
        """Of each layer whose tokens choose: candidates, winners, neurons that are done anyway."""
        ranked = self._candidates(kept)
        for one in zip(ranked, kept, done, self.layers, strict=True):
            if one[0]:
                yield one

    def _by_weights(self, layer: FfnWeights) -> bool:
        return self.config.by_weights(in_blocks(layer.stored_up))

    def _row_bytes(self, inputs: int) -> int:
        groups = math.ceil(inputs / self.config.group)
        levels = math.ceil(math.ceil(self.config.inputs * inputs) * self.config.bits / 8)
        return levels + SCALE_BYTES * groups

    @staticmethod
    def _more_inputs(layer: FfnWeights, keep: int, done: int) -> float:
        """Inputs of a matrix that are read beyond the winners' share, which is rounded up."""
        if done == layer.width:
            return 0.0
        return input_count(layer.hidden, keep, layer.width) - layer.hidden * keep / layer.width

    def work(
        self, kept: Sequence[int], tokens: float, rows: int, executor: str
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Neurons per layer of a span: computed per token, read per forward.

        ``tokens``: per forward.  The native kernels read the winners of a forward of one token per
        row, where they lie; all else is dense.
        """
        widths = [layer.width for layer in self.layers]
        once = self.chosen_once(kept)
        own = all(map(self._by_weights, self.layers))
        most = most_rows(executor, own) if self.config.native else 0
        if executor == IF_COMPACT or tokens <= rows <= most:
            read = [
                k if one else min(width, math.ceil(k * tokens))
                for k, one, width in zip(kept, once, widths, strict=True)
            ]
            return kept, read
        masked = executor == "masked"
        every = [width if masked else k or width for k, width in zip(once, widths, strict=True)]
        return every, every


def stored_bytes(matrix: Tensor, width: int | None = None) -> float:
    """Bytes of a matrix as it is stored, or with ``width`` per weight where it is not in blocks."""
    return matrix.nbytes if width is None or in_blocks(matrix) else matrix.numel() * width


def _matrices(layer: FfnWeights) -> int:
    """Matrices that are copied: gate and up, or fc."""
    return 1 if layer.gate is None else 2


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

        ``context``: positions of the cache.  ``ffn``: bytes of FFNs and what chooses in them, None:
        all; ``attention``, ``head``: shares of the bytes of attention's projections, of the head.
        """
        cache = sum(
            each * (context if most is None else min(context, most)) for each, most in self.cache
        )
        own = self.ffn if ffn is None else ffn
        others = self.others - (1 - head) * self.head
        return (own + attention * self.attention + others + cache) / (self.dense + cache)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; ``TokenTraffic(**data)`` is this again."""
        return {**asdict(self), "cache": [list(one) for one in self.cache]}


@dataclass(frozen=True)
class Costs:
    """Bytes and FLOPs of the FFN of all layers, per dense decode step of one row."""

    layers: tuple[FfnWeights, ...]
    total_bytes: int
    """Bytes of all weights that one decoded token reads."""
    low_rank: bool = False
    """Whether masks come with low-rank compensation, where a layer has a basis for it."""
    traffic: TokenTraffic | None = None
    """Of a token, all its weights; None: bytes per token are not known."""
    width: int | None = None
    """Bytes of a weight that is not in blocks; None: as it is stored."""

    def _neuron(self, layer: FfnWeights) -> float:
        """Bytes of one neuron: its input rows and its output column."""
        held = (layer.stored_up, layer.gate, layer.down)
        return sum(stored_bytes(m, self.width) for m in held if m is not None) / layer.width

    def _plain(self, layer: FfnWeights) -> int:
        """Bytes of one weight that is not in blocks."""
        return layer.down.element_size() if self.width is None else self.width

    @staticmethod
    def per_neuron(layer: FfnWeights) -> int:
        """Weights of one neuron: its input rows and its output column."""
        return layer.hidden * (2 if layer.gate is None else 3)

    def bytes(self, kept: Sequence[int] | None, skips: bool = True, *, copied: bool = False) -> int:
        """Under masks that keep ``kept`` neurons per layer (None: dense).

        ``skips``: removed neurons are not read.  ``copied``: those of a mask are read from copies.
        """
        total = 0.0
        for layer, count, linear in self._work(kept, skips):
            each = self._copied(layer) if copied and count < layer.width else self._neuron(layer)
            total += count * each + linear * self._plain(layer)
        return round(total)

    def _copied(self, layer: FfnWeights) -> int:
        """Bytes of one neuron in a copy: in the model's dtype, in whatever blocks it is stored."""
        return self.per_neuron(layer) * self._plain(layer)

    def flops(self, kept: Sequence[int] | None, skips: bool = True) -> int:
        """As ``bytes``, at two FLOPs per weight."""
        each = self._work(kept, skips)
        return 2 * sum(n * self.per_neuron(layer) + w for layer, n, w in each)

    def _work(
        self, kept: Sequence[int] | None, skips: bool
    ) -> Iterator[tuple[FfnWeights, int, int]]:
        """Each layer, the neurons that it reads, and the weights of its low-rank compensation.

        Layers that keep all do without compensation.
        """
        for index, layer in enumerate(self.layers):
            count = layer.width if kept is None else kept[index]
            linear = 2 * self.rank(layer) * layer.hidden if count < layer.width else 0
            yield layer, count if skips else layer.width, linear

    def rank(self, layer: FfnWeights) -> int:
        """Features that low-rank compensation reads of the layer's input; 0: none."""
        learnt = layer.learnt
        return len(learnt.basis) if self.low_rank and learnt and learnt.basis is not None else 0

    @property
    def observe_flops(self) -> int:
        """Tracing one observed token in all layers."""
        plain = STATISTIC_FLOPS * sum(layer.width + layer.hidden for layer in self.layers)
        return plain + 2 * sum(
            (layer.width + layer.hidden + self.rank(layer)) * self.rank(layer)
            for layer in self.layers
        )

    @property
    def observe_bytes(self) -> int:
        """Sums read and written, float32, for one observed token in all layers."""
        plain = 16 * sum(layer.width for layer in self.layers)
        return plain + 8 * sum(
            (layer.width + self.rank(layer)) * self.rank(layer) for layer in self.layers
        )

    def build_bytes(
        self, kept: Sequence[int], compact: bool, compensates: bool, *, copied: bool = False
    ) -> int:
        """One mask: the copies that compact makes, the removed columns that compensation reads."""
        copies = 0.0
        for count, layer in zip(kept, self.layers, strict=True):
            if compact and count < layer.width:  # read and written, compensation's map too
                written = self._copied(layer) if copied else self._neuron(layer)
                linear = 2 * self.rank(layer) * layer.hidden * self._plain(layer)
                copies += count * (self._neuron(layer) + written) + linear
        removed = sum(
            (layer.width - count) * stored_bytes(layer.down, self.width) / layer.width
            for count, layer in zip(kept, self.layers, strict=True)
        )
        return round(copies) + (round(removed) if compensates else 0)

    def build_flops(self, kept: Sequence[int], compensates: bool) -> int:
        """Sorting (width x log2 width comparisons), the regression, the compensation product."""
        sorting = sum(layer.width * layer.width.bit_length() for layer in self.layers)
        if not compensates:
            return sorting
        removed = sum(
            2 * (layer.width - count) * layer.hidden * (1 + self.rank(layer))
            for count, layer in zip(kept, self.layers, strict=True)
        )
        fit = sum(
            2 * (layer.width + self.rank(layer)) * self.rank(layer) ** 2 for layer in self.layers
        )
        return sorting + removed + fit


def known_bytes(layers: Iterable[FfnWeights], prior: Iterable[Tensor] | None) -> int:
    """Bytes of what was known before a run: calibrated ``prior`` [I] per layer, and learnt."""
    calibrated = sum(part.numel() * part.element_size() for part in prior or ())
    return calibrated + sum(one.learnt.nbytes() for one in layers if one.learnt is not None)


class _Decoded:
    """Decoded tokens of some states by their keep counts (None: dense)."""

    def __init__(self, states: Iterable[SequenceState], widths: Sequence[int]) -> None:
        spans = [span for state in states for span in state.mask_spans]
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


def sequence_report(state: SequenceState) -> SequenceReport:
    """Accounting of one state."""
    decoded = _Decoded([state], [layer.width for layer in state.selector.layers])
    return SequenceReport(
        state.sequence,
        state.row,
        round(state.prompt_tokens),
        round(decoded.tokens),
        round(decoded.dense),
        decoded.sparsity(),
        decoded.while_pruned,
        decoded.dense_share,
        tuple(state.remasks),
    )


def run_report(
    states: Sequence[SequenceState],
    costs: Costs,
    executor: str,
    copies: int,
    method: str,
    asked: float | None,
    proxy_errors: tuple[float, float] | None = None,
    head: HeadReport | None = None,
) -> RunReport:
    """Accounting of a run; ``copies``: bytes held beside the states (compact copies, a prior).

    ``proxy_errors``: of the low-bit copies, and of Gaussian matrices on their grid.  ``head``: of a
    screened output head.
    """
    widths = tuple(layer.width for layer in costs.layers)
    decoded = _Decoded(states, widths)
    causes = Counter(remask.cause for state in states for remask in state.remasks)
    last = states[-1].selection.counts if states and states[-1].selection else widths
    layers = tuple(
        LayerStat(index, width, kept, kept / width, decoded.sparsity(slice(index, index + 1)))
        for index, (width, kept) in enumerate(zip(widths, last, strict=True))
    )
    as_run = _shares(states, costs, executor)
    compact = _shares(states, costs, IF_COMPACT)
    return RunReport(
        method=method,
        requested_sparsity=asked,
        achieved_sparsity=decoded.sparsity(),
        sparsity_while_pruned=decoded.while_pruned,
        dense_token_share=decoded.dense_share,
        prompt_tokens=round(sum(state.prompt_tokens * state.rows for state in states)),
        decoded_tokens=round(decoded.tokens),
        remasks=causes.total() - causes["first"] - causes["given"],
        remask_causes=dict(causes),
        layers=layers,
        executor=executor,
        ffn_flops_share=as_run.flops,
        ffn_bytes_share=as_run.bytes,
        ffn_flops_share_if_compact=compact.flops,
        ffn_bytes_share_if_compact=compact.bytes,
        proxy_flops_share=compact.proxy_flops,
        proxy_bytes_share=compact.proxy_bytes,
        proxy_error=None if proxy_errors is None else proxy_errors[0],
        proxy_error_gaussian=None if proxy_errors is None else proxy_errors[1],
        ffn_share_of_bytes=costs.bytes(None) / max(1, costs.total_bytes),
        extra_memory_bytes=copies + sum(state.nbytes() for state in states),
        sequences=tuple(sequence_report(state) for state in states),
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
    weights = [max(1e-9, sum(float(one.tokens) for one in state.mask_spans)) for state in states]
    ends = (one.cached + one.prompt_tokens + (one.decoded + 1) / 2 for one in states)
    positions = zip(weights, ends, strict=True)
    context = sum(n * end for n, end in positions) / max(1e-9, sum(weights))
    at_bfloat16 = replace(costs, width=BFLOAT16)
    ffn = _shares(states, at_bfloat16, IF_COMPACT).bytes * traffic.ffn
    reads = any(state.config.token is not None and state.config.token.attention for state in states)
    return {
        "mean_context": context,
        "token_bytes_share": traffic.share(
            context,
            ffn,
            1 - decoded.sparsity() * reads,
            1.0 if head is None else head.read(decoded.tokens),
        ),
        "dense_token_bytes_share": traffic.share(context),
    }


class _Shares(NamedTuple):
    """Work of decoding over that of dense decoding; of it, what low-bit copies take."""

    flops: float = 1.0
    bytes: float = 1.0
    proxy_flops: float = 0.0
    proxy_bytes: float = 0.0


def _shares(states: Sequence[SequenceState], costs: Costs, executor: str) -> _Shares:
    """``executor``: one of the executors, or ``IF_COMPACT``."""
    flops = moved = forwards = tokens = proxy_flops = proxy_bytes = 0.0
    skips = executor != "masked"
    copied = executor == "compact"  # in the dtype; ``IF_COMPACT``: as they are stored
    copies = copied or executor == IF_COMPACT
    for state in states:
        masks = state.given or ()
        held = any(mask is not None and mask.bias is not None for mask in masks)
        compensates = held or (state.config.compensation and state.given is None)
        token = TokenCosts.of(state, costs.layers)
        for span in state.mask_spans:
            steps, fed = span.forwards, float(span.tokens)
            forwards += steps
            tokens += fed
            seen = span.observed if state.selector.needs_evidence else 0
            flops += seen * state.rows * costs.observe_flops
            moved += seen * costs.observe_bytes
            if token is None or span.kept is None:
                flops += fed * costs.flops(span.kept, skips)
                moved += steps * costs.bytes(span.kept, skips, copied=copied)
                continue
            computed, read = token.work(span.kept, fed / max(1, steps), state.rows, executor)
            flops += fed * costs.flops(computed)
            moved += steps * costs.bytes(read)
            proxy_flops += fed * token.flops(span.kept, computed)
            proxy_bytes += steps * token.bytes(span.kept, read, costs.width)
        for remask in state.remasks:
            chosen = remask.kept if token is None else token.chosen_once(remask.kept)
            moved += costs.build_bytes(chosen, copies, compensates, copied=copied)
            flops += costs.build_flops(chosen, compensates)
    if not forwards or not tokens:
        return _Shares()
    all_flops, all_bytes = tokens * costs.flops(None), forwards * costs.bytes(None)
    proxy = proxy_flops / all_flops, proxy_bytes / all_bytes
    return _Shares(flops / all_flops + proxy[0], moved / all_bytes + proxy[1], *proxy)
