"""Slices, windows of ``standard``, and the slices of ``continuation`` and ``shift``."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as checked
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from dart_llm.data.documents import Source
from dart_llm.errors import ConfigError
from dart_llm.evaluation import tasks
from dart_llm.evaluation import windows as cutting
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.parts import MemoryStore
from dart_llm.evaluation.windows import LEAD, cut, slice_windows, standard_windows
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import BoundMethod, Run
from lm_cases import loaded
from quality_cases import OPTIONS, PROMPT, TOKENS, bees, loans, write_texts


def spans(windows):
    """(begin, end, first scored token) of every window, in tokens of the text."""
    return [(w.start, w.start + len(w.ids), w.start + w.first) for w in windows]


def test_a_window_scores_only_what_no_window_scored_yet():
    windows = standard_windows(torch.arange(25), 10)
    assert spans(windows) == [(0, 10, 1), (10, 20, 11), (20, 25, 21)]
    assert [w.before.tolist() for w in windows] == [[], list(range(10)), list(range(10, 20))]
    windows = standard_windows(torch.arange(25), 10, 4)
    assert spans(windows) == [(0, 10, 1), (4, 14, 10), (8, 18, 14), (12, 22, 18), (16, 25, 22)]
    assert [w.scored for w in windows] == [9, 4, 4, 4, 3]
    assert [len(w.before) for w in windows] == [0, 4, 8, 10, 10], "at most one window's worth"


def test_slices_are_evenly_spaced_or_a_seeded_choice_that_grows():
    windows = slice_windows(torch.arange(100), 3, 6, 4)
    assert spans(windows) == [(0, 10, 6), (45, 55, 51), (90, 100, 96)]
    assert len(slice_windows(torch.arange(109), None, 6, 4)) == 10
    few, more, other = (
        {w.id for w in slice_windows(torch.arange(200), limit, 6, 4, seed=seed)}
        for limit, seed in ((3, 1), (8, 1), (8, 2))
    )
    assert len(few) == 3 and few < more and more != other
    assert all(start % 10 == 0 for start in more)


STANDARD = MeasureOptions(protocol="standard", window=2048)


def test_the_model_s_context_bounds_the_window_with_a_note():
    windows, notes = cut(torch.arange(300), STANDARD, 128)
    assert [len(w.ids) for w in windows] == [128, 128, 44]
    assert len(notes) == 1 and "windows of 128 tokens" in notes[0] and "2048" in notes[0]
    assert cut(torch.arange(4096), STANDARD, 8192)[1] == ()
    assert len(cut(torch.arange(300), replace(STANDARD, stride=512), 128)[0]) == 3


ids = torch.arange
GAPS = "at least 2 tokens and a stride from 1 to the window"
WIDE = replace(STANDARD, window=100, stride=300)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: standard_windows(ids(9), 10), "9 tokens, fewer than one window of 10: give a lo"),
        (lambda: standard_windows(ids(30), 1), GAPS),
        (lambda: slice_windows(ids(9), 2, 6, 4), "9 tokens; a slice needs 6 prompt"),
        (lambda: slice_windows(ids(99), 2, 1, 4), "at least 2 prompt tokens"),
        (lambda: slice_windows(ids(99), 0, 6, 4), "must be 1 or more, not 0"),
        (lambda: cut(ids(300), WIDE, None), "stride 300 is larger than the window of 100"),
        (lambda: cut(ids(9), replace(STANDARD, protocol="standart"), None), "did you mean standar"),
    ],
)
def test_windows_that_cannot_be_cut(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


class Letters:
    """One token per character; ``start``: a token before every text."""

    bos_token_id = 1

    def __init__(self, start=False):
        self.start = start

    def __call__(self, text, add_special_tokens=True, **more):
        start = [1] if self.start and add_special_tokens else []
        return {"input_ids": start + [ord(character) for character in text]}


def words(ids):
    return "".join(map(chr, ids.tolist()))


@checked(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=0, max_size=40), st.integers(3, 25))
def test_the_sets_never_share_a_document(lengths, size):
    """Every document has its own letter, so that slices show where they come from."""
    source = Source("s", tuple(chr(0x4E00 + n) * length for n, length in enumerate(lengths)))
    used = {}
    for which in ("choose", "report"):
        slices = list(cutting.cut_source(source, which, Letters(), size))
        letters = {letter for each in slices for letter in words(each.body)} - {"\n"}
        used[which] = {place for each in slices for place in each.documents}
        assert letters <= {source.documents[place][0] for place in used[which]}
        assert all(len(each.body) == size for each in slices)
        assert used[which] <= {place for place, _ in source.half(which)}
    assert not used["choose"] & used["report"]
    halves = [len(source.half(which)) for which in ("choose", "report")]
    assert sum(halves) == len(lengths) and halves[1] - halves[0] in (0, 1)


def windows(*sources, limit=2, shift=True, which="report", tokenizer=None, **sizes):
    options = replace(OPTIONS, limit=limit, **sizes)
    return cutting.topic_windows(sources, which, tokenizer or loaded()[1], options, shift)


def test_slices_are_cut_joined_and_evenly_spaced():
    source = Source("s", (*"----", "ab", "cdefghijklm", "op", "qr", "stuv"))
    slices = cutting.cut_source(source, "report", Letters(), 5)
    slices = [(words(each.body), each.documents) for each in slices]
    # c to m gives two whole slices; ab + \n\n + op is the first to fill one of the short ones
    assert slices == [("cdefg", (5,)), ("hijkl", (5,)), ("ab\n\no", (4, 6, 7))]
    half = Source("s", (*["-"] * 10, *(chr(97 + n) * 74 for n in range(10))))
    sizes = {"prompt_tokens": 10, "scored_tokens": 9, "tokenizer": Letters()}
    for limit, letters in ((4, "adgj"), (10, "abcdefghij"), (1, "a")):
        made = windows(half, limit=limit, shift=False, **sizes)
        assert "".join(words(each.ids)[0] for each in made) == letters
        assert [each.id for each in made] == [f"s/{n}" for n in range(limit)]


def test_second_topics():
    tokenizer, made = loaded()[1], windows(bees(), loans())
    assert [each.id for each in made] == ["bees/0", "bees/1", "loans/0", "loans/1"]
    text = tokenizer.decode(made[0].ids)
    assert text[: PROMPT + LEAD] in bees().documents[4]
    assert text[PROMPT + LEAD :] in loans().documents[12]
    assert (made[0].first, made[0].lead, made[0].scored) == (PROMPT, LEAD, TOKENS)
    plain = windows(bees(), loans(), shift=False)[0]
    assert (plain.first, plain.lead, plain.scored) == (PROMPT, 0, TOKENS)
    assert torch.equal(plain.ids[:PROMPT], made[0].ids[:PROMPT])
    letters = Source("s", (*"----", *(letter * 150 for letter in "abcd")))
    for each in windows(letters, limit=4, tokenizer=Letters()):  # another document of one source
        assert len(set(words(each.ids))) == 2 and each.ids[0] != each.ids[PROMPT + LEAD]
    single = Source("one", ("-", bees().documents[0] * 4))
    with pytest.raises(ConfigError, match='the only text, "one", has no slice of another document'):
        windows(single)
    assert [each.id for each in windows(single, shift=False)] == ["one/0", "one/1"]
    for shift in (False, True):  # a start token at the start, and not before the second topic
        made = windows(bees(), loans(), shift=shift, tokenizer=Letters(start=True))
        assert [n for n, token in enumerate(made[0].ids.tolist()) if token == 1] == [0]


def test_too_little_text_says_how_much_there_is():
    with pytest.raises(ConfigError, match=r'"bees" has 8 slices of 134 tokens .* but 9 are needed'):
        windows(bees(), limit=9)
    with pytest.raises(ConfigError, match="has no slices of 134 tokens in its set choose"):
        windows(bees(1), limit=1, which="choose")


@pytest.fixture
def texts(tmp_path):
    """The names of two texts, as a task has them."""
    return "+".join(map(str, write_texts(tmp_path)))


def measured(texts, kind, config=None, **changes):
    candidate = BoundMethod(*loaded(), config)
    options = replace(OPTIONS, limit=1, **changes)
    return tasks.measure(candidate, f"{kind}:{texts}#report", options, MemoryStore())


def test_the_untouched_model_by_one_plain_forward(texts):
    """No cache, no chunks; the last tokens of a slice are scored in either task."""
    for kind in ("continuation", "shift"):
        ids = windows(bees(), loans(), limit=1, shift=kind == "shift")[0].ids
        with torch.inference_mode():
            logits = loaded()[0](ids[None]).logits[0, -TOKENS - 1 : -1]
        result = measured(texts, kind)
        loss = float(cross_entropy(logits, ids[-TOKENS:]))
        assert result.items[0]["mean_loss"] == pytest.approx(loss, abs=1e-5)
        named = [(item["id"], item["source"]) for item in result.items]
        assert named == [("bees/0", "bees"), ("loans/0", "loans")]
        assert (result.items[0]["tokens"], result.accounting) == (TOKENS, None)
        assert result.metrics["tokens"] == 2 * TOKENS


@torch.inference_mode()
def step_by_step(run, ids, moment):
    """Losses of single steps after the prompt; a new mask is forced before step ``moment``."""
    model, losses = run.model, []
    output = model(ids[None, : PROMPT - 1], use_cache=True)
    for step, place in enumerate(range(PROMPT - 1, len(ids) - 1)):
        run.tokens_until_change()
        if step == moment:
            run.controller.flush()
            with torch.inference_mode(False):
                run.controller.sequences[-1].trigger("forced")
        with run.decoding():
            output = model(ids[None, place : place + 1], cache=output.cache)
        losses.append(float(cross_entropy(output.logits[0, -1:], ids[None, place + 1])))
    return losses


def test_an_oracle_makes_the_new_topic_begin_dense(texts):
    changes = {"drift": "never", "remask": {"observe_tokens": 9}, "compensation": False}
    config = PruneConfig.build("dart", sparsity=0.5, **changes)
    result = measured(texts, "shift", config, oracle=True)
    assert result.accounting["remasks"] == 2  # one in each slice
    assert result.accounting["dense_token_share"] == pytest.approx(9 / (LEAD + TOKENS))
    # step 0 feeds the prompt's last token, so step LEAD + 1 the new topic's first
    ids, second = windows(bees(), loans(), limit=1)[0].ids, loans().documents[12]
    assert loaded()[1].decode(ids[PROMPT - 1 + cutting.MOMENT :]) == second[:TOKENS]
    with Run(loaded()[0], config) as run:
        slow = step_by_step(run, ids, cutting.MOMENT)
    mean = sum(slow[-TOKENS:]) / TOKENS
    assert result.items[0]["mean_loss"] == pytest.approx(mean, abs=2e-5)
    assert result.items != measured(texts, "shift", config).items


def test_a_slice_that_ran_dense_or_does_not_fit_is_refused(texts):
    late = PruneConfig.build("dart", sparsity=0.5, min_evidence=PROMPT + LEAD + TOKENS + 1)
    with pytest.raises(ConfigError, match=r"all 40 scored tokens of a slice ran dense"):
        measured(texts, "continuation", late)
    with pytest.raises(ConfigError, match="of up to 1104 tokens are longer than the model's con"):
        measured(texts, "continuation", prompt_tokens=1000)
