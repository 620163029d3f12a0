"""Prompts of packed models in native layers: the model's own numbers, cache and evidence."""

import copy

import pytest
import torch

from dart_llm.data import texts
from dart_llm.models import packed
from dart_llm.models.loading import load
from dart_llm.models.packed_loading import round_weights
from dart_llm.patching.executors import whole_step
from dart_llm.patching.executors.whole_step import WholeSteps
from dart_llm.session.run import prune
from packed_cases import mixed_model
from prior_cases import SMALL
from steps import CACHE, apart, new_cache, pruned, same_masks, step
from tiny import tiny, tokens

pytestmark = pytest.mark.usefixtures("native")

SIZES = {"hidden_size": 64, "intermediate_size": 160}
WIDER = {"gemma3": {"sliding_window": 64}, "mistral": {"sliding_window": 64}}
"""Windows that a prompt fits into."""
FAMILIES = ("llama", "llama-bias", "qwen2", "qwen3", "smollm3", "phi3", "gemma", "olmo2", *WIDER)
FAMILIES += ("gpt_neox", "gpt_neox-serial")
PROMPT, DECODED = 40, 6
IDS = tokens(2, PROMPT + DECODED, seed=5)
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""Of the largest value; bfloat16 is rounded at other places than by torch's operators."""
ROUNDED = 5e-2
"""The same of products with inputs of 8 bits, where some fall to another level."""


def packed_model(name, dtype=torch.float32, kind="q8_0", **sizes):
    model = tiny(name, dtype=dtype, **{**SIZES, **WIDER.get(name, {}), **sizes})
    round_weights(model, kind)
    return model


@pytest.fixture
def prompts(monkeypatch):
    """How many prompts ran natively."""
    seen, run = [], WholeSteps.prompt

    def counted(self, call, *rest):
        seen.append(tuple(call.ids.shape))
        return run(self, call, *rest)

    monkeypatch.setattr(WholeSteps, "prompt", counted)
    return seen


def limit(monkeypatch, most):
    """Prompts of up to ``most`` tokens run on the blocks, by whatever kernels this CPU has."""
    for module in (packed, whole_step):
        monkeypatch.setattr(module, "few", lambda: most)


@torch.no_grad()
def after_prompt(model, ids, **options):
    cache = new_cache(model)
    return model(ids, use_cache=True, **{CACHE: cache}, **options).logits, cache


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("on_blocks", [False, True], ids=["dequantised", "on blocks"])
def test_numbers_and_cache_are_the_models_own(name, dtype, on_blocks, prompts, monkeypatch):
    """Of two rows; all logits, and the last ones alone."""
    limit(monkeypatch, 1000 if on_blocks else 0)
    model, ids = packed_model(name, dtype), IDS[:, :PROMPT]
    close = CLOSE[dtype] + (ROUNDED if on_blocks else 0)
    wanted, theirs = after_prompt(model, ids)
    following = step(model, IDS[:, PROMPT : PROMPT + 1], copy.deepcopy(theirs))
    with prune(model, "griffin", sparsity=0.0, executor="native") as run:
        result, ours = after_prompt(model, ids)
        last, _ = after_prompt(model, ids, logits_to_keep=1)
        decoded = step(model, IDS[:, PROMPT : PROMPT + 1], copy.deepcopy(ours))
        assert run.patch.steps == 1
    # inputs of products are rounded to 8 bits: rounding before decides between two levels
    assert apart(decoded, following) < ROUNDED
    assert prompts == [(2, PROMPT)] * 2
    assert result.dtype == dtype and apart(result, wanted) < close
    assert last.shape == (2, 1, wanted.shape[-1])  # few rows: a product with inputs of 8 bits
    assert apart(last, result[:, -1:]) < ROUNDED
    assert ours.get_seq_length() == PROMPT
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        for mine, other in ((a.keys, b.keys), (a.values, b.values)):
            assert mine.dtype == dtype and apart(mine, other) < close


LONGEST = 256
KINDS = ("q8_0", "q4_0", "q4_1", "q4_k and q6_k")


def model_in_blocks(kind):
    return mixed_model("llama") if kind == KINDS[-1] else packed_model("llama", kind=kind)


@pytest.mark.parametrize(
    ("executor", "kind", "length"),
    [("native", *case) for case in zip(KINDS, (2, 17, 33, LONGEST), strict=True)]
    + [("masked", KINDS[1], 100), ("masked", KINDS[3], 17)],
)
def test_on_the_blocks_a_prompt_says_nearly_what_dequantised_rows_say(
    kind, length, executor, monkeypatch
):
    """Inputs of 8 bits: 2 to 3 % of the logits' size, and the same word where it leads clearly."""
    model, ids = model_in_blocks(kind), tokens(1, length, seed=7)
    limit(monkeypatch, 0)
    wanted, _ = after_prompt(model, ids)
    limit(monkeypatch, LONGEST)
    with prune(model, "griffin", executor=executor):
        result, _ = after_prompt(model, ids)
    far = float((result - wanted).norm() / wanted.norm())
    assert 1e-4 < far < 0.04 and apart(result, wanted) < 0.1
    first, second = wanted.topk(2).values.unbind(-1)
    clear = first - second > 0.1 * wanted.abs().max()
    assert torch.equal(result.argmax(-1)[clear], wanted.argmax(-1)[clear])


