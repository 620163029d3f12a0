"""A run that is stopped by an error, a signal or a broken stream leaves nothing behind."""

import contextlib
import queue
import threading

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import dart_llm
from dart_llm.session.run import prune
from steps import Same, generate, new_cache, shared_model, snapshot, step
from tiny import VOCAB, tiny, tokens

BAD = torch.tensor([[VOCAB + 5]])
"""A token that no embedding has."""


@pytest.mark.parametrize(
    ("name", "method", "decoded"),
    [("llama", "griffin", 0), ("gemma2", "dart", 8), ("gpt2", "dart", 0), ("opt", "griffin", 8)],
)
def test_exception_inside_a_forward(name, method, decoded):
    model = shared_model(name)

    def body():
        with prune(model, method, sparsity=0.5):
            cache = new_cache(model)
            if decoded:
                step(model, tokens(1, decoded), cache)
            step(model, BAD if decoded else BAD.expand(1, 5), cache)

    with Same(model), pytest.raises(IndexError):
        body()


@pytest.mark.parametrize(
    ("name", "calls", "error"),
    [("llama", 1, KeyboardInterrupt), ("gemma3", 3, RuntimeError), ("opt", 3, SystemExit)],
)
def test_error_in_a_hook_of_a_layer(name, calls, error):
    model, count, armed = tiny(name), [0], [False]
    layer = next(m for n, m in model.named_modules() if n.endswith(("layers.2", "h.2")))

    def fail(module, args):
        count[0] += armed[0]
        if armed[0] and count[0] == calls:
            raise error("stop")

    layer.register_forward_pre_hook(fail)
    run = prune(model, "griffin", sparsity=0.5, min_evidence=0)
    with Same(model):
        armed[0] = True
        with pytest.raises(error), run:
            generate(model, tokens(), 6)
        armed[0] = False
    assert run.report().decoded_tokens == max(0, calls - 2)


def test_a_failed_forward_does_not_spoil_the_next_generation():
    model, ids = shared_model("gemma2"), tokens(1, 70)
    with prune(model, "dart", sparsity=0.5) as run:
        wanted = generate(model, ids, 8)
    alone = run.report().to_dict()
    with prune(model, "dart", sparsity=0.5) as run:
        with pytest.raises(IndexError):
            step(model, torch.tensor([[3, 4, VOCAB + 9]]), new_cache(model))
        with pytest.raises(IndexError):
            generate(model, torch.cat([ids, BAD], 1), 4)
        got = generate(model, ids, 8)
    assert torch.equal(got.sequences, wanted.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, wanted.logits, strict=True))
    report = run.report().to_dict()
    for key in ("decoded_tokens", "achieved_sparsity", "ffn_flops_share", "layers"):
        assert report[key] == alone[key]


class Break(StoppingCriteria):
    """Stops, or raises, after four tokens."""

    left = 4

    def __init__(self, error=None):
        self.error = error

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        if self.left <= 0 and self.error is not None:
            raise self.error
        return torch.full((len(input_ids),), self.left <= 0)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_early_stop(error):
    model, run = shared_model(), prune(shared_model(), "griffin", sparsity=0.5)
    criteria = StoppingCriteriaList([Break(error)])
    with Same(model), pytest.raises(error) if error else contextlib.nullcontext(), run:
        generate(model, tokens(), 50, stopping_criteria=criteria)
    assert run.report().decoded_tokens == 3


class Pipe(queue.Queue):
    """A streamer that hands tokens to another thread."""

    stop = False

    def put(self, value, *more):
        if self.stop:
            raise InterruptedError
        super().put(value, *more)

    def end(self):
        super().put(None)


@pytest.mark.parametrize("joined", [True, False])
def test_a_stream_that_breaks_off(joined):
    """A thread generates while the block is held open, as a server does, or left too early."""
    model, pipe = shared_model(), Pipe()

    def work():
        with contextlib.suppress(InterruptedError):
            generate(model, tokens(), 120, streamer=pipe)

    thread = threading.Thread(target=work, daemon=True)
    with Same(model):
        with prune(model, "griffin", sparsity=0.5) as run:
            thread.start()
            taken = [pipe.get(timeout=20) for _ in range(5)]
            pipe.stop = joined
            if joined:
                thread.join()
        thread.join()
    assert [t.numel() for t in taken] == [24, 1, 1, 1, 1]
    assert 3 <= run.report().decoded_tokens < 119


def test_errors_around_a_run():
    """The last accounting may fail (out of memory, Ctrl-C), a callback too: nothing stays."""
    model = shared_model()

    def fail(*arguments):
        raise MemoryError

    def ends(**more):
        with prune(model, "griffin", sparsity=0.5, **more) as run:
            generate(model, tokens(), 4)
            run.controller.flush = fail

    for more in ({}, {"on_remask": fail}):
        with Same(model), pytest.raises(MemoryError):
            ends(**more)
    model = tiny()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3] = float("inf")
    before = snapshot(model)
    run = prune(model, "published", sparsity=0.5)
    with pytest.raises(dart_llm.DartError, match="layer 2 are not finite"), run:
        generate(model, tokens(), 4)
    assert snapshot(model) == before
