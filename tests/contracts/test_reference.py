"""Every executor against the independent reference: the same neurons, and the same logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import reference_drift
from dart_llm.data import texts
from reference import Dart, Trace, decode, learn
from reference_compare import LOGITS, compare, method_of, own_text
from tiny import LAYERS, WIDTH, tiny

pytestmark = pytest.mark.usefixtures("native")

SMALL = {"sequences": 4, "length": 40, "opening": 0}
RANK = 8
EXECUTORS = {
    "llama": ("masked", "compact", "native", "slim"),
    "llama-bias": ("masked", "compact", "native", "slim"),
    "qwen3": ("masked", "compact", "native", "slim"),
    "gemma3": ("masked", "compact", "native"),
    "gpt2": ("masked", "compact"),
}
"""Those that can run the model."""


def other_topic(seed: int, prompt: int = 60, more: int = 90) -> Tensor:
    """Token ids of one half of the vocabulary, and after the prompt of the other."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(3, 20, (prompt,), generator=generator)
    return torch.cat([first, torch.randint(60, 90, (more,), generator=generator)])


def agreed(model, ids: Tensor, prompt: int, name: str, sparsity: float, executors) -> Trace:
    """What the reference gives; every executor gives it too."""
    dart = name == "dart"
    changes = {"prior": SMALL, "compensation_rank": RANK} if dart else {}
    wanted = decode(model, ids, prompt, method_of(model, name, sparsity, SMALL, RANK))
    for executor in executors:
        found = compare(model, ids, prompt, name, sparsity, wanted, executor, **changes)
        assert found.holds, found
        assert found.executor == executor and found.spread > 0.5
    return wanted


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize(("name", "seed"), [*((name, 0) for name in EXECUTORS), ("llama", 1)])
def test_griffin(name: str, seed: int) -> None:
    wanted = agreed(tiny(name, seed), other_topic(seed), 60, "griffin", 0.5, EXECUTORS[name])
    ((step, layers),) = wanted.masks
    assert step == 0 and [len(ids) for ids in layers] == [WIDTH // 2] * LAYERS


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize(
    ("name", "seed"), [("llama", 2), ("llama-bias", 0), ("qwen3", 2), ("gemma3", 2), ("gpt2", 0)]
)
def test_dart_before_and_after_a_change_of_topic(name: str, seed: int) -> None:
    """The seeds are such that the rule fires: the second mask is made from aged evidence."""
    model = tiny(name, seed)
    wanted = agreed(model, other_topic(seed, more=130), 60, "dart", 0.5, EXECUTORS[name])
    (first, before), (second, after) = wanted.masks
    assert first == 0 and second > 60
    assert sum(map(len, before)) == sum(map(len, after)) == LAYERS * WIDTH // 2
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("sparsity", "prompt", "step"), [(0.7, 6, 10), (0.95, 2, 14)])
def test_dart_waits_for_evidence_and_keeps_a_floor(sparsity: float, prompt: int, step: int) -> None:
    ids = other_topic(3, prompt, 80)
    wanted = agreed(tiny("llama", 3), ids, prompt, "dart", sparsity, ("masked", "slim"))
    assert wanted.masks[0][0] == step
    counts = [len(layer) for layer in wanted.masks[0][1]]
    assert sum(counts) == round((1 - sparsity) * LAYERS * WIDTH)


def test_dart_after_more_windows_than_a_reference_holds() -> None:
    """A prompt of 1,399 tokens is 139 windows, of which 128 count, and ages to 256 tokens."""
    ids = other_topic(3, 1399, 100)
    wanted = agreed(tiny("llama", 3), ids, 1399, "dart", 0.5, ("masked", "slim"))
    assert len(wanted.masks) == 2


def test_the_comparison_sees_one_neuron_and_one_logit() -> None:
    model, ids = tiny("llama"), other_topic(0, more=20)
    wanted = decode(model, ids, 60, method_of(model, "griffin", 0.5))
    found = compare(model, ids, 60, "griffin", 0.5, wanted, "masked")
    assert found.holds and found.kept == LAYERS * WIDTH // 2
    (step, layers) = wanted.masks[0]
    spare = sorted(set(range(WIDTH)) - set(layers[0].tolist()))[0]
    other = [torch.cat([layers[0][1:], torch.tensor([spare])]), *layers[1:]]
    found = compare(model, ids, 60, "griffin", 0.5, Trace(wanted.logits, [(step, other)]), "masked")
    assert found.differ == 2 and not found.holds
    logits = wanted.logits.clone()
    logits[70, 5] += 2 * LOGITS
    found = compare(model, ids, 60, "griffin", 0.5, replace(wanted, logits=logits), "masked")
    assert found.differ == 0 and not found.holds


@pytest.mark.parametrize("place", ["prompt", "decoded"])
def test_the_drift_rule_of_the_reference_is_that_of_the_method(place: str) -> None:
    """By hand: with like windows nothing fires; with three unlike ones the third does."""
    detector = reference_drift.Detector()
    generator = torch.Generator().manual_seed(0)
    like = torch.tensor([1.0, 0.0]) + 0.1 * torch.randn(40, 2, generator=generator)
    decoded = 0
    if place == "prompt":
        detector.observe(like)
        detector.arm()
    else:
        detector.arm()
        for v in like:
            decoded += 1
            assert not detector.watch(v, decoded)
    fired = [detector.watch(torch.tensor([0.0, 1.0]), decoded + n) for n in range(1, 41)]
    assert fired.index(True) == 29


# the default model


@pytest.mark.smollm2
def test_smollm2_by_griffin(smollm2) -> None:
    model, tokenizer = smollm2
    ids = two_texts(tokenizer, 120, 24)
    wanted = decode(model, ids, 120, method_of(model, "griffin", 0.5))
    for executor in EXECUTORS["llama"]:
        found = compare(model, ids, 120, "griffin", 0.5, wanted, executor)
        assert found.holds and found.kept == 23_040, found


@pytest.mark.smollm2
def test_smollm2_by_dart(smollm2) -> None:
    """Drift fires, so a second mask is made while decoding."""
    model, tokenizer = smollm2
    prior = {"sequences": 4, "length": 40, "opening": 24}
    ids = two_texts(tokenizer, 120, 66)
    priors = learn(model, own_text(model, **prior))
    wanted = decode(model, ids, 120, Dart(model, 0.5, priors))
    for executor in ("masked", "slim"):
        found = compare(model, ids, 120, "dart", 0.5, wanted, executor, prior=prior)
        assert found.holds and found.steps == (0, 62) and found.kept == 2 * 23_040, found


def two_texts(tokenizer, first: int, second: int) -> Tensor:
    """The first tokens of a passage about an aqueduct, then of one about a bicycle."""
    parts = [(texts.read("aqueduct"), first), (texts.read("bicycle"), second)]
    return torch.cat([torch.tensor(tokenizer(text).input_ids[:length]) for text, length in parts])
