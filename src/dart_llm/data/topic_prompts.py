"""Two-topic prompts: ontology (pydantic), templates, generator.

What two-topic prompts are made of: domains with their items, and templates.

The package's own are ``texts/drift/ontology.yaml`` and ``templates.yaml``.  A file of one's own is
YAML with ``domains`` as there, with ``choices`` that differ from the package's, and with
``templates`` if the package's are not wanted.  All data are checked when they are read.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.files import read_rows

# Templates of two-topic prompts: texts with named slots, checked before any is filled.


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


EXAMPLE = "astronomy: {field: astronomy, expert: an astronomer, place: an observatory, singular: \
[dark matter], plural: [black holes]}"

PHRASES = ("field", "expert", "place")

NUMBERS = ("singular", "plural")

ARTICLES = ("the ", "a ", "an ")


@dataclass(frozen=True)
class Item:
    """A topic: a noun phrase that can follow "about", and whether it takes a plural verb."""

    name: str
    plural: bool

    def slots(self) -> dict[str, str]:
        """The words that depend on the item."""
        if self.plural:
            return {"topic": self.name, "is": "are", "it": "they", "them": "them"}
        return {"topic": self.name, "is": "is", "it": "it", "them": "it"}


@dataclass(frozen=True)
class Domain:
    """Items that belong together.  ``field``: what they belong to; ``expert``, ``place``: with
    their articles."""

    name: str
    field: str
    expert: str
    place: str
    items: tuple[Item, ...]

    def slots(self, item: Item, side: str) -> dict[str, str]:
        """What the slots that end in ``_<side>`` become for one of the items."""
        words = {"field": self.field, "expert": self.expert, "place": self.place, **item.slots()}
        return {f"{name}_{side}": text for name, text in words.items()}


@dataclass(frozen=True)
class Ontology:
    """At least two domains, at least one template; ``choices``: slot -> what may stand in it."""

    domains: tuple[Domain, ...]
    templates: tuple[Template, ...]
    choices: Mapping[str, tuple[str, ...]]


def load_ontology(path: str | Path | None = None) -> Ontology:
    """The package's ontology, or the one in a YAML file; the module's docstring describes it.

    Raises ``ConfigError`` with the place in the file for anything missing, empty, unknown or of
    another kind, and for an item that occurs twice, in one domain or in two.
    """
    with resources.as_file(resources.files("dart_llm.data") / "shipped" / "drift") as folder:
        own = _read(folder / "templates.yaml")
        data = _read(folder / "ontology.yaml" if path is None else Path(path))
    where = "the ontology of the package" if path is None else str(path)
    _check_keys(data, ("domains", "templates", "choices"), where)
    choices = _choices(data, where)
    if "templates" not in data:  # the package's need the package's choices
        choices = {**_choices(own, "the package"), **choices}
    found = _mapping(data if "templates" in data else own, "templates", where)
    return Ontology(
        _domains(data, where),
        tuple(
            Template.parse(name, _phrase(text, f'template "{name}"', where), choices, where)
            for name, text in found.items()
        ),
        choices,
    )


def _domains(data: Mapping[str, Any], where: str) -> tuple[Domain, ...]:
    found = _mapping(data, "domains", where)
    if len(found) < 2:
        raise ConfigError(
            f"{where} has {len(found)} domain(s): a change of topic needs two or more, such as "
            + EXAMPLE
        )
    domains = tuple(_domain(name, entry, where) for name, entry in found.items())
    owners = dict[str, str]()
    for domain in domains:
        for item in domain.items:
            key = _bare(item.name)
            if key in owners:
                raise ConfigError(
                    f'the item "{item.name}" of the domain {domain.name} in {where} is also in '
                    f"the domain {owners[key]}: keep it in one of them"
                    if owners[key] != domain.name
                    else f'the domain {domain.name} in {where} has the item "{item.name}" twice: '
                    "drop one"
                )
            owners[key] = domain.name
    return domains


def _bare(name: str) -> str:
    """An item's name without article and capitals, so that "The Sun" and "sun" are one."""
    text = name.casefold()
    return next((text.removeprefix(a) for a in ARTICLES if text.startswith(a)), text)


