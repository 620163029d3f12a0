"""Templates of two-topic prompts: texts with named slots, checked before any is filled."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

from dart_llm.errors import ConfigError, UnknownName

SIDES = ("a", "b")
SIDE_SLOTS = ("topic", "field", "expert", "place", "is", "it", "them")
"""Slots that exist for both topics: ``{topic_a}``, ``{topic_b}``, ...; ``{Topic_a}`` starts a
sentence."""


@dataclass(frozen=True)
class Template:
    """A prompt with slots.  ``slots``: the names in it without capitals, sorted; ``choices``: those
    of them that are drawn and not given by the topics."""

    id: str
    text: str
    slots: tuple[str, ...]
    choices: tuple[str, ...]

    @classmethod
    def parse(cls, name: str, text: str, choices: Mapping[str, object], where: str) -> Template:
        """Check a template; ``where`` names its file in errors.

        Raises ``UnknownName`` for a slot that does not exist, and ``ConfigError`` for braces that
        do not match, a format after a slot, and a template that leaves out one of its two topics.
        """
        what = f'the template "{name}" in {where}'
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(
                f"{what} has braces that do not match ({error}): write slots as {{topic_a}}, and "
                "a brace as {{ or }}"
            ) from None
        found = set[str]()
        for _, slot, form, conversion in parts:
            if slot is None:
                continue
            if form or conversion:
                raise ConfigError(f'{what} has a format in the slot "{slot}": write its name alone')
            found.add(_known(slot, choices, what))
        for topic in (f"topic_{side}" for side in SIDES):
            if topic not in found:
                raise ConfigError(f"{what} lacks the slot {{{topic}}}: it needs both topics")
        drawn = tuple(sorted(found & set(choices)))
        return cls(name, text, tuple(sorted(found)), drawn)

    def fill(self, slots: Mapping[str, str]) -> str:
        """The text with ``slots`` in it; a slot that starts with a capital gets one."""
        capitals = {_capital(name): _capital(value) for name, value in slots.items()}
        return self.text.format_map({**capitals, **slots})


def slot_names() -> tuple[str, ...]:
    """All slots that the two topics give."""
    return tuple(f"{name}_{side}" for side in SIDES for name in SIDE_SLOTS)


def _known(slot: str, choices: Mapping[str, object], what: str) -> str:
    known = {*slot_names(), *choices}
    for name in (slot, slot[:1].lower() + slot[1:]):
        if name in known:
            return name
    raise UnknownName(f"slot in {what}:", slot, known)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
