"""One FFN block under per-token selection.

``TokenFfn`` ranks neurons by low-bit proxies; ``PackedTokenFfn`` by their exact activations;
``ExactFfn`` by a projection that is read whole; ``InputsFfn`` ranks not neurons, but the inputs of
each matrix.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dart_llm.errors import ConfigError
from dart_llm.models.ffn import FfnBlock, matrix_of
from dart_llm.patching.executors.torch_ffn import Project, stacked
from dart_llm.pruning.accounting import READ_WINNERS, STEP_ROWS, most_rows
from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.token_level import (
    QuantizedProxy,
    TokenMask,
    at_largest,
    contribution_estimate,
    gaussian_error,
    input_count,
    low_bit,
    squared_error,
    winner_places,
)
from dart_llm.pruning.weights import in_blocks, norms_of

logger = logging.getLogger("dart_llm")


def warn_if_slower_than_dense(method: str, token: TokenFfn, executor: str, rows: int) -> None:
    """Warn once if per-token selection is slower than dense here."""
    if not token.config.native:
        _warn_once(
            "%s runs in plain PyTorch and is slower than the unpruned model: it is there to "
            "compare quality at equal bytes; no kernel reads less for it",
            method,
        )
        return
    where = f"under executor {executor.partition(',')[0]}"
    if executor in READ_WINNERS:
        if rows <= most_rows(executor, isinstance(token, PackedTokenFfn)):
            return
        where = f"in a batch of several rows {where}"
    _warn_once(
        "%s is slower than the unpruned model %s: all neurons are computed, and estimated first; "
        "executor native runs the selected ones alone, of one row and of up to %d",
        method,
        where,
        STEP_ROWS,
    )


@functools.cache
def _warn_once(message: str, *values: object) -> None:
    logger.warning(message, *values)


class TokenFfn:
    """Low-bit proxies of one block's gate and up (or fc), and what they select.

    Raises ``ConfigError`` for an offloaded block, whose weights cannot be copied.
    """

    def __init__(self, block: FfnBlock, config: TokenConfig) -> None:
        if block.offloaded:
            raise ConfigError(
                f"layer {block.index} is offloaded, so no low-bit proxies of its weights can be "
                "made: load the model without offloading, or use a method without token"
            )
        self.block, self.config = block, config
        self.watched = False
        self.marks: Tensor | None = None
        """What the tokens of the newest forward selected, [B, T, I] bool, while ``watched``."""
        self._prepare()

    def _prepare(self) -> None:
        config = self.config
        with torch.inference_mode(False):
            *_, down = self.block.matrices()
            parts = self._proxied()
            self.copies: tuple[QuantizedProxy, ...] = tuple(
                low_bit(part, config.bits, config.group) for part in parts
            )
            self.norms = norms_of(down.detach(), 0)
        self.error = [
            squared_error(part, copy) for part, copy in zip(parts, self.copies, strict=True)
        ]

    def _proxied(self) -> list[Tensor]:
        """The matrices of which low-bit proxies are made."""
        *inputs, _ = self.block.matrices()
        return [part.detach() for part in inputs if part is not None]

    def estimate(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """u~ [..., n] float32 of the neurons ``ids`` (None: all), from the proxies alone."""
        x = at_largest(x, math.ceil(self.config.inputs * x.shape[-1]))
        made = [copy.product(x, ids) for copy in self.copies]
        for at, bias in enumerate(self.block.biases()[2 - len(made) : 2]):
            if bias is not None:
                made[at] += bias if ids is None else bias[ids]
        act = self.block.act
        return act(made[0]) if len(made) == 1 else act(made[0]) * made[1]

    def strengths(self, x: Tensor, mask: TokenMask) -> Tensor:
        """What each candidate is ranked by, [..., n].  x: what ``ranks`` says, [..., D or I]."""
        ids = mask.candidates
        worth = self.norms if mask.worth is None else mask.worth
        worth = worth if ids is None else worth[ids]
        return contribution_estimate(self.estimate(x, ids), worth)

    def ranks(self, fed: Tensor, u: Tensor) -> Tensor:
        """What the selection reads: the input [..., D] or the activations u [..., I]."""
        return fed

    @torch.no_grad()
    def winners(self, x: Tensor, mask: TokenMask) -> Tensor:
        """Ids of the neurons that each token keeps, ascending, [..., k] int64.

        x: as of ``strengths``.
        """
        ids = mask.candidates
        places = winner_places(self.strengths(x, mask), mask.winners)
        return places if ids is None else ids[places]

    def run_dense(
        self, project: Project, x: Tensor, fed: Tensor, masks: Sequence[LayerMask | None]
    ) -> tuple[Tensor, Tensor]:
        """``(u, z)`` by dense arithmetic, for any number of tokens.

        x: [B, T, .], input of the host; fed: [B, T, D], input of the first projections (the same,
        but for OPT).  ``masks``: one for all rows, or one per row.
        """
        mean = stacked([m.mean if isinstance(m, TokenMask) else None for m in masks])
        bias = stacked([None if m is None else m.bias for m in masks])
        u = self.block.hidden(x)
        marks = by_row(self._keep, self.ranks(fed, u), masks)
        self.marks = marks if self.watched else None
        keep = marks.to(x.dtype)
        z = project((u if mean is None else u - mean[:, None].to(x)) * keep)
        return u, (z if bias is None else z + bias[:, None].to(x))

    def _keep(self, x: Tensor, mask: LayerMask | None) -> Tensor:
        """[B, T, I] bool."""
        shape = (*x.shape[:-1], self.block.down_width)
        if mask is None:
            return torch.ones(shape, dtype=torch.bool, device=x.device)
        if not isinstance(mask, TokenMask):
            return mask.dense(torch.bool).to(x.device).expand(shape)
        none = torch.zeros(shape, dtype=torch.bool, device=x.device)
        return none.scatter_(-1, self.winners(x, mask), True)

    def nbytes(self) -> int:
        norms: int = self.norms.numel() * self.norms.element_size()
        return norms + sum(copy.nbytes() for copy in self.copies)


class PackedTokenFfn(TokenFfn):
    """Quantised gate/up rank neurons by their exact activations; no proxy is made."""

    def _proxied(self) -> list[Tensor]:
        return []

    def estimate(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """u [..., n] float32 of the neurons ``ids``; x: u of all of them."""
        return (x if ids is None else x[..., ids]).float()

    def ranks(self, fed: Tensor, u: Tensor) -> Tensor:
        return u


class ExactFfn(TokenFfn):
    """Gate or up, read whole, ranks the neurons (in a plain FFN: u itself)."""

    def _prepare(self) -> None:
        self.copies, self.error = (), []

    def strengths(self, x: Tensor, mask: TokenMask) -> Tensor:
        block = self.block
        if block.plain:
            return block.act(block.up_of(x)).abs()
        return (block.up_of(x) if self.config.rule == "up" else block.act(block.gate_of(x))).abs()

    def nbytes(self) -> int:
        return 0


GATE, UP, DOWN = range(3)
"""Indices in ``FfnBlock.matrices``."""


class InputsFfn(TokenFfn):
    """Every matrix is read at its own largest inputs; no neuron is ranked."""

    def _prepare(self) -> None:
        self.copies, self.error = (), []
        self._norms: dict[int | nn.Module, Tensor] = {}

    def run_dense(
        self, project: Project, x: Tensor, fed: Tensor, masks: Sequence[LayerMask | None]
    ) -> tuple[Tensor, Tensor]:
        u = by_row(self._hidden, fed, masks)
        bias = stacked([None if m is None else m.bias for m in masks])
        z = project(u)
        return u, (z if bias is None else z + bias[:, None].to(x))

    def _hidden(self, x: Tensor, mask: LayerMask | None) -> Tensor:
        """u of some rows, [B, T, I]."""
        block, up = self.block, self.block.up_of(self.at_largest(x, mask, UP))
        u = block.act(up) if block.plain else up
        if not block.plain:
            u = u * block.act(block.gate_of(self.at_largest(x, mask, GATE)))
        if mask is None or isinstance(mask, TokenMask):
            return self.at_largest(u, mask, DOWN)
        return u * mask.dense(u.dtype).to(u.device)

    def at_largest(self, x: Tensor, mask: LayerMask | None, matrix: int | nn.Module) -> Tensor:
        """x [..., M] as a matrix reads it: all of it unless ``mask`` selects per token.

        ``matrix``: ``GATE``, ``UP``, ``DOWN``, or a projection of attention.
        """
        if not isinstance(mask, TokenMask):
            return x
        count = input_count(x.shape[-1], mask.winners, mask.width)
        return at_largest(x, count, self._norms_of(matrix) if self.config.weighted else None)

    def _norms_of(self, matrix: int | nn.Module) -> Tensor:
        """Of its columns, computed at the first call."""
        if matrix not in self._norms:
            by_index = isinstance(matrix, int)
            weight = self.block.matrices()[matrix] if by_index else matrix_of(matrix)  # type: ignore[index, arg-type]
            assert weight is not None
            with torch.inference_mode(False):
                self._norms[matrix] = norms_of(weight, 0)
        return self._norms[matrix]

    def nbytes(self) -> int:
        return sum(norms.nbytes for norms in self._norms.values())


KINDS: Mapping[str, type[TokenFfn]] = {"copies": TokenFfn, "inputs": InputsFfn}


def token_ffn(block: FfnBlock, config: TokenConfig) -> TokenFfn:
    """Per-token selection of one block by the rule of ``config``; raises as ``TokenFfn``."""
    _, up, _ = block.matrices()
    if config.by_weights(in_blocks(up)):
        return PackedTokenFfn(block, config)
    return KINDS.get(config.rule, ExactFfn)(block, config)


def by_row(
    run: Callable[[Tensor, LayerMask | None], Tensor], x: Tensor, masks: Sequence[LayerMask | None]
) -> Tensor:
    """``run`` of x [B, ...] and one mask for all rows, or of each row with its mask."""
    if len(masks) == 1:
        return run(x, masks[0])
    return torch.cat([run(x[b : b + 1], mask) for b, mask in enumerate(masks)])


def errors(layers: Sequence[TokenFfn]) -> tuple[float, float] | None:
    """Relative Frobenius error of all proxies, and that of Gaussian matrices of their shapes.

    None where there are no proxies.
    """
    pairs = [pair for layer in layers for pair in layer.error]
    if not pairs:
        return None
    copies = [copy for layer in layers for copy in layer.copies]
    sizes = [copy.shape[0] * copy.shape[1] for copy in copies]
    drawn = [gaussian_error(*copy.shape, copy.bits, copy.group) for copy in copies]
    whole = max(sum(whole for _, whole in pairs), 1e-300)
    gauss = sum(n * e * e for n, e in zip(sizes, drawn, strict=True)) / sum(sizes)
    return float((sum(off for off, _ in pairs) / whole) ** 0.5), float(gauss**0.5)
