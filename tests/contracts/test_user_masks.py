"""A user's own masks: what they keep and compute, and which are refused."""

import copy
from itertools import product

import pytest
import torch

from dart_llm.errors import AttachError
from dart_llm.session.run import prune
from products import SHAPES, cases
from steps import (
    WIDTHS,
    apart,
    decode,
    generate,
    new_cache,
    picked,
    pruned,
    same_masks,
    shared_model,
    step,
)
from tiny import NAMES, tokens
from token_cases import before_down


def _masked_by_hand(model, masks, ids, prompt):
    """Decode with u zeroed by hooks of our own on the down projections, decode tokens only."""

    def zero(layer, _, u):
        if layer not in masks or (u.shape[-2] if u.dim() == 3 else len(u)) >= prompt:
            return None
        return u * torch.zeros(u.shape[-1]).index_fill(0, torch.tensor(masks[layer]), 1)

    with before_down(model, None, zero):
        return decode(model, ids, prompt)


EXECUTORS = ("auto", "masked")


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize(
    ("name", "executor"),
    cases([*product(NAMES, EXECUTORS[:1]), *product(SHAPES, EXECUTORS)], NAMES, EXECUTORS),
)
def test_given_masks_do_what_they_say(name, executor):
    model, ids = shared_model(name), tokens(1, 16)
    masks = {layer: ids_ for layer, ids_ in picked(name).items() if layer != 1}
    wanted = _masked_by_hand(model, masks, ids, 10)
    with prune(model, masks=masks, executor=executor) as run:
        assert apart(decode(model, ids, 10), wanted) < 1e-5
    report, width = run.report(), WIDTHS.get(name, 48)
    assert [layer.kept for layer in report.layers] == [20, width, 20, 20]
    assert report.achieved_sparsity == pytest.approx(3 * (width - 20) / (4 * width))
    assert report.decoded_tokens == 6 and report.dense_token_share == 0
    assert report.method == "fixed masks" and report.requested_sparsity is None
    assert report.remask_causes == {"fixed": 1} and report.remasks == 0
    assert {layer: kept.tolist() for layer, kept in run.masks().items()} == masks


def test_a_further_prompt_runs_dense():
    """As the first one does, also on a cache whose tokens were decoded under the masks."""
    model, ids, cache = shared_model(), tokens(1, 20), new_cache(shared_model())
    with prune(model, masks=picked()):
        step(model, ids[:, :9], cache)
        step(model, ids[:, 9:10], cache)
        same = copy.deepcopy(cache)
        found = step(model, ids[:, 10:], cache)
    assert torch.equal(found, step(model, ids[:, 10:], same))


def test_remove_is_the_complement_and_masks_of_another_run_are_masks():
    model, ids, keep = shared_model(), tokens(1, 76), picked()
    gone = {layer: sorted({*range(48)} - {*kept}) for layer, kept in keep.items()}
    found = []
    for given in ({"masks": keep}, {"remove": gone}):
        with prune(model, **given) as run:
            found.append(decode(model, ids, 70))
        assert {layer: kept.tolist() for layer, kept in run.masks().items()} == keep
    assert torch.equal(*found)
    run, _, wanted = pruned(model, ids, 70)
    with prune(model, masks=run.masks()) as again:
        assert torch.equal(decode(model, ids, 70), wanted)
    assert same_masks(again.masks(), run.masks())


@pytest.mark.contract("sparsity 0 is bit-identical")
def test_masks_that_remove_nothing():
    """An empty mapping is a mask that keeps everything, not the default method."""
    model, ids = shared_model(), tokens(1, 76)
    for given in ({"masks": {}}, {"remove": {}}, {"remove": {0: []}}, {"masks": {0: range(48)}}):
        with prune(model, **given) as run:
            found = decode(model, ids, 70)
        assert torch.equal(found, decode(model, ids, 70))
        assert run.report().achieved_sparsity == 0 and run.report().method == "fixed masks"


def test_how_far_a_run_is_from_its_first_mask():
    model = shared_model()
    with prune(model, "dart-prompt", sparsity=0.5) as run:
        with pytest.raises(AttachError, match="0 tokens were seen and 64 are needed, so decode at"):
            run.masks()
        generate(model, tokens(1, 24), 11)
        words = "34 tokens were seen and 64 are needed, so decode at least 31 more"
        for asked in (run.masks, lambda: run.export("nowhere")):
            with pytest.raises(AttachError, match=words):
                asked()
        generate(model, tokens(1, 24), 42)
        assert len(run.masks()) == 4
    nothing = prune(model, "griffin", sparsity=0.0)
    with nothing, pytest.raises(AttachError, match="is removed: ask for a sparsity above 0"):
        nothing.masks()
