"""Sources: prompts to write after, and passages to read, with their changes of topic in tokens.

Of a passage the first P tokens are the prompt, prefilled dense and observed; the others run as
decode tokens.  Token k after the prompt is fed in decode step k, so the loss of token k + 1 is the
first that step k decides: token 0, which the dense prompt predicts, has none, and the last token is
never fed.
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
    """A prompt, or a passage with ``changes``: characters at which its later topics begin."""

    id: str
    text: str
    topics: tuple[Topic, ...] = ()
    changes: tuple[int, ...] = ()


def load_passages(settings: PassageOptions) -> tuple[Source, ...]:
    """The passages to read; raises ``ConfigError`` for a file that does not fit."""
    chosen = passages.listed_passages(settings.passages)[: settings.limit]
    return tuple(Source(p.id, p.text, p.topics, p.changes) for p in chosen)


def load_sources(settings: DriftSettings) -> tuple[Source, ...]:
    """The study's prompts or passages; raises ``ConfigError`` for a file that does not fit."""
    if settings.kind == FORCED:
        return load_passages(settings)
    if settings.prompt is not None:
        return (Source("prompt", resolve_prompt(settings.prompt)),)
    prompts = passages.listed_prompts(settings.prompts)[: settings.limit]
    return tuple(Source(prompt.id, prompt.text) for prompt in prompts)


def digest(sources: Sequence[Source]) -> str:
    """sha256 of everything that the sources contain."""
    data = json.dumps([asdict(source) for source in sources], sort_keys=True)
    return hashlib.sha256(data.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Reading:
    """A source as tokens ``ids`` [n], of which the first ``prompt`` are the prompt.

    ``starts``: index, counted after the prompt, of the first token of every topic, 0 for the first
    one; empty for a prompt, where they are not known.  ``pieces``: the text of every token after
    the prompt.  ``cut``: whether the context ended before the passage did.
    """

    source: Source
    ids: Tensor
    prompt: int
    starts: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    cut: bool = False

    @property
    def decoded(self) -> int:
        """Tokens after the prompt."""
        return len(self.ids) - self.prompt

    @property
    def changes(self) -> tuple[int, ...]:
        """Index in ``ids`` of the first token of each new topic."""
        return tuple(self.prompt + start for start in self.starts[1:])


def read_passage(source: Source, tokenizer: Any, prompt: int, longest: int | None) -> Reading:
    """Tokenise a passage; ``longest``: tokens of the model's context.

    A token that also holds the break before a topic belongs to that topic.  Raises ``ConfigError``
    when the first topic is too short for a prompt of ``prompt`` tokens, or the context for the
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
            f'the passage "{source.id}" changes its topic after the {longest} tokens of the '
            "model's context: give a model with a longer one, or shorter passages"
        )
    firsts = first_tokens(ends, source.changes)
    if firsts[0] < prompt + 2:
        raise ConfigError(
            f'the passage "{source.id}" has {firsts[0]} tokens before its first change of topic, '
            f"too few for a prompt of {prompt} and a token after it: give a smaller "
            "--prompt-tokens, or a longer passage"
        )
    bounds = [ends[prompt - 1], *ends[prompt:count]]
    pieces = tuple(source.text[a:b] for a, b in zip(bounds, bounds[1:], strict=False))
    starts = (0, *(first - prompt for first in firsts))
    return Reading(source, torch.tensor(ids[:count]), prompt, starts, pieces, cut)


def cut_notes(readings: Sequence[Reading]) -> list[str]:
    """A note where passages did not fit the context."""
    cut = sum(reading.cut for reading in readings)
    return [f"{cut} passages were cut where the model's context ends"] if cut else []


def read_prompt(
    source: Source, tokenizer: Any, chat: bool | None, tokens: int, longest: int | None
) -> Reading:
    """Tokenise a prompt; ``chat`` None: with the chat template where there is one.

    Raises ``ConfigError`` when prompt and ``tokens`` do not fit the context of ``longest``.
    """
    wrap = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    ids = encode_prompt(tokenizer, source.text, wrap)[0]
    if longest and len(ids) + tokens > longest:
        raise ConfigError(
            f'the prompt "{source.id}" has {len(ids)} tokens and {tokens} are to be written, '
            f"but the model's context is {longest}: give a smaller --generation"
        )
    return Reading(source, ids, len(ids))
