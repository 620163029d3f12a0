"""Assisted decoding: tokens that are rolled back leave no trace, and change no text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dart_llm.errors import AttachError, ConfigError
from dart_llm.session.run import prune
from steps import (
    EVIDENCE,
    Forced,
    forward_lengths,
    generate,
    same_sums,
    shared_model,
    state_of,
    sums_of,
)
from tiny import tiny, tokens


@pytest.mark.contract("same report whatever the batch")
@pytest.mark.parametrize(
    ("name", "executor"), [("llama", "auto"), ("gemma2", "masked"), ("gpt2", "auto")]
)
def test_prompt_lookup_equals_greedy(name: str, executor: str) -> None:
    """All draft tokens, kept or not, run under the same masks: the text must not change."""
    model = shared_model(name)
    ids = torch.arange(3, 40)[None]  # no n-gram twice: the first forward carries no candidates
    settings = {"sparsity": 0.5, "executor": executor}
    with prune(model, "griffin", **settings) as run:
        wanted = generate(model, ids, 60)
    masks = run.masks()
    out: Any = None

    def body() -> None:
        nonlocal run, out
        with prune(model, "griffin", **settings) as run:
            out = generate(model, ids, 60, prompt_lookup_num_tokens=3)

    lengths = forward_lengths(model, body)
    assert torch.equal(out.sequences, wanted.sequences)
    assert all(torch.equal(run.masks()[layer], kept) for layer, kept in masks.items())
    assert max(lengths[1:]) > 1, "candidates were tried"
    report = run.report()
    assert sum(lengths) - 37 >= report.decoded_tokens == 59
    assert report.dense_token_share == 0 and report.achieved_sparsity == 0.5


def _assistant(model: Any, noise: float) -> Any:
    other = tiny("llama")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.mark.parametrize(("noise", "new"), [(0.0, 20), (0.02, 21), (0.02, 22), (0.08, 23)])
def test_assistant_model_equals_greedy(noise: float, new: int) -> None:
    """Static masks do not depend on what was seen, so the text can be compared exactly.

    Candidates of the first forward ride along with the prompt and run dense; the reference keeps
    as many tokens dense.
    """
    model, ids = shared_model(), tokens(1, 24)
    out: Any = None
    run: Any = None

    def body() -> None:
        nonlocal run, out
        with prune(model, "static", sparsity=0.3) as run:
            out = generate(model, ids, new, assistant_model=_assistant(model, noise))

    lengths = forward_lengths(model, body)
    report = run.report()
    assert report.decoded_tokens == new - 1, "tokens that were rolled back do not count"
    assert report.prompt_tokens == 24
    dense = round(report.dense_token_share * report.decoded_tokens)
    assert sum(lengths) - 24 > new - 1, "some candidates were refused"
    with prune(model, "static", sparsity=0.3, masking_step=dense) as reference:
        wanted = generate(model, ids, new)
    assert torch.equal(out.sequences, wanted.sequences)
    assert reference.report().achieved_sparsity == pytest.approx(report.achieved_sparsity)


@pytest.mark.parametrize("new", [1, 3, 30])
def test_refused_candidates_never_enter_the_evidence(new: int) -> None:
    model, ids = shared_model(), torch.arange(3, 40)[None]
    with prune(model, "griffin", **EVIDENCE) as run:
        wanted = generate(model, ids, new)
    sums, tokens_seen = sums_of(run), state_of(run).evidence_tokens
    with prune(model, "griffin", **EVIDENCE) as run:
        out = generate(model, ids, new, prompt_lookup_num_tokens=3)
    assert torch.equal(out.sequences, wanted.sequences)
    assert run.report().decoded_tokens == new - 1
    assert state_of(run).evidence_tokens == tokens_seen == 37 + new - 1
    assert same_sums(sums_of(run), sums)


@pytest.mark.parametrize("end", [0, 1, 5])
def test_generation_that_ends_with_refused_candidates(end: int) -> None:
    """No forward follows to show that the candidates went, least of all after the prompt."""
    model, ids = shared_model(), tokens(1, 12, seed=6).repeat(1, 3)
    rows = [[*range(10, 10 + end), 2]]
    settings = {"eos_token_id": 2, "prompt_lookup_num_tokens": 3}

    def body() -> None:
        nonlocal out, run
        with prune(model, "griffin", sparsity=0.5) as run:
            forced = [Forced(36, rows)]
            out = generate(model, ids, 20, logits_processor=forced, **settings)

    out: Any = None
    run: Any = None
    lengths = forward_lengths(model, body)
    assert out.sequences[0, 36:].tolist() == rows[0]
    assert lengths[0] == 39, "three candidates ride along with the prompt"
    assert (run.report().prompt_tokens, run.report().decoded_tokens) == (36, end)
    assert run.report().dense_token_share == 0


def test_reports_between_the_forwards_of_an_assisted_generation() -> None:
    """Looking at a run must not change it, not even before a roll-back."""
    model, ids = shared_model(), torch.arange(3, 40)[None]

    class Look:
        def put(self, value: Tensor) -> None:
            seen.append(run.report().decoded_tokens)
            seen.append(run.drift_checks)
            with pytest.raises(AttachError, match="generate is running"):
                run.tokens_until_change()

        def end(self) -> None:
            pass

    found, seen = [], []
    for streamer in (None, Look()):
        with prune(model, "griffin", **EVIDENCE) as run:
            generate(model, ids, 30, prompt_lookup_num_tokens=3, streamer=streamer)
        found.append((run.report().decoded_tokens, sums_of(run)))
    assert found[0][0] == found[1][0] == 29 and len(seen) > 10
    assert same_sums(found[0][1], found[1][1])


def test_a_model_cannot_assist_itself() -> None:
    model = shared_model()
    with prune(model, "griffin", sparsity=0.5):
        with pytest.raises(ConfigError, match="assistant_early_exit"):
            generate(model, tokens(), 6, assistant_early_exit=2)
        with pytest.raises(ConfigError, match="own assistant"):
            generate(model, tokens(), 6, assistant_model=model)
        generate(model, tokens(), 6)
