"""One test per defect of the published implementation in its masks (1-10) and drift (11-17).

The modules' own tests assert the same promises in full; here each one is shown short and alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dart_llm.errors import ConfigError
from dart_llm.pruning.budgets import depth_profile, depth_sparsities
from dart_llm.pruning.drift import Rule
from dart_llm.pruning.registry import DRIFT_RULES
from dart_llm.session.run import prune
from steps import (
    Forced,
    apart,
    decode,
    generate,
    new_cache,
    same_masks,
    selections,
    shared_model,
    state_of,
    step,
)
from tiny import tiny, tokens

pytestmark = pytest.mark.contract("defects of the published scripts stay fixed")


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """A drift rule that finds every window low and triggers on the second."""
    DRIFT_RULES.register("eager", lambda: Rule(3, lambda mu, sigma: mu + 2, 2))
    yield
    DRIFT_RULES.unregister("eager")


def _run(ids: torch.Tensor, prompt: int, method: str = "griffin", name: str = "llama", **settings):
    run = prune(shared_model(name), method, **{"sparsity": 0.5, **settings})
    found = selections(run)
    with run:
        logits = decode(run.model, ids, prompt)
    return run, found, logits


# Masks


def test_defect_01_a_mask_never_reaches_back() -> None:
    """Masking step 0: the prompt's own logits are dense, later tokens change none of them."""
    ids, other = tokens(1, 60), tokens(1, 60)
    other[:, 40:] = tokens(1, 20, seed=9)
    dense = decode(shared_model(), ids, 30)
    _, _, first = _run(ids, 30, "published")
    _, _, second = _run(other, 30, "published")
    assert torch.equal(first[:, :30], dense[:, :30])
    assert torch.equal(first[:, :40], second[:, :40])
    assert apart(first[:, 30:], dense[:, 30:]) > 1e-2


def test_defect_02_auto_tables_and_masking_steps_are_not_silently_dense() -> None:
    """Teacher-forced evaluation with ``all:auto``, and a static table with masking step 3."""
    ids = tokens(1, 40)
    dense = decode(shared_model(), ids, 30)
    run, _, logits = _run(ids, 30, "published", budget={"name": "depth", "table": "all:auto"})
    assert run.report().achieved_sparsity == 0.5 and apart(logits[:, 30:], dense[:, 30:]) > 1e-2
    table = {"budget": {"table": "all:0.5"}, "sparsity": None, "masking_step": 3}
    run, found, logits = _run(ids, 30, **table)
    assert [at for at, _, _ in found] == [3]
    assert torch.equal(logits[:, :33], dense[:, :33])
    assert apart(logits[:, 33:], dense[:, 33:]) > 1e-2
    assert run.report().achieved_sparsity == pytest.approx(0.5 * 7 / 10)


def test_defect_03_every_layer_gets_its_own_budget() -> None:
    """The golden allocation, and layer 0 of a table."""
    sensitivity = (14, 1, 1.2, 0.9, 1.1, 1.3, 1, 0.8)
    p = depth_sparsities(sensitivity, [index / 7 for index in range(8)], 0.5)
    wanted = [0.1000, 0.4042, 0.6321, 0.6709, 0.6606, 0.6504, 0.6452, 0.2366]
    assert p == pytest.approx(wanted, abs=5e-5) and depth_profile(0) == 0.25
    run, _, _ = _run(tokens(1, 34), 30, budget={"table": "0:#7,1:#9,2:#11,3:#13"}, sparsity=None)
    assert [layer.kept for layer in run.report().layers] == [7, 9, 11, 13]


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_defect_04_no_statistic_is_ever_missing(name: str) -> None:
    """GPT-2 with ``all:auto`` is pruned from the step that was asked for, for good."""
    settings: dict[str, Any] = {"masking_step": 2, "drift": "interval 4", "name": name}
    settings["budget"] = {"name": "depth", "table": "all:auto"}
    run, found, _ = _run(tokens(1, 50), 30, "published", **settings)
    assert [at for at, _, _ in found] == [2, 8, 14]
    assert run.report().achieved_sparsity == pytest.approx(0.5 * 12 / 20, abs=0.01)
    assert run.config.masking_step == 2, "a configuration is never changed"


