"""Where the prompt of a job comes from, and how it becomes tokens."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from dart_llm.arch import context_length
from dart_llm.errors import ConfigError
from dart_llm.generate import encode_prompt
from dart_llm.prompts import mmlu_prompt, read_prompt_file, resolve_prompt
from dart_llm.settings import RunSettings

MMLU_DEFAULT_TOKENS = 1024


def source(settings: RunSettings) -> str:
    """The prompt as given; "" when none is needed, or when it is built after loading (mmlu).

    Raises ``ConfigError`` when a prompt is needed and none, or an empty one, is given.
    """
    if not settings.tokens or settings.prompt_type == "mmlu":
        return ""
    text = _read(settings)
    if text is None:
        raise ConfigError(
            "no prompt: give --prompt TEXT, --prompt-file FILE (- is stdin), or --generation 0 to "
            "evaluate only"
        )
    if not text.strip():
        raise ConfigError("the prompt is empty: give at least one word")
    return text


def _read(settings: RunSettings) -> str | None:
    if settings.prompt_file == "-":  # what the command takes, too, where no prompt is given
        return read_prompt_file("-") or None
    if settings.prompt_file:
        return read_prompt_file(settings.prompt_file)
    given = settings.prompt if settings.prompt is not None else settings.custom_prompt_text
    if given is not None:
        return resolve_prompt(given)
    piped = sys.stdin is not None and not sys.stdin.isatty()
    return (read_prompt_file("-") or None) if piped else None


def encode(settings: RunSettings, prompt: str, model: Any, tokenizer: Any) -> tuple[str, Tensor]:
    """The final text and its ids [1, T]; ``ConfigError`` when it does not fit the context."""
    limit = context_length(model)
    if settings.prompt_type == "mmlu":
        subjects = [part.strip() for part in str(settings.prompt_subject).split(",")]
        length = settings.prompt_length or min(limit or MMLU_DEFAULT_TOKENS, MMLU_DEFAULT_TOKENS)
        prompt = mmlu_prompt(subjects, tokenizer, length)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    ids = encode_prompt(tokenizer, prompt, has_template if settings.chat is None else settings.chat)
    if settings.prompt_length and ids.shape[1] > settings.prompt_length:
        ids = ids[:, -settings.prompt_length :]
    if limit and settings.tokens >= limit:
        raise ConfigError(
            f"{settings.tokens} tokens are to be generated, but the model's context is {limit}: "
            "generate less"
        )
    if limit and ids.shape[1] + settings.tokens > limit:
        raise ConfigError(
            f"the prompt has {ids.shape[1]} tokens and {settings.tokens} are to be generated, but "
            f"the model's context is {limit}: shorten it with --prompt-length "
            f"{max(1, limit - settings.tokens)}, or generate less"
        )
    return prompt, ids
