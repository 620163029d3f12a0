"""Turns of a conversation: what is kept, what goes on, what is counted, what is given up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dart_llm.engine.engine import Engine
from dart_llm.engine.events import Record
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import GenerationResult as Answer
from dart_llm.engine.requests import Sampling
from dart_llm.session.run import prune
from engine_cases import PROMPT, ask, half, own_model, tokenizer
from steps import CACHE
from tiny import tiny, tokens

NEXT = tuple(tokens(1, 12, seed=7)[0].tolist())
DECAYED = half(remask={"evidence": "decay", "decay": 0.1, "observe_tokens": 4})


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(own_model(), tokenizer(), conversations=2) as engine:
        yield engine


def turn(engine: Engine, config: Any, ids: tuple[int, ...], new: int = 10, name: str = "a") -> Any:
    return ask(engine, config, ids, new, name)


def by_hand(config: Any, ids: tuple[int, ...], turns: int, new: int = 10) -> list[Any]:
    """The same turns by bare forwards in one block, each prompt part as one prefill."""
    model, found = tiny(), []
    with torch.no_grad(), prune(model, config) as run:
        cache, fed = None, 0
        for _ in range(turns):
            made: list[int] = []
            feed = torch.tensor([ids[fed:]])
            while len(made) < new:
                given = {} if cache is None else {CACHE: cache}
                output = model(feed, use_cache=True, **given)
                cache = output.cache
                made.append(int(output.logits[0, -1].argmax()))
                feed = torch.tensor([[made[-1]]])
            fed, ids = len(ids) + new - 1, (*ids, *made, *NEXT)
            found.append((tuple(made), run.report()))
    return found


@pytest.mark.parametrize("config", [None, half(), DECAYED, half("dart-prompt")])
def test_turns_are_those_of_one_sequence(engine: Engine, config: Any) -> None:
    wanted = by_hand(config or "dense", PROMPT, 3)
    ids, read, decoded = PROMPT, 0, 0
    for number, (made, report) in enumerate(wanted):
        answer, records = turn(engine, config, ids)
        assert answer.tokens[0] == made
        cached = len(ids) - len(NEXT) - 1 if number else 0
        assert (answer.usage.prompt_tokens, answer.usage.cached_tokens) == (len(ids), cached)
        assert answer.timings.prompt_n == len(ids) - cached
        # this turn alone
        assert answer.report.prompt_tokens == report.prompt_tokens - read == len(ids) - cached
        assert answer.report.decoded_tokens == report.decoded_tokens - decoded == 9
        read, decoded = report.prompt_tokens, report.decoded_tokens
        if config is not None and number and not config.min_evidence:
            assert [r.remask.cause for r in records if r.kind == "remask"] == ["prompt"]
            assert answer.report.achieved_sparsity == 0.5
        ids = (*ids, *made, *NEXT)
    with torch.no_grad():  # and nothing but this text is in the cache
        whole = own_model()(torch.tensor([ids[: -len(NEXT)]])).logits[0, -1]
    if config is None:
        assert int(whole.argmax()) == ask(engine, None, ids[: -len(NEXT)])[0].tokens[0][0]


def test_evidence_of_earlier_turns_is_decayed(engine: Engine) -> None:
    first, _ = turn(engine, DECAYED, PROMPT)
    _, records = turn(engine, DECAYED, (*PROMPT, *first.tokens[0], *NEXT))
    found = next(record.remask for record in records if record.kind == "remask")
    assert found.evidence_tokens == pytest.approx(0.1 * len(PROMPT) + len(NEXT) + 1)


def test_other_settings_and_other_texts_start_anew(engine: Engine) -> None:
    first, _ = turn(engine, half(), PROMPT)
    longer = (*PROMPT, *first.tokens[0], *NEXT)
    for config, ids in (
        (half("griffin", masking_step=2), longer),  # other settings
        (half("griffin", masking_step=2), (9, *longer)),  # another text
        (half("griffin", masking_step=2), PROMPT),  # an older turn, asked again
        (None, longer),
    ):
        answer, _ = turn(engine, config, ids)
        fresh, _ = ask(engine, config, ids, 10)
        assert answer.usage.cached_tokens == 0
        assert answer.tokens == fresh.tokens
        assert answer.report.to_dict() == fresh.report.to_dict()


def test_names_are_apart_and_the_oldest_goes(engine: Engine) -> None:
    made = {}
    for name in "abc":
        made[name], _ = turn(engine, half(), PROMPT, name=name)
    cached = {}
    for name in "cba":
        ids = (*PROMPT, *made[name].tokens[0], *NEXT)
        cached[name] = turn(engine, half(), ids, name=name)[0].usage.cached_tokens
    assert cached == {"a": 0, "b": len(PROMPT) + 9, "c": len(PROMPT) + 9}
    engine.forget("b")
    engine.forget("nobody")
    ids = (*PROMPT, *made["b"].tokens[0], *NEXT)
    assert turn(engine, half(), ids, name="b")[0].usage.cached_tokens == 0


def test_no_conversations() -> None:
    with Engine(own_model(), tokenizer(), conversations=0) as engine:
        first, _ = turn(engine, None, PROMPT)
        again, _ = turn(engine, None, (*PROMPT, *first.tokens[0], *NEXT))
        assert again.usage.cached_tokens == 0 and len(engine._kept) == 0


def test_the_end_of_an_answer_may_be_left_out(engine: Engine) -> None:
    """A stop string was decoded and is no part of what comes back."""
    config = half(masking_step=2)
    plain, _ = ask(engine, config, new=20)
    stop = plain.texts[0][8:11]
    first, _ = ask(engine, config, new=20, conversation="a", stop=(stop,))
    kept = first.tokens[0][: len(first.tokens[0]) - 3]
    ids = (*PROMPT, *kept, *NEXT)
    answer, _ = turn(engine, config, ids)
    assert answer.usage.cached_tokens == len(PROMPT) + len(kept)
    assert answer.report.prompt_tokens == len(NEXT)
    assert answer.report.decoded_tokens == 9
    # its cache is that of the text: dense from here it says what the dense model says
    dense, _ = ask(engine, None, new=20, conversation="b", stop=(stop,))
    back = (*PROMPT, *dense.tokens[0][:4], *NEXT)
    answer, _ = turn(engine, None, back, name="b")
    assert answer.usage.cached_tokens == len(PROMPT) + 4
    assert answer.tokens == ask(engine, None, back, 10)[0].tokens


def test_a_cancelled_turn_goes_on(engine: Engine) -> None:
    def cancelled(records: list[Record], count: int) -> Answer:
        made = lambda: sum(r.kind == "token" for r in records) >= count  # noqa: E731
        return engine.run(Ask(PROMPT, Sampling(), half(), "a"), records.append, made)

    first = cancelled([], 6)
    assert first.finish == ("cancelled",)
    answer, _ = turn(engine, half(), (*PROMPT, *first.tokens[0], *NEXT))
    assert answer.usage.cached_tokens == len(PROMPT) + 5
    engine.run(Ask(PROMPT, Sampling(), half(), "a"), cancelled=lambda: True)
    assert turn(engine, half(), (*PROMPT, *NEXT))[0].usage.cached_tokens == 0


def test_sliding_windows_are_not_cut() -> None:
    """What slid out of a window is gone: a text that takes tokens back is read anew."""
    model = own_model("gemma3")
    with Engine(model, tokenizer()) as engine:
        first, _ = turn(engine, half(), PROMPT)
        ids = (*PROMPT, *first.tokens[0], *NEXT)
        assert turn(engine, half(), ids)[0].usage.cached_tokens == len(PROMPT) + 9
        again, _ = turn(engine, half(), (*PROMPT, *first.tokens[0][:3], *NEXT))
        assert again.usage.cached_tokens == 0