def test_defect_05_sensitivity_is_the_same_online_and_offline() -> None:
    """The budget of one prefill equals the budget of the same tokens fed one by one.

    As long as they are read on every token: of the 9th to the 16th one is left out.
    """
    ids = tokens(1, 32, seed=4)
    whole, _, _ = _run(ids, 9, "published")
    settings = {"masking_step": 8, "drift": "never"}
    single, found, _ = _run(ids, 1, "published", **settings)
    assert [at for at, _, _ in found] == [8]
    counts = [layer.kept for layer in whole.report().layers]
    assert counts == [layer.kept for layer in single.report().layers] and len(set(counts)) > 1
    assert same_masks(found[0][2], [whole.masks().get(layer) for layer in range(4)])


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.95])
def test_defect_06_the_total_is_what_was_asked_for(sparsity: float) -> None:
    budgets = ("uniform", "depth") if sparsity == 0.95 else ("uniform", "depth", "energy")
    for budget in budgets:
        run, _, _ = _run(tokens(1, 34), 30, budget=budget, sparsity=sparsity)
        assert run.report().achieved_sparsity == pytest.approx(sparsity, abs=1.01 / 192)


def test_defect_06_the_layer_language_does_what_it_says() -> None:
    run, _, _ = _run(tokens(1, 34), 30, budget={"table": "0-1:auto"}, sparsity=0.5)
    assert [layer.kept for layer in run.report().layers] == [24, 24, 48, 48]
    run, _, _ = _run(tokens(1, 34), 30, budget={"table": "0,1,2:0.5"}, sparsity=None)
    assert [layer.kept for layer in run.report().layers] == [24, 24, 24, 48]
    for table, message in (("0:#49", "has 48"), ("9:0.5", "layer 9 is out of range")):
        with pytest.raises(ConfigError, match=message):
            prune(shared_model(), "griffin", budget={"table": table})


