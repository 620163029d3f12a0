"""Executors native and slim: what compact computes, from the weights where they lie."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.errors import ConfigError
from dart_llm.models.llama import slim_unsupported_reason as why_not_slim
from dart_llm.native import build
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import prune
from products import SHAPES, cases
from steps import (
    Same,
    apart,
    decode,
    generate,
    new_cache,
    selections,
    shared_model,
    state_of,
    step,
)
from tiny import NAMES, tiny, tokens

pytestmark = pytest.mark.usefixtures("native")

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2}
REFUSED = {"opt": "no FFN module", "opt-350m": "no FFN module"}
"""Models whose FFN the kernels cannot run, and what the sentence says."""

CHOICES: tuple[dict[str, Any], ...] = (
    {"sparsity": 0.5},
    {"sparsity": 0.7, "token": {"bits": 8, "group": 12, "candidates": 0.6}},
    {"sparsity": 0.7, "compensation": False, "score": "normalized"},
)

SLIM = tuple(name for name in NAMES if not why_not_slim(shared_model(name)))
PROMPT, DECODED = 66, 6
PRIOR = {"sequences": 2, "length": 24, "opening": 0}
REMASKS = {"drift": "interval 2", "prior": PRIOR, "sparsity": 0.5}


def _ids() -> Tensor:
    return tokens(1, PROMPT + DECODED, seed=3)


def _logits(name: str, dtype: torch.dtype, method: str, **settings):
    run = prune(shared_model(name, dtype), method, **settings)
    masks = selections(run)
    with run:
        logits = decode(run.model, _ids(), PROMPT)
    return run, masks, logits


def _executors(name: str) -> list[str]:
    if any(name.startswith(refused) for refused in REFUSED):
        return []
    return ["native", "slim"] if name in SLIM else ["native"]


RUN = tuple(name for name in NAMES if _executors(name))
"""Models whose FFNs the kernels can run."""


def test_the_llama_family_is_decoded_as_a_whole() -> None:
    assert set(SLIM) == {"llama", "llama-bias", "qwen2", "qwen3"} & set(NAMES)


# the executors


METHODS = ("griffin", "dart", "dart-prompt")


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize(
    ("name", "dtype", "method"),
    cases(
        [
            *product(NAMES, DTYPES[:1], METHODS[:1]),
            *product(SHAPES, DTYPES[:1], METHODS),
            *product(SHAPES, DTYPES, ["dart"]),
            *product(SLIM, DTYPES[:1], ["dart"]),
        ],
        NAMES,
        DTYPES,
        METHODS,
    ),
    ids=str,
)
def test_equal_to_compact(name: str, dtype: torch.dtype, method: str) -> None:
    settings = {"sparsity": 0.6, "prior": PRIOR} if method == "dart" else {"sparsity": 0.6}
    if not _executors(name):
        reason = next(why for refused, why in REFUSED.items() if name.startswith(refused))
        with pytest.raises(ConfigError, match=reason):
            prune(shared_model(name, dtype), method, executor="native", **settings)
        return
    compact, masks, wanted = _logits(name, dtype, method, executor="compact", **settings)
    for executor in _executors(name):
        run, same, found = _logits(name, dtype, method, executor=executor, **settings)
        assert apart(found, wanted) < TOLERANCE[dtype]
        assert len(same) == len(masks) == 1
        ours, theirs = run.report(), compact.report()
        # its drift signal is an attention output, which a whole step does not show
        watched = executor == "slim" and method == "dart-prompt"
        assert ours.executor == ("native" if watched else executor)
        assert ours.achieved_sparsity == theirs.achieved_sparsity > 0.5
        assert ours.ffn_bytes_share <= theirs.ffn_bytes_share
        if executor == "native":  # slim holds the room of a step too, much beside tiny weights
            assert ours.extra_memory_bytes < theirs.extra_memory_bytes


def test_an_up_projection_by_inputs_is_read_as_it_lies() -> None:
    """Conv1D holds [D, I]: laid out while attached, its neurons are rows to all that look."""
    model = shared_model("gpt2")
    weight = model.transformer.h[1].mlp.c_fc.weight
    up = weight.detach().t().clone()
    with Same(model):
        for _ in range(2):
            run = prune(model, "griffin", score="weight", sparsity=0.5, executor="native")
            assert torch.equal(run.layers[1].up, up)
            with run:
                assert weight.stride() == (1, 32) and torch.equal(weight.t(), up)
                assert torch.equal(run.layers[1].up, up)
                torch.testing.assert_close(run.layers[1].in_norms, up.norm(dim=1))
                decode(model, _ids(), PROMPT)
            assert weight.stride() == (48, 1) and torch.equal(run.layers[1].up, up)


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize(
    ("name", "choice"),
    cases([*product(SHAPES[:4], [0]), *product(["llama", "gpt2"], range(3))], RUN, range(3)),
)
def test_tokens_choose_natively(name: str, choice: int) -> None:
    """Copies, candidates, winners and what the others stand at: what masking by torch gives."""
    model, found = shared_model(name), {}
    for executor in ("masked", "compact", *_executors(name)):
        run = prune(model, "dart-token", executor=executor, prior=PRIOR, **CHOICES[choice])
        with run:
            found[executor] = decode(model, _ids(), PROMPT)
            taken = run.patch.slim
            assert taken is None or taken.steps == DECODED
        report = run.report()
        assert report.executor == executor and report.achieved_sparsity > 0.45
    for executor in _executors(name):
        assert apart(found[executor], found["masked"]) < TOLERANCE[torch.float32], executor
        assert apart(found[executor], found["compact"]) < TOLERANCE[torch.float32], executor


@pytest.mark.parametrize("executor", ["native", "slim"])
@pytest.mark.parametrize("name", SLIM)
def test_observed_tokens_and_new_masks(name: str, executor: str) -> None:
    """Evidence of decoded tokens, read by the kernels, leads to compact's masks."""
    settings = {**REMASKS, "masking_step": 3}
    _, wanted, logits = _logits(name, torch.float32, "dart", executor="compact", **settings)
    _, found, close = _logits(name, torch.float32, "dart", executor=executor, **settings)
    assert apart(close, logits) < TOLERANCE[torch.float32]
    assert [step for step, _, _ in found] == [step for step, _, _ in wanted] == [3]
    for ours, theirs in zip(found[0][2], wanted[0][2], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.contract("sparsity 0 is bit-identical")
@pytest.mark.parametrize("name", RUN)
def test_native_is_bit_identical_at_sparsity_zero(name: str) -> None:
    for dtype in DTYPES:
        run, masks, logits = _logits(name, dtype, "griffin", sparsity=0.0, executor="native")
        assert torch.equal(logits, decode(run.model, _ids(), PROMPT)) and masks == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SLIM)
