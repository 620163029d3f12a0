"""generate in all its ways: beams, static caches, streamers, embeddings, pipelines."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.session.run import prune
from steps import EVIDENCE, Forced, apart, generate, same_sums, shared_model, sums_of
from tiny import VOCAB, tiny, tokens


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


@pytest.mark.parametrize(("method", "chunk"), [("griffin", 5), ("dart", None), ("dart", 5)])
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
            found.append(sums_of(run))
    assert all(same_sums(found[0], other) for other in found[1:])


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
