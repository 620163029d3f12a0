"""The numbers of two results files of one table side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

NAMES = ("model", "dtype", "cell", "task", "method", "label", "variant", "rule", "signal", "window",
         "row", "case", "cost", "sparsity", "asked", "path", "keep", "hidden")  # fmt: skip
"""Keys that say which row a number stands in."""
MIDDLES = ("mean", "estimate")
"""Keys of a value whose ends are ``low`` and ``high`` beside it."""
ENDED = {
    "value": "interval",
    "ratio_to_dense": "interval",
    "gap_closed": "interval",
    "rate": "rate_interval",
    "auc": "auc_interval",
}
"""Keys of a value -> the key of its interval, a pair or ``low`` and ``high``; the first counts."""
PLAIN = ("perplexity", "loss_after_change", "never_at_equal_sparsity", "acc", "acc_norm",
         "achieved", "achieved_sparsity", "bytes_while_observing", "bytes_while_pruned", "tg_ms",
         "ms_per_token", "ms", "share_per_256_tokens_with_one_remask_of_32", "flops_dense_token",
         "flops_observe_token", "flops_observe_share_of_token", "flops_build_masks",
         "flops_drift_window")  # fmt: skip
"""Keys of numbers that have no interval."""
SHARES = ("dense_share", "dense_token_share")
"""Keys of shares, which are often near 0: off by ``TOLERANCE`` of the whole, not of themselves."""
COUNTS = ("remasks",)
"""What is counted: off by ``FEW`` or by ``MANY`` of itself, whichever is more."""
NO_ROWS = ("items_differing_from_plain",)
"""Keys under which no row stands."""
PARTS = ("rows", "cells", "pooled", "signals", "runs")
TOLERANCE = 0.02
"""How far a number without an interval may be off, relative to itself: rounding on other machines
moves a perplexity less."""
FEW, MANY = 2, 0.1


@dataclass(frozen=True)
class Number:
    """A number and the interval in which it should come again."""

    value: float
    low: float
    high: float

    def holds(self, other: float) -> bool:
        """Whether ``other`` lies in the interval, ends included."""
        return self.low <= other <= self.high


@dataclass(frozen=True)
class Pair:
    """One number, as published and made again; ``again`` None: the new file lacks it.

    They agree when the published interval holds both: a value that left its own interval is no
    result of that run.
    """

    name: str
    published: Number
    again: float | None

    @property
    def agrees(self) -> bool:
        own = self.published
        return self.again is not None and own.holds(self.again) and own.holds(own.value)


def compare(published: Mapping[str, Any], again: Mapping[str, Any]) -> list[Pair]:
    """Every number of the published file beside that of the new one, by today's names."""
    new = numbers(again)
    return [
        Pair(name, number, new[name].value if name in new else None)
        for name, number in numbers(published).items()
    ]


def numbers(data: Mapping[str, Any]) -> dict[str, Number]:
    """The numbers of a results file by row and column."""
    parts = {part: data[part] for part in PARTS if isinstance(data.get(part), list | dict)}
    found = dict(_walk(parts or [_flat(data)], (), data.get("renamed", {})))
    return dict(sorted(found.items()))


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """A file that is one row."""
    return {key: data[key] for key in (*NAMES, *PLAIN, *SHARES, *COUNTS) if key in data}


def _walk(
    value: Any, place: tuple[str, ...], names: Mapping[str, str]
) -> Iterator[tuple[str, Number]]:
    if isinstance(value, list):
        for item in value:
            yield from _walk(item, _row(item, place, names), names)
    if not isinstance(value, dict):
        return
    for column, number in _own(value):
        yield " ".join((*place, column)).strip(), number
    for key, item in value.items():
        if isinstance(item, list | dict) and key not in (*NAMES, *ENDED.values(), *NO_ROWS):
            yield from _walk(item, place if key in PARTS else (*place, _today(key, names)), names)


def _row(item: Any, place: tuple[str, ...], names: Mapping[str, str]) -> tuple[str, ...]:
    """The place of a row of a list: what it says of itself behind where the list stands."""
    if not isinstance(item, dict):
        return place
    words = (_today(str(item[key]), names) for key in NAMES if _is_name(item, key))
    return (*place, *(word for word in words if word not in place))


def _today(key: str, names: Mapping[str, str]) -> str:
    """A label with the names that methods have today."""
    for old, new in names.items():
        key = re.sub(rf"(?<![\w-]){re.escape(old)}(?![\w-])", new, key)
    return key


def _is_name(value: Mapping[str, Any], key: str) -> bool:
    return isinstance(value.get(key), str | int | float)


def _own(value: Mapping[str, Any]) -> Iterator[tuple[str, Number]]:
    """The numbers that stand in this dictionary itself."""
    for key in MIDDLES:
        if _number(value.get(key)) and _number(value.get("low")) and _number(value.get("high")):
            yield "", Number(value[key], value["low"], value["high"])
    for key, interval in ENDED.items():
        ends = value.get(interval)
        if _number(value.get(key)) and ends:
            low, high = (ends["low"], ends["high"]) if isinstance(ends, dict) else ends
            yield key, Number(value[key], low, high)
            break  # a row has one interval of a name, that of the first
    for key in (*PLAIN, *SHARES, *COUNTS):
        if _number(value.get(key)):
            own, off = value[key], _off(key, abs(value[key]))
            yield key, Number(own, own - off, own + off)


def _off(key: str, size: float) -> float:
    """How far a number without an interval may be off."""
    if key in COUNTS:
        return max(FEW, MANY * size)
    return TOLERANCE if key in SHARES else TOLERANCE * size


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