def overlap(first, second):
    """Mean share of the kept neurons of two sets of masks that both keep, by layers."""
    pairs = [(set(a.tolist()), set(b.tolist())) for a, b in zip(first, second, strict=True)]
    return sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize(
    ("kind", "method", "executor"),
    [(KINDS[0], "griffin", "native"), (KINDS[1], "dart", "native"), (KINDS[3], "dart", "masked")],
)
def test_on_the_blocks_masks_are_nearly_those_of_dequantised_rows(
    kind, method, executor, monkeypatch
):
    """Neurons at the edge of a mask change places: 0.987 to 1 of what either keeps is the same."""
    settings = {"sparsity": 0.5, "method": method, "executor": executor}
    settings |= {} if method == "griffin" else {"self_stats": SMALL}
    model, ids, result = model_in_blocks(kind), tokens(1, 102, seed=7), []
    for most in (16, LONGEST):
        limit(monkeypatch, most)
        result.append(pruned(model, ids, 100, **settings)[1][0][2])
    assert overlap(*result) > 0.95


@pytest.mark.smollm2
@pytest.mark.parametrize("method", ["griffin", "dart"])
def test_masks_of_the_default_models_prompt(method, monkeypatch):
    """In its own Q4_1 blocks; 0.98 where this was written."""
    model, tokenizer = load()
    ids = tokenizer(texts.all_text(), return_tensors="pt").input_ids[:, :101]
    masks = []
    for most in (16, LONGEST):
        limit(monkeypatch, most)
        masks.append(pruned(model, ids, 100, method=method, executor="native")[1][0][2])
    assert overlap(*masks) > 0.95


@pytest.mark.usefixtures("dequantised_prompts")
@pytest.mark.parametrize("method", ["griffin", "dart", "dart-token"])
def test_masks_are_those_of_the_models_own_prompt(method, prompts):
    """Evidence and the reference of drift: what the layers hand on is what hooks see."""
    settings = {"method": method, **({} if method == "griffin" else {"self_stats": SMALL})}
    model, ids = packed_model("llama"), IDS[:1]
    _, theirs, wanted = pruned(model, ids, PROMPT, executor="masked", **settings)
    assert prompts == []
    _, ours, result = pruned(model, ids, PROMPT, executor="native", **settings)
    assert (1, PROMPT) in prompts and len(ours) == len(theirs) > 0
    assert all(same_masks(a[2], b[2]) for a, b in zip(ours, theirs, strict=True))
    assert apart(result, wanted) < ROUNDED


@pytest.mark.parametrize("method", ["griffin", "dart", "dart-token"])
def test_layers_are_observed_in_any_groups(method, prompts, monkeypatch):
    limit(monkeypatch, LONGEST)
    settings = {"method": method, **({} if method == "griffin" else {"self_stats": SMALL})}
    found = []
    for most in (1, whole_step.OBSERVED):  # one layer at a time, and all
        monkeypatch.setattr(whole_step, "OBSERVED", most)
        model, ids = packed_model("llama"), IDS[:1]
        found.append(pruned(model, ids, PROMPT, executor="native", **settings))
    (_, ours, result), (_, theirs, wanted) = found
    assert (1, PROMPT) in prompts and len(ours) == len(theirs) > 0
    assert all(same_masks(a[2], b[2]) for a, b in zip(ours, theirs, strict=True))
    assert apart(result, wanted) < ROUNDED


def test_what_it_does_not_serve_runs_in_the_model(prompts):
    """And gives what the model gives."""
    model, ids = packed_model("llama"), IDS[:, :PROMPT]
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    embedded = model.get_input_embeddings()(ids).detach()
    calls = {
        "padding": lambda: model(ids, attention_mask=padded),
        "embeddings": lambda: model(inputs_embeds=embedded),
        "other positions": lambda: model(ids, position_ids=torch.arange(PROMPT)[None] + 1),
        "hidden states": lambda: model(ids, output_hidden_states=True),
        "one token": lambda: model(ids[:, :1]),
        "labels": lambda: model(ids, labels=ids),
        "chosen logits": lambda: model(ids, logits_to_keep=torch.tensor([3, 5])),
    }
    for what, call in calls.items():
        with torch.no_grad():
            wanted = call().logits
            with prune(model, "griffin", executor="native"):
                assert torch.equal(call().logits, wanted), what
    with prune(model, "griffin", executor="native"):
        assert model(ids).logits.requires_grad is False or prompts == []
        with torch.no_grad():
            _, cache = after_prompt(model, ids[:, :20])
            del prompts[:]
            step(model, ids[:, 20:], cache)
        seen = []
        handle = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
        after_prompt(model, ids)
        handle.remove()
    assert prompts == [] and seen == [1]
    for other in (packed_model("gemma2"), tiny("llama", **SIZES)):  # a short window, dense weights
        with prune(other, "griffin", executor="native"):
            after_prompt(other, ids)
    assert prompts == []


def test_changed_norms_are_noticed(prompts):
    """Weights that were written between two prompts, also where autograd was not told."""
    model, ids = packed_model("gemma"), IDS[:, :PROMPT]
    with prune(model, "griffin", executor="native"):
        before, _ = after_prompt(model, ids)
        model.model.layers[0].input_layernorm.weight.data.mul_(1.5)
        model.model.norm.weight.data.add_(0.25)
        result, _ = after_prompt(model, ids)
    wanted, _ = after_prompt(model, ids)
    assert len(prompts) == 2 and apart(result, wanted) < 1e-5 < 1e-2 < apart(before, wanted)


def test_ids_beyond_the_vocabulary_are_refused(prompts):
    model, ids = packed_model("llama"), IDS[:, :PROMPT].clone()
    ids[1, 7] = 10_000
    with (
        prune(model, "griffin", executor="native"),
        pytest.raises(IndexError, match="token id 10000 is outside the vocabulary of 96 tokens"),
    ):
        after_prompt(model, ids)