def test_slim_at_sparsity_zero_is_dense_within_rounding(name: str, dtype: torch.dtype) -> None:
    run, _, logits = _logits(name, dtype, "griffin", sparsity=0.0, executor="slim")
    dense = decode(run.model, _ids(), PROMPT)
    assert torch.equal(logits[:, :PROMPT], dense[:, :PROMPT])
    assert apart(logits, dense) < TOLERANCE[dtype]
    assert not torch.equal(logits, dense) or dtype == torch.bfloat16
    assert run.report().decoded_tokens == DECODED


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("executor", ["native", "slim"])
def test_nothing_is_left_behind(executor: str) -> None:
    model = shared_model("qwen2")
    with Same(model):
        with (
            contextlib.suppress(ZeroDivisionError),
            prune(model, "dart", executor=executor, **REMASKS),
        ):
            generate(model, tokens(1, 70), 8)
            raise ZeroDivisionError
        run = prune(model, "griffin", sparsity=0.5, executor=executor)
        for _ in range(2):
            with run:
                assert model.model.layers[0].mlp.down_proj.weight.stride() == (1, 32)
                generate(model, tokens(2, 20), 4)
            assert model.model.layers[0].mlp.down_proj.weight.stride() == (48, 1)


@pytest.mark.parametrize("executor", ["native", "slim"])
@pytest.mark.parametrize("rows", [1, 3])
def test_generate(rows: int, executor: str) -> None:
    model, found = shared_model("llama"), []
    for one in ("compact", executor):
        with prune(model, "griffin", sparsity=0.5, executor=one):
            found.append(generate(model, tokens(rows, 20, seed=5), 12))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert apart(found[1].logits, found[0].logits) < 1e-5


