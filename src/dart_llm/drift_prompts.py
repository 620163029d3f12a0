"""Two-topic prompts: each asks a model to write about one topic and then about another one of
another domain.

``generate`` makes them from an ontology; ``shipped`` are ``generate(SHIPPED, 0)`` of the package's
own, kept as package data.  As JSONL, a line holds ``id``, ``text``, ``template``, ``slots``,
``domains`` and ``seed``; only ``text`` is required in a file of one's own.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from dart_llm.drift_ontology import Domain, Item, Ontology, load_ontology
from dart_llm.drift_templates import Template
from dart_llm.errors import ConfigError
from dart_llm.jsonl import read_rows

SHIPPED = 480
"""Prompts in the package: every template 20 times and every ordered pair of domains twice."""
T = TypeVar("T")


@dataclass(frozen=True)
class DriftPrompt:
    """``id``: template and a hash of the text, so the same text has the same id whatever the seed;
    ``slots``: what was put into the template; ``domains``: of the first and of the second topic.

    ``domains`` is empty, and ``seed`` None, for a prompt that was not generated.  Raises
    ``ConfigError`` when there is no text or no change of domain.
    """

    id: str
    text: str
    template: str = ""
    slots: Mapping[str, str] = field(default_factory=dict)
    domains: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ConfigError(f'the prompt "{self.id}" has no text: write one')
        if self.domains and (len(self.domains) != 2 or self.domains[0] == self.domains[1]):
            raise ConfigError(
                f'the prompt "{self.id}" needs two different domains, not '
                f"{' and '.join(self.domains)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data, as in a file of prompts."""
        return {**asdict(self), "slots": dict(self.slots), "domains": list(self.domains)}


def maximum(ontology: Ontology) -> int:
    """How many prompts there are: ordered pairs of items of two domains, times templates."""
    sizes = [len(domain.items) for domain in ontology.domains]
    return len(ontology.templates) * (sum(sizes) ** 2 - sum(size**2 for size in sizes))


def generate(count: int, seed: int = 0, ontology: Ontology | None = None) -> list[DriftPrompt]:
    """``count`` different prompts; the same for the same seed and ontology on every machine.

    A shorter list is the beginning of a longer one.  Templates, ordered pairs of domains and items
    are all used equally often, as far as the count allows.

    Raises ``ConfigError`` when ``count`` is not 1 to ``maximum(ontology)``, when the seed is
    negative, or when two combinations give the same text.
    """
    source = load_ontology() if ontology is None else ontology
    if not 1 <= count <= maximum(source):
        raise ConfigError(
            f"this ontology gives {maximum(source)} prompts at most, every template with every "
            f"ordered pair of items of two domains: ask for 1 to {maximum(source)}, not {count}"
        )
    if seed < 0:
        raise ConfigError(f"the seed {seed} is negative: give 0 or more")
    rng = random.Random(seed)
    cells = _cells(source, rng)
    uses = Counter[str]()
    found = dict[str, DriftPrompt]()
    while True:
        for cell in cells:
            prompt = cell.draw(source.choices, uses, rng, seed)
            if prompt.text in found:
                raise ConfigError(
                    f'two combinations of topics give the same prompt, "{prompt.text}": rename '
                    f"{prompt.slots['topic_a']} or {prompt.slots['topic_b']}"
                )
            found[prompt.text] = prompt
            if len(found) == count:
                return list(found.values())
        cells = [cell for cell in cells if cell.pairs]


@dataclass
class _Cell:
    """A template with an ordered pair of domains, and the pairs of items not yet used in it."""

    template: Template
    first: Domain
    second: Domain
    pairs: list[tuple[Item, Item]] | None = None  # made when needed: cells are many

    def draw(
        self,
        choices: Mapping[str, Sequence[str]],
        uses: Counter[str],
        rng: random.Random,
        seed: int,
    ) -> DriftPrompt:
        """The next prompt, about a pair of items that were used least; it is not drawn again."""
        if self.pairs is None:
            self.pairs = [(one, other) for one in self.first.items for other in self.second.items]
        rarity = [uses[one.name] + uses[other.name] for one, other in self.pairs]
        least = min(rarity)
        rarest = [number for number, use in enumerate(rarity) if use == least]
        one, other = self.pairs.pop(_pick(rarest, rng))
        uses.update((one.name, other.name))
        known = {**self.first.slots(one, "a"), **self.second.slots(other, "b")}
        known |= {name: _pick(choices[name], rng) for name in self.template.choices}
        text = self.template.fill(known)
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()[:10]
        return DriftPrompt(
            f"{self.template.id}-{digest}",
            text,
            self.template.id,
            {name: known[name] for name in self.template.slots},
            (self.first.name, self.second.name),
            seed,
        )


def _cells(ontology: Ontology, rng: random.Random) -> list[_Cell]:
    """All cells, along diagonals: the next one has another template and another pair of domains."""
    templates = _shuffled(ontology.templates, rng)
    pairs = _shuffled(
        [(a, b) for a in ontology.domains for b in ontology.domains if a is not b], rng
    )
    found = []
    for shift in range(len(templates)):
        for number, (first, second) in enumerate(pairs):
            template = templates[(number + shift) % len(templates)]
            found.append(_Cell(template, first, second))
    return found


# Of all methods of Random, only random() is promised to give the same numbers in later Pythons.
def _pick(values: Sequence[T], rng: random.Random) -> T:
    return values[int(rng.random() * len(values))]


def _shuffled(values: Iterable[T], rng: random.Random) -> list[T]:
    found = list(values)
    for last in range(len(found) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        found[last], found[other] = found[other], found[last]
    return found


def shipped() -> list[DriftPrompt]:
    """The prompts in the package."""
    with resources.as_file(resources.files("dart_llm.texts") / "drift" / "prompts.jsonl") as path:
        return read_prompts(path)


def read_prompts(path: str | Path) -> list[DriftPrompt]:
    """The prompts in a JSONL file; without an ``id`` a prompt's id is its line number.

    Raises ``ConfigError``, with the line's number, for a line that is no JSON object, lacks a text
    or holds something of another kind, and for an id that occurs twice or a file without prompts.
    """
    lines = dict[str, int]()
    found = []
    for number, row in read_rows(Path(path)):
        prompt = _prompt(row, number, f"line {number} of {path}")
        if prompt.id in lines:
            raise ConfigError(
                f"lines {lines[prompt.id]} and {number} of {path} have the same id "
                f'"{prompt.id}": give each prompt its own'
            )
        lines[prompt.id] = number
        found.append(prompt)
    if not found:
        raise ConfigError(f'the file {path} holds no prompts: add lines such as {{"text": "..."}}')
    return found


def _prompt(row: dict[str, Any], number: int, where: str) -> DriftPrompt:
    own = row.get("id")
    name = str(number if own is None else own)
    values = {
        key: row[key] for key in ("text", "template", "slots", "domains", "seed") if key in row
    }
    kinds = {"text": str, "template": str, "slots": dict, "domains": list, "seed": int | None}
    for key, kind in kinds.items():
        if key in values and not isinstance(values[key], kind):
            raise ConfigError(f"the {key} in {where} is of another kind: {values[key]!r}")
    if "text" not in values:
        raise ConfigError(f'{where} has no text: write {{"text": "..."}}')
    if "domains" in values:
        values["domains"] = tuple(map(str, values["domains"]))
    return DriftPrompt(name, **values)
