"""After a run the model is exactly what it was, however the run ended."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

import dart_llm
from dart_llm import AttachError, prune
from steps import CACHE, Forced, apart, decode, generate, new_cache, shared_model, snapshot, step
from tiny import NAMES, VOCAB, tiny, tokens

METHODS = ("griffin", "dart")


class Same:
    """Asserts on exit that the model is bit for bit what it was on entry."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.ids = tokens(1, 12, seed=8)

    def __enter__(self) -> Same:
        decode(self.model, self.ids, 8)
        self.before, self.logits = snapshot(self.model), decode(self.model, self.ids, 8)
        return self

    def __exit__(self, *error: object) -> None:
        after = snapshot(self.model)
        for part, value in self.before.items():
            assert after[part] == value, part
        assert torch.equal(decode(self.model, self.ids, 8), self.logits)


@pytest.mark.parametrize("method", [*METHODS, "published", "static", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_normal_exit(name: str, method: str) -> None:
    model = shared_model(name)
    with Same(model), prune(model, method, sparsity=None if method == "dense" else 0.5) as run:
        generate(model, tokens(2, 70), 8)
    assert run.report().decoded_tokens == 14


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


def test_nested_blocks_are_refused() -> None:
    model = shared_model()
    with Same(model):
        with prune(model, "griffin", sparsity=0.5) as run:
            inner = prune(model, "dart")
            with pytest.raises(AttachError, match=r"dart_llm\.restore\(model\)"):
                inner.attach()
            with pytest.raises(AttachError, match="attached already"):
                run.attach()
            with pytest.raises(AttachError, match="restore"), prune(model.model, "griffin"):
                pass
            generate(model, tokens(), 4)
        assert run.report().decoded_tokens == 3
        inner.detach()


def test_restore_is_always_safe() -> None:
    model = shared_model()
    dart_llm.restore(model)
    dart_llm.restore(nn.Linear(2, 2))
    with Same(model):
        run = prune(model, "griffin", sparsity=0.5).attach()
        generate(model, tokens(), 4)
        dart_llm.restore(model)
        dart_llm.restore(model)
    with Same(model):
        assert run.report().decoded_tokens == 3
        with pytest.raises(AttachError, match="attached run"), run.decoding():
            pass
        with run:
            generate(model, tokens(), 4)
        assert run.report().decoded_tokens == 6
    with Same(model):
        old = prune(model, "griffin", sparsity=0.5).attach()
        dart_llm.restore(model.model)
        with prune(model, "griffin", sparsity=0.25) as new:
            old.detach()
            generate(model, tokens(), 4)
        assert new.report().achieved_sparsity == 0.25
        with old:
            dart_llm.restore(model)


def test_error_while_a_run_ends() -> None:
    """The last accounting may fail (out of memory, Ctrl-C): the model is restored all the same."""
    model = shared_model()
    run = prune(model, "griffin", sparsity=0.5)

    def fail() -> None:
        raise MemoryError

    def body() -> None:
        with run:
            generate(model, tokens(), 4)
            run._tracer.flush = fail  # type: ignore[method-assign]

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


def test_forwards_and_hooks_of_the_user_stay() -> None:
    model = tiny()
    mlp, calls = model.model.layers[1].mlp, []
    plain = mlp.forward

    def own(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape[1])
        return plain(x)

    mlp.forward = own
    model.generate = model.generate
    handles = [model.register_forward_hook(lambda *a: None), mlp.register_forward_hook(print_no)]
    with Same(model):
        with prune(model, "griffin", sparsity=0.0):
            generate(model, tokens(), 4)
        assert mlp.forward is own and len(calls) >= 4
        with prune(model, "griffin", sparsity=0.5):
            assert model.generate.__doc__ == type(model).generate.__doc__
            generate(model, tokens(), 4)
    for handle in handles:
        handle.remove()


def print_no(*args: Any) -> None:
    """A hook that does nothing."""


def test_a_model_that_moved_before_it_was_attached() -> None:
    """Views of fused and transposed weights follow ``model.to``."""
    for name in ("llama", "phi3", "gpt2"):
        model, half = tiny(name), tiny(name, dtype=torch.bfloat16)
        run = prune(model, "dart", sparsity=0.5, score="contribution")
        model.to(torch.bfloat16)
        with run:
            got = decode(model, tokens(1, 74), 70)
        with prune(half, "dart", sparsity=0.5, score="contribution") as other:
            wanted = decode(half, tokens(1, 74), 70)
        assert torch.equal(got, wanted)
        assert run.report().ffn_bytes_share == other.report().ffn_bytes_share
        assert run.report().extra_memory_bytes == other.report().extra_memory_bytes


def test_attach_and_detach() -> None:
    model = shared_model()
    with prune(model, "griffin", sparsity=0.5):
        wanted = generate(model, tokens(), 8)
    with Same(model):
        run = prune(model, "griffin", sparsity=0.5).attach()
        got = generate(model, tokens(), 8)
        run.detach()
        run.detach()
    assert torch.equal(got.sequences, wanted.sequences)
    with Same(model):
        run.attach()
        run.reset()
        assert run.report().decoded_tokens == 0
        again = generate(model, tokens(), 8)
        run.detach()
    assert torch.equal(again.sequences, wanted.sequences)
    assert run.report().decoded_tokens == 7


def test_two_models_at_once() -> None:
    first, second = tiny("llama", seed=1), tiny("gpt2", seed=2)
    alone = []
    for model in (first, second):
        with prune(model, "griffin", sparsity=0.5):
            alone.append(generate(model, tokens(), 8))
    with (
        Same(first),
        Same(second),
        prune(first, "griffin", sparsity=0.5) as a,
        prune(second, "griffin", sparsity=0.5) as b,
    ):
        both = [generate(model, tokens(), 8) for model in (first, second)]
    for one, other in zip(alone, both, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one.logits, other.logits, strict=True))
    assert a.report().decoded_tokens == b.report().decoded_tokens == 7


def test_a_dropped_model_is_freed() -> None:
    model = tiny()
    run = prune(model, "griffin", sparsity=0.5).attach()
    generate(model, tokens(), 4)
    gone = weakref.ref(model)
    del model, run
    gc.collect()
    assert gone() is None


def _dispatched(model: Any, folder: Any) -> Any:
    from accelerate import dispatch_model

    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def _on_the_host(model: Any, folder: Any) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def _on_disk(model: Any, folder: Any) -> Any:
    from accelerate import disk_offload

    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("place", [_dispatched, _on_the_host, _on_disk])
def test_accelerate_hooks_stay(place: Callable[..., Any], name: str, tmp_path: Any) -> None:
    with prune(shared_model(name), "griffin", sparsity=0.5, executor="masked") as run:
        wanted = generate(run.model, tokens(1, 40), 6)
    model = place(tiny(name), tmp_path)
    hooked = sorted(n for n, m in model.named_modules() if hasattr(m, "_hf_hook"))
    assert hooked
    keys = {n: list(m.__dict__) for n, m in model.named_modules()}
    forwards = {n: id(m.__dict__.get("forward")) for n, m in model.named_modules()}
    dense = generate(model, tokens(1, 40), 6)
    with prune(model, "griffin", sparsity=0.5) as run:
        got = generate(model, tokens(1, 40), 6)
    inline = name == "opt"
    assert run.executor == ("compact" if place is _dispatched and not inline else "masked")
    assert apart(got.logits, wanted.logits) < 1e-5
    assert apart(got.logits, dense.logits) > 1e-2
    assert sorted(n for n, m in model.named_modules() if hasattr(m, "_hf_hook")) == hooked
    assert {n: list(m.__dict__) for n, m in model.named_modules()} == keys
    assert {n: id(m.__dict__.get("forward")) for n, m in model.named_modules()} == forwards
    after = generate(model, tokens(1, 40), 6)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, dense.logits, strict=True))


