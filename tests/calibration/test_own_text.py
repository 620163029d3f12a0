"""Text that a model writes by itself: where it starts, how it is sampled, what it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dart_llm.calibration.self_text import likeliest, opening_ids, own_start
from dart_llm.calibration.self_text import sample_continuations as go_on
from dart_llm.calibration.self_text import sample_sequences as write_sequences
from dart_llm.data import texts
from dart_llm.errors import ConfigError, DartError
from dart_llm.models.checkpoint import remember_tokenizer, tokenizer_of
from steps import shared_model
from tiny import VOCAB, tiny
from tiny_gpt2 import write_gpt2


class Fixed:
    """A model that gives the same chances to the next token whatever came before."""

    device = torch.device("cpu")

    class config:
        class text:
            vocab_size = 4

        get_text_config = staticmethod(lambda: Fixed.config.text)

    def __init__(self, *chances: float) -> None:
        self.logits = torch.tensor(chances).log()

    def __call__(self, ids: Tensor, use_cache: bool, logits_to_keep: int, cache: Any = None) -> Any:
        return type("Output", (), {"logits": self.logits.expand(len(ids), 1, 4), "cache": 0})


def test_likeliest_by_hand() -> None:
    chances = torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.25, 0.25, 0.25, 0.25]])
    assert torch.equal(likeliest(chances, 1.0), chances)
    found = likeliest(chances, 0.7)
    assert found[0].tolist() == pytest.approx([0, 0.5, 0.25, 0])
    assert int((found[1] > 0).sum()) == 3
    one = likeliest(chances, 0.01)
    assert one[0].tolist() == pytest.approx([0, 0.5, 0, 0]) and int((one[1] > 0).sum()) == 1
    assert float(chances.sum()) == pytest.approx(2), "the chances given are not changed"


def _shares(found: Tensor) -> list[float]:
    return [float((found == token).float().mean()) for token in range(4)]


def _gone_on(model: Any, first: int, rows: int, length: int, seed: int = 0, **how: Any) -> Tensor:
    ids, generator = torch.full((rows, 1), first), torch.Generator().manual_seed(seed)
    return go_on(model, ids, length, generator, lambda text: None, **how)


def test_temperature_sharpens_the_chances() -> None:
    model = Fixed(0.4, 0.3, 0.2, 0.1)
    found = _gone_on(model, 3, 4000, 4, temperature=0.5)
    assert bool((found[:, 0] == 3).all())
    sharp = [0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3, 0.01 / 0.3]
    assert _shares(found[:, 1:]) == pytest.approx(sharp, abs=0.02)
    plain = [0.4, 0.3, 0.2, 0.1]
    assert _shares(_gone_on(model, 3, 4000, 4)[:, 1:]) == pytest.approx(plain, abs=0.02)


def test_top_p_always_holds() -> None:
    found = _gone_on(Fixed(0.4, 0.3, 0.2, 0.1), 3, 4000, 3, top_p=0.6)
    assert _shares(found[:, 1:]) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.02)


def test_sequences_begin_with_the_start_or_with_any_token() -> None:
    model = Fixed(0.4, 0.3, 0.2, 0.1)
    assert bool((write_sequences(model, [3], 100, 3, 0)[:, 0] == 3).all())
    free = write_sequences(model, [], 4000, 3, 0)
    assert _shares(free[:, 0]) == pytest.approx([0.25] * 4, abs=0.03)
    assert _shares(free[:, 1:]) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.02)


def test_no_global_random_number_is_drawn() -> None:
    model, how = shared_model(), {"temperature": 0.8, "top_p": 0.9}
    state = torch.get_rng_state()
    first = _gone_on(model, 1, 3, 8, 5, **how)
    sequences = write_sequences(model, [], 3, 8, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(_gone_on(model, 1, 3, 8, 5, **how), first)
    assert torch.equal(write_sequences(model, [], 3, 8, 5), sequences)


def test_progress_is_told() -> None:
    news: list[str] = []
    write_sequences(Fixed(0.4, 0.3, 0.2, 0.1), [3], 1, 66, 0, news.append)
    assert news == [
        "the model writes text to learn from: 32 of 66 tokens",
        "the model writes text to learn from: 64 of 66 tokens",
    ]


def test_where_a_text_starts() -> None:
    model = tiny()
    assert own_start(model) == [1]
    model.generation_config.bos_token_id = None
    assert own_start(model) == [2], "the end token, where generation names no start"
    model.generation_config.eos_token_id = [7, 8]
    assert own_start(model) == [7]
    model.generation_config.eos_token_id = None
    assert own_start(model) == [1], "then what the configuration says"
    model.config.bos_token_id = model.config.eos_token_id = None
    assert own_start(model) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value: float) -> None:
    model = Fixed(0.4, 0.3, 0.2, 0.1)
    model.logits[2] = value
    with pytest.raises(DartError, match="a logit of the model's own text is not finite"):
        write_sequences(model, [3], 2, 4, 0)
    model.logits[2] = -float("inf")  # a token that is never chosen
    assert 2 not in write_sequences(model, [3], 50, 4, 0)


def test_a_model_without_a_head() -> None:
    with pytest.raises(ConfigError, match="LlamaModel has no language-model head"):
        write_sequences(shared_model().model, [1], 2, 4, 0)


# openings


class Letters:
    """A tokenizer: an id of 0 to 25 for every letter, none for anything else; or ``ids``."""

    def __init__(self, ids: list[int] | None = None) -> None:
        self.ids = ids

    def __call__(self, text: str) -> dict[str, list[int]]:
        letters = [ord(letter) - ord("a") for letter in text.lower() if "a" <= letter <= "z"]
        return {"input_ids": letters if self.ids is None else self.ids}


def _with_tokenizer(tokenizer: Any) -> Any:
    model = tiny()
    remember_tokenizer(model, tokenizer)
    return model


def test_openings_are_cut_to_one_length_and_taken_in_turn() -> None:
    model, count = _with_tokenizer(Letters()), len(texts.openings())
    found = opening_ids(model, count + 3, 10)
    assert found is not None and found.shape == (count + 3, 10) and found.dtype == torch.int64
    for row, text in zip(found.tolist(), texts.openings() * 2, strict=False):
        letters = [letter for letter in text.lower() if letter.isascii() and letter.isalpha()]
        assert "".join(chr(97 + token) for token in row) == "".join(letters[:10])
    few = opening_ids(model, 3, 10)
    assert few is not None and torch.equal(few, found[:3])


def test_openings_that_are_too_short_are_left_out() -> None:
    """At most the longer half of them has the median's number of letters."""
    model = _with_tokenizer(Letters())
    sizes = [len(Letters()(text)["input_ids"]) for text in texts.openings()]
    length = sorted(sizes)[len(sizes) // 2]
    found = opening_ids(model, len(sizes), length)
    kept = [text for text, size in zip(texts.openings(), sizes, strict=True) if size >= length]
    assert found is not None and 0 < len(kept) < len(sizes)
    wanted = [Letters()(kept[row % len(kept)])["input_ids"][:length] for row in range(len(sizes))]
    assert found.tolist() == wanted
    assert opening_ids(model, 4, max(sizes)) is not None
    assert opening_ids(model, 4, max(sizes) + 1) is None


def test_no_openings() -> None:
    assert opening_ids(tiny(), 4, 10) is None, "no tokenizer"
    assert opening_ids(_with_tokenizer(Letters()), 4, 0) is None, "none are wanted"
    fits, beyond = Letters([VOCAB - 1] * 10), Letters([0] * 9 + [VOCAB])
    assert opening_ids(_with_tokenizer(fits), 1, 10) is not None
    assert opening_ids(_with_tokenizer(beyond), 1, 10) is None, "an id that the model has not"


def test_a_tokenizer_is_read_from_where_the_model_came_from(tmp_path: Path) -> None:
    folder = write_gpt2(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = tokenizer_of(model)
    assert found("tide") == AutoTokenizer.from_pretrained(folder)("tide")
    assert tokenizer_of(model) is found, "it is read once"
    model.name_or_path = str(tmp_path / "elsewhere")
    assert tokenizer_of(model) is found
    other = AutoModelForCausalLM.from_pretrained(folder)
    other.name_or_path = str(tmp_path / "elsewhere")
    assert tokenizer_of(other) is None
