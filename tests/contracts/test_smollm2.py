"""Truth on the real default model: SmolLM2-135M-Instruct, file quantisation Q4_1, float32."""

import pytest
import torch

from dart_llm.data import texts
from dart_llm.evaluation.perplexity import score, slices
from dart_llm.session.run import prune
from steps import generate

pytestmark = pytest.mark.smollm2

DENSE_PERPLEXITY = 20.717
"""Embedded text, 4 slices of 256 prompt + 256 scored tokens; recorded when the text was written."""

PROMPT, FIRST, SECOND = 256, 320, 640


def ids_of(tokenizer, text):
    return tokenizer(text, return_tensors="pt").input_ids[0]


@pytest.fixture(scope="module")
def windows(smollm2):
    return slices(ids_of(smollm2[1], texts.all_text()), 4, 256, 256)


@pytest.fixture(scope="module")
def dense(smollm2, windows):
    return score(smollm2[0], None, windows, 256)


def test_dense_losses_equal_one_plain_forward(smollm2, windows, dense):
    assert dense.perplexity == pytest.approx(DENSE_PERPLEXITY, rel=0.01)
    with torch.inference_mode():
        logits = smollm2[0](windows[0][None]).logits[0, 255:511]
    plain = torch.nn.functional.cross_entropy(logits, windows[0][256:], reduction="none")
    assert torch.allclose(plain, torch.tensor(dense.losses[0]), atol=1e-4)


def test_methods_at_half_sparsity(smollm2, windows, dense):
    """What it costs in perplexity, and of one slice in which no token of theirs decodes dense."""
    found = {}
    for method, best, worst in (
        ("published", 4.5, 8.5),  # its one-token re-masks cost it dearly
        ("dart", 1.5, 2.3),
    ):
        with prune(smollm2[0], method, sparsity=0.5) as run:
            scored = score(smollm2[0], run, windows, 256)
        report = run.report()
        assert report.sparsity_while_pruned == pytest.approx(0.5, abs=1e-3)
        assert report.decoded_tokens == 4 * 256
        removed = sum(layer.width - layer.kept for layer in report.layers)
        assert abs(removed - 0.5 * sum(layer.width for layer in report.layers)) <= 1
        assert best < scored.perplexity / dense.perplexity < worst
        found[method] = sum(scored.losses[0]) / 256
    first = report.sequences[0]
    assert first.achieved_sparsity == pytest.approx(0.5, abs=1e-3)
    assert len(first.remasks) == 1
    with prune(smollm2[0], "griffin", sparsity=0.5) as run:
        scored = score(smollm2[0], run, windows[:1], 256)
    assert run.report().achieved_sparsity == pytest.approx(0.5, abs=1e-3)
    assert found["dart"] < sum(scored.losses[0]) / 256 - 0.1


@pytest.mark.contract("sparsity 0 is bit-identical")
@pytest.mark.contract("masked equals compact")
def test_nothing_removed_and_half_removed(smollm2):
    model, tokenizer = smollm2
    ids = ids_of(tokenizer, "The capital of France is")[None]
    plain = generate(model, ids, 12)
    with prune(model, sparsity=0.0):
        zero = generate(model, ids, 12)
    assert " Paris" in tokenizer.decode(plain.sequences[0])
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, zero.logits, strict=True))
    ids, outputs = ids_of(tokenizer, texts.read("tides"))[None, :200], []
    for executor in ("masked", "compact"):
        with prune(model, "griffin", sparsity=0.5, executor=executor):
            outputs.append(generate(model, ids, 16).logits)
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(*outputs, strict=True))


def test_live_detector_beats_never_remasking_at_its_own_sparsity(smollm2):
    """On a topic change, with dart's dense tokens charged to it."""
    model, tokenizer = smollm2
    passages = [
        torch.cat([ids_of(tokenizer, texts.read(name))[:length] for name, length in pair])
        for pair in (
            (("tides", FIRST), ("court", SECOND)),
            (("bread", FIRST), ("immunity", SECOND)),
        )
    ]
    with prune(model, "dart", sparsity=0.5) as run:
        live = score(model, run, passages, PROMPT)
    report = run.report()
    assert report.remasks >= 2
    assert 0 < report.dense_token_share <= 0.15
    with prune(model, "dart", sparsity=report.achieved_sparsity, drift="never") as run:
        never = score(model, run, passages, PROMPT)
    assert run.report().achieved_sparsity == pytest.approx(report.achieved_sparsity, abs=1e-3)
    assert loss_after_change(live) < loss_after_change(never)


def loss_after_change(scored):
    after = [losses[FIRST - PROMPT :] for losses in scored.losses]
    return sum(map(sum, after)) / sum(map(len, after))