@pytest.mark.parametrize("place", [_on_the_host, _on_disk])
def test_offloaded_weights_are_not_read(place: Callable[..., Any], tmp_path: Any) -> None:
    model = place(tiny(), tmp_path)
    for method in ("dart", "static"):
        with pytest.raises(dart_llm.ConfigError, match="layer 0 is offloaded"):
            prune(model, method)
    for score in ("contribution", "max", "random"):
        with pytest.raises(dart_llm.ConfigError, match="layer 0 is offloaded"):
            prune(model, "griffin", score=score)
    with pytest.raises(dart_llm.ConfigError, match="offloaded"):
        prune(model, "griffin", executor="compact")
    ids = {layer: list(range(10)) for layer in range(4)}
    with prune(model, masks=ids):
        got = generate(model, tokens(), 5)
    with prune(shared_model(), masks=ids, executor="masked"):
        wanted = generate(shared_model(), tokens(), 5)
    assert apart(got.logits, wanted.logits) < 1e-5


@pytest.mark.parametrize("executor", ["masked", "compact"])
def test_inference_mode_and_others_in_one_block(executor: str) -> None:
    model, extra = shared_model(), tokens(1, 8, seed=5)
    settings = {
        "sparsity": 0.5,
        "executor": executor,
        "min_evidence": 0,
        "drift": {"rule": "interval 3", "min_distance": 0, "max_dense_share": 1.0},
        "remask": {"observe_tokens": 2},
    }

    def talk(mode: Callable[[], Any]) -> list[torch.Tensor]:
        found = []
        with prune(model, "dart", **settings) as run:
            for _ in range(2):
                with mode():
                    first = generate(model, tokens(), 12)
                    cache = first.past_key_values
                    turn = torch.cat([first.sequences, extra], 1)
                    found += [*first.logits, *generate(model, turn, 8, **{CACHE: cache}).logits]
                found += [*generate(model, tokens(), 8).logits]
        assert run.report().remask_causes == {"first": 4, "interval": 8, "prompt": 2}
        return found

    with Same(model):
        plain = talk(torch.no_grad)
        inference = talk(torch.inference_mode)
    assert all(torch.equal(a, b) for a, b in zip(plain, inference, strict=True))


