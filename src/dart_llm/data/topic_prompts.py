"""Two-topic prompts: each asks a model to write about one topic, then about one of another domain.

``generate`` makes them from an ontology; ``shipped`` are ``generate(SHIPPED, 0)`` of the package's
own, kept as package data.

An ontology is YAML: ``domains`` (see ``Domain``), ``templates`` (texts with slots) and ``choices``
(what may stand in a slot that no topic fills).  The package's own are ``ontology.yaml`` and
``templates.yaml`` in ``shipped/drift``; a file of one's own may leave out the templates, and gives
the choices that differ.  As JSONL, a prompt's line holds ``id``, ``text``, ``template``, ``slots``,
``domains`` and ``seed``; only ``text`` is required in a file of one's own.
"""

from __future__ import annotations

import hashlib
import random
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from importlib import resources
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.files import parse_yaml, read_rows

T = TypeVar("T")

Record = TypeVar("Record", bound=Any)

SHIPPED = 480
"""Prompts in the package: every template 20 times and every ordered pair of domains twice."""

SIDES = ("a", "b")

SIDE_SLOTS = ("topic", "field", "expert", "place", "is", "it", "them")
"""Slots that exist for both topics: ``{topic_a}``, ``{topic_b}``, ...; ``{Topic_a}`` starts a
sentence."""

SLOTS = tuple(f"{name}_{side}" for side in SIDES for name in SIDE_SLOTS)

REASONS = {
    "missing": "is missing",
    "string_type": "is VALUE, which is not text: write a phrase, in quotes if need be",
    "tuple_type": "must be a list",
    "dict_type": "needs names and values",
    "model_type": "needs names and values",
    "too_short": "is empty: list at least one",
}
"""What is wrong, in the words of a file, by pydantic's name of the problem."""


def validated(kind: Any, data: object, where: str) -> Any:
    """``data`` as a record of ``kind``; raises ``ConfigError`` with the place in ``where``."""
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ", ".join([where, ".".join(map(str, problem["loc"]))]).removesuffix(", ")
        if problem["type"] == "extra_forbidden":
            raise UnknownName(f"key in {place}:", str(problem["loc"][-1]), KEYS) from None
        reason = REASONS.get(problem["type"], problem["msg"].removeprefix("Value error, "))
        raise ConfigError(f"{place}: {reason.replace('VALUE', repr(problem['input']))}") from None


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    if not text:
        raise ValueError("is empty: write a phrase")
    return text


Phrase = Annotated[str, AfterValidator(_one_line)]
"""One line of text with single spaces."""

Phrases = Annotated[tuple[Phrase, ...], BeforeValidator(lambda value: value or ())]


class Item(NamedTuple):
    """A topic: a noun phrase that can follow "about", and whether it takes a plural verb."""

    name: str
    plural: bool


class Domain(BaseModel, frozen=True, extra="forbid"):
    """Items that belong together.

    ``field``: what they belong to; ``expert``, ``place``: with their articles; ``singular``,
    ``plural``: the items, by the verb that they take.
    """

    field: Phrase
    expert: Phrase
    place: Phrase
    singular: Phrases = ()
    plural: Phrases = ()

    @model_validator(mode="after")
    def _has_items(self) -> Domain:
        if not self.items:
            raise ValueError("has no items: list some under singular or plural")
        return self

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """All items, those of the singular first."""
        singular, plural = zip(self.singular, repeat(False)), zip(self.plural, repeat(True))
        return tuple(Item(*item) for item in chain(singular, plural))

    def slots(self, item: Item, side: str) -> dict[str, str]:
        """What the slots that end in ``_<side>`` become for one of the items."""
        number = ("are", "they", "them") if item.plural else ("is", "it", "it")
        texts = (item.name, self.field, self.expert, self.place, *number)
        return {f"{name}_{side}": text for name, text in zip(SIDE_SLOTS, texts, strict=True)}


