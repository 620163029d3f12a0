"""What counts as prompt and what as decode, for every way a model can be driven."""

import copy

import pytest
import torch

from dart_llm.errors import ConfigError
from dart_llm.session.run import prune
from steps import (
    CACHE,
    EVIDENCE,
    HALF,
    Forced,
    apart,
    forward_lengths,
    generate,
    new_cache,
    pruned,
    same_masks,
    selections,
    shared_model,
    state_of,
    step,
    sums_of,
    written,
)
from tiny import tiny, tokens

IDS = tokens(1, 20)
MORE = tokens(1, 9, seed=4)


def counted(run):
    """Prompt and decoded tokens."""
    return run.report().prompt_tokens, run.report().decoded_tokens


def watched(*arguments, **how):
    """The lengths of the forwards of ``written``, its run and what it gave."""
    result = []
    lengths = forward_lengths(arguments[0], lambda: result.extend(written(*arguments, **how)))
    return lengths, *result


def test_one_token_prompt():
    model, one = shared_model(), torch.tensor([[7]])
    run, _ = written(model, one, 6)
    assert counted(run) == (1, 5) and run.report().achieved_sparsity == 0.5
    run, _ = written(model, one, 80, {"method": "dart"})
    report = run.report()
    assert run.remasks[0].step == 15, "16 tokens of evidence: the prompt and 15"
    assert report.dense_token_share == pytest.approx(15 / 79)
    assert report.achieved_sparsity == pytest.approx(0.5 * 64 / 79)
    assert counted(pruned(model, tokens(1, 6), 1)[0]) == (1, 5)
    run, _ = written(model, None, 5)
    assert counted(run) == (1, 4), "without any prompt"


@pytest.mark.parametrize(
    ("name", "chunk"), [("llama", 7), ("llama", 1), ("gemma2", 3), ("gpt2", 3)]
)
def test_chunked_prefill(name, chunk):
    model, ids = shared_model(name), tokens(1, 8)
    one, whole = written(model, ids, 4)
    lengths, run, out = watched(model, ids, 4, prefill_chunk_size=chunk)
    assert lengths[-3:] == [1, 1, 1] and sum(lengths) == 11 and lengths[0] == chunk
    assert counted(run) == (8, 3)
    assert run.report().achieved_sparsity == 0.5 and run.report().remasks == 0
    assert run.remasks[0].evidence_tokens == 8
    assert same_masks(run.masks(), one.masks()) and apart(out.logits, whole.logits) < 1e-5


def test_two_prompts_in_one_block():
    model = shared_model()
    alone = [written(model, IDS, 6), written(model, MORE, 11)]
    with prune(model, **HALF) as run:
        masks = selections(run)
        both = [generate(model, IDS, 6), generate(model, MORE, 11)]
    report = run.report()
    counts = [(s.sequence, s.prompt_tokens, s.decoded_tokens) for s in report.sequences]
    assert counts == [(0, 20, 5), (1, 9, 10)] and counted(run) == (29, 15)
    assert report.remasks == 0 and report.remask_causes == {"first": 2}
    for (one, out), got, (_, _, kept) in zip(alone, both, masks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(out.logits, got.logits, strict=True))
        assert same_masks(list(one.masks().values()), kept)
    run.reset()
    assert run.report().sequences == () and run.report().decoded_tokens == 0


def test_second_turn_with_a_cache():
    model = shared_model()
    with prune(model, **HALF) as run:
        out = generate(model, IDS, 6)
        turn, cache = torch.cat([out.sequences, MORE], 1), out.past_key_values
        dense = forward_lengths(model, lambda: generate(model, turn, 5, **{CACHE: cache}))
    assert dense == [10, 1, 1, 1, 1] and len(run.report().sequences) == 1
    assert counted(run) == (20 + 1 + 9, 5 + 4), "the last token of turn one is fed in turn two"
    remasks = [(m.cause, m.step, m.evidence_tokens) for m in run.remasks]
    assert remasks == [("first", 0, 20.0), ("prompt", 5, 30.0)]
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
    dense, embeds = model(ids).logits, model.get_input_embeddings()(tokens()).detach()
    with prune(model, **HALF) as run:
        assert torch.equal(model(ids).logits, dense)
        assert torch.equal(model(ids, use_cache=False).logits, dense)
        assert torch.equal(model(input_ids=ids, return_dict=False)[0], dense)
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, dense)
        with pytest.raises(ConfigError, match="input_ids"):
            model()
    assert len(run.report().sequences) == 4 and counted(run) == (120, 0)
    one, expected = written(model, tokens(), 8)
    run, out = written(model, None, 8, inputs_embeds=embeds)
    assert torch.equal(out.sequences, expected.sequences[:, 24:])
    assert same_masks(run.masks(), one.masks()) and counted(run) == (24, 7)


