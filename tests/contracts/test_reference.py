"""Every executor against the independent reference: the same neurons, and the same logits."""

import pytest
import torch

from dart_llm.data import texts
from dart_llm.session.run import prune
from reference import Dart, Griffin, decode, learn, own_text
from steps import decode as decoded
from steps import same_masks, selections
from tiny import LAYERS, WIDTH, tiny

pytestmark = pytest.mark.usefixtures("native")

LOGITS = 3e-4
"""Largest difference of a float32 logit that agreement allows."""

SMALL = {"sequences": 4, "length": 40, "opening": 0}
RANK = 8
EXECUTORS = {
    **dict.fromkeys(("llama", "llama-bias", "qwen3"), ("masked", "compact", "native")),
    "gemma3": ("masked", "compact", "native"),
    "gpt2": ("masked", "compact"),
}
"""Those that can run the model."""


def other_topic(seed, prompt=60, more=90):
    """Token ids of one half of the vocabulary, and after the prompt of the other."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(3, 20, (prompt,), generator=generator)
    return torch.cat([first, torch.randint(60, 90, (more,), generator=generator)])


def method_of(model, name, sparsity, prior, rank=32):
    """The reference's method, which learns anew what it needs."""
    if name == "griffin":
        return Griffin(sparsity)
    return Dart(model, sparsity, learn(model, own_text(model, **prior), rank))


def check(model, ids, prompt, method, sparsity, wanted, executor, **changes):
    """ids [T] after ``prompt`` of them under ``executor``: masks and logits of the reference."""
    run = prune(model, method, sparsity=sparsity, executor=executor, **changes)
    masks = selections(run)
    with run:
        logits = decoded(model, ids[None], prompt)[0]
    assert run.report().executor.partition(",")[0] == executor
    assert [step for step, *_ in masks] == [step for step, _ in wanted.masks]
    for (*_, ours), (_, theirs) in zip(masks, wanted.masks, strict=True):
        assert same_masks(ours, theirs)
    assert float((logits - wanted.logits).abs().max()) <= LOGITS


def agreed(model, ids, prompt, name, sparsity, executors):
    """What the reference gives; every executor gives it too."""
    dart = name == "dart"
    changes = {"self_stats": SMALL, "compensation_rank": RANK} if dart else {}
    wanted = decode(model, ids, prompt, method_of(model, name, sparsity, SMALL, RANK))
    assert float(wanted.logits.std()) > 0.5
    for executor in executors:
        check(model, ids, prompt, name, sparsity, wanted, executor, **changes)
    return wanted


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize("name", EXECUTORS)
def test_griffin(name):
    wanted = agreed(tiny(name), other_topic(0), 60, "griffin", 0.5, EXECUTORS[name])
    ((step, layers),) = wanted.masks
    assert step == 0 and [len(ids) for ids in layers] == [WIDTH // 2] * LAYERS


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize(
    ("name", "seed"), [("llama", 2), ("llama-bias", 0), ("qwen3", 2), ("gemma3", 2), ("gpt2", 0)]
)
def test_dart_before_and_after_a_change_of_topic(name, seed):
    """The seeds are such that the rule fires: the second mask is made from aged evidence."""
    model = tiny(name, seed)
    wanted = agreed(model, other_topic(seed, more=130), 60, "dart", 0.5, EXECUTORS[name])
    (first, before), (second, after) = wanted.masks
    assert first == 0 and second > 60
    assert sum(map(len, before)) == sum(map(len, after)) == LAYERS * WIDTH // 2
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_dart_waits_for_evidence_and_keeps_a_floor():
    ids = other_topic(3, prompt=2, more=80)
    wanted = agreed(tiny("llama", 3), ids, 2, "dart", 0.95, ("masked", "native"))
    step, layers = wanted.masks[0]
    assert step == 14 and sum(map(len, layers)) == round(0.05 * LAYERS * WIDTH)


@pytest.mark.smollm2
@pytest.mark.parametrize(
    ("method", "more", "steps", "executors"),
    [("griffin", 12, [0], ("masked", "native")), ("dart", 66, [0, 62], ("native",))],
)
def test_smollm2(smollm2, method, more, steps, executors):
    """The first tokens of a passage about an aqueduct, then of one about a bicycle: drift."""
    model, tokenizer = smollm2
    parts = [(texts.read("aqueduct"), 120), (texts.read("bicycle"), more)]
    ids = torch.cat([torch.tensor(tokenizer(text).input_ids[:size]) for text, size in parts])
    prior = {"sequences": 4, "length": 40, "opening": 24}
    wanted = decode(model, ids, 120, method_of(model, method, 0.5, prior))
    assert [step for step, _ in wanted.masks] == steps
    assert all(sum(map(len, layers)) == 23_040 for _, layers in wanted.masks)
    for executor in executors:
        changes = {} if method == "griffin" else {"self_stats": prior}
        check(model, ids, 120, method, 0.5, wanted, executor, **changes)