def _gradients(model: Any, **settings: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradients of a loss over a prefill and two decode steps, all with the graph on."""
    model.zero_grad(set_to_none=True)
    ids, cache = tokens(1, 12), new_cache(model)
    with prune(model, **settings) as run:
        out = [model(ids[:, :10], **{CACHE: cache}).logits]
        for position in (10, 11):
            out.append(model(ids[:, position : position + 1], **{CACHE: cache}).logits)
        logits = torch.cat(out, 1)
        logits.log_softmax(-1)[..., 5].sum().backward()
        for life in run._tracer.all_lives():
            for layer in life.evidence:
                assert all(not known.total.requires_grad for known in layer.sums.values())
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found, logits


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2", "falcon", "opt"])
def test_gradients(name: str) -> None:
    model = tiny(name)
    dense, _ = _gradients(model, method="dense")
    cache, ids = new_cache(model), tokens(1, 12)
    parts = [model(ids[:, :10], **{CACHE: cache}).logits]
    parts += [model(ids[:, i : i + 1], **{CACHE: cache}).logits for i in (10, 11)]
    torch.cat(parts, 1).log_softmax(-1)[..., 5].sum().backward()
    plain = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert dense.keys() == plain.keys()
    assert all(torch.equal(dense[n], plain[n]) for n in plain)
    settings = {"method": "dart", "sparsity": 0.5, "min_evidence": 0}
    pruned, logits = _gradients(model, **settings)
    assert pruned.keys() == plain.keys()
    assert all(bool(g.isfinite().all()) for g in pruned.values())
    down = [n for n in plain if any(k in n for k in ("down_proj.w", "mlp.c_proj.w", "4h_to_h.w"))]
    down += [n for n in plain if n.endswith("fc2.weight")]
    assert len(down) == 4
    assert all(float(pruned[n].norm()) > 0 and not torch.equal(pruned[n], plain[n]) for n in down)
    masked, same = _gradients(model, **settings, executor="masked")
    assert torch.equal(logits, same)
    assert all(torch.equal(pruned[n], masked[n]) for n in pruned)


def test_no_graph_is_kept() -> None:
    model, ids = tiny("gemma2"), tokens(1, 12)
    with prune(model, "dart", sparsity=0.5, min_evidence=0, masking_step=3) as run:
        cache = new_cache(model)
        alive: list[Any] = []
        watch = model.model.layers[1].mlp.register_forward_hook(
            lambda module, args, z: alive.append((z.requires_grad, weakref.ref(z)))
        )
        model(ids[:, :8], **{CACHE: cache})
        for position in range(8, 12):
            model(ids[:, position : position + 1], **{CACHE: cache})
        watch.remove()
        del cache
        gc.collect()
        assert [grad for grad, _ in alive] == [True] * 5
        assert [z() for _, z in alive] == [None] * 5
    assert run.report().decoded_tokens == 4


def test_forced_tokens_are_really_forced() -> None:
    rows = [[7, 8, 9, 10]]
    got = generate(shared_model(), tokens(), 4, logits_processor=[Forced(24, rows)])
    assert got.sequences[0, 24:].tolist() == rows[0]
