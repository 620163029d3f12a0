"""What ``dart-llm inspect`` computes, against independent computations."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from dart_llm.errors import ConfigError
from dart_llm.models.capture import capture_activations
from dart_llm.session.run import prune
from dart_llm.studies.inspection import sections
from dart_llm.studies.inspection.readings import activations, impact, spread
from inspect_cases import A, B, read, seen
from lm_cases import loaded
from products import SHAPES
from steps import Same, decode, shared_model
from tiny import WIDTH, tokens


def jaccard(a, b):
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("name", SHAPES)
def test_impact_gives_the_sensitivities_of_the_depth_budgets(name):
    """The same S as the tracer's evidence."""
    model, ids = shared_model(name), tokens(1, 30, seed=6)
    impacts = {}

    def take(layer, activations):
        impacts[layer] = impact(activations)

    with Same(model), capture_activations(model, take), torch.no_grad():
        model(ids)
    settings = {"budget": "depth", "sparsity": 0.5, "masking_step": 1000}
    with prune(model, "griffin", **settings) as run:
        decode(model, ids, 30)
    for layer, evidence in enumerate(run.controller.sequences[0].evidence):
        cosine, change = (float(evidence.sums[name].mean) for name in ("cosine", "change"))
        output = impacts[layer]["output"]
        assert output["cosine"]["mean"] == pytest.approx(cosine, rel=1e-4, abs=1e-5)
        assert output["change"]["mean"] == pytest.approx(change, rel=1e-4)
        assert output["s"] == pytest.approx((1 - cosine) * change, rel=1e-3, abs=1e-5)


def test_activations():
    u = torch.tensor([[0.0, 3.0, -4.0, 0.0], [1.0, 1.0, 1.0, 1.0], [10.0, 0.02, 0.0, 0.4]])
    numbers = activations(u)
    assert numbers["zero"] == pytest.approx(3 / 12)
    assert numbers["near"] == pytest.approx(5 / 12)  # root mean squares 2.5, 1 and 5.004
    # 9 of 25 are too many to leave out
    assert numbers["concentrated"] == pytest.approx((2 + 4 + 1) / 3 / 4)
    assert (numbers["absolute"]["max"], numbers["absolute"]["median"]) == (10.0, 1.0)
    assert spread(torch.tensor([4.0, 0.0, 2.0]))["mean"] == 2.0
    silent = activations(torch.zeros(3, 5))
    assert (silent["zero"], silent["concentrated"]) == (1.0, 1 / 5)


def test_strong_neurons_by_forward_proxy(monkeypatch):
    monkeypatch.setattr(sections, "REACH_CHUNK", 7)  # of 50 and more vocabulary entries
    monkeypatch.setattr(sections, "PROXY", "product")
    model, tokenizer = loaded()
    study = read(b=None, top=3)
    strong = sections.neurons(study)["rows"]
    monkeypatch.setattr(sections, "PROXY", "max")
    bare = sections.neurons(read(None, None, top=3))
    assert bare["text"] is None and len(strong) == len(bare["rows"]) == 4 * 3
    rows = model.lm_head.weight.detach().double()
    for layer, block in enumerate(study.view.blocks):
        u = seen(A, layer)["u"]
        down = block.down.weight.detach().double()
        reach = (rows @ down.T).abs()  # [V, I]
        magnitude = u.square().sum(0).sqrt()
        scores = magnitude * reach.amax(0) * magnitude * reach.mean(0)
        order = scores.argsort(descending=True)
        of_layer = [row for row in strong if row["layer"] == layer]
        assert [row["neuron"] for row in of_layer] == order[:3].tolist()
        best = of_layer[0]
        assert best["score"] == pytest.approx(float(scores.max()), rel=1e-4)
        assert best["mean_activation"] == pytest.approx(float(u[:, order[0]].mean()), rel=1e-3)
        sign = math.copysign(1.0, best["mean_activation"])
        promoted = (sign * rows @ down[order[0]]).topk(5).indices
        assert best["tokens"] == [tokenizer.decode([token]) for token in promoted.tolist()]
        alone = [row for row in bare["rows"] if row["layer"] == layer]
        assert [row["neuron"] for row in alone] == reach.amax(0).topk(3).indices.tolist()
        assert alone[0]["mean_activation"] is None


def test_jaccard_and_its_chance():
    one, two, none = torch.tensor([1, 2, 3]), torch.tensor([3, 4]), torch.tensor([])
    pairs = ((one, two), (one, one), (one, none), (none, none))
    assert [sections.jaccard(*pair) for pair in pairs] == [1 / 4, 1.0, 0.0, 1.0]
    assert sections.expected_jaccard(6, 3, 2) == pytest.approx(1 / 4)  # one of 3 + 2 - 1
    assert sections.expected_jaccard(11_008, 5504, 5504) == pytest.approx(1 / 3)
    assert (sections.expected_jaccard(3, 3, 3), sections.expected_jaccard(4, 0, 0)) == (1.0, 1.0)


