"""Sources of a drift study: prompts to continue, and passages to read, as tokens.

The first P tokens of a passage are the prompt, prefilled dense and observed; the others run as
decode tokens and are numbered from 0.  Decode step k feeds token k and so predicts token k + 1.
Token 0 is predicted by the dense prompt and has no loss.  The last token is never fed to the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dart_llm.data import passages
from dart_llm.data.passages import Topic, encode, first_tokens
from dart_llm.data.texts import encode_prompt, resolve_prompt
from dart_llm.errors import ConfigError
from dart_llm.studies.drift.settings import FORCED, DriftSettings, PassageOptions


@dataclass(frozen=True)
class Source:
    """A prompt or a passage; ``changes``: character offsets where later topics begin."""

    id: str
    text: str
    topics: tuple[Topic, ...] = ()
    changes: tuple[int, ...] = ()


def load_passages(settings: PassageOptions) -> tuple[Source, ...]:
    """The passages to read; raises ``ConfigError`` for an invalid file."""
    chosen = passages.listed_passages(settings.passages)[: settings.limit]
    return tuple(Source(p.id, p.text, p.topics, p.changes) for p in chosen)


def load_sources(settings: DriftSettings) -> tuple[Source, ...]:
    """The study's prompts or passages; raises ``ConfigError`` for an invalid file."""
    if settings.kind == FORCED:
        return load_passages(settings)
    if settings.prompt is not None:
        return (Source("prompt", resolve_prompt(settings.prompt)),)
    prompts = passages.listed_prompts(settings.prompts)[: settings.limit]
    return tuple(Source(prompt.id, prompt.text) for prompt in prompts)


def digest(sources: Sequence[Source]) -> str:
    """SHA-256 of the sources' contents."""
    data = json.dumps([asdict(source) for source in sources], sort_keys=True)
    return hashlib.sha256(data.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Reading:
    """A source as tokens ``ids`` [n], of which the first ``prompt`` are the prompt.

    ``starts``: for every topic, the index of its first token, counted after the prompt; 0 for the
    first topic.  Empty for a prompt, whose topics have no known start.  ``pieces``: the text of
    every token after the prompt.  ``cut``: True if the passage was cut to the model's context.
    """

    source: Source
    ids: Tensor
    prompt: int
    starts: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    cut: bool = False

    @property
    def decoded(self) -> int:
        """The number of tokens after the prompt."""
        return len(self.ids) - self.prompt

    @property
    def changes(self) -> tuple[int, ...]:
        """The index in ``ids`` of the first token of each new topic."""
        return tuple(self.prompt + start for start in self.starts[1:])


def read_passage(source: Source, tokenizer: Any, prompt: int, longest: int | None) -> Reading:
    """Tokenise a passage; ``longest``: the model's context length, None if unknown.

    A token that spans the break before a topic belongs to that topic.  Raises ``ConfigError`` if
    the first topic is too short for a prompt of ``prompt`` tokens, or the context ends before the
    first change.
    """
    ids, ends = encode(tokenizer, source.text)
    count = min(len(ids), longest or len(ids))
    cut = count < len(ids)
    if cut:
        changes = tuple(change for change in source.changes if change < ends[count - 1])
        topics = source.topics[: len(changes) + 1]
        source = replace(
            source, text=source.text[: ends[count - 1]], topics=topics, changes=changes
        )
    if not source.changes:
        raise ConfigError(
            f'the topic of the passage "{source.id}" first changes after the {longest} tokens of '
            "the model's context: give a model with a longer context, or shorter passages"
        )
    firsts = first_tokens(ends, source.changes)
    if firsts[0] < prompt + 2:
        raise ConfigError(
            f'the passage "{source.id}" has {firsts[0]} tokens before its first topic change, '
            f"too few for a prompt of {prompt} and two tokens after it: give a smaller "
            "--prompt-tokens, or a longer passage"
        )
    bounds = [ends[prompt - 1], *ends[prompt:count]]
    pieces = tuple(source.text[a:b] for a, b in zip(bounds, bounds[1:], strict=False))
    starts = (0, *(first - prompt for first in firsts))
    return Reading(source, torch.tensor(ids[:count]), prompt, starts, pieces, cut)


def cut_notes(readings: Sequence[Reading]) -> list[str]:
    """One note if passages did not fit the model's context, else an empty list."""
    cut = sum(reading.cut for reading in readings)
    return [f"number of passages that were cut to the model's context: {cut}"] if cut else []


def read_prompt(
    source: Source, tokenizer: Any, chat: bool | None, tokens: int, longest: int | None
) -> Reading:
    """Tokenise a prompt; ``chat``: whether to use the chat template; None uses it if it exists.

    Raises ``ConfigError`` if the prompt and ``tokens`` more tokens exceed the context ``longest``.
    """
    wrap = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    ids = encode_prompt(tokenizer, source.text, wrap)[0]
    if longest and len(ids) + tokens > longest:
        raise ConfigError(
            f'the prompt "{source.id}" has {len(ids)} tokens and {tokens} are to be generated, '
            f"but the model's context is {longest}: give a smaller --generation"
        )
    return Reading(source, ids, len(ids))
