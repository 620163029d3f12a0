"""Generation refuses logits that are NaN or infinite: argmax would hide them."""

from __future__ import annotations

from typing import Any

from transformers import LogitsProcessor

from dart_llm.errors import DartError


class FiniteLogits(LogitsProcessor):
    """Raises ``DartError``; ``what``: whose logits they are, e.g. ``document 3``."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if bool((scores.isnan() | scores.isposinf()).any()):
            raise DartError(
                f"a logit of {self.what} is not finite: the model overflows; try dtype float32"
            )
        return scores
