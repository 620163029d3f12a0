"""A screened output head for decoded tokens, and measurements of its bytes and divergence.

A low-bit screen scores the whole vocabulary roughly.  Only entries whose rough score is near the
best are scored exactly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.models.calls import TokenCall
from dart_llm.models.packed import PackedTensor
from dart_llm.models.screen import Screen, divergence
from dart_llm.native.build import ops, why_not
from dart_llm.patching.executors.native_ffn import Layout
from dart_llm.patching.executors.token_ffn import STEP_ROWS
from dart_llm.pruning.records import HeadReport

EVERY = 32
"""One in this many screened tokens is checked: the whole head scores it too, for comparison."""


class ScreenedHead:
    """Runs the output head of ``model``, a linear layer without bias, with the help of ``screen``.

    ``all_bytes``: bytes of all weights that a decoded token reads.
    """

    def __init__(self, model: Any, screen: Screen, all_bytes: int) -> None:
        self.screen, self._all_bytes = screen, all_bytes
        self.module: Any = model.get_output_embeddings()
        text = model.config.get_text_config()
        self._cap = float(getattr(text, "final_logit_softcapping", None) or 0)
        self._native: torch.dtype | None = None
        """Dtype of hidden states that the kernels support; None if torch runs the head."""
        self._packed: Any = None
        self.forget()

    def go_native(self, layout: Layout) -> None:
        """Use native kernels from now on, if possible; store a quantized head by rows for them."""
        weight: Any = self._weight
        if why_not() or weight.device.type != "cpu":
            return
        if isinstance(weight, PackedTensor):
            layout.reorder(weight.matrix, "rows")
            self._packed = weight.matrix
        if self._packed is not None or weight.is_contiguous():
            self._native = weight.dtype

    def forget(self) -> None:
        """Reset all counts, for a new request."""
        self._tokens = self._checked = self._same = self._exact = 0
        self._divergence = 0.0
        """Sum of the checked tokens' divergences.  ``_same``: number of checked tokens for which
        the screened and the whole head have the same best entry."""

    @property
    def _weight(self) -> Tensor:
        return self.module.weight.detach()  # type: ignore[no-any-return]

    def run(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] for ``hidden`` [..., D]; the head's forward for decoded tokens."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        by_kernels = 0 < len(rows) <= STEP_ROWS and rows.dtype == self._native
        with torch.no_grad():
            scores, exact = self._by_kernels(rows) if by_kernels else self._by_torch(rows)
        self.count(rows, capped(scores, self._cap), exact)  # the model caps its logits later
        return scores.reshape(*hidden.shape[:-1], scores.shape[-1])

    def with_scores(self, call: TokenCall) -> TokenCall:
        """Return ``call``; if one of its tokens will be checked, a copy that requests logits."""
        return replace(call, forbidden=None) if self._checked_rows(len(call.ids)) else call

    @torch.no_grad()
    def count(self, hidden: Tensor, logits: Tensor, exact: int) -> None:
        """Count n screened tokens, and check some of them against the whole head.

        ``hidden``: last hidden states [n, D].  ``logits``: [n, V], as the model returns them, used
        only for checked tokens.  ``exact``: number of entries that were scored exactly.
        """
        for row in self._checked_rows(len(hidden)):
            full = capped(F.linear(hidden[row : row + 1], self._weight), self._cap).float()
            self._checked += 1
            self._same += int(full.argmax() == logits[row : row + 1].float().argmax())
            self._divergence += float(divergence(full, logits[row : row + 1]))
        self._tokens += len(hidden)
        self._exact += exact

    def _checked_rows(self, count: int) -> range:
        """Return which of the next ``count`` tokens to check: the very first, then each 32nd."""
        return range(-self._tokens % EVERY, count, EVERY)

    def _by_kernels(self, hidden: Tensor) -> tuple[Tensor, int]:
        screen, weight = self.screen, self._weight if self._packed is None else None
        arguments = (*screen.tensors(), screen.keep, screen.threshold, weight, self._packed)
        scores, exact = ops().screened_head(hidden.contiguous(), *arguments)
        return scores, sum(exact)

    def _by_torch(self, hidden: Tensor) -> tuple[Tensor, int]:
        """Like ``_by_kernels``, in PyTorch; for several tokens, the whole head is computed."""
        rough = self.screen.rough(hidden)
        near = self.screen.near(rough)
        if len(hidden) > 1 or isinstance(self._weight, PackedTensor):
            full = F.linear(hidden, self._weight)
            return torch.where(near, full, rough.to(hidden.dtype)), int(near.sum())
        entries = near[0].nonzero()[:, 0]
        exact = F.linear(hidden, self._weight.index_select(0, entries))
        return rough.to(hidden.dtype).index_copy(1, entries, exact), len(entries)

    def report(self) -> HeadReport | None:
        """Return the measurements so far; None before the first token."""
        if not self._tokens:
            return None
        weight = self._weight
        exact = self._exact / self._tokens / len(weight)
        return HeadReport(
            tokens=self._tokens,
            bytes_share=self.screen.nbytes() / weight.nbytes + exact + self._checked / self._tokens,
            sampled=self._checked,
            same_share=self._same / self._checked,
            kl=self._divergence / self._checked,
            share_of_bytes=weight.nbytes / self._all_bytes,
        )

    def nbytes(self) -> int:
        """Return the bytes of the screen."""
        return sum(tensor.nbytes for tensor in self.screen.tensors())


def capped(x: Tensor, cap: float) -> Tensor:
    """Return cap tanh(x / cap), or x if ``cap`` is 0."""
    return cap * torch.tanh(x / cap) if cap else x