class Ontology(BaseModel, frozen=True, extra="forbid"):
    """Domains, templates, and what may stand in the slots that no topic fills."""

    choices: dict[Phrase, Annotated[tuple[Phrase, ...], Field(min_length=1)]] = {}
    domains: dict[Phrase, Domain]
    templates: Annotated[dict[Phrase, Phrase], Field(min_length=1)]

    @field_validator("choices")
    @classmethod
    def _are_slots(cls, choices: dict[str, Any]) -> dict[str, Any]:
        for name in choices:
            if name in SLOTS or not name.isidentifier() or not name.islower():
                raise ValueError(
                    f'"{name}" cannot be a slot: use small letters, and no slot of a topic'
                )
        return choices

    @field_validator("domains")
    @classmethod
    def _are_apart(cls, domains: dict[str, Domain]) -> dict[str, Domain]:
        if len(domains) < 2:
            raise ValueError("a change of topic needs two domains or more")
        owners = dict[str, str]()
        for name, item in (
            (name, item) for name, domain in domains.items() for item in domain.items
        ):
            owner = owners.get(_bare(item.name))
            if owner == name:
                raise ValueError(f"{name} has an item twice: drop one")
            if owner is not None:
                raise ValueError(
                    f'the item "{item.name}" of {name} is also in {owner}: keep it in one'
                )
            owners[_bare(item.name)] = name
        return domains

    @model_validator(mode="after")
    def _templates_fit(self) -> Ontology:
        for name, text in self.templates.items():
            try:
                missing = {f"topic_{side}" for side in SIDES} - {*self.slots(text)}
            except ValueError as error:
                raise ValueError(f'the template "{name}": {error}') from None
            if missing:
                raise ValueError(
                    f'the template "{name}" lacks the slot {{{min(missing)}}}: it needs both topics'
                )
        return self

    def slots(self, template: str) -> list[str]:
        """The names in a template without capitals, sorted.

        Raises ``ValueError`` for braces that do not match, a format after a slot, and a slot that
        does not exist.
        """
        known, names = {*SLOTS, *self.choices}, set[str]()
        for _, slot, form, conversion in string.Formatter().parse(template):
            if form or conversion:
                raise ValueError(f'has a format in the slot "{slot}": write its name alone')
            if slot is not None:
                name = slot if slot in known else slot[:1].lower() + slot[1:]
                if name not in known:
                    raise ValueError(str(UnknownName("slot", slot, known)))
                names.add(name)
        return sorted(names)


KEYS = (*Ontology.model_fields, *Domain.model_fields)


def _bare(name: str) -> str:
    """An item's name without article and capitals, so that "The Sun" and "sun" are one."""
    return re.sub("^(the|an?) ", "", name.casefold())


def fill(template: str, slots: Mapping[str, str]) -> str:
    """The text with ``slots`` in it; a slot that starts with a capital gets one."""
    capital = {name[0].upper() + name[1:]: v[:1].upper() + v[1:] for name, v in slots.items()}
    return template.format_map({**capital, **slots})


def load_ontology(path: str | Path | None = None) -> Ontology:
    """The package's ontology, or the one in a YAML file; the module's docstring describes it.

    Raises ``ConfigError`` with the place in the file for anything that does not fit.
    """
    with resources.as_file(_data()) as folder:
        data = _read(folder / "templates.yaml")
        own = _read(folder / "ontology.yaml" if path is None else Path(path))
    if "templates" not in own and isinstance(own.get("choices", {}), dict):
        own["choices"] = {**data["choices"], **own.get("choices", {})}
        own["templates"] = data["templates"]
    found: Ontology = validated(Ontology, own, "the package" if path is None else str(path))
    return found


def _data() -> Any:
    return resources.files("dart_llm.data") / "shipped" / "drift"


