"""A published number that was changed by hand does not come again."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from published import ROOT, scripts

with scripts():
    from reproduce_compare import compare


def published(name: str) -> Any:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text("utf-8"))


def holders(value: Any, key: str) -> Iterator[dict[str, Any]]:
    """Every dictionary with a number under ``key``."""
    if isinstance(value, dict):
        if isinstance(value.get(key), int | float):
            yield value
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from holders(item, key)


@pytest.mark.parametrize(
    ("name", "key", "factor", "more"),
    [
        ("evaluation-smollm2", "value", 3.0, 0.0),
        ("evaluation-recipe-small", "achieved", 1.03, 0.0),
        ("evaluation-recipe-small", "dense_share", 1.0, 0.03),
        ("evaluation-recipe-small", "remasks", 1.2, 3),
        ("budgets-smollm2-wikitext2-valid", "ratio_to_dense", 1.5, 0.0),
        ("detection-smollm2", "rate", 1.0, 0.5),
        ("drift-forced-smollm2", "mean", 1.5, 0.0),
        ("drift-forced-smollm2", "achieved_sparsity", 1.03, 0.0),
        ("drift-forced-smollm2", "dense_token_share", 1.0, 0.03),
        ("drift-forced-smollm2", "remasks", 1.2, 3),
        ("quality-token", "gap_closed", 0.5, 0.0),
        ("quality-token", "perplexity", 1.03, 0.0),
        ("tracer-cost-dart-prompt", "flops_build_masks", 1.03, 0.0),
        ("tracer-cost-dart-prompt", "flops_dense_token", 1.03, 0.0),
        ("tracer-cost-dart-prompt", "flops_observe_share_of_token", 1.03, 0.0),
        ("tracer-cost-dart-prompt", "flops_observe_token", 1.03, 0.0),
    ],
)
def test_a_tampered_value_does_not_agree(name: str, key: str, factor: float, more: float) -> None:
    again = published(name)
    assert all(pair.agrees for pair in compare(again, again))
    tampered = copy.deepcopy(again)
    part = tampered.get("rows") or tampered.get("cells") or tampered
    row = next(row for row in reversed(list(holders(part, key))) if row[key])
    row[key] = row[key] * factor + more
    other = [pair.name for pair in compare(tampered, again) if not pair.agrees]
    assert len(other) == 1, "one number was changed"


@pytest.mark.parametrize(("published", "agrees"), [(0.4, True), (0.6, True), (0.7, False)])
def test_a_published_value_outside_its_own_interval_does_not_agree(
    published: float, agrees: bool
) -> None:
    row = {"task": "arc", "value": published, "interval": {"low": 0.4, "high": 0.6}}
    (pair,) = compare({"rows": [row]}, {"rows": [{**row, "value": 0.5}]})
    assert pair.agrees is agrees


@pytest.mark.parametrize(
    ("key", "published", "again", "agrees"),
    [
        ("remasks", 5, 7, True),
        ("remasks", 5, 8, False),
        ("remasks", 100, 110, True),
        ("remasks", 100, 111, False),
        ("dense_token_share", 0.0, 0.019, True),
        ("dense_token_share", 0.0, 0.021, False),
        ("achieved", 0.5, 0.509, True),
        ("achieved", 0.5, 0.511, False),
        ("achieved", 0.0, 0.001, False),
    ],
)
def test_numbers_without_an_interval(
    key: str, published: float, again: float, agrees: bool
) -> None:
    (pair,) = compare({"rows": [{key: published}]}, {"rows": [{key: again}]})
    assert (pair.name, pair.agrees) == (key, agrees)
