"""Many tokens are multiplied in float32 where the CPU emulates 16 bits; nothing else changes."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dart_llm.calibration.collect import run_forward
from dart_llm.data import texts
from dart_llm.evaluation.perplexity import score, slices
from dart_llm.models import float32_products as module
from dart_llm.models.checkpoint import fingerprint
from dart_llm.models.float32_products import emulates
from dart_llm.models.loading import load
from dart_llm.models.packed import pack
from dart_llm.models.steps import step_unsupported_reason
from dart_llm.session.run import prune
from steps import Same, apart, decode, generate
from tiny import tiny, tokens
from tiny_gpt2 import write_gpt2

BFLOAT16, HALF = torch.bfloat16, torch.float16
PROMPT, IDS = 20, tokens(1, 24, seed=3)
TEXTS = torch.arange(3, 67).reshape(2, 32)


@pytest.fixture(autouse=True)
def slow(monkeypatch):
    """Both 16-bit dtypes are emulated, whatever the CPU."""
    monkeypatch.setattr(module, "emulates", lambda dtype: dtype in (BFLOAT16, HALF))


class Narrow(TorchDispatchMode):
    """Counts products in 16 bits, of more than ``module.FEW`` rows, below whatever called them."""

    # torch's; our kernels compute in float32 anyway
    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "linear", "matmul")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = next((t for t in args if isinstance(t, torch.Tensor) and t.dim() > 1), None)
        name = func.overloadpacket.__name__ if func.namespace == "aten" else ""
        if first is not None and name.startswith(self.PRODUCTS) and first.shape[-2] > module.FEW:
            self.found += [name] if first.dtype in (BFLOAT16, HALF) else []
        return func(*args, **(kwargs or {}))


def emulated(call):
    """Products in 16 bits that ``call`` makes."""
    with Narrow() as narrow, torch.no_grad():
        call()
    return narrow.found


def wide(name="llama"):
    model = tiny(name, dtype=BFLOAT16)
    assert module.compute_prompts_in_float32(model)
    return model


def close(result, exact, dtype):
    assert result.dtype == dtype
    return apart(result.detach(), exact.detach()) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [BFLOAT16, HALF], ids=str)
def test_products_and_their_gradients(dtype, monkeypatch):
    """Against float64: results are rounded once; weights of several chunks give the same."""
    monkeypatch.setattr(module, "CHUNK", 64)
    monkeypatch.setattr(module, "LEAST_ROWS", 5)
    generator = torch.Generator().manual_seed(0)
    x, w, b, g = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((2, 3, 24), (17, 24), (17,), (2, 3, 17))
    )
    q = torch.randn(2, 4, 9, 8, generator=generator).to(dtype)
    saved = []  # by the graph: no weight in float32
    graph = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    for operation, inputs in (
        (F.linear, (x, w, b)),
        (F.linear, (x, w)),
        (lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t()), (x, w, b)),
    ):
        exact = operation(*(one.double() for one in inputs))
        with module.Float32Products(), Narrow() as narrow, graph:
            result = operation(*inputs)
            grads = torch.autograd.grad(result, inputs, g.reshape(result.shape))
        assert narrow.found == [] and close(result, exact, dtype)
        assert {tensor.dtype for tensor in saved} == {dtype}
        with torch.no_grad(), module.Float32Products():
            assert torch.equal(operation(*inputs), result)
        wanted = torch.autograd.grad(exact, inputs, g.reshape(result.shape).double())
        assert all(close(a, e, dtype) for a, e in zip(grads, wanted, strict=True))
    for operation in (
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        lambda q: q @ q.mT,
        lambda q: torch.bmm(q[0], q[1].mT),
    ):
        with module.Float32Products(), Narrow() as narrow:
            assert close(operation(q), operation(q.double()), dtype)
        assert narrow.found == []


@pytest.mark.usefixtures("native")
def test_what_stays_as_torch_has_it():
    few, many, w = (torch.randn(n, 32).to(BFLOAT16) for n in (module.FEW, module.FEW + 1, 64))
    for x, weight in ((few, w), (many.float(), w.float()), (many, pack(w, "q8_0"))):
        wanted = F.linear(x, weight)
        with module.Float32Products():
            assert torch.equal(F.linear(x, weight), wanted)
    with module.Float32Products(), pytest.raises(RuntimeError, match="dtype"):
        F.linear(many, w.float())


KINDS = [("llama", "sdpa"), ("gpt2", "sdpa"), ("gemma2", "eager"), ("bloom", "eager")]


@pytest.mark.parametrize(("name", "attention"), KINDS)
def test_a_prompt_runs_in_float32_and_a_token_as_ever(name, attention):
    plain, model = tiny(name, dtype=BFLOAT16), wide(name)
    plain.set_attn_implementation(attention)
    model.set_attn_implementation(attention)
    assert emulated(lambda: plain(IDS)), "what this is about"
    assert emulated(lambda: model(IDS)) == []
    assert emulated(lambda: model(inputs_embeds=model.get_input_embeddings()(IDS))) == []
    with torch.no_grad():
        logits, exact = model(IDS).logits, copy.deepcopy(plain).float()(IDS).logits
        assert apart(logits, exact) < 1.2 * apart(plain(IDS).logits, exact) + 1e-2
        few = IDS[:, : module.FEW]
        assert torch.equal(model(input_ids=few).logits, plain(few).logits)


def test_the_model_is_the_same_in_every_other_way(tmp_path):
    plain, model = tiny(dtype=BFLOAT16), wide()
    assert fingerprint(model) == fingerprint(plain)
    assert step_unsupported_reason(model) is step_unsupported_reason(plain) is None
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not module.compute_prompts_in_float32(model), "once"
    with torch.no_grad():
        wanted = model(IDS).logits
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(IDS).logits, wanted)
            again.lm_head.weight.zero_()
            assert not again(IDS).logits.any(), "it runs its own weights"
            assert torch.equal(model(IDS).logits, wanted)
        model.save_pretrained(tmp_path)
        assert "forward" not in type(model).from_pretrained(tmp_path).__dict__
        assert torch.equal(copy.deepcopy(model).float()(IDS).logits, plain.float()(IDS).logits)
    with torch.autocast("cpu", dtype=BFLOAT16):
        assert emulated(lambda: model(IDS)), "autocast has its own dtype"
    with pytest.raises(IndexError):
        model(IDS + 1000)
    assert torch.overrides._len_torch_function_stack() == 0


@pytest.mark.contract("exact restore")
@pytest.mark.contract("masked equals compact")
@pytest.mark.contract("sparsity 0 is bit-identical")
@pytest.mark.usefixtures("native")
def test_a_pruned_model_keeps_it():
    """Prompts and scored texts run in float32 by every executor; afterwards the forward is back."""
    model, logits = wide(), {}
    dense, forward = decode(model, IDS, PROMPT), model.__dict__["forward"]
    for executor in ("masked", "compact", "native"):
        with Same(model), prune(model, "griffin", sparsity=0.5, executor=executor) as run:
            assert run.executor == executor and module.float32_note(model)
            assert emulated(lambda: [generate(model, IDS, 4), model(IDS)]) == []
            logits[executor] = decode(model, IDS, PROMPT)
        assert model.__dict__["forward"] is forward
        assert apart(logits[executor][:, PROMPT:], logits["masked"][:, PROMPT:]) < 3e-2, executor
    for method in ("griffin", "dart-token"):
        with prune(model, method, sparsity=0.0):
            assert torch.equal(decode(model, IDS, PROMPT), dense)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_load_does_it_where_no_dtype_is_given(tmp_path, dtype):
    folder = write_gpt2(tmp_path / "model")
    load(str(folder), dtype="bfloat16")[0].save_pretrained(folder)
    model, _ = load(str(folder), dtype=dtype)
    assert model.dtype == BFLOAT16 and bool(emulated(lambda: model(IDS))) == bool(dtype)
    assert ("prompts are computed in float32" in module.float32_note(model)) == (dtype is None)


def gradients(model):
    taken = {}
    run_forward(model, TEXTS, lambda layer, seen, g: taken.setdefault(layer, g))
    return taken


@pytest.mark.usefixtures("native")
def test_a_copy_has_the_gradients_of_the_same_weights_in_float32():
    """Blocks are dequantised, and tied weights stay tied."""
    model = tiny("llama").to(BFLOAT16)
    before = {name: (id(weight), weight.clone()) for name, weight in model.named_parameters()}
    with module.in_float32(model) as copied:
        assert copied is not model and {w.dtype for w in copied.parameters()} == {torch.float32}
        taken = gradients(copied)
    for layer, g in gradients(model.float()).items():
        assert torch.equal(taken[layer], g)
    for name, weight in model.named_parameters():
        assert id(weight) == before[name][0] and torch.equal(weight, before[name][1].float())
    model = tiny("llama", tie_word_embeddings=True).to(BFLOAT16)
    packed = torch.nn.Parameter(pack(model.lm_head.weight, "q8_0"), requires_grad=False)
    model.lm_head.weight = model.model.embed_tokens.weight = packed
    with module.in_float32(model) as copied:
        assert copied.lm_head.weight is copied.model.embed_tokens.weight
        assert torch.equal(copied.lm_head.weight, packed.dequantise().float())


def test_the_model_itself_where_memory_is_short_or_nothing_is_gained(monkeypatch):
    """Where memory is short, matrix by matrix in float32 and without gradients of weights."""

    def copies(model):
        with module.in_float32(model) as runs:
            return runs is not model

    model = tiny("llama")
    assert not copies(model)
    model.to(BFLOAT16)
    size = 4 * sum(weight.numel() for weight in model.parameters())
    for free in (2 * size, 2 * size - 1):
        monkeypatch.setattr(module, "available", lambda free=free: free)
        assert copies(model) == (free == 2 * size)
    with module.in_float32(model) as runs, Narrow() as narrow:
        assert not any(weight.requires_grad for weight in runs.parameters())
        taken = gradients(runs)
    assert narrow.found == [] and all(weight.requires_grad for weight in model.parameters())
    for layer, g in gradients(copy.deepcopy(model).float()).items():
        assert apart(taken[layer], g) < 5e-2
    monkeypatch.setattr(module, "emulates", lambda dtype: False)
    assert not copies(model) and not module.compute_prompts_in_float32(model)
    assert "forward" not in model.__dict__


@pytest.mark.smollm2
@pytest.mark.skipif(not emulates(BFLOAT16), reason="this CPU has bfloat16 arithmetic")
def test_perplexity_is_the_same_but_for_rounding():
    """The default model as ``load`` gives it, and as transformers alone would compute it."""
    model, tokenizer = load("smollm2-135m", weights="dense")
    plain = copy.deepcopy(model)
    del plain.forward
    windows = slices(tokenizer(texts.all_text(), return_tensors="pt").input_ids[0], 2, 64, 64)
    found, slow, exact = (
        score(one, None, windows, 64).perplexity
        for one in (model, plain, copy.deepcopy(plain).float())
    )
    assert found == pytest.approx(slow, rel=0.01) and found == pytest.approx(exact, rel=0.01)
