"""Generate two-topic prompts: ``python benchmarks/make_prompts.py 480 > prompts.jsonl``.

The package's ``prompts.jsonl`` was made with this command, seed 0 and ``prompts/*.yaml``.
An ontology has ``domains`` (``field``, ``expert``, ``place``, and items under ``singular`` and
``plural``), ``templates`` with slots, and ``choices`` for slots that no topic fills.  The same
count, seed and ontology give the same prompts on every machine; a shorter list is a prefix of a
longer list.  Templates, ordered pairs of domains and items are used equally often.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")

FOLDER = Path(__file__).parent / "prompts"


def load(path: Path = FOLDER / "ontology.yaml") -> dict[str, Any]:
    """An ontology; without templates it gets those of prompts/templates.yaml, and their choices."""
    shared = yaml.safe_load((FOLDER / "templates.yaml").read_text(encoding="utf-8"))
    ontology = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "templates" not in ontology:
        ontology["templates"] = shared["templates"]
        ontology["choices"] = {**shared["choices"], **ontology.get("choices", {})}
    return {"choices": {}, **ontology}


def items(domain: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Topics of a domain, and whether each takes a plural verb."""
    kinds = (("singular", False), ("plural", True))
    return [(name, plural) for kind, plural in kinds for name in domain.get(kind) or ()]


def topic_slots(domain: Mapping[str, Any], item: tuple[str, bool], side: str) -> dict[str, str]:
    """The values of the slots that end in ``_<side>`` for a topic."""
    name, plural = item
    verb, subject, object_ = ("are", "they", "them") if plural else ("is", "it", "it")
    values = {"topic": name, **{key: domain[key] for key in ("field", "expert", "place")}}
    values |= {"is": verb, "it": subject, "them": object_}
    return {f"{key}_{side}": value for key, value in values.items()}


def fill(template: str, values: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The text and the slots it uses; a slot name in upper case capitalises the slot's value."""
    template = " ".join(template.split())
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    used = sorted({name if name in values else name[:1].lower() + name[1:] for name in names})
    capital = {
        name[0].upper() + name[1:]: text[:1].upper() + text[1:] for name, text in values.items()
    }
    return template.format_map({**capital, **values}), {name: values[name] for name in used}


# Python guarantees the same numbers in later versions only for Random.random().
def pick(values: Sequence[T], rng: random.Random) -> T:
    return values[int(rng.random() * len(values))]


def shuffled(values: Iterable[T], rng: random.Random) -> list[T]:
    order = list(values)
    for last in range(len(order) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        order[last], order[other] = order[other], order[last]
    return order


def generate(count: int, seed: int, ontology: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``count`` prompts as rows of JSONL."""
    domains, choices = ontology["domains"], ontology["choices"]
    rng, uses, prompts = random.Random(seed), Counter[str](), list[dict[str, Any]]()
    templates = shuffled(ontology["templates"], rng)
    pairs = shuffled([(a, b) for a in domains for b in domains if a != b], rng)
    draws = [
        (
            templates[(number + shift) % len(templates)],
            a,
            b,
            [*product(items(domains[a]), items(domains[b]))],
        )
        for shift in range(len(templates))
        for number, (a, b) in enumerate(pairs)
    ]  # along diagonals: each draw has another template and domain pair than the one before
    while draws:
        for template, a, b, topics in draws:
            rarity = [uses[left] + uses[right] for (left, _), (right, _) in topics]
            rarest = [index for index, used in enumerate(rarity) if used == min(rarity)]
            first, second = topics.pop(pick(rarest, rng))
            uses.update((first[0], second[0]))
            values = {**topic_slots(domains[a], first, "a"), **topic_slots(domains[b], second, "b")}
            text = ontology["templates"][template]
            drawn = {name for _, name, _, _ in string.Formatter().parse(text) if name in choices}
            values |= {name: pick(choices[name], rng) for name in sorted(drawn)}
            text, slots = fill(text, values)
            prompts.append(
                {
                    "id": f"{template}-{hashlib.sha256(text.encode()).hexdigest()[:10]}",
                    "text": text,
                    "template": template,
                    "slots": slots,
                    "domains": [a, b],
                    "seed": seed,
                }
            )
            if len(prompts) == count:
                return prompts
        draws = [draw for draw in draws if draw[3]]
    raise SystemExit(f"this ontology gives at most {len(prompts)} prompts: request fewer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ontology", type=Path, default=FOLDER / "ontology.yaml")
    args = parser.parse_args()
    for row in generate(args.count, args.seed, load(args.ontology)):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
