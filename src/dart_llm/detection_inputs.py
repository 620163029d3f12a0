"""Passages as tokens, with the places at which their topics change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dart_llm import drift_passages
from dart_llm.drift_passages import Passage
from dart_llm.errors import ConfigError
from dart_llm.token_ends import encode, first_tokens


@dataclass(frozen=True)
class Text:
    """A passage's tokens ``ids`` [N]; ``changes``: index of the first token of each new topic."""

    id: str
    ids: Tensor
    changes: tuple[int, ...]
    topics: tuple[str, ...]


def passages(file: str | None, limit: int | None) -> list[Passage]:
    """The package's passages, or those of a JSONL file; the first ``limit`` of them."""
    return drift_passages.passages(file)[:limit]


def digest(found: Sequence[Passage]) -> str:
    """sha256 of what the passages say."""
    lines = "".join(json.dumps(one.to_dict(), sort_keys=True) + "\n" for one in found)
    return hashlib.sha256(lines.encode()).hexdigest()


def tokens(passage: Passage, tokenizer: Any) -> Text:
    """The tokens of a passage; special tokens as the tokenizer adds them.

    A change is the first token that holds a character of the new topic.
    """
    ids, ends = encode(tokenizer, passage.text)
    changes = first_tokens(ends, passage.changes)
    return Text(passage.id, torch.tensor(ids), changes, tuple(t.name for t in passage.topics))


def check(texts: Sequence[Text], prompt: int, longest: int | None) -> None:
    """Raise ``ConfigError`` for a text whose first change is in the prompt, or that is too long.

    ``longest``: tokens of the model's context, or None.
    """
    for text in texts:
        if text.changes[0] <= prompt:
            raise ConfigError(
                f'the first change of passage "{text.id}" is its token {text.changes[0]}, within '
                f"the prompt of {prompt}: give a smaller --prompt-tokens or other passages"
            )
        if longest is not None and len(text.ids) > longest:
            raise ConfigError(
                f'passage "{text.id}" has {len(text.ids)} tokens, and the model\'s context holds '
                f"{longest}: give shorter passages or another model"
            )
