"""The engine on the native kernels: whole steps for requests of every kind."""

import pytest

from dart_llm.engine.engine import Engine
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling
from engine_cases import PROMPT, alone, ask, half, own_model, tokenizer
from steps import Same, storages
from tiny import tiny

pytestmark = pytest.mark.usefixtures("native")

NAMES = {
    "llama": "native",
    "gemma3": "native",
    "gpt2": "native",
    "bloom": "native",
    "opt": "masked",
}


@pytest.mark.parametrize(("name", "executor"), NAMES.items())
def test_executors(name, executor):
    token = half("dart-token", self_stats={"sequences": 4, "length": 64})
    configs = [None, half(), token, half("dart-prompt")]
    wanted = [alone(tiny(name), config) for config in configs]
    with Same(own_model(name)), Engine(own_model(name), tokenizer()) as engine:
        assert engine.executor == executor
        for config, (tokens, report) in zip(configs * 2, wanted * 2, strict=True):
            answer, _ = ask(engine, config)
            assert answer.tokens[0] == tokens  # float32: rounding changes no token here
            if report is not None:
                found, expected = answer.report.to_dict(), report.to_dict()
                # the engine still has the cache for which whole steps have room
                room = [one.pop("extra_memory_bytes") for one in (found, expected)]
                assert found == expected
                whole = executor == "native" and name != "bloom"  # of which no whole step runs
                assert room[0] > room[1] if whole else room[0] == room[1]


@pytest.fixture(scope="module")
def engine(native):
    with Same(own_model()), Engine(own_model(), tokenizer()) as engine:
        yield engine


def test_steps_run_natively(engine):
    engine.prepare(half("dart"))  # learning attaches anew
    whole = engine._host.patch.whole_steps
    assert whole is not None
    # the attention signal is one of the model's own forwards
    for config, steps in ((None, 19), (half(), 19), (half("dart"), 19), (half("published"), 0)):
        before = whole.steps
        ask(engine, config, new=20)
        assert whole.steps - before == steps


def test_nothing_is_held_between_requests(engine):
    configs = [None, half(), half("dart"), half("dart-token"), half("published")]
    for config in configs:  # what stays: priors, low-bit copies, angles of positions
        engine.prepare(config)
        ask(engine, config)
    before = sum(storages().values())
    for config in configs:
        ask(engine, config)
        ask(engine, config, n=2, temperature=1.0)
        engine.run(Ask(PROMPT, Sampling(), config), cancelled=iter([False] * 5 + [True]).__next__)
    assert sum(storages().values()) == before
