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
    model, outputs = shared_model(name), []
    attention = getattr(decoder_layers(model)[-1], ATTENTION.get(name.split("-")[0], "self_attn"))
    with Recorder(model) as recorder:
        keep = lambda m, a, out: outputs.append(tensor_of(out).clone())  # noqa: E731
        recorder.handles.append(attention.register_forward_hook(keep))
        decode(model, IDS, PROMPT)
    settings = {**EVIDENCE, "score": "magnitude", "compensation": True, "drift": "published"}
    with prune(model, "griffin", budget="depth", **settings) as run:
        decode(model, IDS, PROMPT)
    state = state_of(run)
    for index, layer in enumerate(state.evidence):
        u, z = (recorder.get(index, what) for what in ("u", "z"))
        x = stream(recorder, name, index)
        wanted = {
            "score": u.square().sum(0),
            "signed": u.sum(0),
            "cosine": cosine_similarity(x, z, dim=-1).sum(),
            "change": ((z - x).norm(dim=-1) / x.norm(dim=-1)).sum(),
        }
        assert layer.sums.keys() == wanted.keys()
        for key, value in wanted.items():
            total = layer.sums[key].total.double()
            torch.testing.assert_close(total, value, rtol=1e-4, atol=1e-4)
            assert float(layer.sums[key].weight) == LENGTH, key
    v, detector = torch.cat(outputs, 1)[0].double(), state.detector
    if name == "bloom":  # its attention adds the residual itself
        v = v - recorder.get(LAYERS - 1, "input")
    v = v[SINKS:]
    torch.testing.assert_close(detector.total[0].double(), v.sum(0), rtol=1e-4, atol=1e-4)
    assert float(detector.tokens[0]) == len(v)
    for window, wanted in zip(detector.windows, v.split(5)[: len(v) // 5], strict=True):
        torch.testing.assert_close(window[0].double(), wanted.mean(0), rtol=1e-4, atol=1e-5)
