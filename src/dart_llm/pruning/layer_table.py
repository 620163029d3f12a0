"""The layer specification language: how many neurons each layer keeps.

``all:auto`` · ``0-5:0.6,6-11:0.8`` · ``0,1,2:0.6`` · ``3:#512``.  A value is a keep ratio in
(0, 1], a count ``#n``, or ``auto`` (the allocator decides).  Later entries win; layers that are
not named stay dense.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dart_llm.errors import ConfigError
from dart_llm.files import write_text

AUTO = "auto"

_RANGE = re.compile(r"(\d+)(?:-(\d+))?$")

_FORMS = 'use forms such as "all:auto", "0-5:0.6,6-11:0.8", "0,1,2:0.6" or "3:#512"'


@dataclass(frozen=True)
class Entry:
    """One ``layers:value`` part; ``layers`` is None for ``all``, else inclusive ranges."""

    layers: tuple[tuple[int, int], ...] | None
    value: float | int | str
    text: str

    def covers(self, layer: int) -> bool:
        return self.layers is None or any(low <= layer <= high for low, high in self.layers)


@dataclass(frozen=True)
class LayerTable:
    """A parsed specification; ``str(table)`` parses back to an equal table."""

    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        return ",".join(entry.text for entry in self.entries)

    @property
    def has_auto(self) -> bool:
        return any(entry.value == AUTO for entry in self.entries)

    def resolve(self, widths: Sequence[int]) -> list[int | str | None]:
        """What each layer keeps: a count, ``"auto"``, or None (dense).

        Raises ``ConfigError`` for a layer outside the model and a count outside 1..width.
        """
        for entry in self.entries:
            for low, high in entry.layers or ():
                if high >= len(widths):
                    layer = high if low < len(widths) else low
                    raise ConfigError(
                        f"layer {layer} is out of range: this model has {len(widths)} layers "
                        f'(0-{len(widths) - 1}). In "{self}" correct "{entry.text}", or drop it.'
                    )
        return [self._value(layer, width) for layer, width in enumerate(widths)]

    def _value(self, layer: int, width: int) -> int | str | None:
        matching = [entry for entry in self.entries if entry.covers(layer)]
        if not matching:
            return None
        entry = matching[-1]
        if isinstance(entry.value, str):
            return entry.value
        if isinstance(entry.value, float):
            return max(1, round(entry.value * width))
        if entry.value > width:
            raise ConfigError(
                f'"{entry.text}" keeps {entry.value} neurons, but layer {layer} has {width}: '
                f"write a count from #1 to #{width}."
            )
        return entry.value


def parse_layer_spec(text: str) -> LayerTable:
    """Parse a specification; raise ``ConfigError`` that names the offending part."""
    entries: list[Entry] = []
    pending: list[str] = []
    for part in text.strip().replace("\n", ",").split(","):
        part = part.strip()
        if not part:
            raise ConfigError(f'empty part in the layer specification "{text}"; {_FORMS}.')
        left, colon, right = part.partition(":")
        pending.append(left.strip())
        if colon:
            entries.append(_entry(pending, right.strip(), text))
            pending = []
    if pending or not entries:
        part = ",".join(pending) or text
        raise ConfigError(f'"{part}" in the layer specification has no value; {_FORMS}.')
    return LayerTable(tuple(entries))


def _entry(parts: list[str], value: str, whole: str) -> Entry:
    text = f"{','.join(parts)}:{value}"
    if parts == ["all"]:
        return Entry(None, _parse_value(value, text, whole), text)
    ranges = []
    for part in parts:
        match = _RANGE.match(part)
        if not match:
            raise ConfigError(f'"{part}" in "{whole}" is not a layer or a range; {_FORMS}.')
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise ConfigError(f'the range "{part}" in "{whole}" runs backwards: {high}-{low}?')
        ranges.append((low, high))
    return Entry(tuple(ranges), _parse_value(value, text, whole), text)


def _parse_value(value: str, text: str, whole: str) -> float | int | str:
    if value == AUTO:
        return AUTO
    if re.fullmatch(r"#\d+", value):
        if int(value[1:]) == 0:
            raise ConfigError(f'"{text}" in "{whole}" keeps no neuron: write a count from #1 up.')
        return int(value[1:])
    try:
        ratio = float(value)
    except ValueError:
        raise ConfigError(
            f'"{value}" in "{whole}" is neither a keep ratio in (0, 1], a count such as #512, '
            'nor "auto".'
        ) from None
    if ratio > 1 and ratio.is_integer():
        raise ConfigError(
            f'"{text}" in "{whole}": a keep ratio lies in (0, 1]; write #{int(ratio)} to count.'
        )
    if not 0 < ratio <= 1:
        raise ConfigError(f'"{text}" in "{whole}": a keep ratio lies in (0, 1].')
    return ratio


def write_table(path: Path, counts: Sequence[int], note: str) -> None:
    """Write keep counts as a table file that ``read_table`` reads; ``note`` becomes a comment."""
    lines = [f"# {line}" for line in note.splitlines()]
    lines += [f"{layer}:#{count}" for layer, count in enumerate(counts)]
    write_text(path, "\n".join(lines) + "\n")


def read_table(path: Path) -> str:
    """The specification in a table file: comments dropped, lines joined."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the layer table {path}: {error.strerror or error}"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read the layer table {path}: it is not a text file") from None
    lines = (re.split(r"\s#(?!\d)", line)[0].strip() for line in text.splitlines())
    spec = ",".join(line.rstrip(",") for line in lines if line and not line.startswith("#"))
    parse_layer_spec(spec)
    return spec
