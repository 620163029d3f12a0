"""Rows of a batch: padding and ended rows count nowhere, and rows do not reach one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from batch_cases import CHOSEN, LENGTHS, evidence_sums, padded, run_alone, run_batch
from dart_llm.session.run import prune
from prior_cases import CONFIG, SMALL
from products import SHAPES
from steps import (
    Forced,
    apart,
    decode,
    generate,
    new_cache,
    same_masks,
    shared_model,
    step,
)
from tiny import tokens


def _added(parts: list[list[dict[str, tuple[Tensor, float]]]]) -> list[dict[str, Any]]:
    return [
        {name: tuple(sum(p[name][k] for p in layer) for k in (0, 1)) for name in layer[0]}
        for layer in zip(*parts, strict=True)
    ]


def _assert_sums_equal(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() and a
        for name in a:
            torch.testing.assert_close(a[name][0], b[name][0], rtol=2e-4, atol=1e-5)
            assert a[name][1] == pytest.approx(b[name][1]), name


ALL_NEEDS = {"budget": "blend depth global", "compensation": True, "sparsity": 0.5}
"""Every statistic that exists is kept."""

ROWS = (*SHAPES, "gemma2", "bloom")
"""Every shape of FFN, a sliding window, and positions that are no embeddings."""


@pytest.mark.contract("same report whatever the batch")
@pytest.mark.parametrize("name", ROWS)
def test_shared_statistics_are_the_sum_over_rows(name: str) -> None:
    """Prompt and decode tokens, rows that end at different steps, left padding."""
    model = shared_model(name)
    settings = {"method": "griffin", **ALL_NEEDS, "masking_step": 1000}
    ids, mask = padded()
    run, _, _ = run_batch(model, [0, 1, 2], ids, mask, **settings)
    alone = [run_alone(model, row, **settings)[0] for row in range(3)]
    _assert_sums_equal(evidence_sums(run), _added([evidence_sums(one) for one in alone]))
    report, singles = run.report(), [one.report() for one in alone]
    assert report.prompt_tokens == sum(LENGTHS) == sum(one.prompt_tokens for one in singles)
    decoded = sum(len(row) - 1 for row in CHOSEN)
    assert report.decoded_tokens == decoded == sum(one.decoded_tokens for one in singles)


@pytest.mark.contract("same report whatever the batch")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_bare_forwards(name: str, side: str) -> None:
    model = shared_model(name)
    settings = {"method": "griffin", **ALL_NEEDS, "masking_step": 1000}
    ids, mask = padded(side)
    with prune(model, **settings) as run, torch.no_grad():
        model(ids, attention_mask=mask)
    assert run.report().prompt_tokens == sum(LENGTHS)
    parts = []
    for row, length in enumerate(LENGTHS):
        with prune(model, **settings) as one, torch.no_grad():
            model(tokens(1, length, seed=row))
        parts.append(evidence_sums(one))
    if side == "right" or name != "gpt2":  # whose positions a bare forward counts from the pad
        _assert_sums_equal(evidence_sums(run), _added(parts))
    weights = {name: weight for name, (_, weight) in evidence_sums(run)[0].items()}
    assert set(weights.values()) == {float(sum(LENGTHS))}


AGED = {"method": "griffin", **ALL_NEEDS, "score": {"name": "magnitude", "ema_decay": 0.9}}


@pytest.mark.contract("same report whatever the batch")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *[(name, {"method": "griffin", **ALL_NEEDS}) for name in ROWS],
        *[(name, {"method": CONFIG}) for name in SHAPES],
        *[(name, AGED) for name in ("llama", "opt")],
    ],
)
def test_rows_of_their_own_equal_rows_alone(name: str, method: dict[str, Any]) -> None:
    """per_row: masks, logits and accounting of each row are those of the row run alone."""
    model = shared_model(name)
    settings: dict[str, Any] = {**method, "masking_step": 3, "batch": "per_row"}
    ids, mask = padded()
    run, found, logits = run_batch(model, [0, 1, 2], ids, mask, **settings)
    assert run.executor == "masked"
    for row in range(3):
        one, alone, single = run_alone(model, row, **settings)
        mine = [(at, kept) for at, place, kept in found if place == row]
        if len(CHOSEN[row]) > 4:
            assert [at for at, _ in mine] == [at for at, _, _ in alone] == [3]
            assert same_masks(mine[0][1], alone[0][2])
        else:
            assert alone == [], "this row ends before its first mask"
        real = single.shape[1]
        assert apart(logits[row, :real], single[0]) < 3e-5
        a, b = run.report().sequences[row], one.report().sequences[0]
        assert (a.prompt_tokens, a.decoded_tokens) == (b.prompt_tokens, b.decoded_tokens)
        assert a.achieved_sparsity == pytest.approx(b.achieved_sparsity)
        assert len(a.remasks) == len(b.remasks)
    assert run.report().decoded_tokens == sum(len(row) - 1 for row in CHOSEN)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *[(name, {"method": "dart", "prior": SMALL}) for name in ("llama", "bloom", "opt")],
        *[(name, {"method": "griffin", **ALL_NEEDS}) for name in ("gemma2", "opt-postnorm")],
    ],
)
def test_a_row_is_observed_while_another_is_pruned(name: str, method: dict[str, Any]) -> None:
    """min_evidence lets the long prompt be pruned at once and the short one two tokens later."""
    model = shared_model(name)
    settings: dict[str, Any] = {**method, "sparsity": 0.5, "batch": "per_row"}
    settings |= {"drift": "never", "min_evidence": 10}
    _, found, logits = run_batch(model, [0, 2], *(part[::2] for part in padded()), **settings)
    assert [(at, row) for at, row, _ in found] == [(0, 0), (2, 1)]
    for row, place in ((0, 0), (2, 1)):
        _, alone, single = run_alone(model, row, **settings)
        assert same_masks(found[place][2], alone[0][2])
        assert apart(logits[place, : single.shape[1]], single[0]) < 2e-5


def test_sensitivities_of_a_row_are_read_where_they_are_alone() -> None:
    """On its first 8 observed tokens and the 9th; a row that is pruned at once reads none."""
    model = shared_model()
    settings: dict[str, Any] = {"method": "griffin", **ALL_NEEDS, "batch": "per_row"}
    settings["min_evidence"] = 20
    ids, mask = padded()
    chosen = [tokens(1, 30, seed=40 + row)[0].tolist() for row in range(3)]

    def run_rows(rows: list[int], text: Tensor, seen: Tensor) -> Any:
        with prune(model, **settings) as run:
            forced = [Forced(text.shape[1], [chosen[row] for row in rows])]
            generate(model, text, 16, attention_mask=seen, logits_processor=forced)
        return run

    run = run_rows([0, 1, 2], ids, mask)
    observed = [remask.step for remask in run.remasks]
    assert sorted(observed) == [0, 7, 12]
    for row, (length, reads) in enumerate(zip(LENGTHS, (0, 7, 9), strict=True)):
        text = tokens(1, length, seed=row)
        sums = evidence_sums(run, row)
        assert sums[0]["cosine"][1] == length + reads and sums[0]["score"][1] == 20
        _assert_sums_equal(sums, evidence_sums(run_rows([row], text, torch.ones_like(text))))


def test_shared_masks_follow_the_living_rows() -> None:
    """The mask of a batch is the mask of its rows' summed evidence, whatever ended before."""
    model = shared_model()
    ids, mask = padded()
    settings = {"method": "griffin", "sparsity": 0.5, "masking_step": 6}
    _, found, _ = run_batch(model, [0, 1, 2], ids, mask, **settings)
    watch = {**settings, "masking_step": 1000}
    ended = [run_alone(model, row, **watch)[0] for row in (0, 1)]  # both end before step 6
    parts = [evidence_sums(run) for run in ended]
    third = prune(model, **watch)
    with third:
        generate(model, tokens(1, LENGTHS[2], seed=2), 7, logits_processor=[Forced(8, CHOSEN[2:])])
    total = _added([*parts, evidence_sums(third)])
    for kept, sums in zip(found[0][2], total, strict=True):
        top = sums["score"][0].sqrt().argsort(descending=True)[: len(kept)].sort().values
        assert torch.equal(kept, top)


