"""What is observed is what the modules saw: u, z, x, r and v against hooks of our own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dart_llm.pruning.drift import SINKS
from dart_llm.pruning.observations import sampled_tokens as read_tokens
from dart_llm.session.run import prune
from observed_cases import Recorder, _tensor, decoder_layers, stream
from steps import decode, shared_model, state_of
from tiny import NAMES, tokens

ATTENTION = {"gpt2": "attn", "gpt_neox": "attention", "falcon": "self_attention"}
ATTENTION["bloom"] = "self_attention"

PROMPT, LENGTH = 9, 30


@pytest.mark.parametrize("name", NAMES)
def test_sums(name: str) -> None:
    """Prompt and decode tokens, in all statistics that exist."""
    model, ids = shared_model(name), tokens(1, LENGTH, seed=6)
    recorder = Recorder(model)
    if name == "opt-postnorm":
        for index, layer in enumerate(decoder_layers(model)):
            recorder._before(layer.fc1, index, "fc1")
    try:
        decode(model, ids, PROMPT)
    finally:
        for handle in recorder.handles:
            handle.remove()
    found = []
    for budget in ("blend depth depth-residual", "global"):
        settings = {"budget": budget, "sparsity": 0.5, "masking_step": 1000}
        with prune(model, "griffin", score="magnitude", compensation=True, **settings) as run:
            decode(model, ids, PROMPT)
        found.append(state_of(run).evidence)
    for index, layers in enumerate(zip(*found, strict=True)):
        sums = {key: known for layer in layers for key, known in layer.sums.items()}
        u, z, r = (recorder.get(index, what) for what in ("u", "z", "r"))
        x = stream(recorder, name, index)
        size = x.norm(dim=-1)
        wanted = {
            "score": u.square().sum(0),
            "signed": u.sum(0),
            "squares": u.square().sum(0),
        }
        read = [t < PROMPT or bool(read_tokens([t - PROMPT], 1)) for t in range(LENGTH)]
        x, z, r, size = (t[torch.tensor(read)] for t in (x, z, r, size))
        wanted |= {
            "cosine": cosine_similarity(x, z, dim=-1).sum(),
            "change": ((z - x).norm(dim=-1) / size).sum(),
            "cosine-residual": cosine_similarity(x, x + r, dim=-1).sum(),
            "change-residual": (r.norm(dim=-1) / size).sum(),
            "gain": (r.square().sum(-1) / z.square().sum(-1)).sum(),
            "stream": size.square().sum(),
        }
        assert sums.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(sums[key].total.double(), value, rtol=1e-4, atol=1e-4)
            every = key in ("score", "signed", "squares")
            assert float(sums[key].weight) == (LENGTH if every else sum(read)), key


@pytest.mark.parametrize("name", NAMES)
def test_attention_output(name: str) -> None:
    """v is what the last layer's attention returns; sinks are left out."""
    model, ids = shared_model(name), tokens(1, LENGTH, seed=6)
    last = decoder_layers(model)[-1]
    attention = getattr(last, ATTENTION.get(name.split("-")[0], "self_attn"))
    seen: list[Tensor] = []
    handle = attention.register_forward_hook(lambda m, a, out: seen.append(_tensor(out).clone()))
    residual: list[Tensor] = []
    handle_in = last.register_forward_pre_hook(
        lambda m, a, k: residual.append((a[0] if a else k["hidden_states"]).clone()),
        with_kwargs=True,
    )
    settings = {"sparsity": 0.5, "masking_step": 1000, "drift": "published"}
    with prune(model, "griffin", **settings) as run:
        decode(model, ids, PROMPT)
    handle.remove()
    handle_in.remove()
    v = torch.cat(seen, 1)[0].double()
    if name == "bloom":  # its attention adds the residual itself
        v = v - torch.cat(residual, 1)[0].double()
    detector = state_of(run).detector
    detector.catch_up()
    torch.testing.assert_close(detector.total[0].double(), v[SINKS:].sum(0), rtol=1e-4, atol=1e-4)
    assert float(detector.tokens[0]) == LENGTH - SINKS
    windows = v[SINKS:].split(5)[: (LENGTH - SINKS) // 5]
    for mine, wanted in zip(detector.windows, windows, strict=True):
        torch.testing.assert_close(mine[0].double(), wanted.mean(0), rtol=1e-4, atol=1e-5)
