"""The tasks ``continuation`` and ``shift``: sets, slices, second topics, and their measurement."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as checked
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from dart_llm.data.documents import Source
from dart_llm.errors import ConfigError
from dart_llm.evaluation import tasks
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.slices import (
    CONTINUATION,
    LEAD,
    MOMENT,
    SHIFT,
    Pair,
    Shape,
    Slice,
    cut,
    pairs,
)
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.prepare import MemoryStore
from dart_llm.session.run import BoundMethod, Run
from lm_cases import loaded
from quality_cases import PROMPT, SHAPE, TOKENS, bees, loans, read_pairs, write_texts


class Letters:
    """One token per character; ``start``: a token before every text."""

    bos_token_id = 1

    def __init__(self, start=False):
        self.start = start

    def __call__(self, text, add_special_tokens=True, **more):
        own = [1] if self.start and add_special_tokens else []
        return {"input_ids": own + [ord(character) for character in text]}


def words(ids):
    return "".join(map(chr, ids.tolist()))


@checked(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=0, max_size=40), st.integers(3, 25))
def test_the_sets_never_share_a_document(lengths, size):
    """Every document has letters of its own, so that slices say where they come from."""
    source = Source("s", tuple(chr(0x4E00 + n) * length for n, length in enumerate(lengths)))
    used = {}
    for which in ("choose", "report"):
        found = list(cut(source, which, Letters(), size))
        letters = {letter for one in found for letter in words(one.body)} - {"\n"}
        named = {place for one in found for place in one.documents}
        assert letters <= {source.documents[place][0] for place in named}
        assert all(len(one.body) == size for one in found)
        used[which] = named
        assert named <= {place for place, _ in source.half(which)}
    assert not used["choose"] & used["report"]
    halves = [len(source.half(which)) for which in ("choose", "report")]
    assert sum(halves) == len(lengths) and halves[1] - halves[0] in (0, 1)


def test_slices_are_cut_joined_and_evenly_spaced():
    source = Source("s", (*"----", "ab", "cdefghijklm", "op", "qr", "stuv"))
    found = [(words(one.body), one.documents) for one in cut(source, "report", Letters(), 5)]
    # c to m gives two whole slices; ab + \n\n + op is the first to fill one of the short ones
    assert found == [("cdefg", (5,)), ("hijkl", (5,)), ("ab\n\no", (4, 6, 7))]
    half = Source("s", (*["-"] * 10, *(chr(97 + n) * 74 for n in range(10))))
    for wanted, letters in ((4, "adgj"), (10, "abcdefghij"), (1, "a")):
        made = pairs([half], "report", Letters(), Shape(10, 9), wanted, shift=wanted > 1)
        assert "".join(words(pair.first.body)[0] for pair in made) == letters
        assert [pair.first.id for pair in made] == [f"s/{n}" for n in range(wanted)]


def test_windows_of_both_cells():
    first, second = (
        Slice(name, 0, torch.arange(140) + base, (0,)) for name, base in (("a", 1000), ("b", 5000))
    )
    pair = Pair(first, second, (), Shape(70, 40))
    one, two = pair.window(CONTINUATION), pair.window(SHIFT)
    assert one.ids.tolist() == list(range(1000, 1110)) and one.first == 70
    assert two.ids.tolist() == [*range(1000, 1000 + 70 + LEAD), *range(5000, 5040)]
    assert (two.first, two.scored) == (70, LEAD + 40)
    pair = Pair(first, second, (7,), Shape(70, 40))  # a start token counts as one of the prompt's
    assert pair.window(CONTINUATION).ids.tolist() == [7, *range(1000, 1109)]
    assert pair.window(SHIFT).ids.tolist() == [7, *range(1000, 1069 + LEAD), *range(5000, 5040)]
    (made, *_) = pairs([bees(), loans()], "report", Letters(start=True), SHAPE, 2)
    assert len(made.first.body) == SHAPE.size - 1
    for cell in (CONTINUATION, SHIFT):  # and not before the second topic
        assert [n for n, one in enumerate(made.window(cell).ids.tolist()) if one == 1] == [0]


def test_second_topics():
    made = read_pairs(2)
    assert [pair.first.id for pair in made] == ["bees/0", "bees/1", "loans/0", "loans/1"]
    assert [pair.second.id for pair in made] == ["loans/0", "loans/1", "bees/0", "bees/1"]
    ids = made[0].window(SHIFT).ids
    text = loaded()[1].decode(ids)
    assert text[: PROMPT + LEAD] in bees().documents[4]
    assert text[PROMPT + LEAD :] in loans().documents[12] and len(ids) == PROMPT + LEAD + TOKENS
    for pair in read_pairs(4, bees()):  # one source alone: another document of it
        assert not set(pair.first.documents) & set(pair.second.documents)
    single = Source("one", ("-", bees().documents[0] * 4))
    with pytest.raises(ConfigError, match='"one" is all there is, and no other slice of it is of'):
        read_pairs(2, single)
    made = pairs([single], "report", loaded()[1], SHAPE, 2, shift=False)
    assert [pair.first.id for pair in made] == ["one/0", "one/1"]


def test_too_little_text_says_how_much_there_is(snapshot):
    with pytest.raises(ConfigError) as error:
        read_pairs(9, bees())
    assert str(error.value) == snapshot
    with pytest.raises(ConfigError, match="has no slices of 134 tokens in its set choose"):
        pairs([bees(1)], "choose", loaded()[1], SHAPE, 1)


OPTIONS = MeasureOptions(limit=1, prompt_tokens=PROMPT, scored_tokens=TOKENS)


@pytest.fixture
def texts(tmp_path):
    """The names of two texts, as a task has them."""
    return "+".join(map(str, write_texts(tmp_path)))


def measured(texts, kind, config=None, **changes):
    candidate = BoundMethod(*loaded(), config)
    options = OPTIONS if not changes else MeasureOptions(**{**vars(OPTIONS), **changes})
    task = f"{kind}:{texts}#report"
    return tasks.measure(candidate, task, options, MemoryStore(), lambda items: None)


def mean(losses):
    return sum(losses) / len(losses)


def test_the_untouched_model_by_one_plain_forward(texts):
    """No cache, no chunks; the last tokens of a slice are scored in either task."""
    model, pair = loaded()[0], read_pairs(1)[0]
    for kind in (CONTINUATION, SHIFT):
        ids = pair.window(kind).ids
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, -TOKENS - 1 : -1]
        found = measured(texts, kind)
        assert found.items[0]["mean_loss"] == pytest.approx(
            float(cross_entropy(logits, ids[-TOKENS:])), abs=1e-5
        )
        assert [item["id"] for item in found.items] == ["bees/0", "loans/0"]
        assert (found.items[0]["tokens"], found.accounting) == (TOKENS, None)


@torch.inference_mode()
def step_by_step(run, ids, moment=None):
    """Losses of single steps after the prompt; a new mask is asked for before step ``moment``."""
    model, kept = run.model, []
    output = model(ids[None, : PROMPT - 1], use_cache=True)
    for step, place in enumerate(range(PROMPT - 1, len(ids) - 1)):
        run.tokens_until_change()
        if step == moment:
            run.controller.flush()
            with torch.inference_mode(False):
                run.controller.sequences[-1].trigger("forced")
        with run.decoding():
            output = model(ids[None, place : place + 1], cache=output.cache)
        kept.append(float(cross_entropy(output.logits[0, -1:], ids[None, place + 1])))
    return kept


def test_an_oracle_makes_the_new_topic_begin_dense(texts):
    config = PruneConfig.build(
        "dart", sparsity=0.5, drift="never", remask={"observe_tokens": 9}, compensation=False
    )
    found, pair = measured(texts, SHIFT, config, oracle=True), read_pairs(1)[0]
    assert found.accounting["remasks"] == 2  # one in each slice
    assert found.accounting["dense_token_share"] == pytest.approx(9 / (LEAD + TOKENS))
    # step 0 feeds the prompt's last token, so step LEAD + 1 the new topic's first
    ids = pair.window(SHIFT).ids
    assert MOMENT == LEAD + 1 and ids[PROMPT - 1 + MOMENT] == pair.second.body[0]
    with Run(loaded()[0], config) as run:
        slow = step_by_step(run, ids, MOMENT)
    assert found.items[0]["mean_loss"] == pytest.approx(mean(slow[-TOKENS:]), abs=2e-5)
    assert found.items != measured(texts, SHIFT, config).items


def test_a_slice_that_ran_dense_or_does_not_fit_is_refused(texts):
    late = PruneConfig.build("dart", sparsity=0.5, min_evidence=PROMPT + LEAD + TOKENS + 1)
    with pytest.raises(ConfigError, match=r"all 40 scored tokens of a slice ran dense"):
        measured(texts, CONTINUATION, late)
    long = {"prompt_tokens": 1000, "scored_tokens": 40}
    with pytest.raises(ConfigError, match="of up to 1104 tokens are longer than the model's con"):
        measured(f"{texts}", CONTINUATION, **long)
