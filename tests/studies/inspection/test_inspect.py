"""What ``dart-llm inspect`` computes, against computations of our own."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import cosine_similarity, cross_entropy

from dart_llm.errors import ConfigError
from dart_llm.models.capture import capture_activations
from dart_llm.models.describe import describe
from dart_llm.session.run import prune
from dart_llm.studies.inspection import analyses
from dart_llm.studies.inspection.readings import (
    activations,
    impact,
    weight_norms,
)
from inspect_cases import A, B, read, seen
from lm_cases import loaded
from products import SHAPES
from steps import Same, decode, shared_model
from tiny import WIDTH, tokens


def jaccard(one, two):
    return len(one & two) / len(one | two)


@pytest.mark.parametrize("name", SHAPES)
def test_impact_gives_the_sensitivities_of_the_depth_budgets(name):
    """The same S as the tracer's evidence."""
    model, ids = shared_model(name), tokens(1, 30, seed=6)
    found = {}

    def take(layer, one):
        found[layer] = impact(one)

    with Same(model), capture_activations(model, take), torch.no_grad():
        model(ids)
    settings = {"budget": "depth", "sparsity": 0.5, "masking_step": 1000}
    with prune(model, "griffin", **settings) as run:
        decode(model, ids, 30)
    for layer, evidence in enumerate(run.controller.sequences[0].evidence):
        cosine, change = (float(evidence.sums[name].mean) for name in ("cosine", "change"))
        mine = found[layer]["output"]
        assert mine["cosine"]["mean"] == pytest.approx(cosine, rel=1e-4, abs=1e-5)
        assert mine["change"]["mean"] == pytest.approx(change, rel=1e-4)
        assert mine["s"] == pytest.approx((1 - cosine) * change, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
def test_weights(name):
    blocks = describe(shared_model(name)).blocks
    found = weight_norms(blocks)
    for layer, block in enumerate(blocks):
        down = block.down.weight if name == "gpt2" else block.down.weight.T  # [I, D]
        up = block.up.weight.T if name == "gpt2" else block.up.weight
        parts = {"down": down, "up": up}
        if name == "phi3":
            parts |= {"gate": up[:WIDTH], "up": up[WIDTH:]}
        elif block.gate is not None:
            parts["gate"] = block.gate.weight
        assert found[layer].keys() == parts.keys()
        for matrix, rows in parts.items():
            norms = rows.detach().double().square().sum(1).sqrt().numpy()
            mine = found[layer][matrix]
            assert mine["median"] == pytest.approx(np.median(norms), rel=1e-5)
            assert mine["skewness"] == pytest.approx(stats.skew(norms), abs=1e-4)


def test_activations():
    u = torch.tensor([[0.0, 3.0, -4.0, 0.0], [1.0, 1.0, 1.0, 1.0], [10.0, 0.02, 0.0, 0.4]])
    found = activations(u)
    assert found["zero"] == pytest.approx(3 / 12)
    # Root mean squares 2.5, 1 and 5.004: only 0.02 lies below 1 %, and 0.4 below 10 %.
    assert found["near"] == pytest.approx({"0.01": 4 / 12, "0.1": 5 / 12})
    assert found["holds"] == pytest.approx((2 + 4 + 1) / 3 / 4)  # 9 of 25 are too many to leave
    silent = activations(torch.zeros(3, 5))
    assert (silent["zero"], silent["holds"], silent["moments"]["kurtosis"]) == (1.0, 1 / 5, None)


def test_strong_and_weak_neurons_by_forward_proxy():
    model, tokenizer = loaded()
    looked = read(b=None, neuron_score="product", top=3)
    found, bare = analyses.neurons(looked), analyses.neurons(read(None, None, neuron_score="max"))
    rows = model.lm_head.weight.detach().double()
    assert (found["score"], found["text"], bare["text"]) == ("product", "A", None)
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
        strong = bare["layers"][layer]["strong"]  # without a text the proxy alone decides
        wanted = reach.amax(0).topk(5).indices.tolist()
        assert [one["neuron"] for one in strong] == wanted and strong[0]["mean_activation"] is None


def test_top_rows_in_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    rows, columns = (torch.randn(n, 8, generator=generator) for n in (50, 3))
    wanted = (rows @ columns.T).topk(4, 0).indices.T
    for chunk in (1, 7, 99):
        monkeypatch.setattr(analyses, "REACH_CHUNK", chunk)
        assert torch.equal(analyses.top_rows(rows, columns.T, 4), wanted)


def test_jaccard_and_its_chance():
    one, two, none = torch.tensor([1, 2, 3]), torch.tensor([3, 4]), torch.tensor([])
    pairs = ((one, two), (one, one), (one, none), (none, none))
    assert [analyses.jaccard(*pair) for pair in pairs] == [1 / 4, 1.0, 0.0, 1.0]
    for width, a, b in ((6, 3, 2), (5, 5, 2), (7, 4, 5), (4, 0, 2), (3, 3, 3)):
        every = [jaccard(set(range(a)), set(other)) for other in combinations(range(width), b)]
        assert analyses.expected_jaccard(width, a, b) == pytest.approx(sum(every) / len(every))
    assert analyses.expected_jaccard(4, 0, 0) == 1.0
    assert analyses.expected_jaccard(11_008, 5504, 5504) == pytest.approx(1 / 3, abs=1e-3)


def test_overlap():
    """The whole texts by the method's own masks, the halves from activations of the whole texts."""
    model, tokenizer = loaded()
    found = analyses.overlap(read())
    masks = []
    for text in (A, B):
        with prune(model, "griffin", sparsity=0.5) as run, torch.no_grad():
            model(tokenizer(text, return_tensors="pt").input_ids, use_cache=True)
            masks.append(run.select())
    for layer, (a, b) in enumerate(zip(*masks, strict=True)):
        one, two = set(a.ids.tolist()), set(b.ids.tolist())
        mine = found["layers"][layer]
        assert (mine["kept_a"], mine["kept_b"]) == (len(one), len(two))
        assert mine["jaccard"] == pytest.approx(jaccard(one, two))
        assert mine["chance"] == analyses.expected_jaccard(WIDTH, len(one), len(two))
        kept = []
        for text in (A, B):
            u = seen(text, layer)["u"]
            share = (u / u.norm(dim=-1, keepdim=True)).square()
            for part in (share[: len(u) // 2], share[len(u) // 2 :]):
                kept.append(set(part.sum(0).topk(WIDTH // 2).indices.tolist()))
        a1, a2, b1, b2 = kept
        across = sum(jaccard(x, y) for x in (a1, a2) for y in (b1, b2)) / 4
        assert mine["same_text"] == pytest.approx((jaccard(a1, a2) + jaccard(b1, b2)) / 2)
        assert mine["across"] == pytest.approx(across)
    assert found["removed"] == pytest.approx(0.5)
    same = analyses.overlap(read(A, A, method="dart", sparsity=0.4))
    assert same["mean"]["jaccard"] == 1.0 and same["removed"] == pytest.approx(0.4, abs=0.01)


def test_what_cannot_be_looked_at():
    by_text = "does not select neurons by the text alone"
    for settings, problem in (
        ({"method": "dense", "sparsity": None}, '"dense" removes no neuron'),
        ({"method": "wanda"}, by_text),
        ({"method": "dart-token"}, "token-level selection has no sequence mask"),
        ({"ranking_method": "weight"}, by_text),
    ):
        with pytest.raises(ConfigError, match=problem):
            analyses.overlap(read(**settings))
    with pytest.raises(ConfigError, match=r"needs 64 tokens of each text, and B \(B\) has 3"):
        analyses.check(read(A, "sea"))
    with pytest.raises(ConfigError, match=r"text A \(A\) has 1 token"):
        read("a")
    assert [len(ids) for ids in read(max_tokens=70).ids] == [70, 70]
    assert len(read("x" * 3000, None, max_tokens=9999).ids[0]) == 1024  # the model's context


def test_space():
    found = analyses.space(read(layer=2, top_dims=5))
    x = [seen(text, 2)["x"] for text in (A, B)]
    assert (found["layer"], len(found["layers"])) == (2, 4)
    assert len(found["tokens"]) == min(map(len, x))
    for position in (0, 17):
        one, two = x[0][position], x[1][position]
        tops = [set(t.abs().topk(5).indices.tolist()) for t in (one, two)]
        wanted = {"position": position, "cosine": float(cosine_similarity(one, two, dim=0))}
        wanted |= {"distance": float((one - two).norm()), "jaccard": jaccard(*tops)}
        wanted |= {"norm_ratio": float(two.norm() / one.norm())}
        assert found["tokens"][position] == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    mean = float(cosine_similarity(*(t[4:].mean(0) for t in x), dim=0))
    assert found["layers"][2]["cosine"] == pytest.approx(mean, abs=1e-4)
    five = next(w for w in found["windows"] if w["half_width"] == 2)
    middles = [4 + (len(t) - 4) // 2 for t in x]
    parts = [t[m - 2 : m + 3].mean(0) for t, m in zip(x, middles, strict=True)]
    assert (five["tokens_a"], five["tokens_b"]) == (5, 5)
    assert five["distance"] == pytest.approx(float((parts[0] - parts[1]).norm()), rel=1e-4)
    widest = found["windows"][-1]
    assert (widest["tokens_a"], widest["tokens_b"]) == tuple(len(t) - 4 for t in x)
    assert widest["cosine"] == pytest.approx(mean, abs=1e-4)


def test_ablation():
    """Losses by a forward of our own in which the removed neurons are multiplied by 0."""
    looked = read(share=0.25, ablation_seeds=2)
    with Same(looked.model):
        found = analyses.ablation(looked)
    model, tokenizer = loaded()
    texts = [tokenizer(text, return_tensors="pt").input_ids[0] for text in (A, B)]
    best = []
    for text, ids in zip((A, B), texts, strict=True):
        seen_first = [seen(text, layer)["u"][: len(ids) // 2] for layer in range(4)]
        shares = [(u / u.norm(dim=-1, keepdim=True)).square().sum(0) for u in seen_first]
        best.append([set(share.topk(WIDTH // 4).indices.tolist()) for share in shares])
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
        over, random = row["over_dense"], row["over_random"]["estimate"]
        assert over["estimate"] == pytest.approx(row["loss"] - row["dense_loss"], abs=1e-6)
        assert random == pytest.approx(row["loss"] - row["random_loss"], abs=1e-6)
        assert over["n"] == math.ceil(row["tokens"] / found["block_tokens"])
    rows = analyses.ablation(read(A, A))["rows"]  # equal texts: nothing is A's own
    assert [row["neurons"] > 0 for row in rows] == [row["arm"] == "a_top" for row in rows]
    assert rows[0]["loss"] == rows[0]["dense_loss"] == rows[0]["random_loss"]


def own_losses(model, ids, gone):
    """Losses of the second half; neurons are removed for the tokens fed from its start - 1 on."""
    first, handles = len(ids) // 2, []
    for block, sets in zip(model.transformer.h, gone, strict=True):
        mask = torch.ones(len(ids), WIDTH)
        mask[first - 1 :, sorted(sets)] = 0
        handles.append(
            block.mlp.c_proj.register_forward_pre_hook(lambda m, args, k=mask: (args[0] * k,))
        )
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    for handle in handles:
        handle.remove()
    return cross_entropy(logits[first - 1 : -1], ids[first:], reduction="none")
