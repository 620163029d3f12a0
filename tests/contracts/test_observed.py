"""What is observed is what the modules saw: u, z, x, r and v against hooks of our own."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from dart_llm.pruning.drift import SINKS
from dart_llm.pruning.observations import sampled_tokens
from dart_llm.session.run import prune
from observed_cases import Recorder, decoder_layers, stream, tensor_of
from steps import EVIDENCE, decode, shared_model, state_of
from tiny import LAYERS, NAMES, tokens

ATTENTION = {"gpt2": "attn", "gpt_neox": "attention"}
ATTENTION |= {"falcon": "self_attention", "bloom": "self_attention"}
PROMPT, LENGTH = 9, 30
IDS = tokens(1, LENGTH, seed=6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_observed(name):
    """Prompt and decode tokens, in all statistics that exist, and what the last attention gives."""
    model = shared_model(name)
    found, states = [], []
    attention = getattr(decoder_layers(model)[-1], ATTENTION.get(name.split("-")[0], "self_attn"))
    with Recorder(model) as recorder:
        recorder.handles.append(
            attention.register_forward_hook(lambda m, a, out: found.append(tensor_of(out).clone()))
        )
        decode(model, IDS, PROMPT)
    for budget in ("blend depth depth-residual", "global"):
        settings = {**EVIDENCE, "score": "magnitude", "compensation": True, "drift": "published"}
        with prune(model, "griffin", budget=budget, **settings) as run:
            decode(model, IDS, PROMPT)
        states.append(state_of(run))
    for index, layers in enumerate(zip(*(state.evidence for state in states), strict=True)):
        sums = {key: known for layer in layers for key, known in layer.sums.items()}
        _check_sums(sums, recorder, name, index)
    v = torch.cat(found, 1)[0].double()
    if name == "bloom":  # its attention adds the residual itself
        v = v - recorder.get(LAYERS - 1, "input")
    _check_detector(states[0].detector, v)


def _check_sums(sums, recorder, name, index):
    u, z, r = (recorder.get(index, what) for what in ("u", "z", "r"))
    x = stream(recorder, name, index)
    size = x.norm(dim=-1)
    every = {"score": u.square().sum(0), "signed": u.sum(0), "squares": u.square().sum(0)}
    read = [t < PROMPT or bool(sampled_tokens([t - PROMPT], 1)) for t in range(LENGTH)]
    x, z, r, size = (t[torch.tensor(read)] for t in (x, z, r, size))
    wanted = every | {
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
        assert float(sums[key].weight) == (LENGTH if key in every else sum(read)), key


def _check_detector(detector, v):
    """v [T, D] is what the last layer's attention returned; sinks are left out."""
    detector.catch_up()
    torch.testing.assert_close(detector.total[0].double(), v[SINKS:].sum(0), rtol=1e-4, atol=1e-4)
    assert float(detector.tokens[0]) == LENGTH - SINKS
    windows = v[SINKS:].split(5)[: (LENGTH - SINKS) // 5]
    for mine, wanted in zip(detector.windows, windows, strict=True):
        torch.testing.assert_close(mine[0].double(), wanted.mean(0), rtol=1e-4, atol=1e-5)
