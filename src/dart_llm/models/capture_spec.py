"""Which activations ``--save-activations`` keeps: layers, tokens and tensors.  Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dart_llm.errors import ConfigError

TENSORS = ("u", "x", "z", "r")
"""The tensors that can be kept; ``capture.LayerActivations`` says what they are."""

_RANGE = re.compile(r"(\d+)(?:-(\d+))?$")

PANEL = "Activations"


@dataclass(frozen=True)
class Wanted:
    """What is kept: layers, tokens ``start`` to ``end`` (not included; None: to the end), tensors.

    Tokens are counted from the beginning of the sequence, the prompt included.
    """

    layers: tuple[int, ...]
    start: int = 0
    end: int | None = None
    tensors: tuple[str, ...] = ("u",)

    def tokens(self, total: int) -> int:
        """How many tokens of a sequence of ``total`` are kept."""
        return max(0, (total if self.end is None else min(self.end, total)) - self.start)

    @property
    def range(self) -> str:
        """As ``parse_tokens`` reads it."""
        return f"{self.start}:{'' if self.end is None else self.end}"


def parse_layers(text: str, count: int | None = None) -> tuple[int, ...] | None:
    """``all`` (None while ``count``, the model's layers, is not known), ``0-5``, ``0,3,7-9``.

    Raises ``ConfigError`` for what cannot be read, and for a layer out of range.
    """
    if text.strip() == "all":
        return None if count is None else tuple(range(count))
    layers: set[int] = set()
    for part in text.split(","):
        match = _RANGE.match(part.strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise ConfigError(f'"{part}" is not a layer or a range: write all, 0-5 or 0,3,7-9')
        if count is not None and high >= count:
            raise ConfigError(f"layer {high} is out of range: this model has {count} layers")
        layers.update(range(low, high + 1))
    return tuple(sorted(layers))


def parse_tokens(text: str) -> tuple[int, int | None]:
    """``0:256``, ``:256``, ``128:``; raises ``ConfigError`` for anything else and for nothing."""
    match = re.fullmatch(r"\s*(\d*):(\d*)\s*", text)
    start, end = (int(match[1] or 0), int(match[2]) if match[2] else None) if match else (0, 0)
    if end is not None and end <= start:
        raise ConfigError(f'"{text}" is not a range of tokens: write 0:256, or 128: to the end')
    return start, end


def parse_tensors(text: str) -> tuple[str, ...]:
    """``u``, ``u,x``; raises ``ConfigError`` for a name that does not exist."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in TENSORS:
            raise ConfigError(f'"{name}" is not an activation: choose among {", ".join(TENSORS)}')
    return names
