"""Signals: what is recorded equals what the model computes, and how distributions compare."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dart_llm.errors import DartError, UnsupportedModel
from dart_llm.pruning.drift import SINKS, cosine
from dart_llm.session.run import prune
from dart_llm.studies.drift.settings import SIGNALS
from dart_llm.studies.drift.signals import (
    record,
    shannon,
)
from steps import Same, decode, shared_model
from tiny import NAMES, tiny, tokens

PROMPT, LENGTH = 32, 60


def test_similarity_of_distributions_by_hand():
    for p, q, want in (
        ([0.5, 0.5], [0.5, 0.5], 1.0),
        ([1.0, 0.0], [0.0, 1.0], 0.0),
        # middle (3/4, 1/4): KL = log2(4/3) and (log2(2/3) + log2 2) / 2
        ([1.0, 0.0], [0.5, 0.5], 1 - (math.log2(4 / 3) + (math.log2(2 / 3) + 1) / 2) / 2),
        ([2.0, 2.0], [0.1, 0.1], 1.0),  # only the shape counts
        ([0.0, 0.0], [0.5, 0.5], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
    ):
        assert float(shannon(torch.tensor(p), torch.tensor(q))) == pytest.approx(want, abs=1e-6)


def eager(name="llama"):
    model = tiny(name)
    if "falcon" in name:  # chooses when it is loaded, or by its configuration
        model.config._attn_implementation = "eager"
    else:
        model.set_attn_implementation("eager")
    return model


def direct(model, ids, layer):
    """v of one layer by a hook of our own on the projection that ends the attention."""
    found = []
    ends = ("o_proj", "dense", "out_proj", "c_proj")
    modules = [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ends and f".{layer}." in name and "mlp" not in name
    ]
    ((_, module),) = modules
    handle = module.register_forward_hook(lambda m, a, output: found.append(output.clone()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return found[0].reshape(ids.shape[1], -1).float()


@pytest.mark.parametrize("name", NAMES)
def test_recorded_signals_are_what_the_model_computes(name):
    model, ids = eager(name), tokens(1, LENGTH, seed=3)
    with Same(model):
        found = record(model, ids[0], PROMPT, tuple(SIGNALS))
    assert list(found) == list(SIGNALS)
    with torch.no_grad():
        output = model(ids, output_attentions=True, output_hidden_states=True)
        logits = model.get_output_embeddings()(found["hidden"].values)
    last = direct(model, ids, 3)
    assert torch.allclose(found["attention"].values, last, atol=1e-5)
    upper = direct(model, ids, 2)
    assert torch.allclose(found["attention-80"].values, upper, atol=1e-5)  # round(0.8 * 3) = 2
    both = torch.cat([normalize(upper, dim=-1), normalize(last, dim=-1)], -1)
    assert torch.allclose(found["attention-several"].values, both, atol=1e-5)
    if name != "opt-postnorm":
        assert torch.allclose(found["hidden"].values, output.hidden_states[-1][0], atol=1e-5)
    if name not in ("gemma2", "gemma3"):  # these bend the logits afterwards
        assert torch.allclose(logits, output.logits[0], atol=1e-4)
    weights = output.attentions[-1][0].mean(0)[:, SINKS : PROMPT // 2]
    scores = found["attention-scores"]
    late = weights[PROMPT // 2 :]
    shares = (late / late.sum(-1, True)).nan_to_num()  # a window may see none of these positions
    assert torch.allclose(scores.values[PROMPT // 2 :], shares, atol=1e-5)
    assert scores.values.shape == (LENGTH, PROMPT // 2 - SINKS)
    assert (scores.first, scores.compare) == (18, shannon)  # 32 / 2 + 32 / 16


def test_scores_need_eager_attention_and_all_signals_finite_numbers():
    model, ids = tiny("llama"), tokens(1, LENGTH)[0]
    model.set_attn_implementation("sdpa")
    record(model, ids, PROMPT, ("attention", "hidden"))
    with pytest.raises(UnsupportedModel, match="leave the signal attention-scores out"):
        record(model, ids, PROMPT, ("attention-scores",))
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight[0, 0] = torch.inf
    with pytest.raises(DartError, match="the signal attention is not finite"):
        record(model, ids, PROMPT, ("attention",))


@pytest.mark.parametrize("name", NAMES)
def test_the_detector_sees_the_last_hidden_state(name):
    """What the head of the model is given: of the prompt, dense, then of the pruned tokens."""
    model, ids, seen = shared_model(name), tokens(1, PROMPT + 10), list[Tensor]()
    head = model.get_output_embeddings()
    drift = {"rule": "published", "signal": "hidden"}
    with prune(model, "griffin", sparsity=0.5, drift=drift) as run:
        handle = head.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].detach()))
        decode(model, ids, PROMPT)
        handle.remove()
    v = torch.cat(seen).float()
    assert len(v) == PROMPT + 10
    first, *_ = run.drift_checks
    assert first.step == 5 and first.threshold is not None
    centroid, window = v[SINKS:PROMPT].mean(0), v[PROMPT : PROMPT + 5].mean(0)
    assert first.similarity == pytest.approx(float(cosine(window, centroid)), abs=1e-5)
    with prune(model, "griffin", sparsity=0.5, drift="published") as plain:
        decode(model, ids, PROMPT)
    assert abs(plain.drift_checks[0].similarity - first.similarity) > 1e-3