def test_projections_outside_the_ffns_are_native_too() -> None:
    model = shared_model("gemma")
    with prune(model, "griffin", sparsity=0.5, executor="native"), torch.no_grad():
        head = model.lm_head
        run = head.__dict__["forward"]
        calls = []
        run.make.__self__._run = lambda x, w, b: calls.append(len(x)) or F.linear(x, w, b)
        for tokens_at_once in (1, 32, 33):
            assert head(torch.randn(1, tokens_at_once, 32)).shape == (1, tokens_at_once, 96)
        with torch.enable_grad():
            assert head(torch.randn(1, 1, 32)).requires_grad
    assert calls == [1, 32] and "forward" not in head.__dict__


@pytest.mark.parametrize("executor", ["native", "slim"])
def test_many_tokens_at_once(executor: str) -> None:
    """Above a few dozen vectors the rows are gathered: the same numbers."""
    model, found = shared_model("qwen3"), []
    ids = tokens(1, 120, seed=6)
    for one in ("compact", executor):
        run = prune(model, "griffin", sparsity=0.5, executor=one)
        with run, torch.no_grad():
            first = model(ids[:, :20], use_cache=True)
            with run.decoding():
                found.append(model(ids[:, 20:], cache=first.cache).logits)
    assert apart(found[1], found[0]) < 1e-5


