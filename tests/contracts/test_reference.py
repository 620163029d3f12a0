"""Every executor against the independent reference: the same neurons, and the same logits."""

from dataclasses import dataclass

import pytest
import torch

from dart_llm.data import texts
from dart_llm.session.run import prune
from reference import Dart, Griffin, decode, learn, own_text
from steps import decode as decoded
from steps import selections
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


@dataclass(frozen=True)
class Agreement:
    executor: str
    steps: tuple[int, ...]  # decode steps of the masks
    wanted: tuple[int, ...]  # ... and of the reference's
    kept: int  # neurons that the masks keep, all together
    differ: int  # kept by one of the two only
    logits: float  # largest difference
    spread: float  # standard deviation of the logits

    @property
    def holds(self):
        return self.steps == self.wanted and self.differ == 0 and self.logits <= LOGITS


def method_of(model, name, sparsity, prior, rank=32):
    """The reference's method, which learns anew what it needs."""
    if name == "griffin":
        return Griffin(sparsity)
    return Dart(model, sparsity, learn(model, own_text(model, **prior), rank))


def compare(model, ids, prompt, method, sparsity, wanted, executor, **changes):
    """Decode ids [T] after ``prompt`` of them under ``executor``; ``wanted``: by the reference."""
    run = prune(model, method, sparsity=sparsity, executor=executor, **changes)
    masks = selections(run)
    with run:
        logits = decoded(model, ids[None], prompt)[0]
    pairs = zip([ids for *_, ids in masks], [ids for _, ids in wanted.masks], strict=False)
    sets = [(set(a.tolist()), set(b.tolist())) for one in pairs for a, b in zip(*one, strict=True)]
    return Agreement(
        executor=run.report().executor,
        steps=tuple(step for step, *_ in masks),
        wanted=tuple(step for step, _ in wanted.masks),
        kept=sum(len(b) for _, b in sets),
        differ=sum(len(a ^ b) for a, b in sets),
        logits=float((logits - wanted.logits).abs().max()),
        spread=float(wanted.logits.std()),
    )


def agreed(model, ids, prompt, name, sparsity, executors):
    """What the reference gives; every executor gives it too."""
    dart = name == "dart"
    changes = {"self_stats": SMALL, "compensation_rank": RANK} if dart else {}
    wanted = decode(model, ids, prompt, method_of(model, name, sparsity, SMALL, RANK))
    for executor in executors:
        found = compare(model, ids, prompt, name, sparsity, wanted, executor, **changes)
        assert found.holds, found
        assert found.executor.partition(",")[0] == executor and found.spread > 0.5
    return wanted


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize(("name", "seed"), [*((name, 0) for name in EXECUTORS)])
def test_griffin(name, seed):
    wanted = agreed(tiny(name, seed), other_topic(seed), 60, "griffin", 0.5, EXECUTORS[name])
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


@pytest.mark.parametrize(("sparsity", "prompt", "step"), [(0.95, 2, 14)])
def test_dart_waits_for_evidence_and_keeps_a_floor(sparsity, prompt, step):
    ids = other_topic(3, prompt, 80)
    wanted = agreed(tiny("llama", 3), ids, prompt, "dart", sparsity, ("masked", "native"))
    assert wanted.masks[0][0] == step
    counts = [len(layer) for layer in wanted.masks[0][1]]
    assert sum(counts) == round((1 - sparsity) * LAYERS * WIDTH)


# the default model


@pytest.mark.smollm2
@pytest.mark.parametrize(
    ("method", "more", "steps"), [("griffin", 24, (0,)), ("dart", 66, (0, 62))]
)
def test_smollm2(smollm2, method, more, steps):
    """The first tokens of a passage about an aqueduct, then of one about a bicycle: drift."""
    model, tokenizer = smollm2
    parts = [(texts.read("aqueduct"), 120), (texts.read("bicycle"), more)]
    ids = torch.cat([torch.tensor(tokenizer(text).input_ids[:size]) for text, size in parts])
    prior = {"sequences": 4, "length": 40, "opening": 24}
    wanted = decode(model, ids, 120, method_of(model, method, 0.5, prior))
    changes = {} if method == "griffin" else {"self_stats": prior}
    for executor in ("masked", "native"):
        found = compare(model, ids, 120, method, 0.5, wanted, executor, **changes)
        assert found.holds and found.steps == steps and found.kept == 23_040 * len(steps), found
