"""What is observed is what the modules saw: u, z, x, r and v against hooks of our own."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from dart_llm.pruning.drift import SINKS
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
    found = []
    attention = getattr(decoder_layers(model)[-1], ATTENTION.get(name.split("-")[0], "self_attn"))
    with Recorder(model) as recorder:
        recorder.handles.append(
            attention.register_forward_hook(lambda m, a, out: found.append(tensor_of(out).clone()))
        )
        decode(model, IDS, PROMPT)
    settings = {**EVIDENCE, "score": "magnitude", "compensation": True, "drift": "published"}
    with prune(model, "griffin", budget="depth", **settings) as run:
        decode(model, IDS, PROMPT)
    state = state_of(run)
    for index, layer in enumerate(state.evidence):
        _check_sums(layer.sums, recorder, name, index)
    v = torch.cat(found, 1)[0].double()
    if name == "bloom":  # its attention adds the residual itself
        v = v - recorder.get(LAYERS - 1, "input")
    _check_detector(state.detector, v)


def _check_sums(sums, recorder, name, index):
    u, z = (recorder.get(index, what) for what in ("u", "z"))
    x = stream(recorder, name, index)
    size = x.norm(dim=-1)
    wanted = {
        "score": u.square().sum(0),
        "signed": u.sum(0),
        "cosine": cosine_similarity(x, z, dim=-1).sum(),
        "change": ((z - x).norm(dim=-1) / size).sum(),
    }
    assert sums.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(sums[key].total.double(), value, rtol=1e-4, atol=1e-4)
        assert float(sums[key].weight) == LENGTH, key


def _check_detector(detector, v):
    """v [T, D] is what the last layer's attention returned; sinks are left out."""
    torch.testing.assert_close(detector.total[0].double(), v[SINKS:].sum(0), rtol=1e-4, atol=1e-4)
    assert float(detector.tokens[0]) == LENGTH - SINKS
    windows = v[SINKS:].split(5)[: (LENGTH - SINKS) // 5]
    for mine, wanted in zip(detector.windows, windows, strict=True):
        torch.testing.assert_close(mine[0].double(), wanted.mean(0), rtol=1e-4, atol=1e-5)
