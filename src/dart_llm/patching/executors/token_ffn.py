"""Per-token selection in an FFN block, in plain PyTorch: all neurons are computed, then masked."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dart_llm.errors import ConfigError
from dart_llm.models.ffn import FfnBlock, matrix_of
from dart_llm.patching.executors.torch_ffn import Project
from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.registry import TOKEN_RULES
from dart_llm.pruning.token_level import TokenMask
from dart_llm.pruning.token_rules.rule import TokenRule
from dart_llm.pruning.token_rules.teal import Teal
from dart_llm.pruning.weights import in_blocks

logger = logging.getLogger("dart_llm")

STEP_ROWS = 8
"""Largest batch for the cuda kernels, and for whole steps (decode steps in one native call)."""

WHOLE_STEPS = "native, whole steps"
"""Name of executor native in reports if tokens were decoded in whole steps."""


def max_rows(executor: str, by_weights: bool) -> int:
    """Return the largest batch in which ``executor`` reads only the neurons that tokens select.

    Returns 0 if it always reads all neurons.  ``by_weights``: True if the rule ranks neurons by
    their exact activations, computed from quantized weights.
    """
    if executor == "native":
        return STEP_ROWS if by_weights else 1
    return STEP_ROWS if executor == WHOLE_STEPS else 0


def max_selecting_rows(config: TokenConfig | None, executor: str, quantized: bool) -> int:
    """Return ``max_rows`` for the rule of ``config``; 0 without a rule, or without a kernel for it.

    ``quantized``: True if the weights are stored in quantization blocks.
    """
    if config is None:
        return 0
    rule: type[TokenRule] = TOKEN_RULES.get(config.rule).for_weights(config, quantized)
    return max_rows(executor, rule.by_weights) if rule.native else 0


def warn_if_slower_than_dense(method: str, token: TokenFfn, executor: str, rows: int) -> None:
    """Warn once if ``method`` is slower than the dense model at batch size ``rows``."""
    native = token.rule.native
    if not native:
        why = "no kernel skips neurons for it, because it serves to compare quality at equal bytes"
    elif rows > max_rows(executor, token.rule.by_weights):
        why = "executor native skips neurons only for a single row "
        why += f"(up to {STEP_ROWS} rows if one native call runs the whole decode step)"
    else:
        return
    where = f"under executor {executor.partition(',')[0]}" if native else "in plain PyTorch"
    where += " in a batch of several rows" if native and "native" in executor else ""
    _warn_once("%s is slower than the unpruned model %s: all neurons run; %s", method, where, why)


@functools.cache
def _warn_once(message: str, *values: object) -> None:
    logger.warning(message, *values)


class TokenFfn:
    """One FFN block in which tokens select by ``rule``: all neurons are computed, then masked."""

    def __init__(self, block: FfnBlock, rule: TokenRule) -> None:
        self.block, self.rule = block, rule
        self.watched = False
        self.marks: Tensor | None = None
        """True for neurons selected in the newest forward, [B, T, I]; None unless ``watched``."""

    def run_dense(
        self, project: Project, x: Tensor, fed: Tensor, mask: TokenMask
    ) -> tuple[Tensor, Tensor]:
        """Return ``(u, z)``, computed with all neurons, for any number of tokens.

        x: [B, T, .], input of the module whose forward is replaced; fed: [B, T, D], input of gate
        and up, which differs from x only in OPT.
        """
        if self.rule.selects_neurons:
            u = self.block.hidden(x)
            unselected = torch.zeros(u.shape, dtype=torch.bool, device=u.device)
            marks = unselected.scatter_(-1, self.rule.winners(fed, u, mask), True)
            self.marks = marks if self.watched else None
            kept = (u if mask.mean is None else u - mask.mean.to(x)) * marks.to(x.dtype)
        else:
            u = kept = self.rule.hidden(fed, mask)
        z = project(kept)
        return u, (z if mask.bias is None else z + mask.bias.to(x))

    def attention_input(
        self, module: nn.Module, x: Tensor, masks: Sequence[LayerMask | None]
    ) -> Tensor:
        """Return x [B, T, M], the input of an attention projection, with only its largest values.

        ``masks``: one for all batch rows, or one per row.
        """
        rule, matrix = self.rule, matrix_of(module)
        assert isinstance(rule, Teal)
        rows = zip(x.split(len(x) // len(masks)), masks, strict=True)  # type: ignore[no-untyped-call]
        return torch.cat([rule.largest(row, mask, module, matrix) for row, mask in rows])

    def nbytes(self) -> int:
        return self.rule.nbytes()


def token_ffn(block: FfnBlock, config: TokenConfig) -> TokenFfn:
    """Return ``block`` with the per-token rule of ``config``.

    Raises ``ConfigError`` for an offloaded block, whose weights cannot be read between forwards.
    """
    if block.offloaded:
        raise ConfigError(
            f"layer {block.index} is offloaded, so no low-bit proxies of its weights can be "
            "made: load the model without offloading, or use a method with sequence masks"
        )
    rule = TOKEN_RULES.get(config.rule).for_weights(config, in_blocks(block.matrices()[1]))
    return TokenFfn(block, rule(block, config))
