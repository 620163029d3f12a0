"""Truth on the real default model: the engine's answers are those of blocks of their own."""

import pytest

from dart_llm.data.texts import chat_ids
from dart_llm.engine.engine import Engine
from dart_llm.pruning.config import PruneConfig
from engine_cases import alone, ask, half
from steps import Same

pytestmark = [pytest.mark.smollm2, pytest.mark.usefixtures("native")]

TEXT = "Explain in three sentences why the sky is blue during the day and red in the evening."
NEW = 24
CONFIGS = {"griffin": half(), "dart": PruneConfig.build("dart", sparsity=0.3)}


def test_requests_and_turns_are_those_alone(smollm2):
    """Dense in float32: plain transformers' own greedy answer, though whole steps decode it."""
    model, tokenizer = smollm2
    messages = [{"role": "user", "content": TEXT}]
    ids = chat_ids(tokenizer, messages)
    wanted = {name: alone(model, config, ids, NEW)[0] for name, config in CONFIGS.items()}
    plain = alone(model, None, ids, NEW)[0]
    with Same(model), Engine(*smollm2) as engine:
        assert engine.executor == "native"
        for name, config in CONFIGS.items():
            first, _ = ask(engine, config, ids, NEW, conversation=name)
            assert first.tokens[0] == wanted[name], name
            assert ask(engine, None, ids, NEW)[0].tokens[0] == plain
        messages += [{"role": "assistant", "content": first.texts[0]}]
        messages += [{"role": "user", "content": "And why is the sea blue?"}]
        longer = chat_ids(tokenizer, messages)
        second, records = ask(engine, CONFIGS["dart"], longer, NEW, "dart")
    assert second.usage.cached_tokens == len(ids) + NEW - 1
    assert second.report.prompt_tokens == len(longer) - second.usage.cached_tokens
    causes = [record.remask.cause for record in records if record.kind == "remask"]
    assert causes[:1] == ["prompt"]
    assert second.report.sparsity_while_pruned == pytest.approx(0.3, abs=1e-3)