@pytest.mark.parametrize("batch", ["shared", "per_row"])
def test_all_rows_alike(batch: str) -> None:
    """Rows with the same text get the mask and the logits of one row."""
    model, ids = shared_model(), tokens(1, 30)
    with prune(model, "griffin", sparsity=0.5, executor="masked") as run:
        single = decode(model, ids, 24)
    masks = run.masks()
    with prune(model, "griffin", sparsity=0.5, executor="masked", batch=batch) as run:
        rows = decode(model, ids.expand(3, -1), 24)
    assert apart(rows, single.expand(3, -1, -1)) < 1e-5
    assert all(torch.equal(kept, masks[layer]) for layer, kept in run.masks().items())
    assert run.report().prompt_tokens == 72 and run.report().decoded_tokens == 18


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_rows_with_masks_of_their_own_in_multi_token_forwards(name: str) -> None:
    model, ids = shared_model(name), tokens(3, 30)
    with prune(model, CONFIG, batch="per_row") as run:
        cache = new_cache(model)
        step(model, ids[:, :20], cache)
        with run.decoding():
            together = step(model, ids[:, 20:], cache)
    for row in range(3):
        with prune(model, CONFIG, executor="masked") as run:
            single = decode(model, ids[row : row + 1], 20)[:, 20:]
        assert apart(together[row : row + 1], single) < 2e-5


def test_one_prompt_continued_by_many_rows() -> None:
    """A cache that was repeated: the rows share the mask that the prompt made."""
    model, ids = shared_model(), tokens(1, 20)
    more = tokens(4, 5, seed=9)
    with prune(model, "griffin", sparsity=0.5) as run:
        cache = new_cache(model)
        step(model, ids, cache)
        cache.batch_repeat_interleave(4)
        with run.decoding():
            rows = step(model, more, cache)
    assert run.report().decoded_tokens == 20 and run.report().achieved_sparsity == 0.5
    for row in range(4):
        with prune(model, "griffin", sparsity=0.5):
            text = torch.cat([ids, more[row : row + 1]], 1)
            assert apart(rows[row : row + 1], decode(model, text, 20)[:, 20:]) < 1e-5
