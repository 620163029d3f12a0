"""What ``dart-llm inspect`` computes, against computations of our own."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch.nn.functional import cosine_similarity

from dart_llm.errors import ConfigError
from dart_llm.models.capture import capture_activations as tap
from dart_llm.models.describe import describe
from dart_llm.session.run import prune
from dart_llm.studies.inspection import analyses as neurons_module
from dart_llm.studies.inspection.analyses import (
    check,
    compare,
    concentration,
    expected_jaccard,
    half_widths,
    jaccard,
    neurons,
    overlap,
    space,
    top_rows,
)
from dart_llm.studies.inspection.readings import (
    activations,
    histogram,
    impact,
    moments,
    quantiles,
    weights,
)
from inspect_cases import A, B, seen, study
from lm_cases import loaded
from steps import Same, decode, shared_model
from tiny import NAMES, WIDTH, tokens


def test_numbers() -> None:
    values = torch.randn(7, 31, generator=torch.Generator().manual_seed(0)).exp()
    flat = values.double().numpy().reshape(-1)
    found = quantiles(values)
    for name, level in (("min", 0), ("q05", 0.05), ("median", 0.5), ("q95", 0.95), ("max", 1)):
        assert found[name] == pytest.approx(np.quantile(flat, level), rel=1e-6)
    shape = moments(values)
    assert shape["mean"] == pytest.approx(flat.mean())
    assert shape["std"] == pytest.approx(flat.std())
    assert shape["skewness"] == pytest.approx(scipy_stats.skew(flat))
    assert shape["kurtosis"] == pytest.approx(scipy_stats.kurtosis(flat))
    assert moments(torch.ones(5)) == {"mean": 1.0, "std": 0.0, "skewness": None, "kurtosis": None}
    assert moments(torch.zeros(1))["kurtosis"] is None
    assert quantiles(torch.tensor(2.5))["q25"] == 2.5
    assert histogram(torch.tensor([-9.0, 0.0, 0.5, 1.0, 4.0, 7.0]), 0.0, 4.0, 4) == [3, 1, 0, 2]
    assert histogram(torch.ones(3), 1.0, 1.0, 2) == [3, 0]


@pytest.mark.parametrize("name", NAMES)
def test_impact_gives_the_sensitivities_of_the_depth_budgets(name: str) -> None:
    """The same S as the tracer's evidence; and the numbers of each token from hooks of our own."""
    model, ids = shared_model(name), tokens(1, 30, seed=6)
    found: dict[int, Any] = {}
    kept: dict[int, Any] = {}

    def take(layer: int, one: Any) -> None:
        found[layer], kept[layer] = impact(one), (one.x[0].double(), one.r[0].double())

    with Same(model), tap(model, take), torch.no_grad():
        model(ids)
    settings = {"budget": "blend depth depth-residual", "sparsity": 0.5, "masking_step": 1000}
    with prune(model, "griffin", **settings) as run:
        decode(model, ids, 30)
    for layer, evidence in enumerate(run.controller.sequences[0].evidence):
        for variant, suffix in (("output", ""), ("residual", "-residual")):
            cosine = float(evidence.sums[f"cosine{suffix}"].mean)
            change = float(evidence.sums[f"change{suffix}"].mean)
            mine = found[layer][variant]
            assert mine["cosine"]["mean"] == pytest.approx(cosine, rel=1e-4, abs=1e-5)
            assert mine["change"]["mean"] == pytest.approx(change, rel=1e-4)
            assert mine["s"] == pytest.approx((1 - cosine) * change, rel=1e-3, abs=1e-5)
        x, r = kept[layer]
        change = (r.norm(dim=-1) / x.norm(dim=-1)).numpy()
        cosines = cosine_similarity(x, x + r, dim=-1).numpy()
        mine = found[layer]["residual"]
        assert mine["change"]["median"] == pytest.approx(np.median(change), rel=1e-4)
        assert mine["change"]["q95"] == pytest.approx(np.quantile(change, 0.95), rel=1e-4)
        assert mine["cosine"]["q05"] == pytest.approx(np.quantile(cosines, 0.05), abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
def test_weights(name: str) -> None:
    model = shared_model(name)
    found = weights(describe(model).blocks)
    for layer, block in enumerate(describe(model).blocks):
        down = block.down.weight if name == "gpt2" else block.down.weight.T  # [I, D]
        up = block.up.weight.T if name == "gpt2" else block.up.weight
        parts = {"down": down, "up": up}
        if name == "phi3":
            parts |= {"gate": up[:WIDTH], "up": up[WIDTH:]}
        elif block.gate is not None:
            parts["gate"] = block.gate.weight
        assert found["layers"][layer].keys() == parts.keys()
        for matrix, rows in parts.items():
            norms = rows.detach().double().square().sum(1).sqrt().numpy()
            mine = found["layers"][layer][matrix]
            assert len(norms) == WIDTH == sum(mine["histogram"])
            assert mine["median"] == pytest.approx(np.median(norms), rel=1e-5)
            assert mine["skewness"] == pytest.approx(scipy_stats.skew(norms), abs=1e-4)
            low, high = found["range"][matrix]
            counts, _ = np.histogram(norms.clip(low, high), np.linspace(low, high, 41))
            assert abs(counts - np.array(mine["histogram"])).sum() <= 2  # at an edge
        lows = [layer["down"]["min"] for layer in found["layers"]]
        assert min(lows) <= found["range"]["down"][0] <= min(lows) + 0.1 * max(lows)


def test_activations() -> None:
    u = torch.tensor([[0.0, 3.0, -4.0, 0.0], [1.0, 1.0, 1.0, 1.0], [10.0, 0.02, 0.0, 0.4]])
    found = activations(u)
    assert found["zero"] == pytest.approx(3 / 12)
    # Root mean squares 2.5, 1 and 5.004: only 0.02 lies below 1 %, and 0.4 below 10 %.
    assert found["near"] == pytest.approx({"0.01": 4 / 12, "0.1": 5 / 12})
    assert found["holds"] == pytest.approx((2 + 4 + 1) / 3 / 4)  # 9 of 25 are too many to leave
    assert found["absolute"]["max"] == 10 and found["absolute"]["median"] == 1.0
    assert found["moments"]["kurtosis"] == pytest.approx(
        scipy_stats.kurtosis(u.numpy().reshape(-1)), rel=1e-4
    )
    silent = activations(torch.zeros(3, 5))
    assert (silent["zero"], silent["moments"]["kurtosis"]) == (1.0, None)
    assert silent["holds"] == 1 / 5


def test_strong_and_weak_neurons_by_forward_proxy() -> None:
    looked = study(b=None, neuron_score="product", top=3)
    found = neurons(looked)
    model, tokenizer = loaded()
    rows = model.lm_head.weight.detach().double()
    assert (found["score"], found["text"]) == ("product", "A")
    for layer, block in enumerate(looked.view.blocks):
        u = seen(A, layer)["u"]
        reach = (rows @ block.down.weight.detach().double().T).abs()  # [V, I]
        magnitude = u.square().sum(0).sqrt()
        scores = magnitude * reach.amax(0) * magnitude * reach.mean(0)
        order = scores.argsort(descending=True)
        mine = found["layers"][layer]
        assert [one["neuron"] for one in mine["strong"]] == order[:3].tolist()
        assert [one["neuron"] for one in mine["weak"]] == order.flip(0)[:3].tolist()
        best = mine["strong"][0]
        assert best["score"] == pytest.approx(float(scores.max()), rel=1e-4)
        assert best["mean_activation"] == pytest.approx(float(u[:, order[0]].mean()), rel=1e-3)
        sign = math.copysign(1.0, best["mean_activation"])
        said = (sign * rows @ block.down.weight.detach().double()[order[0]]).topk(5).indices
        assert best["tokens"] == [tokenizer.decode([token]) for token in said.tolist()]
        top = scores.sort(descending=True).values
        assert mine["concentration"]["0.1"] == pytest.approx(
            float(top[: round(0.1 * WIDTH)].sum() / top.sum()), rel=1e-4
        )


def test_neurons_without_a_text_are_ranked_by_the_proxy_alone() -> None:
    found = neurons(study(None, None, neuron_score="max", top=2))
    rows = loaded()[0].lm_head.weight.detach()
    for layer, block in enumerate(describe(loaded()[0]).blocks):
        reach = (rows @ block.down.weight.detach().T).abs().amax(0)
        strong = found["layers"][layer]["strong"]
        assert [one["neuron"] for one in strong] == reach.topk(2).indices.tolist()
        assert strong[0]["mean_activation"] is None


def test_top_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, columns = (torch.randn(n, 8, generator=generator) for n in (50, 3))
    wanted = (rows @ columns.T).topk(4, 0).indices.T
    for chunk in (1, 3, 7, 50, 99):
        monkeypatch.setattr(neurons_module, "REACH_CHUNK", chunk)
        assert torch.equal(top_rows(rows, columns.T, 4), wanted)
    assert top_rows(rows[:2], columns.T, 4).shape == (3, 2)
    assert concentration(torch.tensor([0.0, 6.0, 3.0, 1.0]), 0.5) == pytest.approx(0.9)
    assert concentration(torch.zeros(4), 0.5) == 0.0


def test_jaccard_and_its_chance() -> None:
    one, two = torch.tensor([1, 2, 3]), torch.tensor([3, 4])
    assert jaccard(one, two) == 1 / 4 and jaccard(one, one) == 1.0
    assert jaccard(one, one[:0]) == 0.0 and jaccard(one[:0], one[:0]) == 1.0
    for width, a, b in ((6, 3, 2), (5, 5, 2), (7, 4, 5), (4, 0, 2), (3, 3, 3)):
        fixed = set(range(a))
        every = [
            len(fixed & set(other)) / len(fixed | set(other))
            for other in combinations(range(width), b)
        ]
        assert expected_jaccard(width, a, b) == pytest.approx(sum(every) / len(every))
    assert expected_jaccard(4, 0, 0) == 1.0
    assert expected_jaccard(11_008, 5504, 5504) == pytest.approx(1 / 3, abs=1e-3)


@pytest.mark.parametrize("method", ["griffin", "dart"])
def test_overlap_is_that_of_the_methods_own_masks(method: str) -> None:
    looked = study(method=method, sparsity=0.4)
    found = overlap(looked)
    model, tokenizer = loaded()
    masks = []
    for text in (A, B):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with prune(model, method, sparsity=0.4) as run, torch.no_grad():
            model(ids, use_cache=True)
            masks.append(run.select())
    for layer, (a, b) in enumerate(zip(*masks, strict=True)):
        one, two = set(a.ids.tolist()), set(b.ids.tolist())
        mine = found["layers"][layer]
        assert (mine["kept_a"], mine["kept_b"]) == (len(one), len(two))
        assert mine["jaccard"] == pytest.approx(len(one & two) / len(one | two))
        assert mine["chance"] == expected_jaccard(WIDTH, len(one), len(two))
    assert found["removed"] == pytest.approx(0.4, abs=0.01)
    each = [layer["across"] for layer in found["layers"]]
    assert found["mean"]["across"] == pytest.approx(sum(each) / len(each))


def test_overlap_of_halves() -> None:
    """Griffin's masks of the halves, from activations seen in the whole text."""
    mine = overlap(study())["layers"][1]
    kept = []
    for text in (A, B):
        u = seen(text, 1)["u"]
        share = u / u.norm(dim=-1, keepdim=True)
        half = len(u) // 2
        for part in (share[:half], share[half:]):
            kept.append(set(part.square().sum(0).topk(WIDTH // 2).indices.tolist()))
    a1, a2, b1, b2 = kept

    def j(one: set[int], two: set[int]) -> float:
        return len(one & two) / len(one | two)

    assert mine["same_text"] == pytest.approx((j(a1, a2) + j(b1, b2)) / 2)
    assert mine["across"] == pytest.approx((j(a1, b1) + j(a1, b2) + j(a2, b1) + j(a2, b2)) / 4)


def test_the_same_text_twice_keeps_the_same_neurons() -> None:
    found = overlap(study(A, A))
    assert found["mean"]["jaccard"] == 1.0 and found["mean"]["chance"] < 0.4


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"method": "dense", "sparsity": None}, '"dense" removes no neuron'),
        ({"method": "wanda"}, "does not choose neurons by the text alone"),
        ({"method": "dart-token"}, "token-level selection has no sequence mask"),
        ({"ranking_method": "weight"}, "does not choose neurons by the text alone"),
    ],
)
def test_methods_that_do_not_read_the_text(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        overlap(study(**settings))


def test_short_texts() -> None:
    with pytest.raises(ConfigError, match=r"needs 64 tokens of each text, and B \(B\) has 3"):
        check(study(A, "sea"))
    with pytest.raises(ConfigError, match=r"text A \(A\) has 1 token"):
        study("a")
    assert [len(ids) for ids in study(max_tokens=70).ids] == [70, 70]
    assert len(study("x" * 3000, None, max_tokens=9999).ids[0]) == 1024  # the model's context


def test_compare() -> None:
    a, b = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([0.0, 0.0, 10.0])
    found = compare(a, b, 1)
    assert found == pytest.approx(
        {"cosine": 0.8, "distance": math.sqrt(45), "norm_ratio": 2.0, "jaccard": 1.0}
    )
    assert compare(a, torch.tensor([0.0, 9.0, -1.0]), 2)["jaccard"] == pytest.approx(1 / 3)
    assert compare(a, a, 99) == pytest.approx(
        {"cosine": 1.0, "distance": 0.0, "norm_ratio": 1.0, "jaccard": 1.0}
    )
    nothing = compare(torch.zeros(3), torch.zeros(3), 2)
    assert (nothing["cosine"], nothing["norm_ratio"], nothing["distance"]) == (0.0, 0.0, 0.0)
    assert half_widths(0) == [0] and half_widths(5) == [0, 1, 2, 4, 5] == half_widths(5)


def test_space() -> None:
    found = space(study(layer=2, top_dims=5))
    x = [seen(text, 2)["x"] for text in (A, B)]
    assert (found["layer"], len(found["layers"])) == (2, 4)
    assert len(found["tokens"]) == min(map(len, x))
    for position in (0, 17):
        mine = found["tokens"][position]
        one, two = x[0][position], x[1][position]
        assert mine["cosine"] == pytest.approx(float(cosine_similarity(one, two, dim=0)), abs=1e-4)
        assert mine["distance"] == pytest.approx(float((one - two).norm()), rel=1e-4)
        assert mine["norm_ratio"] == pytest.approx(float(two.norm() / one.norm()), rel=1e-4)
        tops = [set(t.abs().topk(5).indices.tolist()) for t in (one, two)]
        assert mine["jaccard"] == len(tops[0] & tops[1]) / len(tops[0] | tops[1])
    means = [t[4:].mean(0) for t in x]
    mine = found["layers"][2]
    assert mine["cosine"] == pytest.approx(float(cosine_similarity(*means, dim=0)), abs=1e-4)
    three = next(w for w in found["windows"] if w["half_width"] == 2)
    middles = [4 + (len(t) - 4) // 2 for t in x]
    parts = [t[m - 2 : m + 3].mean(0) for t, m in zip(x, middles, strict=True)]
    assert (three["tokens_a"], three["tokens_b"]) == (5, 5)
    assert three["distance"] == pytest.approx(float((parts[0] - parts[1]).norm()), rel=1e-4)
    widest = found["windows"][-1]
    assert (widest["tokens_a"], widest["tokens_b"]) == tuple(len(t) - 4 for t in x)
    assert widest["cosine"] == pytest.approx(mine["cosine"], abs=1e-4)


def test_space_of_a_text_with_itself_and_of_a_short_one() -> None:
    for row in space(study(A, A))["tokens"]:
        assert row["cosine"] == pytest.approx(1.0, abs=1e-6) and row["distance"] == 0.0
    short = space(study("ab", "abc"))
    assert len(short["tokens"]) == 2
    assert short["windows"][0]["tokens_a"] == 1
