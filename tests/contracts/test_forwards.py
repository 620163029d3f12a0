"""What counts as prompt and what as decode, for every way a model can be driven."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dart_llm.errors import ConfigError
from dart_llm.session.run import prune
from prior_cases import CONFIG
from steps import (
    CACHE,
    EVIDENCE,
    apart,
    decode,
    forward_lengths,
    generate,
    new_cache,
    same_masks,
    selections,
    shared_model,
    step,
)
from tiny import tokens


def test_one_token_prompt() -> None:
    model, one = shared_model(), torch.tensor([[7]])
    with prune(model, "griffin", sparsity=0.5) as run:
        generate(model, one, 6)
    report = run.report()
    assert (report.prompt_tokens, report.decoded_tokens) == (1, 5)
    assert report.achieved_sparsity == 0.5 and report.sequences[0].remasks[0].step == 0
    with prune(model, "dart", sparsity=0.5) as run:
        generate(model, one, 80)
    report = run.report()
    assert report.sequences[0].remasks[0].step == 15, "16 tokens of evidence: the prompt and 15"
    assert report.decoded_tokens == 79
    assert report.dense_token_share == pytest.approx(15 / 79)
    assert report.achieved_sparsity == pytest.approx(0.5 * 64 / 79)
    with prune(model, "griffin", sparsity=0.5) as run:
        decode(model, tokens(1, 6), 1)
    assert run.report().decoded_tokens == 5


def test_no_prompt_at_all() -> None:
    model = shared_model()
    with prune(model, "griffin", sparsity=0.5) as run:
        model.generate(max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert (run.report().prompt_tokens, run.report().decoded_tokens) == (1, 4)


@pytest.mark.parametrize(
    ("name", "chunk"),
    [("llama", 7), ("llama", 1), ("llama", 8), ("gemma2", 3), ("gpt2", 3), ("falcon", 7)],
)
def test_chunked_prefill(name: str, chunk: int) -> None:
    model, ids = shared_model(name), tokens(1, 8)
    with prune(model, "griffin", sparsity=0.5) as run:
        whole = generate(model, ids, 4)
    wanted = run.masks()

    def body() -> None:
        nonlocal run, out
        with prune(model, "griffin", sparsity=0.5) as run:
            out = generate(model, ids, 4, prefill_chunk_size=chunk)

    out: Any = None
    lengths = forward_lengths(model, body)
    assert lengths[-3:] == [1, 1, 1] and sum(lengths) == 11 and lengths[0] == chunk
    report = run.report()
    assert (report.prompt_tokens, report.decoded_tokens) == (8, 3)
    assert report.achieved_sparsity == 0.5 and report.remasks == 0
    assert report.sequences[0].remasks[0].evidence_tokens == 8
    assert all(torch.equal(run.masks()[layer], kept) for layer, kept in wanted.items())
    assert apart(out.logits, whole.logits) < 1e-5


def test_two_prompts_in_one_block() -> None:
    model, first, second = shared_model(), tokens(1, 20), tokens(1, 9, seed=4)
    alone = []
    for ids, new in ((first, 6), (second, 11)):
        with prune(model, "griffin", sparsity=0.5) as run:
            out = generate(model, ids, new)
        alone.append((out, run.masks()))
    with prune(model, "griffin", sparsity=0.5) as run:
        masks = selections(run)
        both = [generate(model, first, 6), generate(model, second, 11)]
    report = run.report()
    assert [s.prompt_tokens for s in report.sequences] == [20, 9]
    assert [s.decoded_tokens for s in report.sequences] == [5, 10]
    assert [s.sequence for s in report.sequences] == [0, 1]
    assert (report.prompt_tokens, report.decoded_tokens) == (29, 15)
    assert report.remasks == 0 and report.remask_causes == {"first": 2}
    for (out, kept), got, (_, _, found) in zip(alone, both, masks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(out.logits, got.logits, strict=True))
        assert same_masks(list(kept.values()), found)
    run.reset()
    assert run.report().sequences == () and run.report().decoded_tokens == 0


def test_second_turn_with_a_cache() -> None:
    model, first, more = shared_model(), tokens(1, 20), tokens(1, 9, seed=4)
    with prune(model, "griffin", **EVIDENCE) as run:
        out = generate(model, first, 6)
        turn = torch.cat([out.sequences, more], 1)
        generate(model, turn, 5, **{CACHE: out.past_key_values})
    report = run.report()
    assert len(report.sequences) == 1
    assert report.prompt_tokens == 20 + 1 + 9, "the last token of turn one is fed in turn two"
    assert report.decoded_tokens == 5 + 4
    with prune(model, "griffin", sparsity=0.5) as run:
        out = generate(model, first, 6)
        turn = torch.cat([out.sequences, more], 1)
        cache = out.past_key_values
        dense = forward_lengths(model, lambda: generate(model, turn, 5, **{CACHE: cache}))
    assert dense == [10, 1, 1, 1, 1]
    masks = run.report().sequences[0].remasks
    assert [(m.cause, m.step, m.evidence_tokens) for m in masks] == [
        ("first", 0, 20.0),
        ("prompt", 5, 30.0),
    ]
    assert run.report().achieved_sparsity == 0.5


def test_bare_forwards() -> None:
    model, ids = shared_model(), tokens(1, 30)
    with prune(model, "griffin", sparsity=0.5) as run:
        cache = new_cache(model)
        phases = []
        for size in (10, 5, 1, 1, 4, 1):
            at = cache.get_seq_length()
            step(model, ids[:, at : at + size], cache)
            phases.append(run.phase)
        assert phases == ["prefill", "prefill", "pruned", "pruned", "prefill", "pruned"]
        with run.decoding():
            step(model, ids[:, 22:27], cache)
        assert run.phase == "pruned"
        step(model, ids[:, 27:29], cache)
        assert run.phase == "prefill"
    report = run.report()
    assert (report.prompt_tokens, report.decoded_tokens) == (21, 8)
    assert report.dense_token_share == 0


def test_forward_without_a_cache_is_a_prompt() -> None:
    model, ids = shared_model(), tokens(3, 10)
    dense = model(ids).logits
    with prune(model, "griffin", sparsity=0.5) as run:
        assert torch.equal(model(ids).logits, dense)
        assert torch.equal(model(ids, use_cache=False).logits, dense)
        assert torch.equal(model(input_ids=ids, return_dict=False)[0], dense)
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, dense)
        with pytest.raises(ConfigError, match="input_ids"):
            model()
    assert len(run.report().sequences) == 4
    assert run.report().prompt_tokens == 120 and run.report().decoded_tokens == 0


def test_a_cache_that_was_cut_back() -> None:
    """Continuations of one prompt: the caller crops the cache between them."""
    model, ids = shared_model(), tokens(1, 20)
    with prune(model, "griffin", sparsity=0.5) as run, run.decoding():
        cache = new_cache(model)
        step(model, ids, cache)
        found = []
        for seed in (1, 2, 1):
            found.append(step(model, tokens(1, 6, seed=seed), cache))
            cache.crop(-6)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    report = run.report()
    assert len(report.sequences) == 1 and report.remask_causes == {"first": 1}
    assert report.decoded_tokens == 6 and report.prompt_tokens == 20


def test_a_decoder_without_a_head() -> None:
    """Base models have no generate; their forwards are told apart all the same."""
    model, ids = shared_model().model, tokens()
    keys = list(model.__dict__)
    with torch.no_grad(), prune(model, "griffin", sparsity=0.5) as run:
        cache = new_cache(model)
        model(ids, **{CACHE: cache})
        model(ids[:, :1], **{CACHE: cache})
    assert (run.report().prompt_tokens, run.report().decoded_tokens) == (24, 1)
    assert run.report().achieved_sparsity == 0.5 and list(model.__dict__) == keys


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_autocast(name: str) -> None:
    model, found = shared_model(name), []
    for executor in ("masked", "compact"):
        with (
            torch.autocast("cpu", torch.bfloat16),
            prune(model, CONFIG, executor=executor) as run,
        ):
            found.append(decode(model, tokens(1, 30), 24))
        assert run.report().achieved_sparsity == 0.5
    assert apart(found[0], found[1]) < 3e-2
    assert apart(found[0], decode(model, tokens(1, 30), 24)) > 3e-2


def test_positional_arguments() -> None:
    model, ids = shared_model(), tokens()
    with prune(model, "griffin", sparsity=0.5) as run, torch.no_grad():
        cache = new_cache(model)
        model(ids, None, None, cache)
        model(ids[:, :1], torch.ones(1, 25), None, cache)
    assert (run.report().prompt_tokens, run.report().decoded_tokens) == (24, 1)
    config = model.generation_config.__class__(max_new_tokens=4, do_sample=False)
    with prune(model, "griffin", sparsity=0.5) as run:
        model.generate(ids, config)
    assert run.report().decoded_tokens == 3
