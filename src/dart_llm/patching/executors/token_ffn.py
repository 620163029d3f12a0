"""One FFN block under per-token selection: a rule selects, the model's weights compute."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dart_llm.errors import ConfigError
from dart_llm.models.ffn import FfnBlock, matrix_of
from dart_llm.patching.executors.torch_ffn import Project, stacked
from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.registry import TOKEN_RULES
from dart_llm.pruning.token_level import QuantizedProxy, TokenMask
from dart_llm.pruning.token_rules import LowBit, Teal, TokenRule
from dart_llm.pruning.weights import in_blocks

logger = logging.getLogger("dart_llm")

STEP_ROWS = 8
"""Rows of the largest batch that a native step, or the cuda kernels, take."""

WHOLE_STEPS = "native, whole steps"
"""How reports name executor native where it decoded by whole steps."""

READ_WINNERS = {"native": 1, WHOLE_STEPS: STEP_ROWS, "cuda": STEP_ROWS}
"""Executors that read the winners of a token alone, and of how many rows; all else is dense."""


def most_rows(executor: str, by_weights: bool) -> int:
    """As ``READ_WINNERS``; ``by_weights``: weights in blocks rank the neurons themselves."""
    rows = READ_WINNERS.get(executor, 0)
    return STEP_ROWS if rows and by_weights else rows


def winner_rows(config: TokenConfig | None, executor: str, blocks: bool) -> int:
    """Rows of the largest batch whose winners alone ``executor`` reads; 0: it reads all neurons.

    ``blocks``: whether the weights are stored in low-bit blocks.
    """
    if config is None:
        return 0
    rule: type[TokenRule] = TOKEN_RULES.get(config.rule).for_weights(config, blocks)
    return most_rows(executor, rule.by_weights) if rule.native else 0


def warn_if_slower_than_dense(method: str, token: TokenFfn, executor: str, rows: int) -> None:
    """Warn once if per-token selection is slower than dense here."""
    if not token.rule.native:
        _warn_once(
            "%s runs in plain PyTorch and is slower than the unpruned model: it is there to "
            "compare quality at equal bytes; no kernel reads less for it",
            method,
        )
        return
    where = f"under executor {executor.partition(',')[0]}"
    if executor in READ_WINNERS:
        if rows <= most_rows(executor, token.rule.by_weights):
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
    """One block whose tokens select by ``rule``, by dense arithmetic."""

    def __init__(self, block: FfnBlock, rule: TokenRule) -> None:
        self.block, self.rule = block, rule
        self.watched = False
        self.marks: Tensor | None = None
        """Selected by the tokens of the newest forward, [B, T, I] bool, while ``watched``."""

    @property
    def proxies(self) -> tuple[QuantizedProxy, ...]:
        """Low-bit proxies of gate and up, for kernels."""
        return self.rule.proxies

    def saliency(self, mask: TokenMask) -> Tensor:
        """What multiplies each activation, [I] float32, for kernels."""
        assert isinstance(self.rule, LowBit)
        return self.rule.saliency(mask)

    def run_dense(
        self, project: Project, x: Tensor, fed: Tensor, masks: Sequence[LayerMask | None]
    ) -> tuple[Tensor, Tensor]:
        """``(u, z)`` by dense arithmetic, for any number of tokens.

        x: [B, T, .], input of the host; fed: [B, T, D], input of the first projections (the same,
        but for OPT).  ``masks``: one for all rows, or one per row.
        """
        bias = stacked([None if m is None else m.bias for m in masks])
        if self.rule.selects_neurons:
            mean = stacked([m.mean if isinstance(m, TokenMask) else None for m in masks])
            u = self.block.hidden(x)
            marks = by_row(self._marks, masks, fed, u)
            self.marks = marks if self.watched else None
            kept = (u if mean is None else u - mean[:, None].to(x)) * marks.to(x.dtype)
        else:
            u = kept = by_row(self.rule.hidden, masks, fed)
        z = project(kept)
        return u, (z if bias is None else z + bias[:, None].to(x))

    def _marks(self, fed: Tensor, u: Tensor, mask: LayerMask | None) -> Tensor:
        """[B, T, I] bool."""
        shape = (*u.shape[:-1], self.block.down_width)
        if mask is None:
            return torch.ones(shape, dtype=torch.bool, device=u.device)
        if not isinstance(mask, TokenMask):
            return mask.dense(torch.bool).to(u.device).expand(shape)
        none = torch.zeros(shape, dtype=torch.bool, device=u.device)
        return none.scatter_(-1, self.rule.winners(fed, u, mask), True)

    def attention_input(
        self, module: nn.Module, x: Tensor, masks: Sequence[LayerMask | None]
    ) -> Tensor:
        """x [B, T, M] as a projection of attention reads it."""
        rule = self.rule
        assert isinstance(rule, Teal)
        matrix = matrix_of(module)
        return by_row(lambda part, mask: rule.largest(part, mask, module, matrix), masks, x)

    def nbytes(self) -> int:
        return self.rule.nbytes()


def token_ffn(block: FfnBlock, config: TokenConfig) -> TokenFfn:
    """One block under the rule of ``config``.

    Raises ``ConfigError`` for an offloaded block, whose weights cannot be read between forwards.
    """
    if block.offloaded:
        raise ConfigError(
            f"layer {block.index} is offloaded, so no low-bit proxies of its weights can be "
            "made: load the model without offloading, or use a method without token"
        )
    _, up, _ = block.matrices()
    rule = TOKEN_RULES.get(config.rule).for_weights(config, in_blocks(up))
    return TokenFfn(block, rule(block, config))


def by_row(
    run: Callable[..., Tensor], masks: Sequence[LayerMask | None], *tensors: Tensor
) -> Tensor:
    """``run`` of tensors [B, ...] and one mask for all rows, or of each row and its own."""
    if len(masks) == 1:
        return run(*tensors, masks[0])
    rows = [[t[b : b + 1] for t in tensors] for b in range(len(masks))]
    return torch.cat([run(*row, mask) for row, mask in zip(rows, masks, strict=True)])
