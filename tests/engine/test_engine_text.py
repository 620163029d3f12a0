"""The next token: from which ones, how often, the same again.  Its text: whole, without stops."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.engine.request import Pieces, Sampler, StopFinder
from dart_llm.engine.requests import Check, Sampling
from dart_llm.errors import ConfigError, DartError
from dart_llm.pruning.records import DriftCheck
from dart_llm.session.generation import HALF, TextStream
from engine_cases import tokenizer
from tiny import VOCAB

TEXTS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=40)


def chances(seed, size=300):
    return torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * 2


def drawn(logits, count, **settings):
    sampler = Sampler(Sampling(seed=1, **settings))
    found = torch.tensor([sampler.choose(logits)[0] for _ in range(count)])
    return torch.bincount(found, minlength=logits.shape[1]) / count


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
    found = drawn(logits, 3000, temperature=1.0, top_p=top_p)
    allowed = set(order.indices[:inside].tolist())
    assert set(found.nonzero().flatten().tolist()) <= allowed
    wanted = order.values[0] / order.values[:inside].sum()
    assert float(found[order.indices[0]]) == pytest.approx(float(wanted), abs=0.04)


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
    found = [
        (end, end - len(stop))
        for end in range(len(text) + 1)
        for stop in stops
        if text[:end].endswith(stop)
    ]
    return min(found, default=None)


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
