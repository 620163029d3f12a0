"""Generation refuses logits that are NaN or infinite: argmax would hide them."""

from __future__ import annotations

from typing import Any

from transformers import LogitsProcessor, LogitsProcessorList

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


class CheckedModel:
    """A model as ``generate.generate`` uses it, which checks its logits and stops at ``ends``.

    ``what``: whose logits they are, as of ``FiniteLogits``.
    """

    def __init__(self, model: Any, ends: frozenset[int], what: str) -> None:
        self.model, self.device = model, model.device
        self._settings: dict[str, Any] = {
            "logits_processor": LogitsProcessorList([FiniteLogits(what)]),
            "eos_token_id": sorted(ends) or None,
        }

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate``."""
        return self.model.generate(*args, **self._settings, **kwargs)


def text_ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, for the model's generation settings or the tokenizer."""
    found = model.generation_config.eos_token_id
    several = found if isinstance(found, list | tuple) else [found]
    ids = [*several, tokenizer.eos_token_id]
    return frozenset(int(token) for token in ids if token is not None)
