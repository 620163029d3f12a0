"""What the window's first ready prompt and its tour say happens, on the real default model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import dart_llm
from dart_llm.cli.chat import loops
from dart_llm.data.prompts import chat_ids
from dart_llm.engine.engine import Engine
from dart_llm.engine.events import Record, Token
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling
from dart_llm.models.loading import load
from dart_llm.pruning.config import PruneConfig

pytestmark = [pytest.mark.smollm2, pytest.mark.usefixtures("native")]

PROMPTS = json.loads(
    (Path(dart_llm.__file__).parent / "server/static/prompts.json").read_text("utf-8")
)
LONGEST = 192
"""Tokens of the page's longest answer, unless its reader wants another."""


@cache
def default_model() -> Any:
    """As ``dart-llm serve`` loads it: in bfloat16."""
    return load("smollm2-135m")


def told(text: str, executor: str) -> tuple[list[Record], list[Token]]:
    """All records of an answer at the settings of the tour, and its tokens."""
    asked = {name: value for name, value in PROMPTS[0]["dart"].items() if value}
    config = PruneConfig.build(asked.pop("method"), **asked)
    ids = chat_ids(default_model()[1], [{"role": "user", "content": text}])
    records: list[Record] = []
    with Engine(*default_model(), executor=executor) as engine:
        engine.run(Ask(ids, Sampling(max_tokens=LONGEST), config), records.append)
    return records, [record for record in records if isinstance(record, Token)]


def of_kind(records: list[Record], kind: str) -> list[Any]:
    return [record.to_dict() for record in records if record.kind == kind]


@pytest.mark.parametrize("executor", ["slim", "native", "compact"])
def test_the_re_mask_follows_the_change_of_topic(executor: str) -> None:
    """Photosynthesis first; a re-mask within 96 tokens of the recipe's beginning, none before.

    Executors round in other ways, so these are three texts, and the story of each is the same.
    """
    records, tokens = told(PROMPTS[0]["text"], executor)
    ends = [sum(len(token.text) for token in tokens[: i + 1]) for i in range(len(tokens))]
    text = "".join(token.text for token in tokens)
    change = next(i for i, end in enumerate(ends) if end > text.index("recipe"))
    assert change > 44, "four windows of the first topic are what the detector compares with"
    assert "photosynthesis" in text[: text.index("recipe")]
    checks = [one for one in of_kind(records, "check") if one["threshold"] is not None]
    before = [one for one in checks if one["step"] <= change]
    assert before and all(one["similarity"] >= one["threshold"] for one in before)
    first, *later = of_kind(records, "remask")
    assert (first["cause"], [one["cause"] for one in later]) == ("first", ["drift"])
    assert change + 40 <= later[0]["step"] <= change + 96
    dense = [token.index for token in tokens if token.phase == "observe"]
    assert dense == list(range(dense[0], dense[0] + 32)) and dense[0] > change + 10
    recipe = text[text.index("recipe") :]
    assert "tomato" in recipe and len(set(recipe.split())) > 25
    assert not loops(tuple(token.id for token in tokens))


@pytest.mark.parametrize("place", [1, 2])
def test_without_a_change_there_is_no_re_mask(place: int) -> None:
    records, _ = told(PROMPTS[place]["text"], "slim")
    assert [one["cause"] for one in of_kind(records, "remask")] == ["first"]
    assert [one for one in of_kind(records, "check") if one["threshold"] is not None]
