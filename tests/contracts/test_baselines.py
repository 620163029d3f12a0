"""The baselines: their scores and budget by hand, and what each keeps on a small model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from budget_cases import views
from calibrated import ready
from dart_llm.calibration.calibrate import choose, observe
from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import floor_count, top_ids
from dart_llm.pruning.registry import BUDGETS, METHODS
from dart_llm.pruning.scores import mix_ranks, ranks
from dart_llm.session.run import Run, prune
from steps import decode, same_masks, selections, shared_model
from tiny import LAYERS, WIDTH, tokens

CALIBRATION = tokens(6, 24, seed=9)
STATIC = ("wanda", "flap", "random", "static")
METHODS_THAT_PRUNE = tuple(name for name in METHODS.names() if METHODS.get(name).sparsity != 0)


def kept(method: str, prompt: int, **changes: object) -> list[Tensor | None]:
    """The ids that a method keeps after the prompt with this seed."""
    run = ready(shared_model(), method, **{"sparsity": 0.5, **changes})
    found = selections(run)
    with run:
        decode(run.model, tokens(1, 70, seed=prompt), 68)
    return found[0][2]


def activations(ids: Tensor) -> list[Tensor]:
    """u of every layer over all tokens of ids, [tokens, I], float64, by plain hooks."""
    model, found = shared_model(), []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args: found.append(args[0].flatten(0, 1).double())
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def columns() -> list[Tensor]:
    """W_down of every layer, [D, I], float64."""
    return [layer.mlp.down_proj.weight.detach().double() for layer in shared_model().model.layers]


# ranks


def test_ranks_by_hand() -> None:
    """Order 0, 2 (a tie: the lower index first), 3, 1."""
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3, 0, 2, 1]


@pytest.mark.parametrize(
    ("weight", "mixed"),
    [(0, [3, 0, 2, 1]), (0.25, [2.25, 0.25, 2, 1.5]), (0.5, [1.5, 0.5, 2, 2]), (1, [0, 1, 2, 3])],
)
def test_mixed_ranks_by_hand(weight: float, mixed: list[float]) -> None:
    scores, prior = torch.tensor([3.0, 1.0, 3.0, 2.0]), torch.tensor([-4.0, 0.0, 5.0, 9.0])
    assert mix_ranks(scores, prior, weight).tolist() == mixed


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_ranks_keep_the_same_neurons(values: list[int], data: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    keep = data.draw(st.integers(1, len(values)))
    assert torch.equal(top_ids(ranks(scores), keep), top_ids(scores, keep))


# the standardised budget


@pytest.mark.parametrize(
    ("keep", "counts"),
    [(2, [1, 1]), (5, [4, 1]), (8, [4, 4]), (12, [4, 8]), (13, [5, 8]), (16, [8, 8])],
)
def test_standardized_by_hand(keep: int, counts: list[int]) -> None:
    """z of the first layer: four times 1 and -1; of the second: sqrt 7, then -1 / sqrt 7."""
    first = torch.tensor([0.0, 4, 0, 4, 0, 4, 0, 4])
    second = torch.tensor([108.0, 100, 100, 100, 100, 100, 100, 100])
    rule = BUDGETS.get("standardized")
    assert rule(views([first, second]), keep) == counts
    assert rule(views([1e6 * first + 5, second / 1e6]), keep) == counts


def test_a_layer_without_differences_has_mean_scores() -> None:
    flat, two = torch.full((4,), 7.0), torch.tensor([1.0, 1, 3, 3])
    assert BUDGETS.get("standardized")(views([flat, two]), 6) == [4, 2]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9999), st.integers(1, 6), st.floats(0.11, 1))
def test_standardized_keeps_a_tenth_and_meets_the_total(seed: int, count: int, share: float):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(64, generator=generator).exp() ** 4 for _ in range(count)]
    keep = max(round(share * 64 * count), floor_count(64) * count)
    counts = BUDGETS.get("standardized")(views(scores), keep)
    assert sum(counts) == keep
    assert all(7 <= n <= 64 for n in counts)


# against the definitions, on a model


def test_wanda_keeps_the_top_of_its_definition() -> None:
    masks, prior = choose(
        shared_model(),
        PruneConfig.build("wanda", sparsity=0.5),
        observe(shared_model(), PruneConfig.build("wanda"), CALIBRATION),
    )
    assert prior is None and masks is not None
    for mask, u, w in zip(masks, activations(CALIBRATION), columns(), strict=True):
        assert mask is not None and mask.bias is None
        score = w.abs().sum(0) * u.square().sum(0).sqrt()
        assert mask.ids.tolist() == score.topk(WIDTH // 2).indices.sort().values.tolist()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.85])
def test_flap_keeps_the_top_of_its_definition(sparsity: float) -> None:
    config = PruneConfig.build("flap", sparsity=sparsity)
    masks, _ = choose(shared_model(), config, observe(shared_model(), config, CALIBRATION))
    assert masks is not None
    seen, weights = activations(CALIBRATION), columns()
    metric = torch.stack(
        [u.var(0, correction=0) * w.square().sum(0) for u, w in zip(seen, weights, strict=True)]
    )
    z = (metric - metric.mean(1, keepdim=True)) / metric.std(1, keepdim=True)
    keep = round((1 - sparsity) * LAYERS * WIDTH)
    floor = floor_count(WIDTH)
    z.scatter_(1, z.topk(floor, 1).indices, torch.inf)
    want = torch.zeros(LAYERS * WIDTH, dtype=torch.bool)
    want[z.flatten().topk(keep).indices] = True
    for mask, row, u, w in zip(masks, want.view(LAYERS, WIDTH), seen, weights, strict=True):
        assert mask is not None and mask.kept >= floor
        assert mask.ids.tolist() == row.nonzero().flatten().tolist()
        bias = w[:, ~row] @ u.mean(0)[~row]
        assert torch.allclose(mask.bias.double(), bias, atol=1e-5)


def test_glass_mixes_griffins_ranks_with_the_priors() -> None:
    config = PruneConfig.build("glass", sparsity=0.5)
    _, prior = choose(shared_model(), config, observe(shared_model(), config, CALIBRATION))
    assert prior is not None
    found = kept("glass", prompt=1)
    seen = activations(tokens(1, 70, seed=1)[:, :68])
    for ids, before, u, own in zip(found, activations(CALIBRATION), seen, prior, strict=True):
        share = (before / before.norm(dim=1, keepdim=True)).square().sum(0).sqrt()
        assert torch.allclose(own.double(), share, rtol=1e-5)
        local = (u / u.norm(dim=1, keepdim=True)).square().sum(0).sqrt()
        total = local.argsort().argsort() + share.argsort().argsort()
        best = total.double().sort(descending=True, stable=True).indices[: WIDTH // 2]
        assert ids is not None and ids.tolist() == sorted(best.tolist())


def test_glass_at_its_ends() -> None:
    """Weight 0 is GRIFFIN; weight 1 is the prior alone, whatever the prompt."""
    none, whole = {"score": {"prior_weight": 0.0}}, {"score": {"prior_weight": 1.0}}
    for prompt in (1, 2):
        assert same_masks(kept("glass", prompt, **none), kept("griffin", prompt))
    assert same_masks(kept("glass", 1, **whole), kept("glass", 2, **whole))
    assert not same_masks(kept("glass", 1, **whole), kept("griffin", 1))
    assert not same_masks(kept("glass", 1), kept("glass", 2))


@pytest.mark.parametrize("method", STATIC)
def test_static_methods_keep_the_same_for_every_prompt(method: str) -> None:
    assert same_masks(kept(method, 1), kept(method, 2))


def test_random_depends_on_the_seed() -> None:
    assert not same_masks(kept("random", 1), kept("random", 1, seed=1))


@pytest.mark.parametrize("method", METHODS_THAT_PRUNE)
def test_compensation_can_be_switched_and_changes_no_choice(method: str) -> None:
    masks = {}
    for on in (False, True):
        run = ready(shared_model(), method, sparsity=0.5, compensation=on)
        with run:
            decode(run.model, tokens(1, 70), 68)
            masks[on] = run._newest_masks()
        biases = [mask.bias for mask in masks[on] if mask is not None]
        assert len(biases) == LAYERS and all((bias is not None) == on for bias in biases)
    assert same_masks(
        [mask and mask.ids for mask in masks[False]], [mask and mask.ids for mask in masks[True]]
    )


def test_griffin_refresh_chooses_anew_every_64_pruned_tokens() -> None:
    """64 pruned, 16 dense, 64 pruned; the re-mask knows the 16 tokens alone."""
    run = prune(shared_model(), "griffin-refresh", sparsity=0.5)
    ids = tokens(1, 68 + 144, seed=4)
    found = selections(run)
    with run:
        decode(run.model, ids, 68)
    assert [(r.step, r.cause, r.evidence_tokens) for r in run.remasks] == [
        (0, "first", 68),
        (80, "interval", 16),
    ]
    report = run.report()
    assert report.dense_token_share == pytest.approx(16 / 144)
    assert report.achieved_sparsity == pytest.approx(0.5 * 128 / 144)
    assert not same_masks(found[0][2], found[1][2])
    seldom = prune(shared_model(), "griffin-refresh", sparsity=0.5, drift="interval 100")
    with seldom:
        decode(seldom.model, ids, 68)
    assert [r.step for r in seldom.remasks] == [0, 116]


# what prune alone cannot do


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("wanda", ["its masks from calibration", "calibration=FILE", "eval --method wanda --cal"]),
        ("flap", ["its masks from calibration", "calibration=FILE", "eval --method flap --cal"]),
        ("glass", ["its prior from calibration", "config), or", "eval --method glass"]),
        ("dense-8bit", ["a copy of the model to 8 bits", "eval --method dense-8bit"]),
        ("dense-4bit", ["a copy of the model to 4 bits", "eval --method dense-4bit"]),
    ],
)
def test_prune_says_how_to_prepare(method: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        prune(shared_model(), method)
    message = str(caught.value)
    assert (
        "\n" not in message
        and "dart_llm.session.prepare.prepare(model, tokenizer, config" in message
    )
    for part in [f'method "{method}"', *words]:
        assert part in message


def test_what_removes_nothing_or_is_chosen_by_hand_needs_no_calibration() -> None:
    assert not prune(shared_model(), "wanda", sparsity=0.0).asks_for_pruning
    assert prune(shared_model(), "glass", masks={0: [1, 2]}).asks_for_pruning
    held = (None,) * LAYERS
    assert not Run(shared_model(), PruneConfig.build("flap"), held=held).asks_for_pruning


def test_a_variance_has_no_memory() -> None:
    with pytest.raises(ConfigError, match=r'score "flap" is a variance.*drop the ema_decay'):
        prune(shared_model(), "griffin", score={"name": "flap", "ema_decay": 0.9})
