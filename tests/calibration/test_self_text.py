"""Text that a model writes by itself: where it starts, how it is sampled, what it cannot be."""

from types import SimpleNamespace

import pytest
import torch

from dart_llm.calibration.collect import likeliest, opening_ids, sample_continuations, start_ids
from dart_llm.data import texts
from dart_llm.errors import ConfigError, DartError
from dart_llm.models.checkpoint import remember_tokenizer
from steps import shared_model
from tiny import VOCAB, tiny


class Fixed:
    """A model that gives the same chances, moved on by ``step`` tokens with every token."""

    device = torch.device("cpu")

    config = SimpleNamespace(
        get_text_config=lambda: SimpleNamespace(vocab_size=4, bos_token_id=None, eos_token_id=None)
    )

    def __init__(self, *chances, step=0):
        self.logits, self.step = torch.tensor(chances).log(), step

    def __call__(self, ids, use_cache, logits_to_keep, cache=None):
        assert use_cache and logits_to_keep == 1 and ids.shape[1] == 1
        rows = torch.stack([self.logits.roll(self.step * int(token)) for token in ids[:, 0]])
        return SimpleNamespace(logits=rows[:, None], cache=0)


def sample_sequences(model, start, count, length, seed, news=lambda share: None, **how):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((count, 1), start[0]) if start else start_ids(model, count, generator)
    return sample_continuations(model, ids, length, generator, news, **how)


UNEVEN = (0.4, 0.3, 0.2, 0.1)


def shares(result):
    return [float((result == token).float().mean()) for token in range(4)]


@pytest.mark.parametrize("sharpness", [0.1, 3.0, 8.0])  # flat rows need more than NUCLEUS
def test_likeliest_keeps_what_a_whole_sort_keeps(sharpness):
    generator = torch.Generator().manual_seed(3)
    chances = (sharpness * torch.randn(4, 5000, generator=generator)).softmax(-1)
    ordered, tokens = chances.sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered > 0.95] = 0
    assert torch.equal(
        likeliest(chances, 0.95), torch.zeros_like(chances).scatter(1, tokens, ordered)
    )


def test_tokens_come_with_their_chances():
    """Temperature sharpens them; top_p leaves out the unlikely; every token follows the last."""
    sharp = [0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3, 0.01 / 0.3]
    for how, wanted in (
        ({}, list(UNEVEN)),
        ({"temperature": 0.5}, sharp),
        ({"top_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
    ):
        result = sample_sequences(Fixed(*UNEVEN), [3], 4000, 4, 0, **how)
        assert bool((result[:, 0] == 3).all())
        assert shares(result[:, 1:]) == pytest.approx(wanted, abs=0.02)
    sure = Fixed(0, 1, 0, 0, step=1)  # token t + 1 follows token t
    assert sample_sequences(sure, [2], 2, 6, 0).tolist() == [[2, 3, 0, 1, 2, 3]] * 2
    free = sample_sequences(sure, [], 4000, 3, 0)  # no start: any token
    assert shares(free[:, 0]) == pytest.approx([0.25] * 4, abs=0.03)
    assert torch.equal(free[:, 1], (free[:, 0] + 1) % 4)


def test_no_global_random_number_is_drawn():
    shared_model()  # making it draws some
    state, news = torch.get_rng_state(), []
    sequences = sample_sequences(shared_model(), [], 3, 8, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(sample_sequences(shared_model(), [], 3, 8, 5), sequences)
    sample_sequences(Fixed(*UNEVEN), [3], 1, 66, 0, news.append)
    assert news == [n / 65 for n in range(1, 66)], "after every token, which share is written"
    news.clear()
    sample_sequences(Fixed(*UNEVEN), [3], 65, 3, 0, news.append)
    assert news == [0.25, 0.5, 0.75, 1], "in two lots of rows"


def test_models_that_write_nothing():
    model = Fixed(*UNEVEN)
    for value in (float("nan"), float("inf")):
        model.logits[2] = value
        with pytest.raises(DartError, match="logits of the model's self-generated text are not"):
            sample_sequences(model, [3], 2, 4, 0)
    with pytest.raises(ConfigError, match="LlamaModel has no language-model head"):
        sample_sequences(shared_model().model, [1], 2, 4, 0)


def letters(text):
    """A tokenizer: an id of 0 to 25 for every letter, none for anything else."""
    return {"input_ids": [ord(one) - ord("a") for one in text.lower() if "a" <= one <= "z"]}


def taught(tokenizer):
    model = tiny()
    remember_tokenizer(model, tokenizer)
    return model


def test_openings_are_cut_to_one_length_and_taken_in_turn():
    """Those that are too short are left out: half of them have the median's letters."""
    model, every = taught(letters), [letters(text)["input_ids"] for text in texts.openings()]
    sizes = sorted(map(len, every))
    for length in (10, sizes[len(sizes) // 2], sizes[-1]):
        fits = [ids[:length] for ids in every if len(ids) >= length]
        result = opening_ids(model, len(every) + 3, length)
        assert result is not None and result.dtype == torch.int64
        assert result.tolist() == [fits[row % len(fits)] for row in range(len(every) + 3)]
    for one, length in ((tiny(), 10), (model, 0), (model, sizes[-1] + 1)):
        assert opening_ids(one, 4, length) is None, "no tokenizer, none wanted, all too short"
    unread = taught(lambda text: {"input_ids": [0, VOCAB]})  # an id that the model has not
    assert opening_ids(unread, 1, 2) is None
