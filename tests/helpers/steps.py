"""How the contract tests drive a model: teacher-forced decoding, forced generation, snapshots."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessor, PreTrainedModel

from tiny import LAYERS, WIDTH, tiny, tokens

CACHE = (
    "cache"
    if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters
    else ("past_key_values")
)
"""The keyword under which this version of transformers takes a cache."""

EVIDENCE = {"masking_step": 1000, "sparsity": 0.5}
"""Everything is observed and nothing pruned: what was counted can be compared."""


@functools.cache
def shared_model(name: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """One model per name and dtype for all tests; every test leaves it as it was."""
    return tiny(name, dtype=dtype)


def new_cache(model: Any) -> DynamicCache:
    """An empty cache that fits ``model``."""
    return DynamicCache(config=model.config.get_text_config())


@torch.no_grad()
def step(model: Any, ids: Tensor, cache: Any, mask: Tensor | None = None) -> Tensor:
    """One bare forward on a cache.  Returns its logits [B, T, V]."""
    return model(ids, attention_mask=mask, use_cache=True, **{CACHE: cache}).logits


def decode(model: Any, ids: Tensor, prompt: int, mask: Tensor | None = None) -> Tensor:
    """Prefill ``prompt`` tokens, then feed the others one by one.  Returns logits [B, T, V]."""
    cache = new_cache(model)
    found = [step(model, ids[:, :prompt], cache, None if mask is None else mask[:, :prompt])]
    for end in range(prompt + 1, ids.shape[1] + 1):
        seen = None if mask is None else mask[:, :end]
        found.append(step(model, ids[:, end - 1 : end], cache, seen))
    return torch.cat(found, 1)


class Forced(LogitsProcessor):
    """Makes ``generate`` choose given tokens: row r chooses ``rows[r][step]``, then goes on."""

    def __init__(self, prompt: int, rows: Sequence[Sequence[int]]) -> None:
        self.prompt = prompt
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt
        forced = torch.full_like(scores, -1e9)
        for row, wanted in enumerate(self.rows):
            forced[row, wanted[min(step, len(wanted) - 1)]] = 0
        return forced


def generate(model: Any, ids: Tensor, new: int, **settings: Any) -> Any:
    """Greedy generation of ``new`` tokens that returns sequences and raw logits."""
    return model.generate(
        ids,
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **{"eos_token_id": None, **settings},
    )


def apart(first: Sequence[Tensor] | Tensor, second: Sequence[Tensor] | Tensor) -> float:
    """Largest absolute difference, relative to the largest value."""
    a, b = (t if isinstance(t, Tensor) else torch.stack(tuple(t)) for t in (first, second))
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def selections(run: Any) -> list[tuple[int, int | None, list[Tensor | None]]]:
    """A list that fills with (decode step, row, kept ids per layer) of every mask of ``run``."""
    found: list[tuple[int, int | None, list[Tensor | None]]] = []

    def take(remask: Any, state: Any) -> None:
        ids = [None if mask is None else mask.ids.clone() for mask in state.selection.masks]
        found.append((remask.step, remask.row, ids))

    run.on_selection = take
    return found


def same_masks(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> bool:
    """Whether two sets of kept neurons are equal, layer by layer."""
    return len(first) == len(second) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(first, second, strict=True)
    )


def state_of(run: Any, row: int = 0) -> Any:
    """The newest sequence of a run, up to date: the one place that knows where it is kept."""
    run.report()
    return run.controller.sequences[row]


def sums_of(run: Any) -> list[Tensor]:
    """The summed scores of the newest sequence, per layer."""
    return [layer.sums["score"].total.clone() for layer in state_of(run).evidence]


def same_sums(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(first, second, strict=True))


WIDTHS = {"bloom": 64}
"""Where it is not that of ``tiny``."""


def picked(name: str = "llama", keep: int = 20) -> dict[int, list[int]]:
    """Neurons of every layer of ``tiny(name)``, chosen by lot."""
    generator = torch.Generator().manual_seed(3)
    width = WIDTHS.get(name, WIDTH)
    return {
        layer: sorted(torch.randperm(width, generator=generator)[:keep].tolist())
        for layer in range(LAYERS)
    }


def widths_of(run: Any) -> list[int]:
    """Neurons per layer of the model behind ``run``."""
    return [layer.width for layer in run.report().layers]


def forward_lengths(model: nn.Module, body: Callable[[], Any]) -> list[int]:
    """New tokens of every root forward that ``body`` makes."""
    lengths: list[int] = []

    def take(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        lengths.append(int((kwargs["inputs_embeds"] if given is None else given).shape[1]))

    handle = model.register_forward_pre_hook(take, with_kwargs=True)
    try:
        body()
    finally:
        handle.remove()
    return lengths


HOOKS = tuple(name for name in nn.Module().__dict__ if "hook" in name)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a restored model must still have: attributes, hooks, names, weights."""
    modules = dict(model.named_modules())
    return {
        "names": list(modules),
        "attributes": {
            name: [(key, id(value)) for key, value in module.__dict__.items()]
            for name, module in modules.items()
        },
        "hooks": {
            name: {
                key: list(getattr(module, key).items()) for key in HOOKS if _is_dict(module, key)
            }
            for name, module in modules.items()
        },
        "state": {
            name: (value.data_ptr(), value.stride(), hash(_bytes(value)))
            for name, value in model.state_dict().items()
        },
    }


def _bytes(value: Tensor) -> bytes:
    return value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _is_dict(module: nn.Module, key: str) -> bool:
    return hasattr(getattr(module, key, None), "items")


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


def storages() -> dict[int, int]:
    """Memory that tensors hold: bytes by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and not thing.is_meta:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found
