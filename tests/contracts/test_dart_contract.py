"""Priors, low-rank compensation and one ranking together, on every FFN shape: the contract."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dart_llm.errors import ConfigError
from dart_llm.models.describe import describe
from dart_llm.pruning.masks import LayerMask
from dart_llm.session.run import prune
from prior_cases import CONFIG
from products import SHAPES, cases
from steps import (
    apart,
    decode,
    new_cache,
    same_masks,
    selections,
    shared_model,
    state_of,
    step,
)
from tiny import LAYERS, NAMES, tokens

PROMPT, LENGTH = 30, 36
PRIOR = 32
"""Tokens that the prior counts as."""
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2}
REMASKING = {
    "drift": {"rule": "interval 4", "min_distance": 0, "max_dense_share": 1.0},
    "remask": {"observe_tokens": 2, "evidence": "decay", "decay": 0.3},
}
"""Dense tokens 0 to 3 of six by turns; counts stay."""


def ids() -> Tensor:
    return tokens(1, LENGTH, seed=3)


def pruned(name: str, dtype: torch.dtype = torch.float32, **settings: Any):
    """A run, its masks and its logits."""
    run = prune(shared_model(name, dtype), CONFIG, **settings)
    found = selections(run)
    with run:
        logits = decode(run.model, ids(), PROMPT)
    return run, found, logits


def newest(run: Any) -> tuple[LayerMask, ...]:
    return run._newest_masks()


class ByHand:
    """Hooks that apply masks to a dense model: u times the mask, z + bias + out (P h)."""

    def __init__(self, model: Any, masks: tuple[LayerMask, ...]) -> None:
        self.model, self.masks, self.on = model, masks, False
        self.inputs: dict[int, Tensor] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> ByHand:
        for block, mask in zip(describe(self.model).blocks, self.masks, strict=True):
            self._hook(block.index, block.up, block.down, mask)
        return self

    def _hook(self, layer: int, up: nn.Module, down: nn.Module, mask: LayerMask) -> None:
        kept = mask.dense(down.weight.dtype)

        def read(module: nn.Module, args: Any) -> None:
            self.inputs[layer] = args[0]

        def drop(module: nn.Module, args: Any) -> Any:
            return (args[0] * kept,) if self.on else None

        def add(module: nn.Module, args: Any, z: Tensor) -> Any:
            if not self.on:
                return None
            z = z + mask.bias.to(z.dtype)
            if mask.low_rank is None:
                return z
            return z + linear(linear(self.inputs[layer], mask.low_rank.basis), mask.low_rank.out)

        self.handles.append(up.register_forward_pre_hook(read))
        self.handles.append(down.register_forward_pre_hook(drop))
        self.handles.append(down.register_forward_hook(add))

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def by_hand(model: Any, masks: tuple[LayerMask, ...]) -> Tensor:
    """Logits [1, T, V]: the prompt dense, the rest under ``masks``."""
    with ByHand(model, masks) as hooks:
        cache, text = new_cache(model), ids()
        found = [step(model, text[:, :PROMPT], cache)]
        hooks.on = True
        found += [step(model, text[:, at : at + 1], cache) for at in range(PROMPT, LENGTH)]
    return torch.cat(found, 1)


# what is computed


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize(
    ("name", "dtype"),
    cases([*product(NAMES, [torch.float32]), *product(SHAPES, TOLERANCE)], NAMES, TOLERANCE),
    ids=str,
)
def test_masked_and_compact_do_what_the_masks_say(name: str, dtype: torch.dtype) -> None:
    model = shared_model(name, dtype)
    run, masks, masked = pruned(name, dtype, executor="masked")
    wanted, dense = by_hand(model, newest(run)), decode(model, ids(), PROMPT)
    assert apart(masked, wanted) < TOLERANCE[dtype]
    assert torch.equal(masked[:, :PROMPT], dense[:, :PROMPT])
    assert apart(masked[:, PROMPT:], dense[:, PROMPT:]) > 3 * TOLERANCE[dtype]
    total = LAYERS * describe(model).blocks[0].down_width
    assert sum(layer.kept for layer in run.report().layers) == total // 2
    assert run.report().achieved_sparsity == pytest.approx(0.5)
    assert len(masks) == 1
    if name.startswith("opt"):
        with pytest.raises(ConfigError, match="compact"):
            prune(model, CONFIG, executor="compact")
        return
    other, same, compact = pruned(name, dtype)
    assert other.executor == "compact"
    assert same_masks(same[0][2], masks[0][2])
    assert apart(compact, masked) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", SHAPES)
def test_low_rank_maps_are_there_where_the_input_is_seen(name: str) -> None:
    """OPT's layers hold the projections: there only the mean stands for the removed neurons."""
    run, _, _ = pruned(name)
    rank = 0 if name.startswith("opt") else 8
    for mask, layer in zip(newest(run), run.layers, strict=True):
        assert (mask.low_rank is not None) == bool(rank)
        assert (layer.learnt.basis is not None) == bool(rank)
        if rank:
            assert mask.low_rank.basis is layer.learnt.basis
            assert mask.low_rank.out.shape == (layer.hidden, 8)
            continue
        observed = state_of(run).evidence[layer.index].sums["signed"]
        known = layer.learnt.evidence.sums["signed"].mean
        mean = (observed.total + PRIOR * known) / (observed.weight + PRIOR)
        wanted = layer.down[:, mask.removed()] @ mean[mask.removed()]
        torch.testing.assert_close(mask.bias, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "falcon"])
