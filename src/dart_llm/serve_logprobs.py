"""Log-probabilities of tokens, in the two shapes that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scored:
    """One token with its log-probability and the best of the model's own choice.

    ``piece``: the token's text alone.  ``logprob``: None for a prompt's first token, which nothing
    predicts.  ``top``: (text, log-probability), the best first.
    """

    piece: str
    logprob: float | None
    top: tuple[tuple[str, float], ...]


def chat_logprobs(tokens: Sequence[Scored]) -> dict[str, Any]:
    """``logprobs`` of a choice of a chat completion."""
    return {
        "content": [
            {
                **_entry(token.piece, token.logprob),
                "top_logprobs": [_entry(text, value) for text, value in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _entry(text: str, logprob: float | None) -> dict[str, Any]:
    whole = "\ufffd" not in text  # half of a character has no text, and its bytes are not known
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def text_logprobs(tokens: Sequence[Scored], offset: int) -> dict[str, Any]:
    """``logprobs`` of a choice of a completion; ``offset``: characters before the first token."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.piece)
    # of two tokens with one text, such as halves of characters, the likelier one stays
    tops = [None if one.logprob is None else dict(reversed(one.top)) for one in tokens]
    return {
        "tokens": [token.piece for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