def test_positional_arguments_and_a_decoder_without_a_head():
    model, ids = shared_model(), tokens()
    for one, before in ((model, (None, None)), (model.model, (None, None))):
        with prune(one, **HALF) as run, torch.no_grad():
            cache = new_cache(model)
            one(ids, *before, cache)
            one(ids[:, :1], torch.ones(1, 25), None, cache)
        assert counted(run) == (24, 1) and run.report().achieved_sparsity == 0.5
    config = copy.copy(model.generation_config)
    config.update(max_new_tokens=4, do_sample=False)
    with prune(model, **HALF) as run:
        model.generate(ids, config)
    assert run.report().decoded_tokens == 3


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_what_generate_cannot_do_while_pruned(where):
    """Without a cache, wherever it is said; with guidance; a model that assists itself."""
    model = tiny()
    config = model.generation_config.__class__(use_cache=False, max_new_tokens=5)
    settings = {
        "argument": {"max_new_tokens": 5, "use_cache": False},
        "config": {"generation_config": config},
        "model": {"max_new_tokens": 5},
    }[where]
    model.generation_config.use_cache = where != "model"
    with prune(model, **HALF) as run:
        with pytest.raises(ConfigError, match="use_cache"):
            model.generate(tokens(), **settings)
        assert run.report().sequences == ()
        model.generation_config.use_cache = True
        for how, words in (
            ({"guidance_scale": 1.5}, "guidance_scale"),
            ({"assistant_early_exit": 2}, "assistant_early_exit"),
            ({"assistant_model": model}, "a separate model as assistant_model"),
        ):
            with pytest.raises(ConfigError, match=words):
                generate(model, tokens(), 6, **how)
        generate(model, tokens(), 6, guidance_scale=1)
    assert run.report().decoded_tokens == 5


def test_beam_search():
    model, ids = shared_model(), tokens(2, 20)
    settings = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    dense = model.generate(ids, **settings)
    with prune(model, "griffin", sparsity=0.0):
        assert torch.equal(model.generate(ids, **settings), dense)
    with prune(model, **HALF) as run:
        assert not torch.equal(model.generate(ids, **settings), dense)
    assert run.report().achieved_sparsity == 0.5 and counted(run) == (6 * 20, 6 * 7)
    one_by_one = prune(model, **HALF, batch="per_row")
    with one_by_one, pytest.raises(ConfigError, match='batch "shared"'):
        model.generate(ids, **settings)


def test_sampling_and_returned_sequences():
    model, sequences = shared_model(), []
    settings = {"max_new_tokens": 6, "do_sample": True, "eos_token_id": None}
    for batch in ("shared", "per_row"):
        torch.manual_seed(0)
        with prune(model, **HALF, batch=batch) as run:
            out = model.generate(tokens(), num_return_sequences=3, **settings)
        assert out.shape == (3, 30) and len({tuple(row) for row in out.tolist()}) == 3
        assert counted(run) == (72, 15)
        assert len(run.report().sequences) == (1 if batch == "shared" else 3)
        sequences.append(out)
    assert torch.equal(sequences[0], sequences[1]), "the rows share a prompt, so they share a mask"


def test_wrapper_is_entered_to_its_text_decoder():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = tiny("gemma3").config.to_dict()
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model, ids = Gemma3ForConditionalGeneration(config).eval(), tokens(1, 70)
    dense = generate(model, ids, 6)
    run, out = written(model, ids, 6, {"method": "dart"})
    assert run.report().decoded_tokens == 5 and run.report().achieved_sparsity == 0.5
    assert apart(out.logits, dense.logits) > 1e-4


TEXT = torch.arange(3, 40)[None]
"""No n-gram twice: the first forward carries no candidates."""
LOOKUP = {"prompt_lookup_num_tokens": 3}
same_report = pytest.mark.contract("same report whatever the batch")


@same_report
@pytest.mark.parametrize(
    ("name", "executor"), [("llama", "auto"), ("gemma2", "masked"), ("gpt2", "auto")]
)
def test_prompt_lookup_equals_greedy(name, executor):
    """All draft tokens, kept or not, run under the same masks: the text must not change."""
    model, settings = shared_model(name), {"executor": executor}
    for new in (1, 3, 30):  # candidates that are refused never enter the evidence
        one, wanted = written(model, TEXT, new, {**EVIDENCE, **settings})
        run, out = written(model, TEXT, new, {**EVIDENCE, **settings}, **LOOKUP)
        assert torch.equal(out.sequences, wanted.sequences)
        assert state_of(run).evidence_tokens == state_of(one).evidence_tokens == 37 + new - 1
        sums = zip(sums_of(run), sums_of(one), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-4) for a, b in sums)
    one, wanted = written(model, TEXT, 60, settings)
    lengths, run, out = watched(model, TEXT, 60, settings, **LOOKUP)
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


@same_report
@pytest.mark.parametrize(("noise", "new"), [(0.0, 20), (0.08, 23)])
def test_assistant_model_equals_greedy(noise, new):
    """By static masks; as many tokens run dense as candidates in the first forward."""
    model, ids, settings = shared_model(), tokens(1, 24), {"method": "static", "sparsity": 0.3}
    lengths, run, out = watched(model, ids, new, settings, assistant_model=_assistant(noise))
    report = run.report()
    assert counted(run) == (24, new - 1), "tokens that were rolled back do not count"
    assert sum(lengths) - 24 > new - 1, "some candidates were refused"
    dense = round(report.dense_token_share * report.decoded_tokens)
    reference, wanted = written(model, ids, new, {**settings, "masking_step": dense})
    assert torch.equal(out.sequences, wanted.sequences)
    assert reference.report().achieved_sparsity == pytest.approx(report.achieved_sparsity)


@same_report
@pytest.mark.parametrize("end", [0, 1, 5])
def test_generation_that_ends_with_refused_candidates(end):
    """No forward follows to show that the candidates went, least of all after the prompt."""
    ids, rows = tokens(1, 12, seed=6).repeat(1, 3), [[*range(10, 10 + end), 2]]
    how = {"eos_token_id": 2, "logits_processor": [Forced(36, rows)], **LOOKUP}
    lengths, run, out = watched(shared_model(), ids, 20, **how)
    assert out.sequences[0, 36:].tolist() == rows[0]
    assert lengths[0] == 39, "three candidates ride along with the prompt"
    assert counted(run) == (36, end) and run.report().dense_token_share == 0
