"""A user's own masks: what they keep and compute, and which are refused."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dart_llm.errors import AttachError, ConfigError
from dart_llm.models.describe import describe
from dart_llm.session.run import prune
from products import SHAPES, cases
from steps import WIDTHS, apart, decode, generate, picked, shared_model
from tiny import NAMES, tokens


def _masked_by_hand(model: Any, masks: dict[int, list[int]], ids: Tensor, prompt: int) -> Tensor:
    """Decode with u zeroed by hooks of our own on the down projections, decode tokens only."""
    handles = []
    for block in describe(model).blocks:
        if block.index not in masks:
            continue
        keep = torch.zeros(block.down_width, dtype=model.dtype)
        keep[masks[block.index]] = 1

        def zero(module: nn.Module, args: Any, keep: Tensor = keep) -> Any:
            u = args[0]
            rows = u.shape[-2] if u.dim() == 3 else len(u)
            return (u if rows >= prompt else u * keep,)

        handles.append(block.down.register_forward_pre_hook(zero))
    try:
        return decode(model, ids, prompt)
    finally:
        for handle in handles:
            handle.remove()


EXECUTORS = ("auto", "masked")


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize(
    ("name", "executor"),
    cases([*product(NAMES, EXECUTORS[:1]), *product(SHAPES, EXECUTORS)], NAMES, EXECUTORS),
)
def test_given_masks_do_what_they_say(name: str, executor: str) -> None:
    model, ids = shared_model(name), tokens(1, 16)
    masks = {layer: ids_ for layer, ids_ in picked(name).items() if layer != 1}
    wanted = _masked_by_hand(model, masks, ids, 10)
    with prune(model, masks=masks, executor=executor) as run:
        got = decode(model, ids, 10)
    assert apart(got, wanted) < 1e-5
    report, width = run.report(), WIDTHS.get(name, 48)
    assert [layer.kept for layer in report.layers] == [20, width, 20, 20]
    assert report.achieved_sparsity == pytest.approx(3 * (width - 20) / (4 * width))
    assert report.decoded_tokens == 6 and report.dense_token_share == 0
    assert report.method == "given masks" and report.requested_sparsity is None
    assert report.remask_causes == {"given": 1} and report.remasks == 0
    assert {layer: kept.tolist() for layer, kept in run.masks().items()} == masks


def test_remove_is_the_complement() -> None:
    model, ids, keep = shared_model(), tokens(1, 16), picked()
    gone = {layer: sorted({*range(48)} - {*kept}) for layer, kept in keep.items()}
    with prune(model, masks=keep):
        wanted = decode(model, ids, 10)
    with prune(model, remove=gone) as run:
        got = decode(model, ids, 10)
    assert torch.equal(got, wanted)
    assert {layer: kept.tolist() for layer, kept in run.masks().items()} == keep
    dense = decode(model, ids, 10)
    with prune(model, remove={0: []}) as run:
        assert torch.equal(decode(model, ids, 10), dense)
    assert run.report().achieved_sparsity == 0


def test_masks_of_another_run() -> None:
    model, ids = shared_model(), tokens(1, 76)
    with prune(model, "griffin", sparsity=0.5) as run:
        wanted = decode(model, ids, 70)
    with prune(model, masks=run.masks()) as again:
        assert torch.equal(decode(model, ids, 70), wanted)
    assert all(torch.equal(again.masks()[layer], kept) for layer, kept in run.masks().items())


def test_masks_of_a_run_that_removed_nothing() -> None:
    """An empty mapping is a mask that keeps everything, not the default method."""
    model, ids = shared_model(), tokens(1, 76)
    dense = decode(model, ids, 70)
    for given in ({"masks": {}}, {"remove": {}}, {"masks": {0: range(48)}}):
        with prune(model, **given) as run:
            assert torch.equal(decode(model, ids, 70), dense)
        assert run.report().achieved_sparsity == 0 and run.report().method == "given masks"
    with prune(model, "griffin", budget={"table": "all:1.0"}) as run:
        assert torch.equal(decode(model, ids, 70), dense)


def test_given_masks_stay_and_release_as_configured() -> None:
    model, ids = shared_model(), tokens(1, 40)
    settings = {"masks": picked(), "drift": {"rule": "interval 3", "min_distance": 0}}
    with prune(model, "griffin", **settings, release_step=5) as run:
        generate(model, ids, 11)
        generate(model, ids, 11)
    report = run.report()
    assert report.remask_causes == {"given": 2}
    assert report.dense_token_share == 0.5 and report.decoded_tokens == 20


@pytest.mark.parametrize("batch", ["shared", "per_row"])
def test_given_masks_in_batches(batch: str) -> None:
    model, ids, masks = shared_model(), tokens(3, 20), picked()
    with prune(model, masks=masks, batch=batch) as run:
        got = decode(model, ids, 14)
    assert apart(got, _masked_by_hand(model, masks, ids, 14)) < 1e-5
    assert run.report().decoded_tokens == 18


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"masks": {4: [1]}}, "layer 4 is out of range: this model has 4 layers"),
        ({"remove": {1: range(48)}}, "layer 1 would keep no neuron"),
        ({"masks": {0: [1]}, "remove": {0: [1]}}, "not both"),
        ({"masks": {0: [1]}, "sparsity": 0.5}, "drop the sparsity"),
    ],
)
def test_masks_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune(shared_model(), **given)


def test_there_is_no_mask_before_the_first() -> None:
    model = shared_model()
    with prune(model, "griffin", sparsity=0.5) as run:
        with pytest.raises(AttachError, match="0 tokens were seen and 1 are needed"):
            run.masks()
        with pytest.raises(AttachError, match="0 tokens were seen and 1 are needed"):
            run.export("nowhere")
