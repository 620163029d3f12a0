"""How the contract tests drive a model: teacher-forced decoding, forced generation, snapshots."""

import functools
import gc
import inspect

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessor

from dart_llm.errors import DartError
from dart_llm.models.packed import place_of
from dart_llm.session.run import prune
from tiny import LAYERS, WIDTH, tiny, tokens

_TAKEN = inspect.signature(LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in _TAKEN else "past_key_values"
"""The keyword under which this version of transformers takes a cache."""

EVIDENCE = {"masking_step": 1000, "sparsity": 0.5}
"""Everything is observed and nothing pruned: what was counted can be compared."""


@functools.cache
def shared_model(name="llama", dtype=torch.float32):
    """One model per name and dtype for all tests; every test leaves it as it was."""
    return tiny(name, dtype=dtype)


def new_cache(model):
    return DynamicCache(config=model.config.get_text_config())


@torch.no_grad()
def step(model, ids, cache, mask=None):
    """One bare forward on a cache.  Returns its logits [B, T, V]."""
    return model(ids, attention_mask=mask, use_cache=True, **{CACHE: cache}).logits


def decode(model, ids, prompt, mask=None):
    """Prefill ``prompt`` tokens, then feed the others one by one.  Returns logits [B, T, V]."""
    cache = new_cache(model)
    ends, start, logits = [prompt, *range(prompt + 1, ids.shape[1] + 1)], 0, []
    for end in ends:
        seen = None if mask is None else mask[:, :end]
        logits.append(step(model, ids[:, start:end], cache, seen))
        start = end
    return torch.cat(logits, 1)


class Forced(LogitsProcessor):
    """Makes ``generate`` choose given tokens: row r chooses ``rows[r][step]``, then goes on."""

    def __init__(self, prompt, rows):
        self.prompt = prompt
        self.rows = rows

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt
        forced = torch.full_like(scores, -1e9)
        for row, wanted in enumerate(self.rows):
            forced[row, wanted[min(step, len(wanted) - 1)]] = 0
        return forced


def generate(model, ids, new, **settings):
    """Greedy generation of ``new`` tokens that returns sequences and raw logits."""
    return model.generate(
        ids,
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **{"eos_token_id": None, **settings},
    )


def apart(first, second):
    """Largest absolute difference, relative to the largest value."""
    a, b = (t if isinstance(t, Tensor) else torch.stack(tuple(t)) for t in (first, second))
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def selections(run):
    """A list that fills with (decode step, row, kept ids per layer) of every mask of ``run``."""
    selected = []

    def take(remask, state):
        ids = [None if mask is None else mask.ids.clone() for mask in state.selection.masks]
        selected.append((remask.step, remask.row, ids))

    run.on_selection = take
    return selected


def same_masks(first, second):
    """Whether two sets of kept neurons (or two runs' masks) are equal, layer by layer."""
    if isinstance(first, dict):
        first, second = ([kept[layer] for layer in sorted(kept)] for kept in (first, second))
    return len(first) == len(second) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(first, second, strict=True)
    )


def state_of(run, row=0):
    """The newest sequence of a run, up to date: the one place that knows where it is kept."""
    run.report()
    return run.controller.sequences[row]


HALF = {"method": "griffin", "sparsity": 0.5}


def pruned(model, ids, prompt, make=None, **settings):
    """A run (by ``make``, else ``prune``) that decodes ids, its ``selections``, its logits."""
    run = (make or prune)(model, **{**HALF, **settings})
    masks = selections(run)
    with run:
        return run, masks, decode(model, ids, prompt)


def written(model, ids, new, settings=None, **how):
    """A run in which ``generate`` writes ``new`` tokens in the way of ``how``, and what it gave."""
    with prune(model, **{**HALF, **(settings or {})}) as run:
        return run, generate(model, ids, new, **how)


def sums_of(run):
    return [layer.sums["score"].total.clone() for layer in state_of(run).evidence]


WIDTHS = {"bloom": 64}
"""Where it is not that of ``tiny``."""


def picked(name="llama", keep=20):
    """Neurons of every layer of ``tiny(name)``, chosen by lot."""
    generator = torch.Generator().manual_seed(3)
    width = WIDTHS.get(name, WIDTH)
    return {
        layer: sorted(torch.randperm(width, generator=generator)[:keep].tolist())
        for layer in range(LAYERS)
    }


def forward_lengths(model, body):
    """New tokens of every root forward that ``body`` makes."""
    lengths = []

    def take(module, args, kwargs):
        given = kwargs.get("input_ids", args[0] if args else None)
        lengths.append(int((kwargs["inputs_embeds"] if given is None else given).shape[1]))

    handle = model.register_forward_pre_hook(take, with_kwargs=True)
    try:
        body()
    finally:
        handle.remove()
    return lengths


HOOKS = tuple(name for name in nn.Module().__dict__ if "hooks" in name)


def snapshot(model):
    """What a restored model must still have: modules, types, attributes, hooks, weights."""
    modules = dict(model.named_modules())
    return {
        "types": [(name, type(module)) for name, module in modules.items()],
        "attributes": {
            name: [(key, id(value)) for key, value in module.__dict__.items()]
            for name, module in modules.items()
        },
        "hooks": {
            name: {key: list((getattr(module, key, None) or {}).items()) for key in HOOKS}
            for name, module in modules.items()
        },
        "state": {
            name: (place_of(value), value.stride(), hash(_bytes(value)))
            for name, value in model.state_dict().items()
        },
    }


def _bytes(value):
    return value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class Same:
    """Asserts on exit that the model is bit for bit what it was on entry."""

    def __init__(self, model):
        self.model = model
        self.ids = tokens(1, 12, seed=8)

    def __enter__(self):
        decode(self.model, self.ids, 8)
        self.before, self.logits = snapshot(self.model), decode(self.model, self.ids, 8)
        return self

    def __exit__(self, *error):
        after = snapshot(self.model)
        for part, value in self.before.items():
            assert after[part] == value, part
        assert torch.equal(decode(self.model, self.ids, 8), self.logits)


def refused(call, inputs, kind=DartError):
    """What ``call`` says of inputs that it refuses, by the input: for a snapshot."""
    said = {}
    for value in inputs:
        with pytest.raises(kind) as caught:
            call(value)
        said[ascii(value)] = str(caught.value)
    return said


def storages():
    """Memory that tensors hold: bytes by address."""
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and not thing.is_meta:
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sizes