def test_a_cropped_cache_and_a_long_one() -> None:
    model, found = shared_model("llama"), []
    ids = tokens(1, 200, seed=9)
    for executor in ("compact", "slim"):
        with prune(model, "griffin", sparsity=0.5, executor=executor), torch.no_grad():
            output = model(ids[:, :20], use_cache=True)
            for end in range(20, 200):
                output = model(ids[:, end : end + 1], cache=output.cache)
            output.cache.crop(-40)
            for end in range(160, 170):
                output = model(ids[:, end : end + 1], cache=output.cache)
            assert output.cache.get_seq_length() == 170
            found.append(output.logits)
    assert apart(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("executor", ["masked", "compact", "native", "slim", "graph"])
def test_tokens_observed_after_a_second_prompt_are_those_of_the_untouched_model(
    executor: str,
) -> None:
    """Logits, evidence and accounting: the masks of the turn before have no part in them."""
    model, text = shared_model(), tokens(1, 40)
    settings = {"sparsity": 0.5, "min_evidence": 8, "remask": "decay", "executor": executor}
    with prune(model, "griffin", **settings) as run:
        cache = new_cache(model)
        step(model, text[:, :20], cache)
        step(model, text[:, 20:21], cache)
        step(model, text[:, 21:24], cache)
        before = copy.deepcopy(cache)
        found = [step(model, text[:, at : at + 1], cache) for at in (24, 25, 26)]
        phase, early = run.phase, run.report()
        sums = [layer.sums["score"].total.clone() for layer in state_of(run).evidence]
        step(model, text[:, 27:28], cache)
    assert (phase, run.phase) == ("observe", "pruned")
    dense = [step(model, text[:, at : at + 1], before) for at in (24, 25, 26)]
    assert apart(torch.cat(found), torch.cat(dense)) < 1e-5
    report = run.report()
    assert (early.dense_token_share, report.dense_token_share) == (3 / 4, 3 / 5)
    assert report.achieved_sparsity == 0.5 * 2 / 5
    # GRIFFIN's statistic sums to 1 over each token's neurons
    assert [float(total.sum()) for total in sums] == pytest.approx([2 + 3 + 3] * 4, rel=1e-4)


def test_gradients_go_through_the_weights() -> None:
    model = shared_model("llama")
    ids = tokens(1, 24)
    with prune(model, "griffin", sparsity=0.5, executor="slim"):
        output = model(ids[:, :20], use_cache=True)
        model(ids[:, 20:21], cache=output.cache).logits.sum().backward()
    gradient = model.model.layers[0].mlp.down_proj.weight.grad
    assert gradient is not None and float(gradient.abs().sum()) > 0
    model.zero_grad(set_to_none=True)


# refusals


def test_other_dtypes_and_rows_of_their_own() -> None:
    with pytest.raises(ConfigError, match="float16, not float32 or bfloat16"):
        prune(shared_model("llama", torch.float16), "griffin", sparsity=0.5, executor="native")
    with pytest.raises(ConfigError, match="a mask per row"):
        PruneConfig.build("griffin", executor="native", batch="per_row")
    with pytest.raises(ConfigError, match=r'which is a gemma model, not one of .*; use "native"'):
        prune(shared_model("gemma"), "griffin", sparsity=0.5, executor="slim")


@pytest.fixture
def undone() -> Iterator[None]:
    """What is known of the build is found out anew, before and after."""
    build.why_not.cache_clear()
    yield
    build.why_not.cache_clear()


@pytest.mark.usefixtures("undone")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    build.why_not.cache_clear()
    with pytest.raises(ConfigError, match=r'DART_NATIVE=0 keeps .* off; use executor "compact"'):
        prune(shared_model("llama"), "griffin", sparsity=0.5, executor="native")
    assert prune(shared_model("llama"), "griffin", sparsity=0.5).executor == "compact"


@pytest.mark.usefixtures("undone")
def test_a_build_that_fails_is_said_once_and_compact_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DART_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    build.why_not.cache_clear()
    run = prune(shared_model("llama"), "griffin", sparsity=0.5)
    assert run.executor == run.executor == "compact"
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "no C++ compiler" in caplog.text and "slower executor compact" in caplog.text
    with pytest.raises(ConfigError, match='use executor "compact" or "auto"'):
        prune(shared_model("llama"), "griffin", sparsity=0.5, executor="slim")


def test_auto_is_the_fastest_that_can_run() -> None:
    wanted = {"llama": "slim", "gemma": "native", "gpt2": "native", "opt": "masked"}
    for name, executor in wanted.items():
        assert prune(shared_model(name), "griffin", sparsity=0.5).executor == executor
        assert prune(shared_model(name), "griffin", sparsity=0.0).executor in ("compact", "masked")
    half = shared_model("llama", torch.float16)
    assert prune(half, "griffin", sparsity=0.5).executor == "compact"
    rows = prune(shared_model("llama"), "griffin", sparsity=0.5, batch="per_row")
    assert rows.executor == "masked"


@pytest.mark.usefixtures("undone")
def test_a_compiler_that_refuses_is_quoted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DART_CACHE", str(tmp_path))
    wrong = {**build.sources(), "kernels.cpp": '#error "not today"\n'}
    monkeypatch.setattr(build, "sources", lambda: wrong)
    build.why_not.cache_clear()
    assert "not today" in build.why_not() and len(caplog.records) == 1


@pytest.mark.parametrize("method", ["griffin", "dart-token"])
@pytest.mark.parametrize("executor", ["masked", "native", "slim"])
def test_a_piece_of_one_token_is_evidence_too(executor: str, method: str) -> None:
    """A text that goes on after its cache, and a prompt in pieces: masks see every token."""
    model, ids = tiny("llama"), tokens(1, 16)
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    found = []
    for way in (executor, "masked"):
        with prune(model, method, sparsity=0.5, executor=way):
            first = model.generate(ids, prefill_chunk_size=5, **options)
            cache = {"past_key_values": first.past_key_values}
            second = model.generate(first.sequences, **cache, **options)
        found.append(torch.stack([*first.logits, *second.logits]))
    assert apart(*found) < 1e-4
