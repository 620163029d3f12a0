"""A run belongs to one ``generate`` at a time; one that is stopped leaves nothing behind."""

import contextlib
import queue
import threading

import pytest
import torch

import dart_llm
from dart_llm import prune
from dart_llm.errors import AttachError, ConfigError, DartError
from dart_llm.models.agreement import signature
from steps import Same, generate, new_cache, shared_model, snapshot, step
from tiny import VOCAB, tiny, tokens

pytestmark = pytest.mark.usefixtures("native")
IDS = torch.tensor([[5, 6, 7, 8]])


def test_a_second_generate_is_refused_and_the_run_goes_on():
    model, errors = tiny("llama"), []

    def again(_):
        with pytest.raises(ConfigError, match="use one lock per model") as error:
            model.generate(IDS, max_new_tokens=2)
        errors.append(error)

    with prune(model, "griffin", sparsity=0.5, on_remask=again) as run:
        model.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert len(errors) == 1 and run.report().decoded_tokens == 5


class Halt:
    """Takes a text's tokens as a streamer does; halts after the first that was generated."""

    def __init__(self, first=2):
        self.begun, self.goes_on, self.left = threading.Event(), threading.Event(), first

    def put(self, *_):
        self.left -= 1
        if self.left == 0:
            self.begun.set()
            assert self.goes_on.wait(60)

    def end(self):
        pass


@contextlib.contextmanager
def halted(model, ids, halt):
    """Another thread is in the middle of a text; a list that gets it, or the error, in the end."""
    result = []

    def write():
        try:
            result.append(generate(model, ids, 6, streamer=halt).sequences)
        except DartError as error:
            result.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    assert halt.begun.wait(60)
    try:
        yield result
    finally:
        halt.goes_on.set()
        thread.join()


EXECUTORS = pytest.mark.parametrize("executor", ["native", "compact"])


@EXECUTORS
def test_a_run_does_not_attach_in_the_middle_of_another_threads_text(executor):
    model = tiny("llama")
    dense = generate(model, IDS, 6).sequences
    with Same(model):
        with halted(model, IDS, Halt()) as result:
            match = "another thread is generating with this model: attach when it has finished"
            with pytest.raises(AttachError, match=match):
                prune(model, "griffin", sparsity=0.5, executor=executor).attach()
        assert torch.equal(result[0], dense)
        with prune(model, "griffin", sparsity=0.5, executor=executor):
            generate(model, IDS, 6)


@EXECUTORS
def test_a_text_in_the_middle_of_which_the_run_is_left_is_an_error(executor):
    model = tiny("llama")
    halt = Halt()
    with Same(model), contextlib.ExitStack() as after:
        with prune(model, "griffin", sparsity=0.5, executor=executor):
            result = after.enter_context(halted(model, IDS, halt))
        after.close()
        (error,) = result
        assert isinstance(error, AttachError) and "the run was left while another" in str(error)


@EXECUTORS
def test_a_forward_of_another_thread_ends_before_the_run_is_left(executor):
    """It reads copies and blocks that leaving frees."""
    model, halt, left = tiny("llama"), Halt(first=1), []
    model.model.norm.register_forward_hook(halt.put)
    run = prune(model, "griffin", sparsity=0.5, executor=executor).attach()
    forward = threading.Thread(target=lambda: model(IDS, use_cache=True))
    forward.start()
    assert halt.begun.wait(60)
    leave = threading.Thread(target=lambda: left.append(run.detach()))
    leave.start()
    leave.join(0.3)
    assert leave.is_alive() and not left
    halt.goes_on.set()
    for thread in (forward, leave):
        thread.join(60)
    assert len(left) == 1


def test_attributes_that_change_while_they_are_read():
    """As where another thread attaches: a module's attributes are read, and one more is there."""
    module = tiny("llama").model.norm
    attributes = module.__dict__

    class Name(str):
        def __hash__(self):
            attributes[f"other {len(attributes)}"] = 1
            return 5

    attributes[Name("one")] = 1
    assert signature(module)


def test_two_threads_are_told_apart():
    model, ids, messages = tiny(), tokens(1, 12), []

    def run():
        try:
            step(model, ids, new_cache(model))
        except ConfigError as error:
            messages.append(str(error))

    def meanwhile(*_):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(60)

    with prune(model, "griffin", sparsity=0.5):
        handle = model.model.layers[1].register_forward_pre_hook(meanwhile)
        run()
        handle.remove()
        assert generate(model, ids, 3).sequences.shape == (1, 15)
    assert messages == [
        "another thread is running this model: a pruned model runs one forward at a time"
    ]


def test_a_failed_forward_does_not_spoil_the_next_generation():
    model, ids = shared_model("gemma2"), tokens(1, 70)
    with prune(model, "dart", sparsity=0.5) as run:
        wanted = generate(model, ids, 8)
    alone = run.report().to_dict()
    with prune(model, "dart", sparsity=0.5) as run:
        with pytest.raises(IndexError):
            step(model, torch.tensor([[3, 4, VOCAB + 9]]), new_cache(model))
        with pytest.raises(IndexError):
            generate(model, torch.cat([ids, torch.tensor([[VOCAB + 5]])], 1), 4)
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
