"""Which activations ``--save-activations`` keeps: layers, tokens and tensors.  Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import model_validator

from dart_llm.errors import ConfigError
from dart_llm.settings_base import BaseSettings, setting

TENSORS = ("u", "x", "z", "r")
"""The tensors that can be kept; ``activations.Seen`` says what they are."""

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
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.match(part.strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise ConfigError(f'"{part}" is not a layer or a range: write all, 0-5 or 0,3,7-9')
        if count is not None and high >= count:
            raise ConfigError(f"layer {high} is out of range: this model has {count} layers")
        found.update(range(low, high + 1))
    return tuple(sorted(found))


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
            raise ConfigError(f'"{name}" is no activation: choose among {", ".join(TENSORS)}')
    return names


class ActivationSettings(BaseSettings):
    """The settings of commands that can keep activations."""

    save_activations: bool = setting(
        PANEL, "Save activations as safetensors (says the size first).", False
    )
    activation_layers: str = setting(PANEL, "Their layers: all, 0-5 or 0,3,7-9.", "all")
    activation_tokens: str = setting(PANEL, "Their tokens: 0:256, or 128: to the end.", "0:256")
    activation_tensors: str = setting(
        PANEL, "Which: u (neurons), x (stream before), z, r (FFN output); as in u,x.", "u"
    )

    @model_validator(mode="after")
    def _check_activations(self) -> ActivationSettings:
        parse_layers(self.activation_layers)
        parse_tokens(self.activation_tokens)
        parse_tensors(self.activation_tensors)
        return self

    def wanted(self, layers: int) -> Wanted:
        """What is kept of a model with this many layers."""
        start, end = parse_tokens(self.activation_tokens)
        chosen = parse_layers(self.activation_layers, layers) or ()
        return Wanted(chosen, start, end, parse_tensors(self.activation_tensors))
