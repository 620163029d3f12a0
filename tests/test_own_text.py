"""Text that a model writes by itself: where it starts, how it is sampled, what it cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dart_llm.errors import ConfigError, DartError
from dart_llm.own_text import likeliest, own_start, write_sequences
from steps import shared_model
from tiny import tiny


class Fixed:
    """A model that gives the same chances to the next token whatever came before."""

    device = torch.device("cpu")

    class config:
        class text:
            vocab_size = 4

        get_text_config = staticmethod(lambda: Fixed.config.text)

    def __init__(self, *chances: float) -> None:
        self.logits = torch.tensor(chances).log()

    def __call__(self, ids: Tensor, use_cache: bool, cache: Any = None) -> Any:
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


def test_temperature_holds_from_the_second_token_on() -> None:
    model = Fixed(0.4, 0.3, 0.2, 0.1)
    found = write_sequences(model, [3], 4000, 4, 0, temperature=0.5)
    assert bool((found[:, 0] == 3).all())
    assert _shares(found[:, 1]) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.03)
    sharp = [0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3, 0.01 / 0.3]
    assert _shares(found[:, 2:]) == pytest.approx(sharp, abs=0.02)
    free = write_sequences(model, [], 4000, 3, 0, temperature=0.5)
    assert _shares(free[:, 0]) == pytest.approx([0.25] * 4, abs=0.03)
    assert _shares(free[:, 1:]) == pytest.approx(sharp, abs=0.02)


def test_top_p_always_holds() -> None:
    found = write_sequences(Fixed(0.4, 0.3, 0.2, 0.1), [3], 4000, 3, 0, top_p=0.6)
    assert _shares(found[:, 1:]) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.02)


def test_no_global_random_number_is_drawn() -> None:
    state = torch.get_rng_state()
    first = write_sequences(shared_model(), [1], 3, 8, 5, temperature=0.8, top_p=0.9)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(
        write_sequences(shared_model(), [1], 3, 8, 5, lambda t: None, 0.8, 0.9), first
    )


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
