"""Truth on the real default model: the engine's answers are those of blocks of their own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from dart_llm.data.prompts import chat_ids
from dart_llm.engine.engine import Engine
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling
from dart_llm.pruning.config import PruneConfig
from engine_cases import alone, ask, half
from steps import Same

pytestmark = [pytest.mark.smollm2, pytest.mark.usefixtures("native")]

TEXTS = (
    "Explain in three sentences why the sky is blue during the day and red in the evening.",
    "Write a short letter to a friend about a walk along the sea in winter.",
)
NEW = 24
CONFIGS = {
    "dense": None,
    "dart": half("dart"),
    "griffin": half("griffin"),
    "published": half("published"),
    "dart-token": half("dart-token"),
}


def prompt(tokenizer: Any, text: str) -> tuple[int, ...]:
    return chat_ids(tokenizer, [{"role": "user", "content": text}])


@pytest.fixture(scope="module")
def wanted(smollm2: Any) -> dict[tuple[str, str], tuple[int, ...]]:
    model, tokenizer = smollm2
    found = {}
    for text in TEXTS:
        ids = prompt(tokenizer, text)
        for name, config in CONFIGS.items():
            found[name, text] = alone(model, config, ids, NEW)[0]
    return found


@pytest.fixture(scope="module")
def engine(smollm2: Any, wanted: Any) -> Iterator[Engine]:
    with Same(smollm2[0]), Engine(*smollm2) as engine:
        yield engine


def test_interleaved_requests_are_those_alone(smollm2: Any, engine: Engine, wanted: Any) -> None:
    """Dense in float32: plain transformers' own greedy answer, though slim steps decode it."""
    assert engine.executor == "slim"
    order = [(name, text) for name in CONFIGS for text in TEXTS]
    random.Random(2).shuffle(order)
    names = list(CONFIGS)
    for place, (name, text) in enumerate(order):
        if place % 3 == 0:
            other = prompt(smollm2[1], TEXTS[place % 2])
            left = iter([False] * (place % 5))
            asked = Ask(other, Sampling(), CONFIGS[names[place % len(names)]])
            gone = engine.run(asked, cancelled=lambda left=left: next(left, True))
            assert gone.finish == ("cancelled",) and len(gone.tokens[0]) == max(0, place % 5)
        answer, _ = ask(engine, CONFIGS[name], prompt(smollm2[1], text), NEW)
        assert answer.tokens[0] == wanted[name, text], (name, text)


def test_turns_of_a_chat(smollm2: Any, engine: Engine) -> None:
    tokenizer = smollm2[1]
    messages = [{"role": "user", "content": TEXTS[0]}]
    config = PruneConfig.build("dart", sparsity=0.3)
    first, _ = ask(engine, config, chat_ids(tokenizer, messages), NEW, "talk")
    messages += [{"role": "assistant", "content": first.texts[0]}]
    messages += [{"role": "user", "content": "And why is the sea blue?"}]
    ids = chat_ids(tokenizer, messages)
    ask(engine, None, ids, 4)
    second, records = ask(engine, config, ids, NEW, "talk")
    assert second.usage.cached_tokens == len(chat_ids(tokenizer, messages[:1])) + NEW - 1
    assert second.report.prompt_tokens == len(ids) - second.usage.cached_tokens
    causes = [record.remask.cause for record in records if record.kind == "remask"]
    assert causes[:1] == ["prompt"]
    assert second.report.sparsity_while_pruned == pytest.approx(0.3, abs=1e-3)