def _domain(name: str, entry: Any, where: str) -> Domain:
    place = f"the domain {name} in {where}"
    if not isinstance(entry, dict):
        raise ConfigError(f"{place} needs names and values, such as {EXAMPLE}")
    _check_keys(entry, (*PHRASES, *NUMBERS), place)
    phrases = {key: _phrase(entry.get(key), key, place) for key in PHRASES}
    items = [
        Item(_phrase(text, f"item under {number}", place), number == "plural")
        for number in NUMBERS
        for text in _list(entry.get(number) or [], number, place)
    ]
    if not items:
        raise ConfigError(f"{place} has no items: list some under singular or plural")
    return Domain(name, **phrases, items=tuple(items))


def _choices(data: Mapping[str, Any], where: str) -> dict[str, tuple[str, ...]]:
    found = _mapping(data, "choices", where) if "choices" in data else {}
    for name, texts in found.items():
        if name in slot_names() or not name.isidentifier() or not name.islower():
            raise ConfigError(
                f'the choice "{name}" in {where} cannot be a slot: use small letters, and no slot '
                "of a topic"
            )
        if not _list(texts, name, where):
            raise ConfigError(f'the choice "{name}" in {where} is empty: list what may stand in it')
    return {
        name: tuple(_phrase(text, f'entry of the choice "{name}"', where) for text in texts)
        for name, texts in found.items()
    }


def _mapping(data: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    found = data.get(key)
    if not isinstance(found, dict) or not found:
        raise ConfigError(f'{where} needs "{key}:" with names and values below it')
    for name in found:
        _phrase(name, f"name under {key}", where)
    return found


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f'"{name}" of {where} must be a list')
    return value


def _phrase(value: Any, name: str, where: str) -> str:
    """One line of text with single spaces; YAML makes other things of ``no`` and ``1984``."""
    if not isinstance(value, str):
        shown = "is missing" if value is None else f"is {value!r}, which is not text"
        raise ConfigError(f"the {name} of {where} {shown}: write a phrase, in quotes if need be")
    text = " ".join(value.split())
    if not text:
        raise ConfigError(f"the {name} of {where} is empty: write a phrase")
    return text


def _check_keys(data: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in data:
        if key not in known:
            raise UnknownName(f"key in {where}:", str(key), known)


def _read(path: Path) -> dict[str, Any]:
    """A YAML mapping; a name that is given twice is an error, where YAML would keep the last."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read the ontology file {path}: {reason}") from None
    if not isinstance(data, dict):
        raise ConfigError(f'the ontology file {path} needs "domains:" with names and values below')
    for name, line in _twice(node):
        raise ConfigError(f'the name "{name}" in line {line} of {path} is given twice: drop one')
    return data


def _twice(node: Any) -> Iterator[tuple[str, int]]:
    """Names that a mapping holds for the second time, with their lines, from 1."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _twice(child)
    if isinstance(node, yaml.MappingNode):
        seen = set[str]()
        for key, value in node.value:
            if key.value in seen:
                yield key.value, key.start_mark.line + 1
            seen.update([key.value] if isinstance(key.value, str) else [])
            yield from _twice(value)


# Two-topic prompts: each asks a model to write about one topic and then about another one of
# another domain.
#
# ``generate`` makes them from an ontology; ``shipped`` are ``generate(SHIPPED, 0)`` of the
# package's own, kept as package data.  As JSONL, a line holds ``id``, ``text``, ``template``,
# ``slots``, ``domains`` and ``seed``; only ``text`` is required in a file of one's own.


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
    with resources.as_file(
        resources.files("dart_llm.data") / "shipped" / "drift" / "prompts.jsonl"
    ) as path:
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
