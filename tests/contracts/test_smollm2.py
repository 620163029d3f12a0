"""Truth on the real default model: SmolLM2-135M-Instruct, file quantisation Q4_1, float32."""

import math

import pytest
import torch

from dart_llm.data import texts
from dart_llm.evaluation.perplexity import score, slices
from dart_llm.session.run import prune
from steps import generate

pytestmark = [pytest.mark.smollm2, pytest.mark.usefixtures("native")]

PROMPT, SCORED = 256, 128
DENSE_PERPLEXITY = 28.791
"""Embedded text, 2 slices of 256 prompt + 128 scored tokens; recorded when the text was written."""


def ids_of(tokenizer, text):
    return tokenizer(text, return_tensors="pt").input_ids[0]


@pytest.fixture(scope="module")
def windows(smollm2):
    return slices(ids_of(smollm2[1], texts.all_text()), 2, PROMPT, SCORED)


@pytest.fixture(scope="module")
def dense(smollm2, windows):
    return score(smollm2[0], None, windows, PROMPT)


def pruned(smollm2, windows, method, **settings):
    """Losses and report."""
    with prune(smollm2[0], method, **settings) as run:
        scored = score(smollm2[0], run, windows, PROMPT)
    return scored, run.report()


def test_dense_losses_equal_one_plain_forward(smollm2, windows, dense):
    assert dense.perplexity == pytest.approx(DENSE_PERPLEXITY, rel=0.01)
    with torch.inference_mode():
        logits = smollm2[0](windows[0][None]).logits[0, PROMPT - 1 : -1]
    plain = torch.nn.functional.cross_entropy(logits, windows[0][PROMPT:], reduction="none")
    assert torch.allclose(plain, torch.tensor(dense.losses[0]), atol=1e-4)


def test_methods_at_half_sparsity(smollm2, windows, dense):
    """What they cost in perplexity; the one-token re-masks of published cost it dearly."""
    losses = {}
    for method, best, worst in (("published", 4.5, 8.5), ("dart", 1.5, 2.3)):
        scored, report = pruned(smollm2, windows, method, sparsity=0.5)
        assert report.sparsity_while_pruned == pytest.approx(0.5, abs=1e-3)
        assert report.decoded_tokens == 2 * SCORED
        removed = sum(layer.width - layer.kept for layer in report.layers)
        assert abs(removed - 0.5 * sum(layer.width for layer in report.layers)) <= 1
        assert best < scored.perplexity / dense.perplexity < worst
        losses[method] = sum(scored.losses[0]) / SCORED
    first = report.sequences[0]
    assert first.achieved_sparsity == pytest.approx(0.5, abs=1e-3) and len(first.remasks) == 1
    scored, report = pruned(smollm2, windows[:1], "griffin", sparsity=0.5)
    assert report.achieved_sparsity == pytest.approx(0.5, abs=1e-3)
    assert losses["dart"] < scored.mean_loss - 0.1


@pytest.mark.contract("accounting equals a count by hooks")
def test_70_percent_is_near_dense_for_tokens_that_choose(smollm2, windows, dense):
    """And not for a mask of the sequence."""
    scored, report = pruned(smollm2, windows[:1], "dart-token", sparsity=0.7)
    loss = sum(dense.losses[0]) / SCORED
    assert 1 < math.exp(scored.mean_loss - loss) < 1.3
    assert report.achieved_sparsity == pytest.approx(0.7, abs=1e-3)
    assert report.dense_token_share == 0 and report.remasks == 0
    row = (math.ceil(576 / 2) + 2 * 18) * 2 + 4
    assert report.proxy_bytes_share == pytest.approx(row / (3 * 576 * torch.float32.itemsize))
    scored, _ = pruned(smollm2, windows[:1], "griffin", sparsity=0.7)
    assert math.exp(scored.mean_loss - loss) > 4


@pytest.mark.contract("sparsity 0 is bit-identical")
@pytest.mark.contract("masked equals compact")
def test_nothing_removed_and_half_removed(smollm2):
    model, ids = smollm2[0], ids_of(smollm2[1], texts.read("tides"))[None, :200]
    plain, logits = generate(model, ids, 12).logits, []
    for sparsity, executor in ((0.0, "auto"), (0.5, "masked"), (0.5, "compact")):
        with prune(model, "griffin", sparsity=sparsity, executor=executor):
            logits.append(generate(model, ids, 12).logits)
    assert all(torch.equal(a, b) for a, b in zip(plain, logits[0], strict=True))
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(*logits[1:], strict=True))


def test_live_detector_beats_never_remasking_at_its_own_sparsity(smollm2):
    """On a topic change, with dart's dense tokens charged to it."""
    tides, court = (ids_of(smollm2[1], texts.read(name)) for name in ("tides", "court"))
    prompt, first, second, losses = 128, 160, 320, []
    passage = torch.cat([tides[:first], court[:second]])
    settings = {"sparsity": 0.5}
    for _ in range(2):
        with prune(smollm2[0], "dart", **settings) as run:
            scored = score(smollm2[0], run, [passage], prompt)
        losses.append(sum(scored.losses[0][first - prompt :]))
        report = run.report()
        if len(losses) == 1:
            assert report.remasks >= 1 and 0 < report.dense_token_share <= 0.15
            settings = {"sparsity": report.achieved_sparsity, "drift": "never"}
    assert report.achieved_sparsity == pytest.approx(settings["sparsity"], abs=1e-3)
    assert losses[0] < losses[1]