def test_overlap():
    """The whole texts by the method's own masks, the halves from activations of the whole texts."""
    model, tokenizer = loaded()
    data = sections.overlap(read())
    masks = []
    for text in (A, B):
        with prune(model, "griffin", sparsity=0.5) as run, torch.no_grad():
            model(tokenizer(text, return_tensors="pt").input_ids, use_cache=True)
            masks.append(run.select())
    for layer, (a, b) in enumerate(zip(*masks, strict=True)):
        of_a, of_b = set(a.ids.tolist()), set(b.ids.tolist())
        row = data["layers"][layer]
        assert (row["kept_a"], row["kept_b"]) == (len(of_a), len(of_b))
        assert row["jaccard"] == pytest.approx(jaccard(of_a, of_b))
        assert row["chance"] == sections.expected_jaccard(WIDTH, len(of_a), len(of_b))
        kept = []
        for text in (A, B):
            u = seen(text, layer)["u"]
            share = (u / u.norm(dim=-1, keepdim=True)).square()
            for part in (share[: len(u) // 2], share[len(u) // 2 :]):
                kept.append(set(part.sum(0).topk(WIDTH // 2).indices.tolist()))
        a1, a2, b1, b2 = kept
        across = sum(jaccard(x, y) for x in (a1, a2) for y in (b1, b2)) / 4
        assert row["same_text"] == pytest.approx((jaccard(a1, a2) + jaccard(b1, b2)) / 2)
        assert row["across"] == pytest.approx(across)
    assert data["removed"] == pytest.approx(0.5)
    same = sections.overlap(read(A, A, method="dart", sparsity=0.4))
    assert same["mean"]["jaccard"] == 1.0 and same["removed"] == pytest.approx(0.4, abs=0.01)


def test_what_cannot_be_looked_at():
    for settings in (
        {"method": "dense", "sparsity": None},
        {"method": "wanda"},
        {"method": "dart-token"},
        {"ranking_method": "weight"},
    ):
        with pytest.raises(ConfigError, match="does not select the neurons of a sequence by its"):
            sections.overlap(read(**settings))
    with pytest.raises(ConfigError, match=r"needs 64 tokens of each text, and B \(B\) has 3"):
        sections.ablation(read(A, "sea"))
    with pytest.raises(ConfigError, match=r"text A \(A\) has 1 token"):
        read("a")
    assert [len(ids) for ids in read(max_tokens=70).ids] == [70, 70]
    assert len(read("x" * 3000, None, max_tokens=9999).ids[0]) == 1024  # the model's context


def test_ablation():
    """Losses by a forward in which the removed neurons are multiplied by 0."""
    study = read(share=0.25, ablation_seeds=2)
    with Same(study.model):
        rows = sections.ablation(study)["rows"]
    model, tokenizer = loaded()
    texts = [tokenizer(text, return_tensors="pt").input_ids[0] for text in (A, B)]
    best = []
    for text, ids in zip((A, B), texts, strict=True):
        first_halves = [seen(text, layer)["u"][: len(ids) // 2] for layer in range(4)]
        shares = [(u / u.norm(dim=-1, keepdim=True)).square().sum(0) for u in first_halves]
        best.append([set(share.topk(WIDTH // 4).indices.tolist()) for share in shares])
    removed = {
        "A's own": [a - b for a, b in zip(*best, strict=True)],
        "B's own": [b - a for a, b in zip(*best, strict=True)],
    }
    assert len(rows) == 4
    for row in rows:
        ids, sets = texts["AB".index(row["text"])], removed[row["removed"]]
        assert row["neurons"] == sum(map(len, sets))
        assert row["achieved_sparsity"] == pytest.approx(row["neurons"] / (4 * WIDTH))
        assert (row["dense_token_share"], row["remasks"]) == (0.0, 0)
        for key, gone in (("loss", sets), ("dense_loss", [set()] * 4)):
            losses = masked_losses(model, ids, gone)
            assert row["tokens"] == len(losses) == len(ids) - len(ids) // 2
            assert row[key] == pytest.approx(float(losses.mean()), rel=1e-4)
        over, random = row["over_dense"], row["over_random"]["estimate"]
        assert over["estimate"] == pytest.approx(row["loss"] - row["dense_loss"], abs=1e-6)
        assert random == pytest.approx(row["loss"] - row["random_loss"], abs=1e-6)
        assert row["random_loss"] != row["dense_loss"]
        assert over["n"] == math.ceil(row["tokens"] / sections.BLOCK)
    rows = sections.ablation(read(A, A, ablation_seeds=1))["rows"]  # nothing is A's own
    assert [row["neurons"] for row in rows] == [0] * 4
    assert rows[0]["loss"] == rows[0]["dense_loss"] == rows[0]["random_loss"]


def masked_losses(model, ids, gone):
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
