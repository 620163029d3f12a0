"""A run that is stopped by an error, a signal or a broken stream leaves nothing behind."""

import contextlib
import queue
import threading

import pytest
import torch

import dart_llm
from dart_llm.session.run import prune
from steps import Same, generate, new_cache, shared_model, snapshot, step
from tiny import VOCAB, tiny, tokens

BAD = torch.tensor([[VOCAB + 5]])
"""A token that no embedding has."""


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
    assert {k: report[k] for k in ("decoded_tokens", "layers")}.items() <= alone.items()


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
