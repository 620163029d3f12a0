"""Executor graph: whole decode steps on fixed tensors, as a CUDA graph would replay them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

from dart_llm.errors import ConfigError
from dart_llm.models.llama import step_unsupported_reason as why_not_step
from dart_llm.patching.executors import graph_step as graph_decoder
from dart_llm.patching.executors.graph_step import GRAPHS, Recorded
from dart_llm.session.run import prune
from steps import Same, apart, decode, generate, selections, shared_model
from tiny import NAMES, tiny, tokens

FAMILY = tuple(name for name in NAMES if not why_not_step(shared_model(name)))
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 3e-2}
PROMPT, DECODED = 66, 8
PRIOR = {"sequences": 2, "length": 24, "opening": 0}
REMASKS = {"drift": "interval 2", "prior": PRIOR, "sparsity": 0.5}


def _logits(name: str, dtype: torch.dtype, method: str, **settings: Any) -> Any:
    run = prune(shared_model(name, dtype), method, **settings)
    masks = selections(run)
    with run:
        logits = decode(run.model, tokens(1, PROMPT + DECODED, seed=3), PROMPT)
        taken = run.patch.slim
        assert (taken.steps if taken else 0) == (DECODED if run.executor == "graph" else 0)
    return run, masks, logits


def test_the_family() -> None:
    assert {"llama", "qwen2", "qwen3"} <= {name.split("-")[0] for name in FAMILY}


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in FAMILY), ("llama", torch.bfloat16)],
    ids=str,
)
def test_what_compact_computes(name: str, dtype: torch.dtype) -> None:
    often = {"rule": "interval 2", "min_distance": 0, "max_dense_share": None}
    settings = {**REMASKS, "drift": often, "remask": {"observe_tokens": 1}}
    if dtype == torch.bfloat16:  # rounding may change later masks
        settings = REMASKS
    _, masks, wanted = _logits(name, dtype, "dart", executor="compact", **settings)
    run, same, found = _logits(name, dtype, "dart", executor="graph", **settings)
    assert apart(found, wanted) < TOLERANCE[dtype]
    assert len(same) == len(masks) == (3 if dtype == torch.float32 else 1)
    if dtype == torch.float32:
        for ours, theirs in zip(same, masks, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours[2], theirs[2], strict=True))
    assert run.report().executor == "graph"


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_observed_tokens_and_sensitivities(name: str) -> None:
    settings = {"masking_step": 3, "sparsity": 0.5, "drift": "interval 2"}
    _, wanted, logits = _logits(name, torch.float32, "published", executor="compact", **settings)
    _, found, close = _logits(name, torch.float32, "published", executor="graph", **settings)
    assert apart(close, logits) < TOLERANCE[torch.float32]
    assert [step for step, _, _ in found] == [step for step, _, _ in wanted]
    for ours, theirs in zip(found[0][2], wanted[0][2], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_dense_steps_at_sparsity_zero(name: str) -> None:
    run, _, logits = _logits(name, torch.float32, "griffin", sparsity=0.0, executor="graph")
    dense = decode(run.model, tokens(1, PROMPT + DECODED, seed=3), PROMPT)
    assert torch.equal(logits[:, :PROMPT], dense[:, :PROMPT])
    assert apart(logits, dense) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_dense_steps_leave_no_graph_of_gradients(mode: Any) -> None:
    """They run on the model's own parameters; a graph would hold every step's tensors."""
    model = shared_model("llama")
    with prune(model, "griffin", sparsity=0.5, masking_step=9, executor="graph") as run, mode():
        output = model(tokens(1, 20), use_cache=True)
        for at in range(3):
            output = model(tokens(1, 1, seed=at), cache=output.cache)
        assert run.phase == "observe" and run.patch.steps == 3
    held = [t for layer in output.cache.layers for t in (layer.keys, layer.values)]
    assert not any(t.requires_grad for t in (output.logits, *held))


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("rows", [1, 4])
def test_generate_leaves_the_model_as_it_was(rows: int) -> None:
    model, found = shared_model("qwen2"), []
    with Same(model):
        for one in ("compact", "graph"):
            with prune(model, "griffin", sparsity=0.5, executor=one) as run:
                found.append(generate(model, tokens(rows, 20, seed=5), 100))
        assert torch.equal(found[0].sequences, found[1].sequences)
        assert run.report().decoded_tokens == rows * 99


def test_padding_is_left_to_the_model() -> None:
    model = shared_model("llama")
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :4] = 0
    found = []
    for one in ("compact", "graph"):
        with prune(model, "griffin", sparsity=0.5, executor=one) as run:
            found.append(generate(model, tokens(2, 20, seed=5), 6, attention_mask=mask))
    assert run.patch is None and torch.equal(found[0].sequences, found[1].sequences)


def test_transformers_own_compiling_of_a_static_cache_stays_correct() -> None:
    """``generate`` compiles the forward of an attached model on its own where there is a GPU."""
    model, ids = tiny("llama"), tokens(1, 20, seed=5)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    compiling = CompileConfig(backend="eager", mode=None)
    compiling._compile_all_devices = True
    found = []
    for more in ({}, {"cache_implementation": "static", "compile_config": compiling}):
        with prune(model, "griffin", sparsity=0.5, executor="compact") as run:
            found.append(generate(model, ids, 5, **more).sequences)
        assert run.report().achieved_sparsity == 0.5 and run.report().decoded_tokens == 4
    assert torch.equal(found[0], found[1])


class Replay(Recorded):
    """What a GPU does: the work runs once, and replays write into the tensors of that time."""

    made = 0

    def __init__(self, work: Any, device: torch.device) -> None:
        super().__init__(work, device)
        type(self).made += 1
        for _ in range(graph_decoder.WARM_UPS):
            work()
        self._output = work()

    def __call__(self) -> Any:
        new = self._work()
        for old, fresh in zip(_tensors(self._output), _tensors(new), strict=True):
            old.copy_(fresh)
        return self._output


def _tensors(output: Any) -> list[Tensor]:
    return [output.logits, output.hidden, *(t for layer in output.observed for t in layer)]


def test_a_replay_may_write_again_what_was_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, states and observed activations of a step outlast the next one; few recordings."""
    monkeypatch.setattr(graph_decoder, "Recorded", Replay)
    monkeypatch.setattr(Replay, "made", 0)
    settings = {**REMASKS, "masking_step": 3}
    _, masks, wanted = _logits("llama", torch.float32, "dart", executor="compact", **settings)
    _, same, found = _logits("llama", torch.float32, "dart", executor="graph", **settings)
    assert apart(found, wanted) < TOLERANCE[torch.float32]
    for ours, theirs in zip(same, masks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[2], theirs[2], strict=True))
    # observing and pruned; a re-mask with the same counts refills the buffers that were recorded
    assert 2 <= Replay.made <= GRAPHS


def test_a_remask_with_the_same_counts_needs_no_new_recording(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graph_decoder, "Recorded", Replay)
    monkeypatch.setattr(Replay, "made", 0)
    settings = {"sparsity": 0.5, "drift": "interval 2", "remask": {"observe_tokens": 1}}
    _, masks, _ = _logits("llama", torch.float32, "griffin", executor="graph", **settings)
    assert len(masks) == 3 and Replay.made == 2


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi"])
def test_other_families_are_refused_with_a_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match=r'"graph" cannot run .*; use "compact"'):
        prune(tiny(name), "griffin", sparsity=0.5, executor="graph")


def test_auto_never_takes_it() -> None:
    assert prune(shared_model("llama"), "griffin", sparsity=0.5).executor != "graph"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="recording a graph needs a GPU")
def test_recorded_on_a_gpu() -> None:
    model = tiny("llama").to("cuda")
    ids = tokens(1, 20, seed=5).to("cuda")
    found = []
    for one in ("compact", "graph"):
        with prune(model, "dart", executor=one, **REMASKS):
            found.append(generate(model, ids, 24).sequences)
    assert torch.equal(found[0], found[1])
