"""A run that is stopped by an error, a signal or a broken stream leaves nothing behind."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

import dart_llm
from dart_llm.session.run import prune
from steps import Same, generate, new_cache, shared_model, snapshot, step
from tiny import VOCAB, tiny, tokens

METHODS = ("griffin", "dart")


@pytest.mark.parametrize("executor", ["masked", "compact"])
def test_exception_in_the_block(executor: str) -> None:
    model = shared_model()

    def body() -> None:
        with prune(model, executor=executor):
            generate(model, tokens(), 4)
            raise ZeroDivisionError

    with Same(model), pytest.raises(ZeroDivisionError):
        body()


@pytest.mark.parametrize("when", ["prefill", "decode"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
def test_exception_inside_a_forward(name: str, method: str, when: str) -> None:
    model, bad = shared_model(name), torch.tensor([[VOCAB + 5]])

    def body() -> None:
        with prune(model, method, sparsity=0.5):
            cache = new_cache(model)
            if when == "decode":
                step(model, tokens(1, 8), cache)
            step(model, bad.expand(1, 1 if when == "decode" else 5), cache)

    with Same(model), pytest.raises(IndexError):
        body()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon", "opt"])
def test_error_in_a_hook_of_a_layer(name: str, calls: int, error: type[BaseException]) -> None:
    model = tiny(name)
    layer = next(m for n, m in model.named_modules() if n.endswith(("layers.2", "h.2")))
    count, armed = [0], [False]

    def fail(module: nn.Module, args: Any) -> None:
        count[0] += armed[0]
        if armed[0] and count[0] == calls:
            raise error("stop")

    layer.register_forward_pre_hook(fail)
    run = prune(model, "dart", sparsity=0.5, min_evidence=0)

    def body() -> None:
        with run:
            armed[0] = True
            generate(model, tokens(), 6)

    with Same(model):
        with pytest.raises(error):
            body()
        armed[0] = False
    assert run.report().decoded_tokens == max(0, calls - 2)


def test_a_failed_forward_does_not_spoil_the_next_generation() -> None:
    model, ids = shared_model("gemma2"), tokens(1, 70)
    with prune(model, "dart", sparsity=0.5) as run:
        wanted = generate(model, ids, 8)
    alone = run.report().to_dict()
    with prune(model, "dart", sparsity=0.5) as run:
        with pytest.raises(IndexError):
            step(model, torch.tensor([[3, 4, VOCAB + 9]]), new_cache(model))
        with pytest.raises(IndexError):
            generate(model, torch.cat([ids, torch.tensor([[VOCAB + 9]])], 1), 4)
        got = generate(model, ids, 8)
    assert torch.equal(got.sequences, wanted.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, wanted.logits, strict=True))
    report = run.report().to_dict()
    for key in ("decoded_tokens", "achieved_sparsity", "ffn_flops_share", "layers"):
        assert report[key] == alone[key]


class Break(StoppingCriteria):
    """Stops, or raises, after some tokens."""

    def __init__(self, after: int, error: type[BaseException] | None = None) -> None:
        self.left = after
        self.error = error

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.left -= 1
        if self.left <= 0 and self.error is not None:
            raise self.error
        return torch.full((len(input_ids),), self.left <= 0)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_early_stop(error: type[BaseException] | None) -> None:
    model = shared_model()
    criteria = StoppingCriteriaList([Break(4, error)])

    def body() -> None:
        with prune(model, "griffin", sparsity=0.5) as run:
            try:
                generate(model, tokens(), 50, stopping_criteria=criteria)
            finally:
                assert run.report().decoded_tokens == 3

    with Same(model):
        if error is None:
            body()
        else:
            with pytest.raises(error):
                body()


class Pipe:
    """A streamer that hands tokens to another thread."""

    def __init__(self) -> None:
        self.items: queue.Queue[Any] = queue.Queue()
        self.stop = False

    def put(self, value: torch.Tensor) -> None:
        if self.stop:
            raise InterruptedError
        self.items.put(value)

    def end(self) -> None:
        self.items.put(None)


def _stream(model: Any, pipe: Pipe, seen: list[Any]) -> Any:
    """A generator that holds the block open while it yields, as a server does."""
    with prune(model, "griffin", sparsity=0.5) as run:
        seen.append(run)

        def work() -> None:
            with pytest.raises(InterruptedError):
                generate(model, tokens(), 400, streamer=pipe)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            while (item := pipe.items.get(timeout=20)) is not None:
                yield item
        finally:
            pipe.stop = True
            thread.join()


def test_early_break_of_a_stream() -> None:
    model, seen = shared_model(), []
    with Same(model):
        stream = _stream(model, Pipe(), seen)
        taken = [next(stream) for _ in range(5)]
        stream.close()
    assert [t.numel() for t in taken] == [24, 1, 1, 1, 1]
    assert seen[0].report().decoded_tokens >= 3


def test_block_left_while_a_thread_still_generates() -> None:
    model, pipe = shared_model(), Pipe()
    with Same(model):
        with prune(model, "griffin", sparsity=0.5) as run:
            thread = threading.Thread(
                target=lambda: generate(model, tokens(), 120, streamer=pipe), daemon=True
            )
            thread.start()
            for _ in range(4):
                pipe.items.get(timeout=20)
        thread.join()
    assert run.report().decoded_tokens < 119
    with prune(model, "griffin", sparsity=0.5):
        generate(model, tokens(), 4)


def test_error_while_a_run_ends() -> None:
    """The last accounting may fail (out of memory, Ctrl-C): the model is restored all the same."""
    model = shared_model()
    run = prune(model, "griffin", sparsity=0.5)

    def fail() -> None:
        raise MemoryError

    def body() -> None:
        with run:
            generate(model, tokens(), 4)
            run.controller.flush = fail  # type: ignore[method-assign]

    with Same(model), pytest.raises(MemoryError):
        body()
    with prune(model, "griffin"):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_error_in_a_callback(error: type[BaseException]) -> None:
    model = shared_model()

    def fail(remask: Any) -> None:
        raise error

    def body() -> None:
        with prune(model, "griffin", sparsity=0.5, on_remask=fail):
            generate(model, tokens(), 4)

    with Same(model), pytest.raises(error):
        body()


def test_overflow_is_named_and_the_model_restored() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3] = float("inf")

    def body() -> None:
        with prune(model, "published", sparsity=0.5):
            generate(model, tokens(), 4)

    before = snapshot(model)
    with pytest.raises(dart_llm.DartError, match="layer 2 are not finite"):
        body()
    assert snapshot(model) == before
