"""What counts as prompt and what as decode, for every way a model can be driven."""

import pytest
import torch

from dart_llm.errors import ConfigError
from dart_llm.session.run import prune
from prior_cases import CONFIG
from steps import (
    CACHE,
    EVIDENCE,
    HALF,
    apart,
    decode,
    forward_lengths,
    generate,
    new_cache,
    pruned,
    same_masks,
    selections,
    shared_model,
    step,
    written,
)
from tiny import tokens

IDS = tokens(1, 20)
MORE = tokens(1, 9, seed=4)


def counted(run):
    """Prompt and decoded tokens."""
    return run.report().prompt_tokens, run.report().decoded_tokens


def test_one_token_prompt():
    model, one = shared_model(), torch.tensor([[7]])
    run, _ = written(model, one, 6)
    assert counted(run) == (1, 5) and run.report().achieved_sparsity == 0.5
    assert run.remasks[0].step == 0
    run, _ = written(model, one, 80, {"method": "dart"})
    report = run.report()
    assert run.remasks[0].step == 15, "16 tokens of evidence: the prompt and 15"
    assert report.decoded_tokens == 79
    assert report.dense_token_share == pytest.approx(15 / 79)
    assert report.achieved_sparsity == pytest.approx(0.5 * 64 / 79)
    assert counted(pruned(model, tokens(1, 6), 1)[0]) == (1, 5)
    run, _ = written(model, None, 5)
    assert counted(run) == (1, 4), "without any prompt"


@pytest.mark.parametrize(
    ("name", "chunk"), [("llama", 7), ("llama", 1), ("llama", 8), ("gemma2", 3), ("gpt2", 3)]
)
def test_chunked_prefill(name, chunk):
    model, ids, found = shared_model(name), tokens(1, 8), []
    one, whole = written(model, ids, 4)
    lengths = forward_lengths(
        model, lambda: found.extend(written(model, ids, 4, prefill_chunk_size=chunk))
    )
    run, out = found
    assert lengths[-3:] == [1, 1, 1] and sum(lengths) == 11 and lengths[0] == chunk
    assert counted(run) == (8, 3)
    assert run.report().achieved_sparsity == 0.5 and run.report().remasks == 0
    assert run.remasks[0].evidence_tokens == 8
    assert same_masks(run.masks(), one.masks())
    assert apart(out.logits, whole.logits) < 1e-5


def test_two_prompts_in_one_block():
    model = shared_model()
    alone = [written(model, IDS, 6), written(model, MORE, 11)]
    with prune(model, **HALF) as run:
        masks = selections(run)
        both = [generate(model, IDS, 6), generate(model, MORE, 11)]
    report = run.report()
    found = [(s.sequence, s.prompt_tokens, s.decoded_tokens) for s in report.sequences]
    assert found == [(0, 20, 5), (1, 9, 10)] and counted(run) == (29, 15)
    assert report.remasks == 0 and report.remask_causes == {"first": 2}
    for (one, out), got, (_, _, kept) in zip(alone, both, masks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(out.logits, got.logits, strict=True))
        assert same_masks(list(one.masks().values()), kept)
    run.reset()
    assert run.report().sequences == () and run.report().decoded_tokens == 0


def test_second_turn_with_a_cache():
    model = shared_model()
    with prune(model, **{**HALF, **EVIDENCE}) as run:
        out = generate(model, IDS, 6)
        turn = torch.cat([out.sequences, MORE], 1)
        generate(model, turn, 5, **{CACHE: out.past_key_values})
    assert len(run.report().sequences) == 1
    assert counted(run) == (20 + 1 + 9, 5 + 4), "the last token of turn one is fed in turn two"
    with prune(model, **HALF) as run:
        out = generate(model, IDS, 6)
        turn, cache = torch.cat([out.sequences, MORE], 1), out.past_key_values
        dense = forward_lengths(model, lambda: generate(model, turn, 5, **{CACHE: cache}))
    assert dense == [10, 1, 1, 1, 1]
    assert [(m.cause, m.step, m.evidence_tokens) for m in run.remasks] == [
        ("first", 0, 20.0),
        ("prompt", 5, 30.0),
    ]
    assert run.report().achieved_sparsity == 0.5


def test_bare_forwards():
    model, ids = shared_model(), tokens(1, 30)
    with prune(model, **HALF) as run:
        cache, phases = new_cache(model), []
        for part in ids[:, :22].split([10, 5, 1, 1, 4, 1], 1):
            step(model, part, cache)
            phases.append(run.phase)
        assert phases == ["prefill", "prefill", "pruned", "pruned", "prefill", "pruned"]
        with run.decoding():
            step(model, ids[:, 22:27], cache)
        assert run.phase == "pruned"
        step(model, ids[:, 27:29], cache)
        assert run.phase == "prefill"
    assert counted(run) == (21, 8) and run.report().dense_token_share == 0


def test_forward_without_a_cache_is_a_prompt():
    model, ids = shared_model(), tokens(3, 10)
    dense = model(ids).logits
    with prune(model, **HALF) as run:
        assert torch.equal(model(ids).logits, dense)
        assert torch.equal(model(ids, use_cache=False).logits, dense)
        assert torch.equal(model(input_ids=ids, return_dict=False)[0], dense)
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, dense)
        with pytest.raises(ConfigError, match="input_ids"):
            model()
    assert len(run.report().sequences) == 4 and counted(run) == (120, 0)


def test_a_cache_that_was_cut_back():
    """Continuations of one prompt: the caller crops the cache between them."""
    model, found = shared_model(), []
    with prune(model, **HALF) as run, run.decoding():
        cache = new_cache(model)
        step(model, IDS, cache)
        for seed in (1, 2, 1):
            found.append(step(model, tokens(1, 6, seed=seed), cache))
            cache.crop(-6)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    report = run.report()
    assert len(report.sequences) == 1 and report.remask_causes == {"first": 1}
    assert counted(run) == (20, 6)


def test_a_decoder_without_a_head():
    """Base models have no generate; their forwards are told apart all the same."""
    model, ids = shared_model().model, tokens()
    keys = list(model.__dict__)
    with torch.no_grad(), prune(model, **HALF) as run:
        cache = new_cache(model)
        model(ids, **{CACHE: cache})
        model(ids[:, :1], **{CACHE: cache})
    assert counted(run) == (24, 1)
    assert run.report().achieved_sparsity == 0.5 and list(model.__dict__) == keys


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_autocast(name):
    model, ids, found = shared_model(name), tokens(1, 30), []
    for executor in ("masked", "compact"):
        with torch.autocast("cpu", torch.bfloat16):
            run, _, logits = pruned(model, ids, 24, method=CONFIG, executor=executor)
        found.append(logits)
        assert run.report().achieved_sparsity == 0.5
    assert apart(found[0], found[1]) < 3e-2
    assert apart(found[0], decode(model, ids, 24)) > 3e-2


def test_positional_arguments():
    model, ids = shared_model(), tokens()
    with prune(model, **HALF) as run, torch.no_grad():
        cache = new_cache(model)
        model(ids, None, None, cache)
        model(ids[:, :1], torch.ones(1, 25), None, cache)
    assert counted(run) == (24, 1)
    config = model.generation_config.__class__(max_new_tokens=4, do_sample=False)
    with prune(model, **HALF) as run:
        model.generate(ids, config)
    assert run.report().decoded_tokens == 3
