"""Inspection: what ablating a topic's neurons costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from dart_llm.studies.inspection.analyses import ablation, arms, blocks, random_ids, strongest
from inspect_cases import A, B, seen, study
from lm_cases import loaded
from steps import Same
from tiny import WIDTH


def test_arms() -> None:
    a = [torch.tensor([0, 2, 4]), torch.tensor([1])]
    b = [torch.tensor([2, 3, 4]), torch.tensor([1])]
    found = {k: {n: ids.tolist() for n, ids in v.items()} for k, v in arms(a, b).items()}
    assert found == {
        "a_only": {0: [0], 1: []},
        "b_only": {0: [3], 1: []},
        "a_top": {0: [0, 2, 4], 1: [1]},
    }
    drawn = random_ids(arms(a, b)["a_top"], [6, 9], 3)
    assert [len(drawn[0]), len(drawn[1])] == [3, 1]
    assert all(torch.equal(drawn[n], ids.unique()) for n, ids in drawn.items())
    again = random_ids(arms(a, b)["a_top"], [6, 9], 3)
    assert torch.equal(drawn[0], again[0])
    best = strongest([torch.tensor([1.0, 9.0, 5.0, 2.0]), torch.tensor([1.0, 2.0])], 0.5)
    assert [ids.tolist() for ids in best] == [[1, 2], [1]]
    assert strongest([torch.tensor([1.0, 9.0])], 0.01)[0].tolist() == [1]


def test_blocks() -> None:
    found = blocks([float(n) for n in range(34)])
    assert list(found.values()) == [(7.5, 16.0), (23.5, 16.0), (32.5, 2.0)]


def test_ablation() -> None:
    """Losses by a forward of our own in which the removed neurons are multiplied by 0."""
    looked = study(share=0.25, ablation_seeds=2)
    with Same(looked.model):
        found = ablation(looked)
    model, tokenizer = loaded()
    texts = [tokenizer(text, return_tensors="pt").input_ids[0] for text in (A, B)]
    best = []
    for text, ids in zip((A, B), texts, strict=True):
        own = []
        for layer in range(4):
            u = seen(text, layer)["u"][: len(ids) // 2]
            share = (u / u.norm(dim=-1, keepdim=True)).square().sum(0)
            own.append(set(share.topk(WIDTH // 4).indices.tolist()))
        best.append(own)
    removed = {
        "a_only": [one - two for one, two in zip(*best, strict=True)],
        "b_only": [two - one for one, two in zip(*best, strict=True)],
        "a_top": best[0],
    }
    assert len(found["rows"]) == 6
    for row in found["rows"]:
        ids = texts["AB".index(row["text"])]
        sets = removed[row["arm"]]
        assert row["neurons"] == sum(map(len, sets))
        assert row["achieved_sparsity"] == pytest.approx(row["neurons"] / (4 * WIDTH))
        assert (row["dense_token_share"], row["remasks"]) == (0.0, 0)
        for key, gone in (("loss", sets), ("dense_loss", [set()] * 4)):
            losses = own_losses(model, ids, gone)
            assert row["tokens"] == len(losses) == len(ids) - len(ids) // 2
            assert row[key] == pytest.approx(float(losses.mean()), rel=1e-4)
        over = row["over_dense"]
        assert over["estimate"] == pytest.approx(row["loss"] - row["dense_loss"], abs=1e-6)
        assert over["low"] <= over["estimate"] <= over["high"]
        assert row["random_loss"] == pytest.approx(sum(row["random_losses"]) / 2)
        assert row["over_random"]["estimate"] == pytest.approx(
            row["loss"] - row["random_loss"], abs=1e-6
        )
        assert over["n"] == math.ceil(row["tokens"] / found["block_tokens"])


def own_losses(model: Any, ids: torch.Tensor, gone: list[set[int]]) -> torch.Tensor:
    """Losses of the second half; neurons are removed for the tokens fed from its start - 1 on."""
    first, handles = len(ids) // 2, []
    for block, sets in zip(model.transformer.h, gone, strict=True):
        mask = torch.ones(len(ids), WIDTH)
        for neuron in sets:
            mask[first - 1 :, neuron] = 0
        handles.append(
            block.mlp.c_proj.register_forward_pre_hook(lambda m, args, k=mask: (args[0] * k,))
        )
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    for handle in handles:
        handle.remove()
    return cross_entropy(logits[first - 1 : -1], ids[first:], reduction="none")


def test_ablation_of_equal_texts_has_nothing_to_remove() -> None:
    rows = {(row["arm"], row["text"]): row for row in ablation(study(A, A))["rows"]}
    for text in "AB":
        row = rows["a_only", text]
        assert row["neurons"] == 0 and row["achieved_sparsity"] == 0.0
        assert row["loss"] == row["dense_loss"] == row["random_loss"]
        assert (row["over_dense"]["low"], row["over_dense"]["high"]) == (0.0, 0.0)
        assert rows["a_top", text]["neurons"] > 0
