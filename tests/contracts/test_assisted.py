"""Assisted decoding: tokens that are rolled back leave no trace, and change no text."""

from types import SimpleNamespace

import pytest
import torch

from dart_llm.errors import AttachError, ConfigError
from dart_llm.session.run import prune
from steps import (
    EVIDENCE,
    HALF,
    Forced,
    forward_lengths,
    generate,
    same_masks,
    same_sums,
    shared_model,
    state_of,
    sums_of,
    written,
)
from tiny import tiny, tokens

pytestmark = pytest.mark.contract("same report whatever the batch")

IDS = torch.arange(3, 40)[None]
"""No n-gram twice: the first forward carries no candidates."""
LOOKUP = {"prompt_lookup_num_tokens": 3}


def watched(*arguments, **how):
    """The lengths of the forwards of ``written``, its run and what it gave."""
    found = []
    lengths = forward_lengths(arguments[0], lambda: found.extend(written(*arguments, **how)))
    return lengths, *found


@pytest.mark.parametrize(
    ("name", "executor"), [("llama", "auto"), ("gemma2", "masked"), ("gpt2", "auto")]
)
def test_prompt_lookup_equals_greedy(name, executor):
    """All draft tokens, kept or not, run under the same masks: the text must not change."""
    model, settings = shared_model(name), {"executor": executor}
    one, wanted = written(model, IDS, 60, settings)
    lengths, run, out = watched(model, IDS, 60, settings, **LOOKUP)
    assert torch.equal(out.sequences, wanted.sequences)
    assert max(lengths[1:]) > 1, "candidates were tried"
    report = run.report()
    assert sum(lengths) - 37 >= report.decoded_tokens == 59
    assert report.dense_token_share == 0 and report.achieved_sparsity == 0.5
    assert same_masks(run.masks(), one.masks())


def _assistant(noise):
    other, generator = tiny("llama"), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.mark.parametrize(("noise", "new"), [(0.0, 20), (0.02, 21), (0.08, 23)])
def test_assistant_model_equals_greedy(noise, new):
    """Static masks do not depend on what was seen, so the text can be compared exactly.

    Candidates of the first forward ride along with the prompt and run dense; the reference keeps
    as many tokens dense.
    """
    model, ids, settings = shared_model(), tokens(1, 24), {"method": "static", "sparsity": 0.3}
    lengths, run, out = watched(model, ids, new, settings, assistant_model=_assistant(noise))
    report = run.report()
    assert report.decoded_tokens == new - 1, "tokens that were rolled back do not count"
    assert report.prompt_tokens == 24
    assert sum(lengths) - 24 > new - 1, "some candidates were refused"
    dense = round(report.dense_token_share * report.decoded_tokens)
    reference, wanted = written(model, ids, new, {**settings, "masking_step": dense})
    assert torch.equal(out.sequences, wanted.sequences)
    assert reference.report().achieved_sparsity == pytest.approx(report.achieved_sparsity)


@pytest.mark.parametrize("new", [1, 3, 30])
def test_refused_candidates_never_enter_the_evidence(new):
    """Nor does looking at a run change it, not even before a roll-back."""
    model, seen = shared_model(), []

    def look(value):
        seen.append(run.report().decoded_tokens)
        assert run.drift_checks == ()
        with pytest.raises(AttachError, match="generate is running"):
            run.tokens_until_change()

    one, wanted = written(model, IDS, new, EVIDENCE)
    for streamer in (None, SimpleNamespace(put=look, end=lambda: None)):
        with prune(model, **{**HALF, **EVIDENCE}) as run:
            out = generate(model, IDS, new, streamer=streamer, **LOOKUP)
        assert torch.equal(out.sequences, wanted.sequences)
        assert run.report().decoded_tokens == new - 1
        assert state_of(run).evidence_tokens == state_of(one).evidence_tokens == 37 + new - 1
        assert same_sums(sums_of(run), sums_of(one))
    assert len(seen) >= new / 3


@pytest.mark.parametrize("end", [0, 1, 5])
def test_generation_that_ends_with_refused_candidates(end):
    """No forward follows to show that the candidates went, least of all after the prompt."""
    ids, rows = tokens(1, 12, seed=6).repeat(1, 3), [[*range(10, 10 + end), 2]]
    how = {"eos_token_id": 2, "logits_processor": [Forced(36, rows)], **LOOKUP}
    lengths, run, out = watched(shared_model(), ids, 20, **how)
    assert out.sequences[0, 36:].tolist() == rows[0]
    assert lengths[0] == 39, "three candidates ride along with the prompt"
    assert (run.report().prompt_tokens, run.report().decoded_tokens) == (36, end)
    assert run.report().dense_token_share == 0


def test_a_model_cannot_assist_itself():
    model = shared_model()
    with prune(model, **HALF):
        for how, words in (
            ({"assistant_early_exit": 2}, "assistant_early_exit"),
            ({"assistant_model": model}, "own assistant"),
        ):
            with pytest.raises(ConfigError, match=words):
                generate(model, tokens(), 6, **how)
        generate(model, tokens(), 6)