def test_defect_07_every_token_of_a_forward_counts() -> None:
    """A further prompt part of 12 tokens on a cache enters the evidence as 12, not as 1."""
    model, ids = shared_model(), tokens(1, 40)
    settings = {"sparsity": 0.5, "masking_step": 1000}
    weights, totals = [], []
    for sizes in ((20, 12), (32,)):
        with prune(model, "griffin", **settings) as run:
            cache, at = new_cache(model), 0
            for size in sizes:
                step(model, ids[:, at : at + size], cache)
                at += size
        layer = state_of(run).evidence[2].sums["score"]
        weights.append(layer.weight)
        totals.append(layer.total)
    assert weights == [32, 32]
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_defect_08_sums_do_not_overflow(dtype: torch.dtype) -> None:
    """Sums are float32: activations of 200 over 300 tokens overflow a float16 sum."""
    model = tiny("llama", dtype=dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight *= 300
            layer.mlp.down_proj.weight /= 300
    with prune(model, "published", sparsity=0.5) as run:
        decode(model, tokens(1, 305), 300)
    scores = state_of(run).selection.scores
    assert run.report().achieved_sparsity == 0.5
    assert all(score.dtype == torch.float32 and bool(score.isfinite().all()) for score in scores)
    assert max(float(score.square().max()) for score in scores) > torch.finfo(torch.float16).max


def test_defect_09_every_row_decides_and_padding_does_not() -> None:
    model, ids = shared_model(), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    totals = []
    for rows, part in (([0, 1], slice(None)), ([0], slice(None)), ([1], slice(8, None))):
        with prune(model, "griffin", sparsity=0.5) as run:
            generate(model, ids[rows][:, part], 3, attention_mask=mask[rows][:, part])
        totals.append(state_of(run).evidence[1].sums["score"].total)
    torch.testing.assert_close(totals[0], totals[1] + totals[2], rtol=1e-4, atol=1e-5)
    assert float(totals[0].sum()) == pytest.approx(20 + 12, rel=1e-4), "unit norm per real token"


def test_defect_10_matrices_get_smaller() -> None:
    model = shared_model()

    def flops() -> int:
        cache = new_cache(model)
        step(model, tokens(1, 20), cache)
        step(model, tokens(1, 1), cache)
        with FlopCounterMode(display=False) as counter:
            step(model, tokens(1, 1), cache)
        return int(counter.get_total_flops())

    dense = flops()
    with prune(model, "griffin", sparsity=0.5) as run:
        pruned = flops()
        compact = run.patch.layers[0].kept
        assert compact.rows.shape == (48, 32) and compact.columns.shape == (32, 24)
    assert dense - pruned == 4 * 2 * 24 * 32 * 3


# Drift


def test_defect_11_a_trigger_takes_all_layers_together() -> None:
    """After every drift trigger all layers observe, and all get masks again at once."""
    settings = {"drift": "eager", "masking_step": 2, "budget": "depth"}
    run, found, _ = _run(tokens(1, 70), 30, "published", **settings)
    causes = run.report().remask_causes
    assert causes["first"] == 1 and causes["drift"] >= 1
    assert all(sum(ids is not None for ids in kept) == 4 for _, _, kept in found)
    report = run.report()
    assert report.sparsity_while_pruned == pytest.approx(0.5, abs=0.01)
    assert report.achieved_sparsity == pytest.approx(0.5 * (1 - report.dense_token_share), abs=0.01)


def test_defect_12_the_baseline_after_a_trigger_is_never_one_token() -> None:
    """One observed token: the detector arms on its first windows, and states to trigger again."""
    run, _, _ = _run(tokens(1, 110), 30, "published", drift="eager")
    assert run.report().remask_causes["drift"] >= 2
    armed = [check for check in run.drift_checks if check.threshold is not None]
    assert armed and all(math.isfinite(check.threshold or 0.0) for check in armed)
    assert all(math.isfinite(check.similarity) for check in run.drift_checks)
    states = [check.state for check in run.drift_checks]
    assert states.index("arming") > states.index("armed"), "it was armed, and armed anew"


def test_defect_13_budgets_stay_with_their_layers() -> None:
    settings = {"drift": "interval 5", "masking_step": 2}
    run, found, _ = _run(tokens(1, 60), 30, "published", **settings)
    counts = [remask.kept for remask in run.remasks]
    assert len(counts) >= 4 and set(counts) == {counts[0]} and len(set(counts[0])) > 1
    assert all(tuple(len(ids) for ids in kept) == counts[0] for _, _, kept in found)


def test_defect_14_one_low_window_is_not_enough_and_the_deviation_counts() -> None:
    paper = DRIFT_RULES.get("paper")()
    low, high = (float(paper.threshold(torch.tensor(0.8), torch.tensor(s))) for s in (0.1, 0.4))
    assert paper.count == 3 and low == pytest.approx(0.75) and high == pytest.approx(0.6)
    run, _, _ = _run(tokens(1, 60), 30, "griffin", drift="eager")
    checks = run.drift_checks
    first = next(check for check in checks if check.trigger)
    assert first.counter == 2 and [check.counter for check in checks[:2]] == [1, 2]


def test_defect_15_evaluation_keeps_the_sparsity_it_was_asked_for() -> None:
    """Drift ``never``: no detector, no window, no re-mask, one sparsity throughout."""
    run, found, _ = _run(tokens(1, 120), 30, "published", drift="never")
    assert len(found) == 1 and run.drift_checks == ()
    assert run.report().achieved_sparsity == run.report().sparsity_while_pruned == 0.5
    run, _, _ = _run(tokens(1, 120), 30, "published", drift="eager")
    assert run.report().remasks > 0, "the same text does trigger"


def test_defect_16_released_means_released() -> None:
    ids = tokens(1, 80)
    settings = {"drift": "eager", "masking_step": 1, "release_step": 20}
    run, found, _ = _run(ids, 30, "published", **settings)
    assert found and all(at < 20 for at, _, _ in found)
    assert all(check.step <= 20 for check in run.drift_checks)
    assert run.phase == "released"
    other, later, _ = _run(ids[:, :60], 30, "published", **settings)
    assert [at for at, _, _ in later] == [at for at, _, _ in found]
    assert other.report().decoded_tokens == 30
    assert 0 < run.report().achieved_sparsity <= 0.5 * 20 / 50
    # a further prompt on the cache of a released sequence does not prune it again
    model = shared_model()
    with prune(model, "published", sparsity=0.5, **settings) as run:
        cache = new_cache(model)
        step(model, ids[:, :10], cache)
        for at in range(10, 32):
            step(model, ids[:, at : at + 1], cache)
        step(model, ids[:, 32:40], cache)
        step(model, ids[:, 40:41], cache)
        assert run.phase == "released"


def test_defect_17_achieved_sparsity_is_reported_and_true() -> None:
    """The report against a count of what every decode step really kept."""
    model, ids = shared_model(), tokens(1, 30)
    chosen = tokens(1, 40, seed=2)[0].tolist()
    settings = {"drift": "interval 6", "masking_step": 4, "budget": "depth"}
    removed: list[float] = []
    run = prune(model, "published", sparsity=0.5, **settings)

    def count(module: Any, args: Any, kwargs: Any) -> None:
        masks = run.patch.plan.masks[0]
        if kwargs["input_ids"].shape[1] == 1:
            kept = [48] * 4 if masks is None else [m.kept if m else 48 for m in masks]
            removed.append(1 - sum(kept) / (4 * 48))

    with run:
        handle = model.register_forward_pre_hook(count, with_kwargs=True)
        generate(model, ids, 40, logits_processor=[Forced(30, [chosen])])
        handle.remove()
    report = run.report()
    assert len(removed) == report.decoded_tokens == 39
    assert report.achieved_sparsity == pytest.approx(sum(removed) / 39)
    assert report.dense_token_share == pytest.approx(removed.count(0) / 39)
    assert 0.1 < report.dense_token_share < 0.6
    said = str(report)
    assert f"{report.achieved_sparsity:.1%}" in said and f"{report.dense_token_share:.1%}" in said
