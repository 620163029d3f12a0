"""A request that has ended leaves nothing for the garbage collector: its cache goes at once."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest
import torch

from dart_llm.engine.engine import Engine
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling
from dart_llm.pruning.config import PruneConfig
from engine_cases import PROMPT, half, tokenizer
from tiny import tiny


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def tensors() -> int:
    """Tensors that are alive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some module of torch warns when it is looked at
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())


@pytest.mark.parametrize(
    ("config", "asked"),
    [(None, 99), (None, 4), (half(), 99), (half(), 0), (half(drift="interval 4"), 4)],
)
def test_no_tensor_stays(no_collector: None, config: PruneConfig | None, asked: int) -> None:
    """``asked``: how often the request may go on before it is cancelled."""
    with Engine(tiny(), tokenizer()) as engine:

        def request() -> None:
            calls = iter(range(asked))
            engine.run(
                Ask(PROMPT, Sampling(max_tokens=12), config),
                cancelled=lambda: next(calls, None) is None,
            )

        request()
        before = tensors()
        for _ in range(3):
            request()
        assert tensors() == before


def test_no_tensor_stays_after_a_fault(no_collector: None) -> None:
    with Engine(tiny(), tokenizer()) as engine:

        def request() -> None:
            calls = iter([False, False])
            with pytest.raises(StopIteration):
                engine.run(Ask(PROMPT, Sampling(), half()), cancelled=lambda: next(calls))

        request()
        before = tensors()
        for _ in range(3):
            request()
        assert tensors() <= before
