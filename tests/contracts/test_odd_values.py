"""Numbers and dtypes that are rare: not-a-number, autocast, float64, ids outside the vocabulary."""

import pytest
import torch

from dart_llm.errors import AttachError
from dart_llm.native import build
from dart_llm.patching.executors.native_ffn import ACTS
from dart_llm.session.run import prune
from steps import CACHE, HALF, apart, generate, new_cache, shared_model, written
from tiny import LAYERS, VOCAB, WIDTH, tiny, tokens

pytestmark = pytest.mark.usefixtures("native")

MASKS = {layer: list(range(WIDTH // 2)) for layer in range(LAYERS)}
KINDS = ("", "avx512bf16", "avx512", "avx2", "portable")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_number_stays_so(kind):
    if not build.use_kernels(kind):
        pytest.skip(f"this CPU has no {kind}")
    x, one = torch.tensor([[1.0], [-2.0], [float("nan")], [3.0]]), torch.ones(1, 1)
    for number, act in ACTS.items():
        found = build.ops().ffn(x, None, one, one, *[None] * 7, number)
        torch.testing.assert_close(found, act(x), rtol=1e-5, atol=1e-5, equal_nan=True)
    build.use_kernels("")


def _after_autocast(executor):
    model, ids = shared_model(), tokens(1, 30)
    with prune(model, masks=MASKS, executor=executor) as run, torch.no_grad():
        cache = {CACHE: new_cache(model)}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids[:, :24], **cache)
        found = [model(ids[:, at : at + 1], **cache).logits for at in range(24, 30)]
        if executor == "slim":
            assert run.patch.slim.steps >= 5, "the first step may widen the cache"
    return torch.cat(found)


def test_a_prompt_under_autocast_and_steps_outside():
    assert apart(_after_autocast("slim"), _after_autocast("masked")) < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "static"},
        {"method": "dart-token"},
        {"score": "contribution"},
        {"score": "wanda"},
        {"score": "weight"},
        {"budget": "global"},
    ],
    ids=str,
)
def test_float64_keeps_what_float32_keeps(settings):
    texts = []
    for dtype in (torch.float64, torch.float32):
        run, out = written(tiny(dtype=dtype), tokens(1, 40), 6, settings)
        texts.append(out.sequences.tolist())
        assert run.report().decoded_tokens == 5 and run.report().achieved_sparsity > 0.3
    assert texts[0] == texts[1]


@pytest.mark.parametrize("executor", ["slim", "native", "compact", "masked"])
def test_ids_outside_the_vocabulary_are_an_index_error(executor):
    model = shared_model()
    for wrong in (VOCAB, -1):
        with prune(model, masks=MASKS, executor=executor), torch.no_grad():
            cache = {CACHE: new_cache(model)}
            model(tokens(1, 24), **cache)
            said = f"token id {wrong} is outside the vocabulary of {VOCAB}"
            with pytest.raises(IndexError, match=said if executor == "slim" else None):
                model(torch.tensor([[wrong]]), **cache)


def test_room_for_a_cache_is_counted_and_goes_with_it():
    model, ids = shared_model(), tokens(1, 40)
    with prune(model, masks=MASKS, executor="slim") as run, torch.no_grad():
        idle, cache = run.report().extra_memory_bytes, {CACHE: new_cache(model)}
        model(ids[:, :38], **cache)
        model(ids[:, 38:39], **cache)
        growing = run.patch.slim.decoder._cache
        room, held = growing.keys[0].shape[2], growing.keys[0].nbytes
        assert growing.nbytes() == 2 * LAYERS * held * (room - 39) // room > 0
        counted = run.report().extra_memory_bytes
        cache.clear()
        assert growing.keys == growing.values == [] and growing.nbytes() == 0
        assert counted - run.report().extra_memory_bytes == 2 * LAYERS * held * (room - 39) // room
        assert run.report().extra_memory_bytes > idle, "angles and scratch memory stay"


def test_how_far_a_run_is_from_its_first_mask():
    model = shared_model()
    with prune(model, "dart-prompt", sparsity=0.5) as run:
        with pytest.raises(AttachError, match="0 tokens were seen and 64 are needed, so decode at"):
            run.masks()
        generate(model, tokens(1, 24), 11)
        words = "34 tokens were seen and 64 are needed, so decode at least 31 more"
        with pytest.raises(AttachError, match=words):
            run.masks()
        generate(model, tokens(1, 24), 42)
        assert len(run.masks()) == LAYERS
    with (
        prune(model, "griffin", sparsity=0.0) as run,
        pytest.raises(AttachError, match="nothing is removed: ask for a sparsity above 0"),
    ):
        run.masks()
    with prune(model, **HALF) as run:
        for asked in (run.masks, lambda: run.export("nowhere")):
            with pytest.raises(AttachError, match="0 tokens were seen and 1 are needed"):
                asked()
