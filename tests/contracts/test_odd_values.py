"""Numbers and dtypes that are rare: not-a-number, autocast, float64, ids outside the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dart_llm.errors import AttachError
from dart_llm.native import build
from dart_llm.patching.executors.native_ffn import ACTS
from dart_llm.session.run import prune
from steps import CACHE, apart, generate, new_cache, shared_model
from tiny import LAYERS, VOCAB, WIDTH, tiny, tokens

pytestmark = pytest.mark.usefixtures("native")

HALF = {layer: list(range(WIDTH // 2)) for layer in range(LAYERS)}
KINDS = ("", "avx512bf16", "avx512", "avx2", "portable")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_number_stays_so(kind: str, act: int) -> None:
    if not build.use_kernels(kind):
        pytest.skip(f"this CPU has no {kind}")
    x = torch.tensor([[1.0, -2.0, float("nan"), 3.0]]).T.contiguous()
    one = torch.ones(1, 1)
    found = build.ops().ffn(x, None, one, one, None, None, None, None, None, None, None, act)
    build.use_kernels("")
    assert found.isnan().flatten().tolist() == [False, False, True, False]
    assert ACTS[act](x).isnan().flatten().tolist() == [False, False, True, False]
    rest = [0, 1, 3]
    assert apart(found[rest], ACTS[act](x)[rest]) < 1e-5


def _after_autocast(executor: str) -> Tensor:
    model, ids, cache = shared_model(), tokens(1, 30), {}
    with prune(model, masks=HALF, executor=executor) as run, torch.no_grad():
        cache = {CACHE: new_cache(model)}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids[:, :24], **cache)
        found = [model(ids[:, at : at + 1], **cache).logits for at in range(24, 30)]
        if executor == "slim":
            assert run.patch.slim.steps >= 5, "the first step may widen the cache"
    return torch.cat(found)


def test_a_prompt_under_autocast_and_steps_outside() -> None:
    assert apart(_after_autocast("slim"), _after_autocast("masked")) < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "static"},
        {"method": "dart-token"},
        {"method": "griffin", "score": "contribution"},
        {"method": "griffin", "score": "wanda"},
        {"method": "griffin", "score": "weight"},
        {"method": "griffin", "budget": "global"},
    ],
    ids=str,
)
def test_float64_keeps_what_float32_keeps(settings: dict[str, Any]) -> None:
    written = []
    for dtype in (torch.float64, torch.float32):
        model = tiny(dtype=dtype)
        with prune(model, **settings, sparsity=0.5) as run:
            written.append(generate(model, tokens(1, 40), 6).sequences.tolist())
        report = run.report()
        assert report.decoded_tokens == 5 and report.achieved_sparsity > 0.3
    assert written[0] == written[1]


@pytest.mark.parametrize("executor", ["slim", "native", "compact", "masked"])
@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_ids_outside_the_vocabulary_are_an_index_error(wrong: int, executor: str) -> None:
    model, cache = shared_model(), {}
    with prune(model, masks=HALF, executor=executor), torch.no_grad():
        cache = {CACHE: new_cache(model)}
        model(tokens(1, 24), **cache)
        words = (
            f"token id {wrong} is outside the vocabulary of {VOCAB}" if executor == "slim" else ""
        )
        with pytest.raises(IndexError, match=words):
            model(torch.tensor([[wrong]]), **cache)


def test_room_for_a_cache_is_counted_and_goes_with_it() -> None:
    model, ids = shared_model(), tokens(1, 40)
    with prune(model, masks=HALF, executor="slim") as run, torch.no_grad():
        idle = run.report().extra_memory_bytes
        cache = {CACHE: new_cache(model)}
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


def test_how_far_a_run_is_from_its_first_mask() -> None:
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
