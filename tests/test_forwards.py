"""What counts as prompt and what as decode, for every way a model can be driven."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from dart_llm import AttachError, ConfigError, prune
from steps import (
    CACHE,
    Forced,
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
from tiny import VOCAB, tiny, tokens

EVIDENCE = {"masking_step": 1000, "sparsity": 0.5}
"""Everything is observed and nothing pruned: what was counted can be compared."""


def _sums(run: Any) -> list[Tensor]:
    """The summed scores of the newest sequence, per layer (after a report, which flushes)."""
    run.report()
    return [layer.sums["score"].total.clone() for layer in run._tracer.lives[0].evidence]


def _same_sums(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(first, second, strict=True))


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
    assert report.sequences[0].remasks[0].step == 63, "64 tokens of evidence: the prompt and 63"
    assert report.decoded_tokens == 79
    assert report.dense_token_share == pytest.approx(63 / 79)
    assert report.achieved_sparsity == pytest.approx(0.5 * 16 / 79)
    with prune(model, "griffin", sparsity=0.5) as run:
        decode(model, tokens(1, 6), 1)
    assert run.report().decoded_tokens == 5


def test_no_prompt_at_all() -> None:
    model = shared_model()
    with prune(model, "griffin", sparsity=0.5) as run:
        model.generate(max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert (run.report().prompt_tokens, run.report().decoded_tokens) == (1, 4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon"])
@pytest.mark.parametrize("chunk", [7, 1, 3, 8])
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


def test_second_turn_runs_its_prompt_dense_and_keeps_the_evidence() -> None:
    model, text = shared_model(), tokens(1, 40)
    with prune(model, "griffin", sparsity=0.5) as run:
        cache = new_cache(model)
        step(model, text[:, :20], cache)
        step(model, text[:, 20:21], cache)
        masks = run.masks()
        length = forward_lengths(model, lambda: step(model, text[:, 21:33], cache))
        assert length == [12] and run.phase == "prefill"
        step(model, text[:, 33:34], cache)
        assert run.phase == "pruned"
    assert not same_masks(list(masks.values()), list(run.masks().values()))
    report = run.report()
    assert (report.prompt_tokens, report.decoded_tokens) == (32, 2)
    # the same evidence by hand: the two prompt parts, the second on the cache that pruning left
    assert report.sequences[0].remasks[1].evidence_tokens == 32


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


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("executor", ["auto", "masked"])
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


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.08])
@pytest.mark.parametrize("new", [20, 21, 22, 23])
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


@pytest.mark.parametrize("new", [1, 2, 3, 30])
def test_refused_candidates_never_enter_the_evidence(new: int) -> None:
    model, ids = shared_model(), torch.arange(3, 40)[None]
    with prune(model, "griffin", **EVIDENCE) as run:
        wanted = generate(model, ids, new)
    sums, tokens_seen = _sums(run), run._tracer.lives[0].evidence_tokens
    with prune(model, "griffin", **EVIDENCE) as run:
        out = generate(model, ids, new, prompt_lookup_num_tokens=3)
    assert torch.equal(out.sequences, wanted.sequences)
    assert run.report().decoded_tokens == new - 1
    assert run._tracer.lives[0].evidence_tokens == tokens_seen == 37 + new - 1
    assert _same_sums(_sums(run), sums)


@pytest.mark.parametrize("end", [0, 1, 2, 5, 9])
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
        found.append((run.report().decoded_tokens, _sums(run)))
    assert found[0][0] == found[1][0] == 29 and len(seen) > 10
    assert _same_sums(found[0][1], found[1][1])


def test_a_model_cannot_assist_itself() -> None:
    model = shared_model()
    with prune(model, "griffin", sparsity=0.5):
        with pytest.raises(ConfigError, match="assistant_early_exit"):
            generate(model, tokens(), 6, assistant_early_exit=2)
        with pytest.raises(ConfigError, match="own assistant"):
            generate(model, tokens(), 6, assistant_model=model)
        generate(model, tokens(), 6)


def test_guidance_is_refused() -> None:
    model = shared_model()
    with prune(model, "griffin", sparsity=0.5) as run:
        with pytest.raises(ConfigError, match="guidance_scale"):
            generate(model, tokens(), 6, guidance_scale=1.5)
        generate(model, tokens(), 6, guidance_scale=1)
    assert run.report().decoded_tokens == 5


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_generate_without_a_cache_is_refused(where: str) -> None:
    model = tiny()
    config = model.generation_config.__class__(use_cache=False, max_new_tokens=5)
    settings: dict[str, Any] = {"max_new_tokens": 5}
    if where == "config":
        settings = {"generation_config": config}
    elif where == "argument":
        settings["use_cache"] = False
    else:
        model.generation_config.use_cache = False
    with prune(model, "griffin", sparsity=0.5) as run:
        with pytest.raises(ConfigError, match="use_cache"):
            model.generate(tokens(), **settings)
        assert run.report().sequences == ()
        model.generation_config.use_cache = True
        generate(model, tokens(), 5)


def test_beam_search() -> None:
    model, ids = shared_model(), tokens(2, 20)
    settings = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    dense = model.generate(ids, **settings)
    with prune(model, "griffin", sparsity=0.0):
        assert torch.equal(model.generate(ids, **settings), dense)
    found = []
    for executor in ("masked", "compact"):
        with prune(model, "griffin", sparsity=0.5, executor=executor) as run:
            found.append(model.generate(ids, **settings))
        report = run.report()
        assert report.achieved_sparsity == 0.5 and report.decoded_tokens == 6 * 7
        assert report.prompt_tokens == 6 * 20
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], dense)
    with (
        prune(model, "griffin", sparsity=0.5, batch="per_row"),
        pytest.raises(ConfigError, match='batch "shared"'),
    ):
        model.generate(ids, **settings)


@pytest.mark.parametrize("method", ["griffin", "dart"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_static_cache(method: str, chunk: int | None) -> None:
    model, ids = shared_model(), tokens(1, 70)
    with prune(model, method, sparsity=0.5) as run:
        wanted = generate(model, ids, 8)
    report = run.report()
    with prune(model, method, sparsity=0.5) as run:
        got = generate(model, ids, 8, cache_implementation="static", prefill_chunk_size=chunk)
    assert torch.equal(got.sequences, wanted.sequences)
    assert apart(got.logits, wanted.logits) < 1e-5
    assert run.report().decoded_tokens == report.decoded_tokens == 7
    assert run.report().prompt_tokens == 70
    assert run.report().layers == report.layers


def test_static_cache_knows_its_padding() -> None:
    model, ids = shared_model(), tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    found = []
    for settings in ({}, {"cache_implementation": "static"}):
        for chunk in (None, 5):
            with prune(model, "griffin", **EVIDENCE) as run:
                generate(model, ids, 4, attention_mask=mask, prefill_chunk_size=chunk, **settings)
            assert run.report().prompt_tokens == 8 + 14
            found.append(_sums(run))
    assert all(_same_sums(found[0], other) for other in found[1:])


class _Pipe:
    """What TextIteratorStreamer does, without text."""

    def __init__(self) -> None:
        self.items: queue.Queue[Any] = queue.Queue()

    def put(self, value: Tensor) -> None:
        self.items.put(value.flatten().tolist())

    def end(self) -> None:
        self.items.put(None)


@pytest.mark.parametrize("assisted", [{}, {"prompt_lookup_num_tokens": 3}])
def test_streamer_in_a_thread(assisted: dict[str, int]) -> None:
    model, ids, pipe = shared_model(), torch.arange(3, 40)[None], _Pipe()
    with prune(model, "griffin", sparsity=0.5) as run:
        wanted = generate(model, ids, 30).sequences[0].tolist()
    with prune(model, "griffin", sparsity=0.5) as run:
        thread = threading.Thread(
            target=lambda: generate(model, ids, 30, streamer=pipe, **assisted)
        )
        thread.start()
        got: list[int] = []
        while (item := pipe.items.get(timeout=20)) is not None:
            got += item
        thread.join()
    assert got == wanted and run.report().decoded_tokens == 29


class _StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_stopping_criteria() -> None:
    model = shared_model()
    with prune(model, "griffin", sparsity=0.5) as run:
        out = generate(model, tokens(), 50, stopping_criteria=StoppingCriteriaList([_StopAt(30)]))
    assert out.sequences.shape[1] == 30 and run.report().decoded_tokens == 5


def test_sampling_and_returned_sequences() -> None:
    model, found = shared_model(), []
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "eos_token_id": None}
    settings["num_return_sequences"] = 3
    for batch in ("shared", "per_row"):
        torch.manual_seed(0)
        with prune(model, "griffin", sparsity=0.5, batch=batch) as run:
            out = model.generate(tokens(), **settings)
        assert out.shape == (3, 30) and len({tuple(row) for row in out.tolist()}) == 3
        report = run.report()
        assert report.decoded_tokens == 15 and report.prompt_tokens == 72
        assert len(report.sequences) == (1 if batch == "shared" else 3)
        found.append(out)
    assert torch.equal(found[0], found[1]), "the rows share a prompt, so they share a mask"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_inputs_embeds(name: str) -> None:
    model, ids = shared_model(name), tokens()
    embeds = model.get_input_embeddings()(ids).detach()
    with prune(model, "griffin", sparsity=0.5) as run:
        wanted = generate(model, ids, 8)
    masks = run.masks()
    with prune(model, "griffin", sparsity=0.5) as run:
        got = generate(model, None, 8, inputs_embeds=embeds)
    assert torch.equal(got.sequences, wanted.sequences[:, 24:])
    assert apart(got.logits, wanted.logits) < 1e-5
    assert all(torch.equal(run.masks()[layer], kept) for layer, kept in masks.items())
    assert (run.report().prompt_tokens, run.report().decoded_tokens) == (24, 7)


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


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_autocast(name: str) -> None:
    model, found = shared_model(name), []
    for executor in ("masked", "compact"):
        with (
            torch.autocast("cpu", torch.bfloat16),
            prune(model, "dart", sparsity=0.5, min_evidence=0, executor=executor) as run,
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


def test_pipeline() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {"<pad>": 0, "<end>": 2, "<unk>": 3} | {f"w{i}": i for i in (1, *range(4, VOCAB))}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        padding_side="left",
    )
    model = tiny()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    settings |= {"suppress_tokens": [0, 1, 2, 3], "return_full_text": False}
    texts = ["w7 w8 w9 w10 w11 w12", "w20 w21 w22"]
    dense = [write(text, **settings)[0]["generated_text"] for text in texts]
    with prune(model, "griffin", sparsity=0.5) as run:
        pruned = [write(text, **settings)[0]["generated_text"] for text in texts]
    assert [len(text.split()) for text in pruned] == [8, 8] and pruned != dense
    report = run.report()
    assert [s.prompt_tokens for s in report.sequences] == [6, 3]
    assert report.decoded_tokens == 14 and report.achieved_sparsity == 0.5
    with prune(model, "griffin", sparsity=0.5, batch="per_row") as run:
        rows = write(texts, batch_size=2, **settings)
    assert [row[0]["generated_text"] for row in rows] == pruned
    assert run.report().prompt_tokens == 9 and run.report().decoded_tokens == 14
    assert [write(text, **settings)[0]["generated_text"] for text in texts] == dense


def test_wrapper_is_entered_to_its_text_decoder() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = tiny("gemma3").config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    dense = generate(model, tokens(1, 70), 6)
    found = []
    for executor in ("masked", "compact"):
        with prune(model, "dart", sparsity=0.5, executor=executor) as run:
            found.append(generate(model, tokens(1, 70), 6))
        report = run.report()
        assert report.decoded_tokens == 5 and report.achieved_sparsity == 0.5
        assert [layer.width for layer in report.layers] == [48] * 4
    assert apart(found[0].logits, found[1].logits) < 1e-5
    assert any(not torch.equal(a, b) for a, b in zip(found[0].logits, dense.logits, strict=True))


def test_forced_decoding_inside_generate_changes_nothing() -> None:
    model, rows = shared_model(), [[9, 8, 7, 6]]
    with prune(model, "griffin", sparsity=0.5) as run:
        with run.decoding():
            out = generate(model, tokens(), 4, logits_processor=[Forced(24, rows)])
        assert out.sequences[0, 24:].tolist() == rows[0]
    assert (run.report().prompt_tokens, run.report().decoded_tokens) == (24, 3)
