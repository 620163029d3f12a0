"""Requests with a screened output head beside requests with the whole one, on one model."""

import pytest

from dart_llm.engine.engine import Engine
from dart_llm.models.checkpoint import remember_tokenizer
from dart_llm.pruning.config import PruneConfig
from engine_cases import alone, ask, half, tokenizer
from steps import Same
from tiny import tiny

OWN = {"sequences": 4, "length": 32, "opening": 0, "tokens": 0}


def screened(method="griffin", share=0.4, sparsity=0.5):
    return PruneConfig.build(
        method,
        sparsity=sparsity,
        head={"kind": "screened", "bytes": share},
        self_stats=None if method == "dense" else OWN,
    )


def model_of():
    model = tiny(vocab_size=2048, hidden_size=64)
    remember_tokenizer(model, tokenizer())
    return model


@pytest.mark.parametrize("executor", ["compact", "native"])
def test_each_request_has_the_head_that_it_asks_for(executor, request):
    if executor != "compact":
        request.getfixturevalue("native")
    dense = screened("dense", sparsity=None)
    configs = [None, screened(), half(), screened(share=0.7), dense, None]
    wanted = []
    for config in configs:
        wanted.append(alone(model_of(), config and config.replace({"executor": executor})))
    model = model_of()
    with Same(model), Engine(model, tokenizer(), executor=executor) as engine:
        for config, (tokens, report) in zip(configs, wanted, strict=True):
            answer, _ = ask(engine, config)
            assert answer.tokens[0] == tokens
            screens = config is not None and config.screens
            assert (answer.report.head is not None) == screens
            if report is None:
                continue
            found, expected = answer.report.to_dict(), report.to_dict()
            without = {"extra_memory_bytes": 0, "head": None}
            assert found | without == expected | without
            if screens:  # a dense run of its own has no kernels under "native": rounding
                assert found["head"] == pytest.approx(expected["head"], rel=1e-3, abs=1e-6)
                assert found["head"]["tokens"] == 39
    assert "forward" not in model.get_output_embeddings().__dict__
