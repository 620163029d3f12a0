"""The baselines: their scores and budget by hand, and what each keeps on a small model."""

import pytest
import torch

from dart_llm.calibration.self_calibration import choose
from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import floor_count
from dart_llm.session.run import prune
from observed_cases import dense_u
from prior_cases import observed, ready
from steps import pruned, same_masks, shared_model
from tiny import LAYERS, WIDTH, tokens

CALIBRATION = tokens(6, 24, seed=9)


def kept(method, prompt, **changes):
    ids = tokens(1, 70, seed=prompt)
    return pruned(shared_model(), ids, 68, ready, **{"method": method, **changes})[1][0][2]


def chosen(method, sparsity=0.5):
    """The masks that calibration gives, and the prior."""
    config = PruneConfig.build(method, sparsity=sparsity)
    return choose(shared_model(), config, observed(shared_model(), config, CALIBRATION))


@pytest.mark.parametrize("sparsity", [0.3, 0.85])
def test_flap_keeps_the_top_of_its_definition(sparsity):
    (masks, _), model = chosen("flap", sparsity), shared_model()
    seen = dense_u(model, CALIBRATION)
    weights = [layer.mlp.down_proj.weight.detach().double() for layer in model.model.layers]
    pairs = zip(seen, weights, strict=True)
    metric = torch.stack([u.var(0, correction=0) * w.square().sum(0) for u, w in pairs])
    z = (metric - metric.mean(1, keepdim=True)) / metric.std(1, keepdim=True)
    floor = floor_count(WIDTH)
    z.scatter_(1, z.topk(floor, 1).indices, torch.inf)
    want = torch.zeros(LAYERS * WIDTH, dtype=torch.bool)
    want[z.flatten().topk(round((1 - sparsity) * LAYERS * WIDTH)).indices] = True
    for mask, row, u, w in zip(masks, want.view(LAYERS, WIDTH), seen, weights, strict=True):
        assert mask.kept >= floor and mask.ids.tolist() == row.nonzero().flatten().tolist()
        bias = w[:, ~row] @ u.mean(0)[~row]
        assert torch.allclose(mask.bias.double(), bias, atol=1e-5)


def test_glass_mixes_griffins_ranks_with_the_priors():
    _, prior = chosen("glass")
    seen, masks = dense_u(shared_model(), tokens(1, 70, seed=1)[:, :68]), kept("glass", prompt=1)
    learned = dense_u(shared_model(), CALIBRATION)
    for ids, before, u, weight in zip(masks, learned, seen, prior, strict=True):
        share = (before / before.norm(dim=1, keepdim=True)).square().sum(0).sqrt()
        assert torch.allclose(weight.double(), share, rtol=1e-5)
        local = (u / u.norm(dim=1, keepdim=True)).square().sum(0).sqrt()
        total = local.argsort().argsort() + share.argsort().argsort()
        best = total.double().sort(descending=True, stable=True).indices[: WIDTH // 2]
        assert ids is not None and ids.tolist() == sorted(best.tolist())
    whole = {"score": {"prior_weight": 1.0}}  # the prior alone, whatever the prompt
    assert same_masks(kept("glass", 1, **whole), kept("glass", 2, **whole))
    assert same_masks(kept("glass", 1, score={"prior_weight": 0.0}), kept("griffin", 1))


def test_griffin_refresh_chooses_anew_every_64_pruned_tokens():
    """64 pruned, 16 dense, 64 pruned; the re-mask knows the 16 tokens alone."""
    ids, method = tokens(1, 68 + 144, seed=4), {"method": "griffin-refresh"}
    run, masks, _ = pruned(shared_model(), ids, 68, **method)
    remasks = [(r.step, r.cause, r.evidence_tokens) for r in run.remasks]
    assert remasks == [(0, "first", 68), (80, "interval", 16)]
    report = run.report()
    assert report.dense_token_share == pytest.approx(16 / 144)
    assert report.achieved_sparsity == pytest.approx(0.5 * 128 / 144)
    assert not same_masks(masks[0][2], masks[1][2])
    seldom, _, _ = pruned(shared_model(), ids, 68, **method, drift="interval 100")
    assert [r.step for r in seldom.remasks] == [0, 116]


def test_prune_says_how_to_prepare():
    for method, learned in (("wanda", "masks"), ("glass", "prior")):
        words = rf'method "{method}" .*its {learned} from calibration.*prepare\(model'
        with pytest.raises(ConfigError, match=words) as caught:
            prune(shared_model(), method)
        assert f"eval --method {method}" in str(caught.value)
