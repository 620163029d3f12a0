"""The engine on the native kernels, with a screened head, and on the real default model."""

import pytest

from dart_llm.data.texts import chat_ids
from dart_llm.engine.engine import Engine
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling
from dart_llm.models.checkpoint import remember_tokenizer
from dart_llm.pruning.config import PruneConfig
from engine_cases import PROMPT, alone, ask, half, own_model, tokenizer
from steps import Same, storages
from tiny import tiny

NAMES = {"llama": "native", "gemma3": "native", "bloom": "native", "opt": "masked"}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("name", "executor"), NAMES.items())
def test_executors(name, executor):
    token = half("dart-token", self_stats={"sequences": 4, "length": 64})
    configs = [None, half(), token, half("dart-prompt")]
    expected = [alone(tiny(name), config) for config in configs]
    with Same(own_model(name)), Engine(own_model(name), tokenizer()) as engine:
        assert engine.executor == executor
        for config, (tokens, report) in zip(configs * 2, expected * 2, strict=True):
            answer, _ = ask(engine, config)
            assert answer.tokens[0] == tokens  # float32: rounding changes no token here
            if report is not None:
                reports = [answer.report.to_dict(), report.to_dict()]
                # the engine still has the cache for which whole steps have room
                room = [one.pop("extra_memory_bytes") for one in reports]
                assert reports[0] == reports[1]
                whole = executor == "native" and name != "bloom"  # of which no whole step runs
                assert room[0] > room[1] if whole else room[0] == room[1]


@pytest.mark.usefixtures("native")
def test_steps_run_natively_and_nothing_stays_between_requests():
    with Same(own_model()), Engine(own_model(), tokenizer()) as engine:
        configs = [None, half(), half("dart"), half("dart-token"), half("published")]
        for config in configs:  # learning attaches anew, and keeps statistics
            engine.prepare(config)
            ask(engine, config)
        whole = engine._host.patch.whole_steps
        # the attention signal is one of the model's own forwards
        for config, steps in zip(configs, (19, 19, 19, 19, 0), strict=True):
            before = whole.steps
            ask(engine, config, new=20)
            assert whole.steps - before == steps
        before = sum(storages().values())
        for config in configs:
            ask(engine, config, n=2, temperature=1.0)
            cancelled = iter([False] * 5 + [True]).__next__
            engine.run(Ask(PROMPT, Sampling(), config), cancelled=cancelled)
        assert sum(storages().values()) == before


OWN = {"sequences": 4, "length": 32, "opening": 0, "tokens": 0}


def screened(method="griffin", share=0.4, sparsity=0.5):
    head = {"kind": "screened", "bytes": share}
    stats = None if method == "dense" else OWN
    return PruneConfig.build(method, sparsity=sparsity, head=head, self_stats=stats)


def model_of():
    model = tiny(vocab_size=2048, hidden_size=64)
    remember_tokenizer(model, tokenizer())
    return model


@pytest.mark.parametrize("executor", ["compact", "native"])
def test_each_request_has_the_head_that_it_names(executor, request):
    if executor != "compact":
        request.getfixturevalue("native")
    dense = screened("dense", sparsity=None)
    configs = [None, screened(), half(), screened(share=0.7), dense, None]
    expected = [
        alone(model_of(), config and config.replace({"executor": executor})) for config in configs
    ]
    model = model_of()
    with Same(model), Engine(model, tokenizer(), executor=executor) as engine:
        for config, (tokens, report) in zip(configs, expected, strict=True):
            answer, _ = ask(engine, config)
            assert answer.tokens[0] == tokens
            screens = config is not None and config.screens
            assert (answer.report.head is not None) == screens
            if report is not None:
                reports = [answer.report.to_dict(), report.to_dict()]
                heads = [one.pop("head", None) for one in reports]
                without = {"extra_memory_bytes": 0}
                assert reports[0] | without == reports[1] | without
                if screens:  # a dense run of its own has no kernels under "native": rounding
                    assert heads[0] == pytest.approx(heads[1], rel=1e-3, abs=1e-6)
    assert "forward" not in model.get_output_embeddings().__dict__


TEXT = "Explain in three sentences why the sky is blue during the day and red in the evening."
NEW = 24
CONFIGS = {"griffin": half(), "dart": PruneConfig.build("dart", sparsity=0.3)}


@pytest.mark.smollm2
@pytest.mark.usefixtures("native")
def test_the_real_model_answers_as_alone(smollm2):
    """Dense in float32: plain transformers' own greedy answer, though whole steps decode it."""
    model, words = smollm2
    messages = [{"role": "user", "content": TEXT}]
    ids = chat_ids(words, messages)
    expected = {name: alone(model, config, ids, NEW)[0] for name, config in CONFIGS.items()}
    plain = alone(model, None, ids, NEW)[0]
    with Same(model), Engine(*smollm2) as engine:
        assert engine.executor == "native"
        for name, config in CONFIGS.items():
            first, _ = ask(engine, config, ids, NEW, conversation=name)
            assert first.tokens[0] == expected[name], name
            assert ask(engine, None, ids, NEW)[0].tokens[0] == plain
        messages += [{"role": "assistant", "content": first.texts[0]}]
        messages += [{"role": "user", "content": "And why is the sea blue?"}]
        longer = chat_ids(words, messages)
        second, records = ask(engine, CONFIGS["dart"], longer, NEW, "dart")
    assert second.usage.cached_tokens == len(ids) + NEW - 1
    assert second.report.prompt_tokens == len(longer) - second.usage.cached_tokens
    causes = [record.remask.cause for record in records if record.kind == "remask"]
    assert causes[:1] == ["prompt"]
