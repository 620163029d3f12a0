"""The output head of an attached model by a screen, for decoded tokens; what it cost and lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.models.packed import PackedTensor
from dart_llm.models.screen import Screen, divergence
from dart_llm.native.build import ops, why_not
from dart_llm.patching.executors.native_ffn import Layout
from dart_llm.patching.executors.step_formulas import capped
from dart_llm.pruning.accounting import STEP_ROWS
from dart_llm.pruning.records import HeadReport

EVERY = 32
"""Of so many screened tokens one is scored by the whole head too, to see what is lost."""


class ScreenedHead:
    """``module``: the head of ``model``, a linear layer without bias."""

    def __init__(self, model: Any, screen: Screen) -> None:
        self.screen = screen
        self.module: nn.Module = model.get_output_embeddings()
        text = model.config.get_text_config()
        self._cap = float(getattr(text, "final_logit_softcapping", None) or 0)
        self._native: torch.dtype | None = None
        """Of the hidden states that the kernels read; None: torch runs it all."""
        self._packed: Any = None
        self._tokens = self._sampled = self._same = 0
        self._exact = 0.0
        self._divergence = 0.0

    def go_native(self, layout: Layout) -> None:
        """Run by the kernels; a packed head is laid out so that single rows can be read."""
        weight: Any = self._weight
        if why_not() or weight.device.type != "cpu":
            return
        if isinstance(weight, PackedTensor):
            layout.turned(weight.matrix, "rows")
            self._packed = weight.matrix
        if self._packed is not None or weight.is_contiguous():
            self._native = weight.dtype

    @property
    def _weight(self) -> Tensor:
        weight: Any = self.module.weight
        return weight.detach()  # type: ignore[no-any-return]

    def run(self, original: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The module's forward for decoded tokens, [..., D] to [..., V]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        scores = self._scores(rows, original, None)
        return scores.reshape(*hidden.shape[:-1], scores.shape[-1])

    def step(self, hidden: Tensor, forbidden: list[int] | None) -> Tensor:
        """Logits [B, V] of a whole step's last hidden states [B, D].

        With ``forbidden``, the likeliest words [B] but for these, int64, may stand in their place.
        """
        if self._cap:
            return capped(self._scores(hidden, self._whole, None), self._cap)
        return self._scores(hidden, self._whole, forbidden)

    def _whole(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self._weight)

    @torch.no_grad()
    def _scores(
        self, hidden: Tensor, whole: Callable[[Tensor], Tensor], forbidden: list[int] | None
    ) -> Tensor:
        looked = range(-self._tokens % EVERY, len(hidden), EVERY)
        few = 0 < len(hidden) <= STEP_ROWS
        if few and hidden.dtype == self._native:
            scores = self._by_kernels(hidden, None if looked else forbidden)
        else:
            scores = self._by_torch(hidden, whole)
        self._tokens += len(hidden)
        self._look(hidden, scores, whole, looked)
        return scores

    def _by_kernels(self, hidden: Tensor, forbidden: list[int] | None) -> Tensor:
        screen = self.screen
        scores, exact = ops().screened_head(
            hidden.contiguous(),
            screen.basis,
            screen.levels,
            screen.by,
            screen.keep,
            self._weight if self._packed is None else None,
            self._packed,
            screen.threshold,
            forbidden,
        )
        self._exact += sum(exact)
        return scores  # type: ignore[no-any-return]

    def _by_torch(self, hidden: Tensor, whole: Callable[[Tensor], Tensor]) -> Tensor:
        """The same by formulas: of one token its words alone, of several all of them."""
        rough = self.screen.rough(hidden)
        near = self.screen.near(rough)
        self._exact += float(near.sum())
        if len(hidden) > 1 or isinstance(self._weight, PackedTensor):
            return torch.where(near, whole(hidden), rough.to(hidden.dtype))
        words = near[0].nonzero()[:, 0]
        exact = F.linear(hidden, self._weight.index_select(0, words))
        return rough.to(hidden.dtype).index_copy(1, words, exact)

    def _look(
        self, hidden: Tensor, scores: Tensor, whole: Callable[[Tensor], Tensor], places: range
    ) -> None:
        """Score each ``EVERY``-th token by the whole head too: the first, then as they come."""
        for place in places:
            full, found = (
                whole(hidden[place : place + 1]).float(),
                scores[place : place + 1].float(),
            )
            self._sampled += 1
            self._same += int(full.argmax() == found.argmax())
            self._divergence += float(divergence(full, found))

    def report(self) -> HeadReport | None:
        """What was read and lost so far; None before the first token."""
        if not self._tokens:
            return None
        weight = self._weight
        read = self.screen.nbytes() / weight.nbytes
        looked = self._sampled / self._tokens
        return HeadReport(
            tokens=self._tokens,
            bytes_share=read + self._exact / self._tokens / len(weight) + looked,
            sampled=self._sampled,
            same_share=self._same / self._sampled,
            kl=self._divergence / self._sampled,
        )

    def nbytes(self) -> int:
        """Bytes beside the model."""
        return sum(one.nbytes for one in self.screen.tensors())
