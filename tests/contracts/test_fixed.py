"""Clamped neurons and masks of the user: what a hook written by hand computes."""

import math
from itertools import product

import pytest
import torch

import steps
from dart_llm.errors import AttachError, ConfigError
from dart_llm.pruning.clamp import Clamp, LayerClamp
from dart_llm.session.run import prune
from products import SHAPES
from tiny import WIDTH, tokens
from token_cases import PLAIN, before_down

PROMPT = 10
IDS = tokens(1, 22, seed=4)
CLAMP = {0: {3: 2.5, 17: -1.0}, 2: {5: 0.0}, 3: {40: 30.0}}
OFTEN = {"drift": {"rule": "interval 4", "min_distance": 0, "max_dense_share": None}}
OFTEN |= {"remask": {"observe_tokens": 2}, "compensation": False}


def by_hand(model, kept_of, clamp=CLAMP, prompt=PROMPT):
    """Logits of IDS by hooks: after the prompt u is 0 outside of ``kept_of``, and clamped."""
    fed = dict.fromkeys(range(4), prompt)

    def change(layer, _, u):
        if (u.shape[-2] if u.dim() == 3 else len(u)) >= prompt:
            return None
        kept = kept_of(fed[layer], layer)
        fed[layer] += 1
        u = u.clone() if kept is None else u * torch.zeros(u.shape[-1]).index_fill(0, kept, 1)
        for neuron, value in clamp.get(layer, {}).items():
            u[..., neuron] = value
        return u

    with before_down(model, None, change):
        return steps.decode(model, IDS, prompt)


def in_time(masks):
    """``kept_of`` for masks as ``selections`` gives them, tokens that are observed left out."""

    def kept_of(position, layer):
        decoded = position - PROMPT
        mine = [(start, ids) for start, _, ids in masks if start <= decoded]
        if not mine or decoded >= mine[-1][0] + 4:  # an interval of four, then two are observed
            return None
        return mine[-1][1][layer]

    return kept_of


@pytest.mark.parametrize(
    ("name", "executor"),
    [*product((*SHAPES, "bloom"), ("auto",)), ("llama", "masked"), ("opt", "masked")],
)
def test_a_clamp_alone_is_a_hook_by_hand(name, executor):
    """Decoded tokens alone; the prompt is what it was."""
    model = steps.shared_model(name)
    clamp = {k: v for k, v in CLAMP.items() if name != "bloom" or k < 3}
    wanted = by_hand(model, lambda *_: None, clamp)
    with prune(model, sparsity=0, clamp=clamp, executor=executor) as run:
        assert steps.apart(steps.decode(model, IDS, PROMPT), wanted) < 1e-5
    assert steps.apart(wanted, steps.decode(model, IDS, PROMPT)) > 1e-3
    gone = sum(map(len, clamp.values())) / (4 * steps.WIDTHS.get(name, WIDTH))
    assert run.report().achieved_sparsity == pytest.approx(gone)
    kept = run.masks()
    assert [*kept] == [*clamp] and not {3, 17} & {*kept[0].tolist()}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("executor", ["masked", "compact", "native"])
