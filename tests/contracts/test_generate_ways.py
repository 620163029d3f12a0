"""generate in all its ways: beams, static caches, streamers, embeddings, pipelines."""

import queue
import threading
from types import SimpleNamespace

import pytest
import torch

from dart_llm.errors import ConfigError
from dart_llm.session.run import prune
from steps import (
    EVIDENCE,
    HALF,
    apart,
    generate,
    same_masks,
    same_sums,
    shared_model,
    sums_of,
    written,
)
from tiny import tiny, tokens


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_what_generate_cannot_do_while_pruned(where):
    """Without a cache, wherever it is said, and with guidance."""
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
        with pytest.raises(ConfigError, match="guidance_scale"):
            generate(model, tokens(), 6, guidance_scale=1.5)
        generate(model, tokens(), 6, guidance_scale=1)
    assert run.report().decoded_tokens == 5


def test_beam_search():
    model, ids, found = shared_model(), tokens(2, 20), []
    settings = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    dense = model.generate(ids, **settings)
    with prune(model, "griffin", sparsity=0.0):
        assert torch.equal(model.generate(ids, **settings), dense)
    for executor in ("masked", "compact"):
        with prune(model, **HALF, executor=executor) as run:
            found.append(model.generate(ids, **settings))
        report = run.report()
        assert report.achieved_sparsity == 0.5 and report.decoded_tokens == 6 * 7
        assert report.prompt_tokens == 6 * 20
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], dense)
    one_by_one = prune(model, **HALF, batch="per_row")
    with one_by_one, pytest.raises(ConfigError, match='batch "shared"'):
        model.generate(ids, **settings)


@pytest.mark.parametrize(("method", "chunk"), [("griffin", 5), ("dart", None), ("dart", 5)])
def test_static_cache(method, chunk):
    model, ids = shared_model(), tokens(1, 70)
    one, wanted = written(model, ids, 8, {"method": method})
    static = {"cache_implementation": "static", "prefill_chunk_size": chunk}
    run, got = written(model, ids, 8, {"method": method}, **static)
    assert torch.equal(got.sequences, wanted.sequences)
    assert apart(got.logits, wanted.logits) < 1e-5
    assert run.report().decoded_tokens == one.report().decoded_tokens == 7
    assert run.report().prompt_tokens == 70
    assert run.report().layers == one.report().layers


def test_static_cache_knows_its_padding():
    ids, mask, found = tokens(2, 14), torch.ones(2, 14, dtype=torch.long), []
    mask[0, :6] = 0
    for cache in ({}, {"cache_implementation": "static"}):
        for chunk in (None, 5):
            how = {"attention_mask": mask, "prefill_chunk_size": chunk, **cache}
            run, _ = written(shared_model(), ids, 4, EVIDENCE, **how)
            assert run.report().prompt_tokens == 8 + 14
            found.append(sums_of(run))
    assert all(same_sums(found[0], other) for other in found[1:])


@pytest.mark.parametrize("assisted", [{}, {"prompt_lookup_num_tokens": 3}])
def test_streamer_in_a_thread(assisted):
    model, ids, got = shared_model(), torch.arange(3, 40)[None], []
    items = queue.Queue()  # what TextIteratorStreamer fills, without text
    pipe = SimpleNamespace(
        put=lambda ids: items.put(ids.flatten().tolist()), end=lambda: items.put(None)
    )
    wanted = written(model, ids, 30)[1].sequences[0].tolist()
    with prune(model, **HALF) as run:
        how = {"streamer": pipe, **assisted}
        thread = threading.Thread(target=lambda: generate(model, ids, 30, **how))
        thread.start()
        while (item := items.get(timeout=20)) is not None:
            got += item
        thread.join()
    assert got == wanted and run.report().decoded_tokens == 29


def test_sampling_and_returned_sequences():
    model, found = shared_model(), []
    settings = {"max_new_tokens": 6, "do_sample": True, "eos_token_id": None}
    for batch in ("shared", "per_row"):
        torch.manual_seed(0)
        with prune(model, **HALF, batch=batch) as run:
            out = model.generate(tokens(), num_return_sequences=3, **settings)
        assert out.shape == (3, 30) and len({tuple(row) for row in out.tolist()}) == 3
        report = run.report()
        assert report.decoded_tokens == 15 and report.prompt_tokens == 72
        assert len(report.sequences) == (1 if batch == "shared" else 3)
        found.append(out)
    assert torch.equal(found[0], found[1]), "the rows share a prompt, so they share a mask"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_inputs_embeds(name):
    model, ids = shared_model(name), tokens()
    one, wanted = written(model, ids, 8)
    embeds = model.get_input_embeddings()(ids).detach()
    run, got = written(model, None, 8, inputs_embeds=embeds)
    assert torch.equal(got.sequences, wanted.sequences[:, 24:])
    assert apart(got.logits, wanted.logits) < 1e-5
    assert same_masks(run.masks(), one.masks())
    assert (run.report().prompt_tokens, run.report().decoded_tokens) == (24, 7)


def test_wrapper_is_entered_to_its_text_decoder():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = tiny("gemma3").config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model, ids, found = Gemma3ForConditionalGeneration(config).eval(), tokens(1, 70), []
    dense = generate(model, ids, 6)
    for executor in ("masked", "compact"):
        run, out = written(model, ids, 6, {"method": "dart", "executor": executor})
        found.append(out)
        report = run.report()
        assert report.decoded_tokens == 5 and report.achieved_sparsity == 0.5
        assert [layer.width for layer in report.layers] == [48] * 4
    assert apart(found[0].logits, found[1].logits) < 1e-5
    assert any(not torch.equal(a, b) for a, b in zip(found[0].logits, dense.logits, strict=True))
