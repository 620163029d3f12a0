"""The engine on the native kernels: whole slim steps for requests of every kind."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dart_llm.engine.engine import Engine
from dart_llm.engine.events import Token
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling
from engine_cases import PROMPT, alone, ask, half, own_model, tokenizer
from steps import Same, storages
from tiny import tiny

pytestmark = pytest.mark.usefixtures("native")

NAMES = {"llama": "slim", "gemma": "native", "gpt2": "native", "opt": "masked"}


@pytest.mark.parametrize(("name", "executor"), NAMES.items())
def test_executors(name: str, executor: str) -> None:
    configs = [
        half(),
        half("dart-token", prior={"sequences": 4, "length": 64}),
        half("dart-prompt"),
    ]
    wanted = [alone(tiny(name), config) for config in configs]
    plain = alone(tiny(name), None)[0]
    with Same(own_model(name)), Engine(own_model(name), tokenizer()) as engine:
        assert engine.executor == executor
        for _ in range(2):
            for config, (tokens, report) in zip(configs, wanted, strict=True):
                answer, _ = ask(engine, config)
                assert answer.tokens[0] == tokens
                found, expected = answer.report.to_dict(), report.to_dict()
                # the engine still has the cache for which slim holds room
                room = [one.pop("extra_memory_bytes") for one in (found, expected)]
                assert found == expected
                assert room[0] > room[1] if executor == "slim" else room[0] == room[1]
            assert ask(engine)[0].tokens[0] == plain  # float32: rounding changes no token here


@pytest.fixture(scope="module")
def engine(native: None) -> Any:
    with Same(own_model()), Engine(own_model(), tokenizer()) as engine:
        yield engine


def test_steps_run_natively(engine: Engine) -> None:
    engine.prepare(half("dart"))  # learning attaches anew
    slim = engine._host.patch.slim
    assert slim is not None
    # the attention signal is one of the model's own forwards
    for config, steps in ((None, 19), (half(), 19), (half("dart"), 19), (half("published"), 0)):
        before = slim.steps
        ask(engine, config, new=20)
        assert slim.steps - before == steps


def test_priors_of_two_methods_in_turn(engine: Engine) -> None:
    """dart observes features of the FFN's input, dart-token none: each its own, every time."""
    configs = [half("dart", masking_step=6), half("dart-token", masking_step=6), half()]
    model = tiny()
    wanted = [alone(model, config)[0] for config in configs]
    order = [0, 1, 2] * 4
    random.Random(1).shuffle(order)
    for index in order:
        assert ask(engine, configs[index])[0].tokens[0] == wanted[index]


def test_several_rows_and_one_row_in_turn(engine: Engine) -> None:
    alone_, _ = ask(engine, half())
    for _ in range(2):
        rows, _ = ask(engine, half(), n=2)
        assert set(rows.tokens) == {alone_.tokens[0]}
        assert ask(engine, half())[0].tokens == alone_.tokens


def test_nothing_is_held_between_requests(engine: Engine) -> None:
    configs = [None, half(), half("dart"), half("dart-token"), half("published")]
    for config in configs:  # what stays: priors, low-bit copies, angles of positions
        engine.prepare(config)
        ask(engine, config)
    before = sum(storages().values())
    for config in configs * 2:
        ask(engine, config)
        ask(engine, config, n=2, temperature=1.0)
        engine.run(Ask(PROMPT, Sampling(), config), cancelled=iter([False] * 5 + [True]).__next__)
    assert sum(storages().values()) == before


def test_conversations_on_slim_steps(engine: Engine) -> None:
    first, _ = ask(engine, half(), new=30, conversation="a")
    ids = (*PROMPT, *first.tokens[0], 7, 8, 9)
    second, records = ask(engine, half(), ids, 30, "a")
    assert second.usage.cached_tokens == len(PROMPT) + 29
    assert second.report.prompt_tokens == 4 and second.report.decoded_tokens == 29
    phases = [one.phase for one in records if isinstance(one, Token)]
    assert phases == ["prefill"] + ["pruned"] * 29
    ask(engine, None)  # somebody else in between
    third, _ = ask(engine, half(), (*ids, *second.tokens[0], 7), 30, "a")
    assert third.usage.cached_tokens == len(ids) + 29
