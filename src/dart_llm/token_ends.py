"""Where the tokens of a text end in it, so that a place in the text becomes a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids, and for each the number of characters up to its end, which never falls."""
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, ends = list(found["input_ids"]), [end for _, end in found["offset_mapping"]]
    else:  # no offsets: the lengths of the decoded beginnings
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        decode = tokenizer.decode
        ends = [
            min(len(text), len(decode(ids[: k + 1], skip_special_tokens=True)))
            for k in range(len(ids))
        ]
    for place in range(1, len(ends)):
        ends[place] = max(ends[place], ends[place - 1])  # a special token is at no character
    return ids, ends


def first_tokens(ends: Sequence[int], offsets: Sequence[int]) -> tuple[int, ...]:
    """For each offset in characters the first token that holds something from there on."""
    return tuple(next(k for k, end in enumerate(ends) if end > offset) for offset in offsets)
