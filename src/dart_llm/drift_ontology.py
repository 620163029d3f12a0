"""What two-topic prompts are made of: domains with their items, and templates.

The package's own are ``texts/drift/ontology.yaml`` and ``templates.yaml``.  A file of one's own is
YAML with ``domains`` as there, with ``choices`` that differ from the package's, and with
``templates`` if the package's are not wanted.  All data are checked when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from dart_llm.drift_templates import Template, slot_names
from dart_llm.errors import ConfigError, UnknownName

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
    with resources.as_file(resources.files("dart_llm.texts") / "drift") as folder:
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
