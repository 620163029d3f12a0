"""One FFN block under token-level selection: low-bit copies rank, the model's weights compute."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.models.ffn import FfnBlock
from dart_llm.patching.executors.torch_ffn import Project, stacked
from dart_llm.pruning.accounting import READ_WINNERS, STEP_ROWS
from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.token_level import (
    QuantizedProxy,
    TokenMask,
    contribution_estimate,
    gaussian_error,
    low_bit,
    squared_error,
    winner_places,
)
from dart_llm.pruning.weights import norms_of

logger = logging.getLogger("dart_llm")


def say_slower(method: str, executor: str, rows: int) -> None:
    """Say once where tokens that choose their neurons take longer than all neurons would."""
    if executor not in READ_WINNERS:
        _say_slower(method, f"under executor {executor}")
    elif rows > READ_WINNERS[executor]:
        _say_slower(method, f"in a batch of several rows under executor {executor}")


@functools.cache
def _say_slower(method: str, where: str) -> None:
    logger.warning(
        "%s is slower than the unpruned model %s: all neurons are computed, and estimated first; "
        "executors native and slim run the chosen ones alone, of one row and of up to %d",
        method,
        where,
        STEP_ROWS,
    )


class TokenFfn:
    """Copies of one block's gate and up (or fc), and what they choose.

    Raises ``ConfigError`` for an offloaded block, whose weights cannot be copied.
    """

    def __init__(self, block: FfnBlock, config: TokenConfig) -> None:
        if block.offloaded:
            raise ConfigError(
                f"layer {block.index} is offloaded, so no low-bit copies of its weights can be "
                "made: load the model without offloading, or use a method without token"
            )
        self.block = block
        with torch.inference_mode(False):
            parts = [part.detach() for part in block.matrices()[:2] if part is not None]
            self.copies: tuple[QuantizedProxy, ...] = tuple(
                low_bit(part, config.bits, config.group) for part in parts
            )
            down = block.matrices()[2].detach()
            self.norms = norms_of(down, 0)
        self.error = [
            squared_error(part, copy) for part, copy in zip(parts, self.copies, strict=True)
        ]

    def estimate(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """u~ [..., n] float32 of the neurons ``ids`` (None: all), from the copies alone."""
        made = [copy.product(x, ids) for copy in self.copies]
        for at, bias in enumerate(self.block.biases()[2 - len(made) : 2]):
            if bias is not None:
                made[at] += bias if ids is None else bias[ids]
        act = self.block.act
        return act(made[0]) if len(made) == 1 else act(made[0]) * made[1]

    @torch.no_grad()
    def winners(self, x: Tensor, mask: TokenMask) -> Tensor:
        """Ids of the neurons that each token keeps, ascending, [..., k] int64.  x: [..., D]."""
        ids = mask.candidates
        worth = self.norms if mask.worth is None else mask.worth
        worth = worth if ids is None else worth[ids]
        places = winner_places(contribution_estimate(self.estimate(x, ids), worth), mask.winners)
        return places if ids is None else ids[places]

    def run_dense(
        self, project: Project, x: Tensor, fed: Tensor, masks: Sequence[LayerMask | None]
    ) -> tuple[Tensor, Tensor]:
        """``(u, z)`` by dense arithmetic, for any number of tokens.

        x: [B, T, .], what the host is given; fed: [B, T, D], what the input projections are given
        (the same, but for OPT).  ``masks``: one for all rows, or one per row.
        """
        rows = [slice(None)] if len(masks) == 1 else [slice(b, b + 1) for b in range(len(masks))]
        parts = [self._keep(fed[row], mask) for row, mask in zip(rows, masks, strict=True)]
        keep = torch.cat([part.to(x.dtype) for part in parts])
        mean = stacked([m.mean if isinstance(m, TokenMask) else None for m in masks])
        bias = stacked([None if m is None else m.bias for m in masks])
        u = self.block.hidden(x)
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


def errors(layers: Sequence[TokenFfn]) -> tuple[float, float]:
    """Relative Frobenius error of all copies, and that of Gaussian matrices of their shapes."""
    pairs = [pair for layer in layers for pair in layer.error]
    copies = [copy for layer in layers for copy in layer.copies]
    sizes = [copy.shape[0] * copy.shape[1] for copy in copies]
    drawn = [gaussian_error(*copy.shape, copy.bits, copy.group) for copy in copies]
    whole = max(sum(whole for _, whole in pairs), 1e-300)
    gauss = sum(n * e * e for n, e in zip(sizes, drawn, strict=True)) / sum(sizes)
    return float((sum(off for off, _ in pairs) / whole) ** 0.5), float(gauss**0.5)
