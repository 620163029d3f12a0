"""How tokens are drawn: from which ones, how often, and the same ones again."""

from __future__ import annotations

import pytest
import torch

from dart_llm.engine.decoding import FEW, Sampler, logprobs
from dart_llm.engine.requests import Sampling
from dart_llm.errors import ConfigError, DartError


def chances(seed: int, size: int = 300) -> torch.Tensor:
    return torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * 2


def drawn(logits: torch.Tensor, count: int, **settings: object) -> torch.Tensor:
    sampler = Sampler(Sampling(seed=1, **settings))
    found = torch.tensor([sampler.choose(logits)[0] for _ in range(count)])
    return torch.bincount(found, minlength=logits.shape[1]) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_should(temperature: float) -> None:
    logits = chances(0, 8)
    wanted = torch.softmax(logits[0] / temperature, 0)
    assert torch.allclose(drawn(logits, 10000, temperature=temperature), wanted, atol=0.02)


@pytest.mark.parametrize(("top_p", "seed"), [(0.05, 0), (0.3, 1), (0.9, 2), (0.9999, 3)])
def test_top_p_keeps_the_likeliest(top_p: float, seed: int) -> None:
    logits = chances(seed)
    order = torch.softmax(logits[0].double(), 0).sort(descending=True)
    inside = int((order.values.cumsum(0) < top_p).sum()) + 1
    assert (inside > FEW) == (top_p > 0.8)
    found = drawn(logits, 3000, temperature=1.0, top_p=top_p)
    allowed = set(order.indices[:inside].tolist())
    assert set(found.nonzero().flatten().tolist()) <= allowed
    wanted = order.values[0] / order.values[:inside].sum()
    assert float(found[order.indices[0]]) == pytest.approx(float(wanted), abs=0.04)


def test_greedy_and_almost_greedy() -> None:
    logits = torch.cat([chances(seed) for seed in range(3)])
    best = logits.argmax(-1).tolist()
    assert Sampler(Sampling(n=3)).choose(logits) == best
    for temperature, top_p in ((1.0, 1e-9), (1e-9, 1.0), (1e-45, 0.9), (5e-324, 1.0)):
        sampler = Sampler(Sampling(n=3, temperature=temperature, top_p=top_p, seed=0))
        assert sampler.choose(logits) == best


def test_seeds() -> None:
    flat = torch.zeros(3, 1000)

    def three(seed: int | None) -> list[list[int]]:
        sampler = Sampler(Sampling(n=3, temperature=1.0, seed=seed))
        return [sampler.choose(flat) for _ in range(4)]

    assert three(5) == three(5)
    assert three(5) != three(6) and three(None) != three(None)
    rows = list(zip(*three(5), strict=True))
    assert len(set(rows)) == 3
    alone = Sampler(Sampling(temperature=1.0, seed=5))
    assert tuple(alone.choose(flat[:1])[0] for _ in range(4)) == rows[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_overflow_is_said(bad: float) -> None:
    logits = chances(0)
    logits[0, 7] = bad
    with pytest.raises(DartError, match="not finite"):
        Sampler(Sampling()).choose(logits)


def test_logprobs() -> None:
    logits = torch.cat([chances(0), chances(1)]).bfloat16()
    wanted = torch.log_softmax(logits.float(), -1)
    found = logprobs(logits, [4, 9], 3)
    for row, (token, values) in enumerate(zip([4, 9], found, strict=True)):
        assert values[0] == (token, pytest.approx(float(wanted[row, token])))
        best = wanted[row].topk(3)
        assert [one for one, _ in values[1:]] == best.indices.tolist()
        assert [value for _, value in values[1:]] == pytest.approx(best.values.tolist())
    assert [len(values) for values in logprobs(logits, [4, 9], 0)] == [1, 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tokens": 0}, "max_tokens 0 must be 1 or more"),
        ({"temperature": -1.0}, "temperature -1 must be"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_p": 0.0}, r"top_p 0 must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p 1.5"),
        ({"seed": 2**63}, "64 bits"),
        ({"n": 0}, "n 0 must be 1 to 128"),
        ({"n": 129}, "n 129"),
        ({"stop": ("a", "")}, "empty stop string"),
        ({"stop": ("a",) * 17}, "17 stop strings are too many"),
        ({"logprobs": -1}, "logprobs -1 must be 0 to 20"),
        ({"logprobs": 21}, "logprobs 21"),
    ],
)
def test_what_cannot_be_asked(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Sampling(**settings)
