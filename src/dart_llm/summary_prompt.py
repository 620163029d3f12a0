"""The prompt that asks for a summary, made to fit the model's context.

Only the document is ever shortened, from its end: the instruction before it, the cue after it and
the chat template around all of it stay whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dart_llm.errors import ConfigError

INSTRUCTION = "Summarize the following text in one or two sentences."
CUE = "Summary:"

_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s)|[^\s](?=\n)")
_WORD_END = re.compile(r"\S(?=\s)")
_NEAR = 0.8
"""A boundary in the last fifth of what fits is worth the text that it costs."""


@dataclass(frozen=True)
class Prompt:
    """``ids``: the token ids; ``document``: as it stands in the prompt; ``chat``: as a message."""

    ids: list[int]
    document: str
    shortened: bool
    chat: bool


def build(
    tokenizer: Any,
    document: str,
    context_length: int | None,
    max_output: int,
    chat: bool | None = None,
) -> list[int]:
    """The token ids of ``fit``."""
    return fit(tokenizer, document, context_length, max_output, chat).ids


def fit(
    tokenizer: Any,
    document: str,
    context_length: int | None,
    max_output: int,
    chat: bool | None = None,
) -> Prompt:
    """A prompt that leaves room for ``max_output`` tokens in a context of ``context_length``.

    ``context_length`` None: no bound is known and nothing is shortened.  ``chat``: through the
    chat template, or not; None: where the tokenizer has one.  The document ends with a sentence
    where one ends near the limit, else with a word.

    Raises ``ConfigError`` when no word of the document fits beside the instruction, and when
    ``chat`` is asked for without a template.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ConfigError(
            "this model's tokenizer has no chat template: give --no-apply-chat-template"
        )
    chat = has_template if chat is None else chat
    document = document.strip()

    def encode(text: str) -> list[int]:
        return _encode(tokenizer, text, chat)

    ids = encode(document)
    if context_length is None or len(ids) + max_output <= context_length:
        return Prompt(ids, document, False, chat)
    room = context_length - max_output
    kept = _shortened(document, lambda text: len(encode(text)) <= room)
    if not kept:
        raise ConfigError(
            f"the instruction alone has {len(encode(''))} tokens and {max_output} are to be "
            f"generated, so a context of {context_length} leaves no room for the document: give a "
            "smaller --max-output or a model with a longer context"
        )
    return Prompt(encode(kept), kept, True, chat)


def _encode(tokenizer: Any, document: str, chat: bool) -> list[int]:
    text = f"{INSTRUCTION}\n\n{document}\n\n{CUE}"
    if chat:
        message = {"role": "user", "content": text}
        text = tokenizer.apply_chat_template(
            [message],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # read by templates of models that would reason aloud first
        )
    ids = tokenizer(text, add_special_tokens=not chat, verbose=False).input_ids
    return [int(token) for token in ids]


def _shortened(document: str, fits: Callable[[str], bool]) -> str:
    """The longest start of ``document`` that fits, back to a boundary; "" when nothing does."""
    low, high = 0, len(document)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(document[:middle]) else (low, middle)
    kept = document[: _boundary(document, low)]
    while kept and not fits(kept):  # fewer characters can be more tokens
        kept = kept[:-1].rstrip()
    return kept


def _boundary(text: str, length: int) -> int:
    """The end of the last sentence within ``length`` characters, or word; where none, ``length``"""
    for pattern in (_SENTENCE_END, _WORD_END):
        ends = [match.end() for match in pattern.finditer(text, 0, length + 1)]
        if ends and ends[-1] >= _NEAR * length:
            return ends[-1]
    return length