def test_a_method_that_chooses_and_a_clamp(executor):
    """Observed tokens are clamped too, and masks never keep what is clamped."""
    model = steps.shared_model()
    with prune(model, "griffin", sparsity=0.5, clamp=CLAMP, executor=executor, **OFTEN) as run:
        masks = steps.selections(run)
        logits = steps.decode(model, IDS, PROMPT)
    assert [start for start, *_ in masks] == [0, 6]
    assert all(len(ids[0]) == WIDTH // 2 and not {3, 17} & {*ids[0].tolist()} for *_, ids in masks)
    assert steps.apart(logits, by_hand(model, in_time(masks))) < 1e-5
    assert run.report().sparsity_while_pruned == 0.5
    token, logits = {"method": PLAIN, "sparsity": 0.5, "clamp": CLAMP}, []
    for one in ("masked", executor):
        with prune(model, executor=one, **token):
            logits.append(steps.decode(model, IDS, PROMPT))
    assert steps.apart(*logits) < 1e-5
    for method in ("cats", "gate", "countdown", "prox"):  # their winners are other neurons
        with prune(model, method, sparsity=0.9, clamp=CLAMP) as run:
            steps.decode(model, IDS, PROMPT)
        assert run.report().sparsity_while_pruned == pytest.approx(0.9, abs=0.02)


def test_nothing_stands_for_a_clamped_neuron_but_its_value():
    """The mean of what is removed, which compensates, leaves out what is clamped."""
    model, constants = steps.shared_model(), []
    for clamp in ({}, {0: {3: 0.0, 17: 0.0}}, {0: {3: 2.0, 17: 0.0}}):
        with prune(model, "griffin", sparsity=0.5, compensation=True, clamp=clamp) as run:
            steps.decode(model, IDS, PROMPT)
            (state,) = run.controller.sequences
            constants.append(state.selection.masks[0])
    plain, silent, loud = constants
    down = model.model.layers[0].mlp.down_proj.weight.detach()
    assert torch.equal(silent.ids, loud.ids) and len(silent.ids) == len(plain.ids) == WIDTH // 2
    torch.testing.assert_close(loud.bias - silent.bias, 2.0 * down[:, 3])
    with prune(model, "griffin", sparsity=0.5, compensation=True) as run:
        steps.decode(model, IDS, PROMPT)
        mean = run.controller.sequences[0].evidence[0].sums["signed"].mean
    gone = sorted({*range(WIDTH)} - {*silent.ids.tolist()} - {3, 17})
    torch.testing.assert_close(silent.bias, down[:, gone] @ mean[gone])


def test_clamped_neurons_rank_last_and_have_no_mean():
    clamp = Clamp({1: LayerClamp(torch.tensor([0, 2]), 4, None)})
    ones = torch.ones(4)
    assert [score.tolist() for score in clamp.last([ones, ones])] == [
        [1.0] * 4,
        [-math.inf, 1.0, -math.inf, 1.0],
    ]
    assert clamp.silent(0, ones).tolist() == [1.0] * 4
    assert clamp.silent(1, ones).tolist() == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.contract("sparsity 0 is bit-identical")
def test_what_removes_nothing():
    """An empty mapping of masks keeps everything; it does not stand for the default method."""
    dense = steps.decode(steps.shared_model(), IDS, PROMPT)
    masks = ({"masks": {}}, {"remove": {}}, {"remove": {0: []}}, {"masks": {0: range(48)}})
    for settings in (*({"sparsity": 0, "clamp": clamp} for clamp in ({}, {0: {}})), *masks):
        with prune(steps.shared_model(), executor="compact", **settings) as run:
            assert torch.equal(steps.decode(run.model, IDS, PROMPT), dense)
        report = run.report()
        assert report.achieved_sparsity == 0
        assert (report.method == "fixed masks") == (settings in masks)


def test_a_clamp_at_0_removes():
    logits = []
    clamp = {"clamp": {1: {4: 0.0, 9: 0}}, "method": "dense"}
    for settings in (clamp, {"remove": {1: [4, 9]}, "executor": "compact"}):
        with prune(steps.shared_model(), **settings) as run:
            logits.append(steps.decode(run.model, IDS, PROMPT))
    assert torch.equal(*logits)


def test_clamps_that_cannot_be():
    every = dict.fromkeys(range(WIDTH), 0.0)
    for clamp, message in (
        ({4: {1: 0.0}}, "layer 4 is out of range: this model has 4 layers"),
        ({0: {48: 0.0}}, "layer 0 has neurons 0-47; got id 48"),
        ({0: {1: float("nan")}}, "neuron 1 of layer 0 is clamped at nan: give a finite float32"),
        ({0: {1: 1e39}}, r"neuron 1 of layer 0 is clamped at 1e\+39: give a finite float32"),
        ({0: {1: "x"}}, "neuron 1 of layer 0 is clamped at x: give a finite float32"),
        ({0: {1.5: 0.0}}, r"clamp= takes \{layer: \{neuron id: activation\}\}"),
        ({"0": {1: 0.0}}, r"clamp= takes \{layer: \{neuron id: activation\}\}"),
        ({1: every}, "layer 1 has no neuron that is not clamped: clamp fewer"),
        ({0: [1, 2]}, r"clamp= takes \{layer: \{neuron id: activation\}\}"),
        ([0], r"clamp= takes \{layer: \{neuron id: activation\}\}"),
    ):
        with pytest.raises(ConfigError, match=message):
            prune(steps.shared_model(), sparsity=0, clamp=clamp)
    with pytest.raises(ConfigError, match="only clamped neurons in a layer: keep more, or clamp"):
        prune(steps.shared_model(), masks={0: [1]}, clamp={0: {1: 0.0}})


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize(("name", "executor"), [*product((*SHAPES, "bloom"), ("auto", "masked"))])
def test_fixed_masks_keep_what_they_name(name, executor):
    model = steps.shared_model(name)
    masks = {layer: ids for layer, ids in steps.picked(name).items() if layer != 1}
    kept = {layer: torch.tensor(ids) for layer, ids in masks.items()}
    expected = by_hand(model, lambda _, layer: kept.get(layer), {})
    with prune(model, masks=masks, executor=executor) as run:
        assert steps.apart(steps.decode(model, IDS, PROMPT), expected) < 1e-5
    report, width = run.report(), steps.WIDTHS.get(name, WIDTH)
    assert [layer.kept for layer in report.layers] == [20, width, 20, 20]
    assert report.achieved_sparsity == pytest.approx(3 * (width - 20) / (4 * width))
    assert report.decoded_tokens == 12 and report.dense_token_share == 0
    assert report.method == "fixed masks" and report.requested_sparsity is None
    assert report.remask_causes == {"fixed": 1} and report.remasks == 0
    assert {layer: kept.tolist() for layer, kept in run.masks().items()} == masks


def test_remove_is_the_complement_and_masks_of_another_run_are_masks():
    model, ids, keep, logits = steps.shared_model(), tokens(1, 76), steps.picked(), []
    gone = {layer: sorted({*range(48)} - {*kept}) for layer, kept in keep.items()}
    for settings in ({"masks": keep}, {"remove": gone}):
        with prune(model, **settings) as run:
            logits.append(steps.decode(model, ids, 70))
        assert {layer: kept.tolist() for layer, kept in run.masks().items()} == keep
    assert torch.equal(*logits)
    run, _, wanted = steps.pruned(model, ids, 70)
    with prune(model, masks=run.masks()) as again:
        assert torch.equal(steps.decode(model, ids, 70), wanted)
    assert steps.same_masks(again.masks(), run.masks())


def test_how_far_a_run_is_from_its_first_mask():
    model = steps.shared_model()
    with prune(model, "dart-prompt", sparsity=0.5) as run:
        steps.generate(model, tokens(1, 24), 11)
        words = "34 tokens were seen and 64 are needed, so decode at least 31 more"
        for call in (run.masks, lambda: run.export("nowhere")):
            with pytest.raises(AttachError, match=words):
                call()
        steps.generate(model, tokens(1, 24), 42)
        assert len(run.masks()) == 4
    nothing = prune(model, "griffin", sparsity=0.0)
    with nothing, pytest.raises(AttachError, match="removes no neurons: give a sparsity above 0"):
        nothing.masks()
