"""Layer tables: a small language that says how many neurons each layer keeps.

Examples are ``all:auto``, ``0-5:0.6,6-11:0.8``, ``0,1,2:0.6`` and ``3:#512``.  A value is a keep
ratio in (0, 1], a count ``#n``, or ``auto`` (the budget decides).  If several entries name a layer,
the last one counts.  Layers that are not named stay dense.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dart_llm.errors import ConfigError
from dart_llm.files import write_text

AUTO = "auto"

_ENTRY = re.compile(r"(all|\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*):(auto|#\d+|[\d.]+(?:e-?\d+)?)", re.ASCII)

_FORMS = 'use forms such as "all:auto", "0-5:0.6,6-11:0.8", "0,1,2:0.6" or "3:#512"'


@dataclass(frozen=True)
class Entry:
    """One ``layers:value`` entry; ``layers`` is None for ``all``, otherwise inclusive ranges."""

    layers: tuple[tuple[int, int], ...] | None
    value: float | int | str
    text: str

    def covers(self, layer: int) -> bool:
        return self.layers is None or any(low <= layer <= high for low, high in self.layers)


@dataclass(frozen=True)
class LayerTable:
    """A parsed layer table; parsing ``str(table)`` gives an equal table."""

    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        return ",".join(entry.text for entry in self.entries)

    @property
    def has_auto(self) -> bool:
        return any(entry.value == AUTO for entry in self.entries)

    def resolve(self, widths: Sequence[int]) -> list[int | str | None]:
        """For each layer, what it keeps: a count, ``"auto"``, or None (dense).

        ``widths``: number of neurons in each layer.  Raises ``ConfigError`` for a layer that the
        model does not have, and for a count that is larger than the layer.
        """
        for entry in self.entries:
            outside = [n for bounds in entry.layers or () for n in bounds if n >= len(widths)]
            if outside:
                raise ConfigError(
                    f"layer {outside[0]} is out of range: this model has {len(widths)} layers "
                    f'(0-{len(widths) - 1}); correct "{entry.text}"'
                )
        return [self._value(layer, width) for layer, width in enumerate(widths)]

    def _value(self, layer: int, width: int) -> int | str | None:
        entry = next((entry for entry in reversed(self.entries) if entry.covers(layer)), None)
        if entry is None or isinstance(entry.value, str):
            return None if entry is None else AUTO
        if isinstance(entry.value, float):
            return max(1, round(entry.value * width))
        if entry.value > width:
            raise ConfigError(
                f'"{entry.text}" keeps {entry.value} neurons, but layer {layer} has {width}: '
                f"write a count from #1 to #{width}"
            )
        return entry.value


def parse_layer_spec(text: str) -> LayerTable:
    """Parse a layer table; raises ``ConfigError`` if the table is not valid."""
    spec = re.sub(r"\s*\n\s*", ",", text.strip())
    spec = re.sub(r"\s*([,:])\s*", r"\1", spec)
    entries, end = list[Entry](), 0
    while match := _ENTRY.match(spec, end):
        entries.append(_entry(*match.groups()))
        end = match.end() + 1
        if spec[match.end() : end] != ",":
            break
    if not entries or end != len(spec) + 1:
        raise ConfigError(f'"{spec[end:]}" in the layer specification "{text}": {_FORMS}')
    return LayerTable(tuple(entries))


def _entry(layers: str, value: str) -> Entry:
    text = f"{layers}:{value}"
    ranges = None
    if layers != "all":
        bounds = [part.partition("-") for part in layers.split(",")]
        ranges = tuple((int(low), int(high or low)) for low, _, high in bounds)
        if any(low > high for low, high in ranges):
            raise ConfigError(f'a range of "{text}" runs backwards: write the lower layer first')
    if value == AUTO:
        return Entry(ranges, AUTO, text)
    try:
        kept = int(value[1:]) if value.startswith("#") else float(value)
    except ValueError:
        kept = 0
    if not (0 < kept <= 1 or (isinstance(kept, int) and kept)):
        raise ConfigError(
            f'"{text}": write a keep ratio in (0, 1], or a count of neurons as #1, #2, ...'
        )
    return Entry(ranges, kept, text)


def write_table(path: Path, counts: Sequence[int], note: str) -> None:
    """Write keep ``counts`` to a file that ``read_table`` can read, with ``note`` as a comment."""
    lines = [f"# {line}" for line in note.splitlines()]
    lines += [f"{layer}:#{count}" for layer, count in enumerate(counts)]
    write_text(path, "\n".join(lines) + "\n")


def read_table(path: Path) -> str:
    """The layer table in a file, as one line without comments; raises ``ConfigError``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the layer table {path}: {error}") from None
    lines = (re.split(r"\s#(?!\d)", line)[0].strip() for line in text.splitlines())
    spec = ",".join(line.rstrip(",") for line in lines if line and not line.startswith("#"))
    parse_layer_spec(spec)
    return spec