def _read(path: Path) -> dict[str, Any]:
    """A YAML mapping; a name that is given twice is an error, where YAML would keep the last."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the ontology file {path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f'the ontology file {path} needs "domains:" with names and values below')
    return data


@dataclass(frozen=True)
class DriftPrompt:
    """A text that asks for two topics.

    ``id``: template and a hash of the text, so the same text has the same id whatever the seed;
    ``slots``: what was put into the template; ``domains``: of both topics.  A prompt that was not
    generated has neither domains nor seed.
    """

    id: str
    text: str
    template: str = ""
    slots: Mapping[str, str] = Field(default_factory=dict)
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
    sizes = [len(domain.items) for domain in ontology.domains.values()]
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
    draws = _draws(source, rng)
    uses = Counter[str]()
    prompts = dict[str, DriftPrompt]()
    while True:
        for draw in draws:
            prompt = draw.prompt(uses, rng, seed)
            if prompt.text in prompts:
                raise ConfigError(
                    f'two combinations of topics give the same prompt, "{prompt.text}": rename '
                    f"{prompt.slots['topic_a']} or {prompt.slots['topic_b']}"
                )
            prompts[prompt.text] = prompt
            if len(prompts) == count:
                return list(prompts.values())
        draws = [draw for draw in draws if draw.pairs]


class _Draw:
    """A template with an ordered pair of domains, and the pairs of items not yet used in it."""

    def __init__(self, ontology: Ontology, template: str, domains: tuple[str, str]) -> None:
        self.ontology, self.template, self.domains = ontology, template, domains
        self.pairs: list[tuple[Item, Item]] | None = None  # made when needed: draws are many

    def prompt(self, uses: Counter[str], rng: random.Random, seed: int) -> DriftPrompt:
        """The next prompt, about a pair of items that were used least; it is not drawn again."""
        first, second = (self.ontology.domains[name] for name in self.domains)
        if self.pairs is None:
            self.pairs = [(one, other) for one in first.items for other in second.items]
        rarity = [uses[one.name] + uses[other.name] for one, other in self.pairs]
        least = min(rarity)
        rarest = [number for number, use in enumerate(rarity) if use == least]
        one, other = self.pairs.pop(_pick(rarest, rng))
        uses.update((one.name, other.name))
        template, choices = self.ontology.templates[self.template], self.ontology.choices
        names = self.ontology.slots(template)
        values = {**first.slots(one, "a"), **second.slots(other, "b")}
        values |= {name: _pick(choices[name], rng) for name in names if name in choices}
        text, slots = fill(template, values), {name: values[name] for name in names}
        name = f"{self.template}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
        return DriftPrompt(name, text, self.template, slots, self.domains, seed)


def _draws(ontology: Ontology, rng: random.Random) -> list[_Draw]:
    """All, along diagonals: the next one has another template and another pair of domains."""
    templates = _shuffled(ontology.templates, rng)
    pairs = _shuffled([(a, b) for a in ontology.domains for b in ontology.domains if a != b], rng)
    return [
        _Draw(ontology, templates[(number + shift) % len(templates)], pair)
        for shift in range(len(templates))
        for number, pair in enumerate(pairs)
    ]


# Of all methods of Random, only random() is promised to give the same numbers in later Pythons.
def _pick(values: Sequence[T], rng: random.Random) -> T:
    return values[int(rng.random() * len(values))]


def _shuffled(values: Iterable[T], rng: random.Random) -> list[T]:
    shuffled = list(values)
    for last in range(len(shuffled) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        shuffled[last], shuffled[other] = shuffled[other], shuffled[last]
    return shuffled


def shipped() -> list[DriftPrompt]:
    """The prompts in the package."""
    with resources.as_file(_data() / "prompts.jsonl") as path:
        return read_prompts(path)


def read_prompts(path: str | Path) -> list[DriftPrompt]:
    """The prompts in a JSONL file; without an ``id`` a prompt's id is its line number.

    Raises as ``read_records``.
    """
    rows = (
        (number, {**row, "id": str(number if row.get("id") is None else row["id"])})
        for number, row in read_rows(Path(path))
    )
    return read_records(DriftPrompt, path, rows)


def read_records(
    kind: type[Record], path: str | Path, rows: Iterable[tuple[int, dict[str, Any]]]
) -> list[Record]:
    """The lines of a file, each with its number, as records with different ids.

    Raises ``ConfigError``, with the line's number, for a line that does not fit and an id that
    occurs twice, and for a file without records.
    """
    records = dict[str, Record]()
    for number, row in rows:
        record = validated(kind, row, f"line {number} of {path}")
        if record.id in records:
            raise ConfigError(
                f'the id "{record.id}" in line {number} of {path} is taken: give each line its own'
            )
        records[record.id] = record
    if not records:
        raise ConfigError(f"the file {path} is empty: it holds no prompts or passages")
    return list(records.values())
