"""Messages of a conversation as the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dart_llm.errors import ConfigError


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt of ``messages`` (``role``, ``content``), up to where the answer begins.

    Raises ``ConfigError`` without a chat template, and for messages that it refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "this model's tokenizer has no chat template: use a model that was tuned for chats"
        )
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            [dict(one) for one in messages], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ConfigError(f"the model's chat template refuses these messages: {error}") from None
    return text


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """``chat_text`` as token ids; the template writes special tokens itself."""
    found = tokenizer(chat_text(tokenizer, messages), add_special_tokens=False, verbose=False)
    return tuple(found["input_ids"])
