"""The engine with native kernels, screened head, default model; conversations; tokens and text."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.data.texts import chat_ids
from dart_llm.engine.engine import Engine
from dart_llm.engine.request import Pieces, Sampler, StopFinder
from dart_llm.engine.requests import Check, Sampling
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.errors import ConfigError, DartError
from dart_llm.models.checkpoint import remember_tokenizer
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.records import DriftCheck
from dart_llm.session.generation import HALF, TextStream
from dart_llm.session.run import prune
from engine_cases import PROMPT, alone, ask, half, own_model, tokenizer
from steps import CACHE, Same, storages
from tiny import VOCAB, tiny, tokens

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
NEW = 12
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
    model, answers, cache, fed = tiny(), [], {}, 0
    with prune(model, config) as run:
        for _ in range(turns):
            made, feed = [], ids[fed:]
            while len(made) < new:
                output = model(torch.tensor([feed]), use_cache=True, **cache)
                cache, feed = {CACHE: output.cache}, [int(output.logits[0, -1].argmax())]
                made += feed
            fed, ids = len(ids) + new - 1, (*ids, *made, *NEXT)
            answers.append((tuple(made), run.report()))
    return answers


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


def test_turns_after_a_stop_string_and_after_a_cancelled_turn(engine):
    """A stop string was decoded and is no part of what comes back."""
    config = half(masking_step=2)
    plain, _ = ask(engine, config, new=20)
    stop = plain.texts[0][8:11]
    first, _ = ask(engine, config, new=20, conversation="a", stop=(stop,))
    kept = first.tokens[0][: len(first.tokens[0]) - 3]
    answer, _ = turn(engine, config, (*PROMPT, *kept, *NEXT))
    assert answer.usage.cached_tokens == len(PROMPT) + len(kept)
    assert (answer.report.prompt_tokens, answer.report.decoded_tokens) == (len(NEXT), 9)
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


TEXTS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=40)


def chances(seed, size=300):
    return torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * 2


def drawn(logits, count, **settings):
    sampler = Sampler(Sampling(seed=1, **settings))
    sampled = torch.tensor([sampler.choose(logits)[0] for _ in range(count)])
    return torch.bincount(sampled, minlength=logits.shape[1]) / count


def test_tokens_come_as_often_as_they_should():
    logits = chances(0, 8)
    for temperature in (0.5, 2.0):
        wanted = torch.softmax(logits[0] / temperature, 0)
        assert torch.allclose(drawn(logits, 10000, temperature=temperature), wanted, atol=0.02)


@pytest.mark.parametrize(("top_p", "seed"), [(0.05, 0), (0.3, 1), (0.9, 2), (0.9999, 3)])
def test_top_p_keeps_the_likeliest(top_p, seed):
    logits = chances(seed)
    order = torch.softmax(logits[0].double(), 0).sort(descending=True)
    inside = int((order.values.cumsum(0) < top_p).sum()) + 1
    shares = drawn(logits, 3000, temperature=1.0, top_p=top_p)
    allowed = set(order.indices[:inside].tolist())
    assert set(shares.nonzero().flatten().tolist()) <= allowed
    wanted = order.values[0] / order.values[:inside].sum()
    assert float(shares[order.indices[0]]) == pytest.approx(float(wanted), abs=0.04)


def test_greedy_and_almost_greedy():
    logits = torch.cat([chances(seed) for seed in range(3)])
    best = logits.argmax(-1).tolist()
    assert Sampler(Sampling(n=3)).choose(logits) == best
    for temperature, top_p in ((1.0, 1e-9), (1e-9, 1.0), (1e-45, 0.9), (5e-324, 1.0)):
        sampler = Sampler(Sampling(n=3, temperature=temperature, top_p=top_p, seed=0))
        assert sampler.choose(logits) == best
    for bad in (float("nan"), float("inf")):
        logits[0, 7] = bad
        with pytest.raises(DartError, match="not finite"):
            Sampler(Sampling()).choose(logits)


def test_seeds():
    flat = torch.zeros(3, 1000)

    def three(seed):
        sampler = Sampler(Sampling(n=3, temperature=1.0, seed=seed))
        return [sampler.choose(flat) for _ in range(4)]

    assert three(5) == three(5)
    assert three(5) != three(6) and three(None) != three(None)
    rows = list(zip(*three(5), strict=True))
    assert len(set(rows)) == 3
    alone = Sampler(Sampling(temperature=1.0, seed=5))
    assert tuple(alone.choose(flat[:1])[0] for _ in range(4)) == rows[0]


WRONG = [
    *({"temperature": value} for value in (-1.0, float("nan"), float("inf"))),
    *({"top_p": value} for value in (0.0, 1.5)),
    *({"n": value} for value in (0, 129)),
    *({"stop": value} for value in (("a", ""), ("a",) * 17)),
    *({"logprobs": value} for value in (-1, 21)),
    {"max_tokens": 0},
    {"seed": 2**63},
]


@pytest.mark.parametrize("given", WRONG, ids=repr)
def test_values_out_of_range_are_named(given):
    (name,) = given
    with pytest.raises(ConfigError, match=f"^{name} .* must be "):
        Sampling(**given)


def first_end(text, stops):
    """End and beginning of the stop string that is complete first, the longest of several."""
    spans = [
        (end, end - len(stop))
        for end in range(len(text) + 1)
        for stop in stops
        if text[:end].endswith(stop)
    ]
    return min(spans, default=None)


@settings(deadline=None)
@given(TEXTS, STOPS, st.data())
def test_stop_strings_do_not_depend_on_how_a_text_is_cut(text, stops, data):
    finder, shown, rest = StopFinder(stops), "", text
    begun = {stop[:n] for stop in stops for n in range(1, len(stop))}
    while rest and not finder.found:
        cut = data.draw(st.integers(1, len(rest)))
        shown += finder.add(rest[:cut])
        rest = rest[cut:]
        seen = text[: len(text) - len(rest)]
        if not finder.found:
            # nothing that may belong to a stop string, and nothing more than that, is held back
            ends = (n for n in range(len(seen) + 1) if seen[len(seen) - n :] in begun or not n)
            assert seen.startswith(shown) and len(seen) - len(shown) == max(ends)
    end = first_end(text, stops)
    assert finder.found == (end is not None)
    if end is None:
        assert shown + finder.end() == text
    else:
        assert shown == text[: end[1]] and finder.end() == ""


@settings(deadline=None)
@given(IDS)
def test_streamed_text_and_pieces_are_the_decoded_text(ids):
    stream = TextStream(tokenizer())
    shown = "".join(stream.add(token) for token in ids)
    whole = tokenizer().decode(ids, skip_special_tokens=True)
    assert whole.startswith(shown)
    assert not shown.endswith(HALF) and shown + stream.end() == whole
    pieces = Pieces(tokenizer()).of(ids)
    assert len(pieces) == len(ids)
    if HALF not in (whole := tokenizer().decode(ids)):
        assert "".join(pieces) == whole


def test_a_character_comes_when_it_is_whole():
    pieces = Pieces(tokenizer())
    ids = tokenizer()("<s>é b</s>").input_ids
    assert pieces.of(ids) == ["<s>", "", "é", " ", "b", "</s>"]
    assert pieces[ids[0]] == "<s>" and pieces[ids[1]] == HALF
    assert pieces.of(ids[:2]) == ["<s>", HALF]


@pytest.mark.parametrize(
    ("state", "similarity", "shown"),
    [("arming", 0.0, None), ("arming", 0.4, 0.4), ("armed", 0.0, 0.0), ("suppressed", 0.3, 0.3)],
)
def test_the_first_window_has_no_similarity(state, similarity, shown):
    values = {field.name: 0 for field in dataclasses.fields(DriftCheck)}
    check = DriftCheck(**{**values, "state": state, "similarity": similarity})
    assert Check(check).to_dict()["similarity"] == shown
