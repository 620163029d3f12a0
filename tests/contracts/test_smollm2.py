"""Truth on the real default model: SmolLM2-135M-Instruct, file quantisation Q4_1, float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dart_llm.calibration.self_text import opening_ids
from dart_llm.data import texts
from dart_llm.evaluation.perplexity import Scored, score, slices
from dart_llm.pruning.config import PriorConfig
from dart_llm.session.run import prune

pytestmark = pytest.mark.smollm2

DENSE_PERPLEXITY = 20.717
"""Embedded text, 4 slices of 256 prompt + 256 scored tokens; recorded when the text was written."""

PROMPT, FIRST, SECOND = 256, 320, 640


def ids_of(tokenizer, text: str) -> Tensor:
    return tokenizer(text, return_tensors="pt").input_ids[0]


@pytest.fixture(scope="module")
def windows(smollm2) -> list[Tensor]:
    return slices(ids_of(smollm2[1], texts.all_text()), 4, 256, 256)


@pytest.fixture(scope="module")
def dense(smollm2, windows) -> Scored:
    return score(smollm2[0], None, windows, 256)


def test_dense_perplexity_is_the_recorded_one(dense):
    assert dense.perplexity == pytest.approx(DENSE_PERPLEXITY, rel=0.01)


def test_dense_losses_equal_one_plain_forward(smollm2, windows, dense):
    model = smollm2[0]
    with torch.inference_mode():
        logits = model(windows[0][None]).logits[0, 255:511]
    plain = torch.nn.functional.cross_entropy(logits, windows[0][256:], reduction="none")
    assert torch.allclose(plain, torch.tensor(dense.losses[0]), atol=1e-4)


@pytest.mark.parametrize(
    ("method", "best", "worst"),
    [("published", 4.5, 8.5), ("dart", 1.5, 2.3)],  # its one-token re-masks cost published dearly
)
def test_methods_at_half_sparsity(smollm2, windows, dense, method, best, worst):
    with prune(smollm2[0], method, sparsity=0.5) as run:
        scored = score(smollm2[0], run, windows, 256)
    report = run.report()
    assert report.sparsity_while_pruned == pytest.approx(0.5, abs=1e-3)
    assert report.decoded_tokens == 4 * 256
    removed = sum(layer.width - layer.kept for layer in report.layers)
    assert abs(removed - 0.5 * sum(layer.width for layer in report.layers)) <= 1
    ratio = scored.perplexity / dense.perplexity
    assert best < ratio < worst


def test_dart_loses_less_than_griffin_on_a_slice(smollm2, windows):
    """At the same half of all neurons, and no token of this slice decoded dense."""
    found = {}
    for method in ("dart", "griffin"):
        with prune(smollm2[0], method, sparsity=0.5) as run:
            scored = score(smollm2[0], run, windows[:1], 256)
        report = run.report()
        assert report.achieved_sparsity == pytest.approx(0.5, abs=1e-3)
        assert (report.dense_token_share, report.remasks) == (0, 0)
        found[method] = sum(scored.losses[0]) / len(scored.losses[0])
    assert found["dart"] < found["griffin"] - 0.1


def test_every_opening_is_as_long_as_the_prior_asks(smollm2):
    model, tokenizer = smollm2
    found = opening_ids(model, 32, PriorConfig().opening)
    assert found is not None and found.shape == (32, 24)
    assert len({tuple(row) for row in found.tolist()}) == 32
    for row, opening in zip(found, texts.openings(), strict=True):
        assert opening.startswith(tokenizer.decode(row))


@pytest.mark.contract("sparsity 0 is bit-identical")
def test_sparsity_zero_is_bit_identical(smollm2):
    model, tokenizer = smollm2
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    plain = model.generate(**inputs, **options)
    with prune(model, sparsity=0.0):
        pruned = model.generate(**inputs, **options)
    assert " Paris" in tokenizer.decode(plain.sequences[0])
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, pruned.logits, strict=True))


@pytest.mark.contract("masked equals compact")
def test_masked_and_compact_choose_the_same_text(smollm2):
    model, tokenizer = smollm2
    ids = ids_of(tokenizer, texts.read("tides"))[None, :200]
    outputs = {}
    for executor in ("masked", "compact"):
        with prune(model, "griffin", sparsity=0.5, executor=executor):
            outputs[executor] = model.generate(
                ids, max_new_tokens=16, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
    for a, b in zip(outputs["masked"].logits, outputs["compact"].logits, strict=True):
        assert torch.allclose(a, b, atol=2e-3)


def test_live_detector_beats_never_remasking_at_its_own_sparsity(smollm2):
    """On a topic change, with dart's dense tokens charged to it."""
    model, tokenizer = smollm2
    passages = [
        torch.cat(
            [
                ids_of(tokenizer, texts.read(first))[:FIRST],
                ids_of(tokenizer, texts.read(second))[:SECOND],
            ]
        )
        for first, second in (("tides", "court"), ("bread", "immunity"))
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


def loss_after_change(scored: Scored) -> float:
    after = [losses[FIRST - PROMPT :] for losses in scored.losses]
    return sum(map(sum, after)) / sum(map(len, after))
