"""Turns of a conversation: what is kept, what goes on, what is counted, what is given up."""

import pytest
import torch

from dart_llm.engine.engine import Engine
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling
from dart_llm.session.run import prune
from engine_cases import PROMPT, ask, half, own_model, tokenizer
from steps import CACHE
from tiny import tiny, tokens

NEXT = tuple(tokens(1, 12, seed=7)[0].tolist())
DECAYED = half(remask={"evidence": "decay", "decay": 0.1, "observe_tokens": 4})


@pytest.fixture
def engine():
    with Engine(own_model(), tokenizer(), conversations=2) as engine:
        yield engine


def turn(engine, config, ids, name="a"):
    return ask(engine, config, ids, 10, name)


@torch.no_grad()
def by_hand(config, ids, turns, new=10):
    """The same turns by bare forwards in one block, each prompt part as one prefill."""
    model, found, cache, fed = tiny(), [], {}, 0
    with prune(model, config) as run:
        for _ in range(turns):
            made, feed = [], ids[fed:]
            while len(made) < new:
                output = model(torch.tensor([feed]), use_cache=True, **cache)
                cache, feed = {CACHE: output.cache}, [int(output.logits[0, -1].argmax())]
                made += feed
            fed, ids = len(ids) + new - 1, (*ids, *made, *NEXT)
            found.append((tuple(made), run.report()))
    return found


@pytest.mark.parametrize("config", [None, half(), DECAYED, half("dart-prompt")])
def test_turns_are_those_of_one_sequence(engine, config):
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
        remasks = [r.remask for r in records if r.kind == "remask"]
        if config is not None and number and not config.min_evidence:
            assert [one.cause for one in remasks] == ["prompt"]
            assert answer.report.achieved_sparsity == 0.5
        if config is DECAYED and number == 1:  # evidence of earlier turns is decayed
            expected = 0.1 * len(PROMPT) + len(NEXT) + 1
            assert remasks[0].evidence_tokens == pytest.approx(expected)
        ids = (*ids, *made, *NEXT)
    if config is None:  # and nothing but this text is in the cache
        said = ids[: -len(NEXT)]
        with torch.no_grad():
            whole = own_model()(torch.tensor([said])).logits[0, -1]
        assert int(whole.argmax()) == ask(engine, None, said)[0].tokens[0][0]


def test_other_settings_and_other_texts_start_anew(engine):
    first, _ = turn(engine, half(), PROMPT)
    longer, late = (*PROMPT, *first.tokens[0], *NEXT), half("griffin", masking_step=2)
    # other settings, another text, an older turn asked again, dense
    for config, ids in ((late, longer), (late, (9, *longer)), (late, PROMPT), (None, longer)):
        answer, _ = turn(engine, config, ids)
        fresh, _ = ask(engine, config, ids, 10)
        assert answer.usage.cached_tokens == 0
        assert answer.tokens == fresh.tokens
        assert answer.report.to_dict() == fresh.report.to_dict()


def test_names_are_apart_and_the_oldest_goes(engine):
    made = {name: turn(engine, half(), PROMPT, name)[0].tokens[0] for name in "abc"}

    def cached(engine, name):
        answer, _ = turn(engine, half(), (*PROMPT, *made[name], *NEXT), name)
        return answer.usage.cached_tokens

    assert [cached(engine, name) for name in "cba"] == [len(PROMPT) + 9, len(PROMPT) + 9, 0]
    engine.forget("b")
    engine.forget("nobody")
    assert cached(engine, "b") == 0
    with Engine(tiny(), tokenizer(), conversations=0) as none:
        turn(none, half(), PROMPT)
        assert cached(none, "a") == 0 and len(none._conversations) == 0


def test_the_end_of_an_answer_may_be_left_out(engine):
    """A stop string was decoded and is no part of what comes back."""
    config = half(masking_step=2)
    plain, _ = ask(engine, config, new=20)
    stop = plain.texts[0][8:11]
    first, _ = ask(engine, config, new=20, conversation="a", stop=(stop,))
    kept = first.tokens[0][: len(first.tokens[0]) - 3]
    answer, _ = turn(engine, config, (*PROMPT, *kept, *NEXT))
    assert answer.usage.cached_tokens == len(PROMPT) + len(kept)
    assert (answer.report.prompt_tokens, answer.report.decoded_tokens) == (len(NEXT), 9)


def test_a_cancelled_turn_goes_on(engine):
    records = []
    made = lambda: sum(r.kind == "token" for r in records) >= 6  # noqa: E731
    first = engine.run(Ask(PROMPT, Sampling(), half(), "a"), records.append, made)
    assert first.finish == ("cancelled",)
    answer, _ = turn(engine, half(), (*PROMPT, *first.tokens[0], *NEXT))
    assert answer.usage.cached_tokens == len(PROMPT) + 5
    engine.run(Ask(PROMPT, Sampling(), half(), "a"), cancelled=lambda: True)
    assert turn(engine, half(), (*PROMPT, *NEXT))[0].usage.cached_tokens == 0


def test_sliding_windows_are_not_cut():
    """What slid out of a window is gone: a text that takes tokens back is read anew."""
    with Engine(own_model("gemma3"), tokenizer()) as engine:
        first, _ = turn(engine, half(), PROMPT)
        ids = (*PROMPT, *first.tokens[0], *NEXT)
        assert turn(engine, half(), ids)[0].usage.cached_tokens == len(PROMPT) + 9
        again, _ = turn(engine, half(), (*PROMPT, *first.tokens[0][:3], *NEXT))
        assert again.usage.cached_tokens == 0
