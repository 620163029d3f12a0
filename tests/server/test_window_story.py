"""What the window's first ready prompt and its tour say happens, on the real default model."""

import functools
import json

import pytest

from dart_llm.cli.chat import loops
from dart_llm.data.prompts import chat_ids
from dart_llm.engine.engine import Engine
from dart_llm.engine.events import Token
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling
from dart_llm.models.loading import load
from dart_llm.pruning.config import PruneConfig
from dart_llm.server.window import PROMPTS, static_files

pytestmark = [pytest.mark.smollm2, pytest.mark.usefixtures("native")]

READY = json.loads(static_files()[PROMPTS][0])
LONGEST = 192
"""Tokens of the page's longest answer, unless its reader wants another."""


BLOCKS, FLOAT32 = {"weights": "file"}, {"dtype": "float32"}
"""What ``make window`` serves, and what a ``--dtype`` makes of it."""


@functools.cache
def model(**held):
    return load("smollm2-135m", **held)


def told(held, place, executor):
    """The records of a ready prompt's answer at its settings, by kind."""
    text, asked = READY[place]["text"], READY[place]["dart"]
    asked = {name: value for name, value in asked.items() if value}
    config = PruneConfig.build(asked.pop("method"), **asked)
    loaded = model(**held)
    ids = chat_ids(loaded[1], [{"role": "user", "content": text}])
    records = []
    with Engine(*loaded, executor=executor) as engine:
        engine.run(Ask(ids, Sampling(max_tokens=LONGEST), config), records.append)
    found = {"token": [one for one in records if isinstance(one, Token)]}
    for kind in ("check", "remask"):
        found[kind] = [record.to_dict() for record in records if record.kind == kind]
    found["check"] = [one for one in found["check"] if one["threshold"] is not None]
    return found


@pytest.mark.parametrize(
    ("held", "executor"),
    [
        (BLOCKS, "slim"),
        pytest.param(BLOCKS, "native", marks=pytest.mark.full),
        pytest.param(FLOAT32, "slim", marks=pytest.mark.full),
        pytest.param(FLOAT32, "compact", marks=pytest.mark.full),
    ],
)
def test_the_re_mask_follows_the_change(held, executor):
    """Each rounds in its own way, so these are four texts; the story of each is the same."""
    found = told(held, 0, executor)
    tokens = found["token"]
    ends = [sum(len(token.text) for token in tokens[: i + 1]) for i in range(len(tokens))]
    text = "".join(token.text for token in tokens)
    words, _, code = text.partition("```python")
    change = next(i for i, end in enumerate(ends) if end > len(words))
    assert change > 44, "four windows of words are what the detector compares with"
    assert "algorithm" in words and "def " not in words
    first, *later = found["remask"]
    assert (first["cause"], [one["cause"] for one in later]) == ("first", ["drift"])
    dense = [token.index for token in tokens if token.phase == "observe"]
    assert dense == list(range(dense[0], dense[0] + 32)) and later[0]["step"] == dense[-1]
    trigger = found["check"][-1 - sum(one["step"] >= dense[0] for one in found["check"])]
    assert trigger["step"] == dense[0] - 1 and trigger["similarity"] < trigger["threshold"]
    assert change < trigger["step"] <= change + 20
    assert code.count("def bubble_sort(") == 1 and len(set(code.split())) > 15
    assert not loops(tuple(token.id for token in tokens))


@pytest.mark.parametrize("held", [BLOCKS, pytest.param(FLOAT32, marks=pytest.mark.full)])
@pytest.mark.parametrize("place", [1, 2])
def test_without_a_change_there_is_no_re_mask(held, place):
    found = told(held, place, "slim")
    assert [one["cause"] for one in found["remask"]] == ["first"] and found["check"]
