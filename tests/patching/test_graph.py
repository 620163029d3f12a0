"""Executor graph: whole decode steps on fixed tensors, as a CUDA graph would replay them."""

import pytest
import torch
from transformers import CompileConfig

from dart_llm.errors import ConfigError
from dart_llm.patching.executors import graph_step as graph_decoder
from dart_llm.patching.executors.graph_step import GRAPHS
from dart_llm.session.run import prune
from replays import Replay
from steps import apart, decode, generate, selections, shared_model
from tiny import tiny, tokens

PROMPT, DECODED = 66, 8
PRIOR = {"sequences": 2, "length": 24, "opening": 0}
REMASKS = {"drift": "interval 2", "self_stats": PRIOR, "sparsity": 0.5}


def _logits(method, executor, **settings):
    run = prune(shared_model(), method, executor=executor, **settings)
    masks = selections(run)
    with run:
        logits = decode(run.model, tokens(1, PROMPT + DECODED, seed=3), PROMPT)
        assert executor != "graph" or run.patch.steps == DECODED
    return masks, logits


def test_transformers_own_compiling_of_a_static_cache_stays_correct():
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


def test_a_replay_may_write_again_what_was_returned(monkeypatch):
    """Logits, states and observed activations of a step outlast the next one; few recordings."""
    monkeypatch.setattr(graph_decoder, "Recorded", Replay)
    monkeypatch.setattr(Replay, "made", 0)
    settings = {**REMASKS, "masking_step": 3}
    masks, wanted = _logits("dart", "compact", **settings)
    same, found = _logits("dart", "graph", **settings)
    assert apart(found, wanted) < 5e-6
    for ours, theirs in zip(same, masks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[2], theirs[2], strict=True))
    assert 2 <= Replay.made <= GRAPHS
    # observing and pruned; a re-mask with the same counts refills the buffers that were recorded
    monkeypatch.setattr(Replay, "made", 0)
    settings = {"sparsity": 0.5, "drift": "interval 2", "remask": {"observe_tokens": 1}}
    masks, _ = _logits("griffin", "graph", **settings)
    assert len(masks) == 3 and Replay.made == 2


def test_other_families_are_refused_and_auto_never_takes_it():
    for name in ("bloom", "gemma2", "phi"):
        with pytest.raises(ConfigError, match=r'"graph" cannot run .*; use "compact"'):
            prune(tiny(name), "griffin", sparsity=0.5, executor="graph")
    assert prune(shared_model("llama"), "griffin", sparsity=0.5).executor != "graph"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="recording a graph needs a GPU")
def test_recorded_on_a_gpu():
    model = tiny("llama").to("cuda")
    ids = tokens(1, 20, seed=5).to("cuda")
    found = []
    for one in ("compact", "graph"):
        with prune(model, "dart", executor=one, **REMASKS):
            found.append(generate(model, ids, 24).sequences)
    assert torch.equal(found[0], found[1])
