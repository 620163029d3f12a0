"""JSON from strangers: bounded in depth, without NaN, doubled keys or halves of characters."""

from __future__ import annotations

import json
import math
from typing import Any

from dart_llm.serve_errors import Refusal

DEEPEST = 32
"""Objects and lists inside one another."""
LONGEST_NUMBER = 64
"""Characters of a number."""


def parse(body: bytes) -> dict[str, Any]:
    """The object in ``body``; raises ``Refusal`` (400) with what is wrong with it."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(f"the body is not UTF-8 (byte {error.start})") from None
    try:
        data = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_int,
        )
    except json.JSONDecodeError as error:
        raise _bad(
            f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None
    except RecursionError:
        raise _bad(_deep()) from None
    if not isinstance(data, dict):
        raise _bad('the body must be a JSON object, as in {"messages": [...]}')
    _check(data)
    return data


def _bad(message: str) -> Refusal:
    return Refusal(400, message, code="invalid_json")


def _deep() -> str:
    return f"the body nests more than {DEEPEST} objects and lists: make it flatter"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _bad(f"the key {_shown(twice)} stands twice in one object: leave one out")
    return found


def _constant(name: str) -> float:
    raise _bad(f"the body holds {name}, which is not JSON: give a finite number")


def _float(text: str) -> float:
    value = float(text) if len(text) <= LONGEST_NUMBER else math.inf
    if math.isinf(value):
        raise _bad(f"the number {text[:LONGEST_NUMBER]} is too large or too long")
    return value


def _int(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise _bad(f"the number {text[:LONGEST_NUMBER]}... is too long")
    return int(text)


def _check(data: dict[str, Any]) -> None:
    """Depth, and that every text can be written as UTF-8; without recursion."""
    level: list[Any] = [data]
    for _ in range(DEEPEST):
        inside: list[Any] = []
        for value in level:
            if isinstance(value, str):
                _check_text(value)
            elif isinstance(value, dict):
                inside += [*value, *value.values()]
            elif isinstance(value, list):
                inside += value
        level = inside
        if not level:
            return
    raise _bad(_deep())


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _bad(
            f"the text {_shown(text)} holds half of a character (a lone surrogate)"
        ) from None


def _shown(text: str) -> str:
    return json.dumps(text if len(text) <= 40 else text[:40] + "...")
