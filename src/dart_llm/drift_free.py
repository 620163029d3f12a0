"""Free mode: the model writes after a prompt, through its own ``generate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dart_llm.drift_grid import Source
from dart_llm.errors import ConfigError
from dart_llm.finite_logits import CheckedModel, text_ends
from dart_llm.generate import encode_prompt, generate
from dart_llm.session import Run


@dataclass(frozen=True, eq=False)
class Asking:
    """A prompt as tokens ``ids`` [1, T]; ``chat``: through the model's chat template."""

    source: Source
    ids: Tensor
    chat: bool


@dataclass(frozen=True)
class Written:
    """A text and the pieces of its tokens; ``ended``: by the model itself."""

    text: str
    pieces: tuple[str, ...]
    ended: bool


def ask(
    source: Source, tokenizer: Any, chat: bool | None, tokens: int, longest: int | None
) -> Asking:
    """Tokenise a prompt; ``chat`` None: with the chat template where there is one.

    Raises ``ConfigError`` when prompt and ``tokens`` do not fit the context of ``longest``.
    """
    wrap = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    ids = encode_prompt(tokenizer, source.text, wrap)
    if longest and ids.shape[1] + tokens > longest:
        raise ConfigError(
            f'the prompt "{source.id}" has {ids.shape[1]} tokens and {tokens} are to be written, '
            f"but the model's context is {longest}: give a smaller --generation"
        )
    return Asking(source, ids, wrap)


def write(
    model: Any,
    tokenizer: Any,
    asking: Asking,
    tokens: int,
    run: Run | None,
    temperature: float | None = None,
    seed: int = 0,
) -> Written:
    """Up to ``tokens`` tokens; greedy unless ``temperature``.

    ``run``: an attached run, or None for the untouched model.  The token that ends a text is one
    of its tokens, with an empty piece.  Raises ``DartError`` when a logit is not finite.
    """
    ends = text_ends(model, tokenizer)
    checked = CheckedModel(model, ends, f"the text after {asking.source.id}")
    made = generate(
        checked, tokenizer, asking.ids, tokens, run=run, temperature=temperature, seed=seed
    )
    ended = bool(made.token_ids) and made.token_ids[-1] in ends
    pieces = [*made.tokens[:-1], ""] if ended else made.tokens
    return Written("".join(pieces), tuple(pieces), ended)