def test_the_map_is_the_regression_of_what_was_seen(name: str) -> None:
    """From u and h of the prompt's tokens after the sinks, and of the prior's sums."""
    model = shared_model(name)
    run, _, _ = pruned(name)
    us, hs = {}, {}
    handles = []
    for block in describe(model).blocks:
        for module, where in ((block.down, us), (block.up, hs)):
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, a, w=where, n=block.index: w.update(
                        {n: a[0][0, 4:].detach().double()}
                    )
                )
            )
    with torch.no_grad():
        model(ids()[:, :PROMPT])
    for handle in handles:
        handle.remove()
    for mask, layer in zip(newest(run), run.layers, strict=True):
        u, basis = us[layer.index], layer.learnt.basis.double()
        f = hs[layer.index] @ basis.T
        count = len(u)
        prior = {k: s.mean.double() for k, s in layer.learnt.evidence.sums.items()}

        def pool(own: Tensor, name: str, n: int = count, prior: Any = prior) -> Tensor:
            return (own + PRIOR * prior[name]) / (n + PRIOR)

        mean_u, mean_f = pool(u.sum(0), "signed"), pool(f.sum(0), "features")
        cross = pool(u.T @ f, "cross") - torch.outer(mean_u, mean_f)
        moments = pool(f.T @ f, "moments") - torch.outer(mean_f, mean_f)
        slopes = cross @ torch.linalg.inv(moments + 0.1 * torch.eye(8).double())
        gone = layer.down.double()[:, mask.removed()]
        out = gone @ slopes[mask.removed()]
        torch.testing.assert_close(mask.low_rank.out.double(), out, rtol=1e-3, atol=1e-3)
        bias = gone @ mean_u[mask.removed()] - out @ mean_f
        torch.testing.assert_close(mask.bias.double(), bias, rtol=1e-3, atol=1e-3)


# re-masks


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_remasks_refill_the_same_buffers(name: str) -> None:
    """A captured decode step stays valid: addresses stay, contents are those of the new mask."""
    model, text = shared_model(name), tokens(1, 60, seed=1)
    run = prune(model, CONFIG, executor="compact", **REMASKING)
    addresses, contents = [], []

    def take() -> None:
        for layer in run.patch.layers:
            held = layer.kept
            found = (held.rows, held.columns, held.row_bias, held.bias, held.linear.out)
            addresses.append([t.data_ptr() for t in found if t is not None])
            contents.append(held.linear.out.clone())
            assert torch.equal(held.linear.out, held.mask.low_rank.out)
            assert held.linear.basis is run.layers[layer.block.index].learnt.basis

    with run:
        cache = new_cache(model)
        step(model, text[:, :20], cache)
        step(model, text[:, 20:21], cache)
        take()
        for at in range(21, 34):
            step(model, text[:, at : at + 1], cache)
        take()
    assert len(run.remasks) == 3 and {r.kept for r in run.remasks} == {run.remasks[0].kept}
    assert addresses[:LAYERS] == addresses[LAYERS:]
    assert not any(
        torch.equal(a, b) for a, b in zip(contents[:LAYERS], contents[LAYERS:], strict=True)
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_executors_agree_through_remasks(name: str) -> None:
    model, text, found = shared_model(name), tokens(1, 44, seed=1), []
    for executor in ("masked", "auto"):
        run = prune(model, CONFIG, executor=executor, **REMASKING)
        masks = selections(run)
        with run:
            found.append((decode(model, text, 20), masks))
    assert apart(found[0][0], found[1][0]) < 1e-5
    assert [m[0] for m in found[0][1]] == [0, 6, 12, 18]
    assert all(same_masks(a[2], b[2]) for a, b in zip(found[0][1], found[1][1], strict=True))
