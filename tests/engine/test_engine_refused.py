"""The engine: ends of texts, learning while it serves, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dart_llm
from dart_llm.engine.engine import Engine
from dart_llm.engine.events import Token
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling
from dart_llm.errors import AttachError, ConfigError
from dart_llm.pruning.config import PruneConfig
from engine_cases import (
    CONFIGS,
    PROMPT,
    alone,
    ask,
    half,
    own_model,
    prepared,
    tokenizer,
)
from steps import Same
from tiny import tiny, tokens


@pytest.fixture(scope="module")
def engine() -> Any:
    with Same(own_model()), prepared() as engine:
        yield engine


def test_stop_strings(engine: Engine) -> None:
    text, tokens = (plain := ask(engine)[0]).texts[0], plain.tokens[0]
    for start, end in ((10, 14), (3, 4), (20, 29)):
        stop = text[start:end]
        answer, records = ask(engine, stop=("\u4e16", stop))
        assert answer.finish == ("stop",) and answer.texts[0] == text[: text.index(stop)]
        assert answer.tokens[0] == tokens[: len(answer.tokens[0])]
        shown = [record.text for record in records if isinstance(record, Token)]
        assert "".join(shown) == answer.texts[0]
    never = ask(engine, stop=(text[-2:] + "\u4e16",))[0]
    assert never.finish == ("length",) and never.texts == (text,)


def test_the_end_of_a_text() -> None:
    model = tiny()
    plain = alone(model, None)[0]
    end = plain[7]
    model.generation_config.eos_token_id = [2, end]
    short = plain[: plain.index(end) + 1]
    assert alone(model, None)[0] == short
    with Engine(model, tokenizer()) as engine:
        answer, records = ask(engine)
    assert answer.tokens[0] == short and answer.finish == ("stop",)
    last = records[-2]
    assert isinstance(last, Token) and (last.id, last.text) == (end, "") and last.piece
    assert answer.texts[0] == tokenizer().decode(short[:-1], skip_special_tokens=True)


def test_a_prompt_of_several_pieces(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from dart_llm.engine import request as engine_loop

    whole = {name: ask(engine, config) for name, config in CONFIGS.items()}
    monkeypatch.setattr(engine_loop, "PIECE", 23)  # the second piece is one token
    for name, config in CONFIGS.items():
        answer, _ = ask(engine, config)
        assert answer.tokens == whole[name][0].tokens
        assert answer.report.prompt_tokens == len(PROMPT)
        assert answer.report.decoded_tokens == 39
    calls = iter([False, True])
    answer = engine.run(Ask(PROMPT), cancelled=lambda: next(calls))
    assert answer.tokens == ((),) and answer.finish == ("cancelled",)


def test_learning_while_serving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DART_CACHE", str(tmp_path))  # other tests have learnt from this model
    model, news = tiny(), []
    with Same(model):
        with Engine(model, tokenizer(), say=news.append) as engine:
            first, _ = ask(engine, half("griffin"), new=8, conversation="a")
            assert not news
            engine.prepare(half("dart"))
            assert any(line.startswith("learning gradients") for line in news)
            count = len(news)
            dart, _ = ask(engine, half("dart"))
            ask(engine, half("dart", masking_step=3))
            assert len(news) == count
            glass, _ = ask(engine, half("glass"))
            assert len(news) > count
            longer = (*PROMPT, *first.tokens[0], 5, 6)
            again, _ = ask(engine, half("griffin"), longer, conversation="a")
            assert again.usage.cached_tokens == len(PROMPT) + 7
        assert dart.tokens[0] == alone(model, half("dart"))[0]
        assert glass.report.method == "glass" and glass.report.achieved_sparsity == 0.5


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (half(executor="masked"), 'served by executor "compact"'),
        (PruneConfig.build("dense-4bit"), "weights of 4 bits"),
        (
            PruneConfig.build("griffin", budget={"table": "31:0.5"}),
            "layer 31 is out of range",
        ),
    ],
)
def test_what_cannot_be_served(engine: Engine, config: Any, words: str) -> None:
    for call in (engine.prepare, lambda config: ask(engine, config)):
        with pytest.raises(ConfigError, match=words):
            call(config)
    assert len(ask(engine, new=3)[0].tokens[0]) == 3


def test_what_cannot_be_asked(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="holds no token"):
        Ask(())
    with pytest.raises(ConfigError, match="ask for n 1"):
        Ask(PROMPT, Sampling(n=2), conversation="a")
    long = tuple(tokens(1, 513)[0].tolist())
    with pytest.raises(ConfigError, match="513 tokens and the model's context holds 512"):
        ask(engine, ids=long)
    full, _ = ask(engine, ids=long[:510], new=40)
    assert len(full.tokens[0]) == 3 and full.finish == ("length",)


def test_executor_graph() -> None:
    """Without a GPU the same steps run call by call; in float64, where rounding decides no tie."""
    model = tiny(dtype=torch.float64)
    with Same(model), Engine(model, tokenizer(), executor="graph") as engine:
        for name in ("griffin", "dense", "dart", "dart-token", "griffin", "published"):
            answer, _ = ask(engine, CONFIGS[name])
            assert answer.tokens[0] == alone(tiny(dtype=torch.float64), CONFIGS[name])[0], name
            # tokens that choose change a step's shapes; "published" watches an attention output
            whole = name not in ("dart-token", "published")
            assert answer.report.executor == ("graph" if whole else "compact")


def test_engines_that_cannot_be() -> None:
    model = tiny()
    with pytest.raises(ConfigError, match=r"call model\.eval\(\) first"):
        Engine(model.train(), tokenizer())
    model.eval()
    with pytest.raises(ConfigError, match="executor"):
        Engine(model, tokenizer(), executor="fast")
    with Same(model), Engine(model, tokenizer(), executor="masked") as engine:
        assert engine.executor == "masked"
        assert ask(engine, half())[0].report.executor == "masked"
        with pytest.raises(AttachError, match="already being pruned"):
            Engine(model, tokenizer())
        dart_llm.restore(model)
        with pytest.raises(AttachError, match="detached"):
            ask(engine)
    engine.close()
    with pytest.raises(AttachError, match="closed"):
        ask(engine)
