"""What vLLM does to requests, which must not change what a pruned request is answered.

Tiny models; test_smollm2.py has the real one.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TINY_PROMPTS, VOCAB, Engine, arguments, assert_same, reference
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, RequestOutputKind

from dart_llm.errors import ConfigError

REFRESH = {"drift": "interval 6", "remask": {"observe_tokens": 4}}
GRIFFIN = arguments("griffin", 0.5)


@pytest.fixture
def llama(tiny: Any) -> Path:
    return tiny("llama")  # type: ignore[no-any-return]


def test_chunked_prefill(llama: Path, engine: Any) -> None:
    llm = engine(llama, max_num_batched_tokens=16, max_num_seqs=4)
    for method, settings in (("griffin", {}), ("griffin-refresh", REFRESH)):
        answers = llm.answers(TINY_PROMPTS, 20, arguments(method, 0.5, **settings))
        for ids, answer in zip(TINY_PROMPTS, answers, strict=True):
            assert_same(answer, reference(llama, ids, 20, method, sparsity=0.5, **settings))


def test_preempted_requests_keep_their_masks(llama: Path, engine: Any) -> None:
    """So few blocks that requests are preempted and their tokens are computed again."""
    llm = engine(llama, num_gpu_blocks_override=5, block_size=32, max_model_len=128)
    long = 80
    extra = arguments("griffin-refresh", 0.5, **REFRESH)
    answers = llm.answers(TINY_PROMPTS, long, extra)
    assert llm.pruning.running.replayed > 0
    for ids, answer in zip(TINY_PROMPTS, answers, strict=True):
        assert_same(answer, reference(llama, ids, long, "griffin-refresh", sparsity=0.5, **REFRESH))


def test_the_prefix_cache_serves_only_dense_requests(llama: Path, engine: Any) -> None:
    ids = torch.randint(3, VOCAB, (100,), generator=torch.Generator().manual_seed(9)).tolist()
    pruned = reference(llama, ids, 60, "griffin", sparsity=0.5)
    longer = [*ids, *pruned.tokens]
    llm = engine(llama, enable_prefix_caching=True, block_size=32)
    assert_same(llm.answers([ids], 60, None)[0], reference(llama, ids, 60, "dense"))
    assert_same(llm.answers([ids], 60, GRIFFIN)[0], pruned)
    assert_same(llm.answers([ids], 60, GRIFFIN)[0], pruned)
    # blocks of the pruned answer must not serve a dense request for the same text
    assert_same(llm.answers([longer], 8, None)[0], reference(llama, longer, 8, "dense"), 1e-4)


def test_several_sequences_of_one_request(llama: Path, engine: Any) -> None:
    llm, ids = engine(llama, enable_prefix_caching=True, block_size=32), [*range(3, 73)]
    options = {"seed": 1, "output_kind": RequestOutputKind.FINAL_ONLY}
    llm.add("n", ids, 12, GRIFFIN, n=3, temperature=1.0, **options)
    assert len({tuple(answer.tokens) for answer in llm.run()["n"]}) == 3
    _finish(llm)
    assert llm.pruning.totals.values["requests"] == 3
    assert llm.pruning.totals.values["dense_tokens"] == 0
    llm.add("n", ids, 12, GRIFFIN, n=2, temperature=1e-6, **options)
    expected = reference(llama, ids, 12, "griffin", sparsity=0.5).tokens
    assert [answer.tokens for answer in llm.run()["n"]] == [expected] * 2


def test_mixed_requests_and_aborts(llama: Path, engine: Any) -> None:
    """200 requests, 8 at a time: dense and pruned, a quarter aborted; nothing is left of them."""
    llm = engine(llama, max_num_batched_tokens=64)
    kinds: dict[str, dict[str, Any]] = {
        "dense": {},
        "griffin": {"sparsity": 0.5},
        "griffin-refresh": {"sparsity": 0.5, **REFRESH},
    }
    names = [f"{method}/{number}" for number in range(67) for method in kinds][:200]
    aborts = {}
    for number, name in enumerate(names):
        method = name.split("/")[0]
        llm.add(name, TINY_PROMPTS[number % 3], 16, arguments(method, **kinds[method]))
        if number % 4 == 1:
            aborts[2 + number * 2] = name
    done = llm.run(aborts)
    aborted = len(names) - len(done)
    for number, name in enumerate(names):
        if name in done:
            method = name.split("/")[0]
            expected = reference(llama, TINY_PROMPTS[number % 3], 16, method, **kinds[method])
            assert_same(done[name][0], expected)
    assert aborted >= 40
    _finish(llm)
    assert not any(llm.pruning.running.requests.values())
    assert not llm.pruning.state._narrow


def _finish(llm: Engine) -> None:
    """The engine learns of ended requests in its next step."""
    llm.add("last", TINY_PROMPTS[0], 2)
    llm.run()


def test_memory_is_flat(llama: Path, engine: Any) -> None:
    """Nothing of a request stays: after hundreds of them, as many tensors exist as before."""
    llm = engine(llama)

    def tensors() -> int:
        _finish(llm)
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    llm.answers(TINY_PROMPTS * 4, 4, GRIFFIN)
    before = tensors()
    for _ in range(25):
        llm.answers(TINY_PROMPTS * 4, 4, GRIFFIN)
    assert tensors() <= before + 5
    assert len(llm.pruning.running.requests) == 1  # "last", of which the engine will be told


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"dart": "grifin"}, "did you mean griffin"),
        ({"dart": "griffin", "dart_sparsity": 1.5}, r"sparsity 1.5 must lie in \[0, 1\)"),
        ({"dart": "griffin", "dart_sparsity": "a"}, "must be a number"),
        ({"dart": "griffin", "dart_sparsty": 0.5}, "did you mean dart_sparsity"),
        ({"dart_sparsity": 0.5}, "needs a method"),
        ({"dart": "dart-token"}, "lets every token select"),
        ({"dart": "wanda"}, "calibration"),
        ({"dart": "dart"}, "did not learn"),
        ({"dart": "published", "dart_settings": '{"score": "max"}'}, "reads the embedding"),
        ({"dart": "griffin", "dart_settings": "{"}, "JSON text"),
        ({"dart": "griffin", "dart_settings": {"budget": {"table": "9:0.5"}}}, "3 layers"),
        ({"dart_masks": "topic"}, "unknown mask"),
    ],
)
def test_bad_values_are_errors_of_their_request(
    extra: dict[str, Any], message: str, llama: Path, shared_engine: Engine
) -> None:
    with pytest.raises(VLLMValidationError, match=message):
        shared_engine.add("bad", TINY_PROMPTS[0], 4, extra)
    answer = shared_engine.answers(TINY_PROMPTS[:1], 8, GRIFFIN)[0]
    assert_same(answer, reference(llama, TINY_PROMPTS[0], 8, "griffin", sparsity=0.5))


@pytest.fixture(scope="module")
def shared_engine(tiny: Any) -> Engine:
    return Engine(tiny("llama"))


@pytest.mark.parametrize("method", ["static", "random", "published"])
def test_other_methods(method: str, llama: Path, shared_engine: Engine) -> None:
    expected = [reference(llama, ids, 16, method, sparsity=0.5) for ids in TINY_PROMPTS]
    assert expected[0].tokens != reference(llama, TINY_PROMPTS[0], 16, "dense").tokens
    answers = shared_engine.answers(TINY_PROMPTS, 16, arguments(method, 0.5))
    for answer, wanted in zip(answers, expected, strict=True):
        assert_same(answer, wanted)


def test_defaults_of_the_server(llama: Path, engine: Any) -> None:
    llm = engine(llama, dart={"method": "griffin", "sparsity": 0.5})
    griffin = reference(llama, TINY_PROMPTS[0], 16, "griffin", sparsity=0.5)
    dense = reference(llama, TINY_PROMPTS[0], 16, "dense")
    assert_same(llm.answers(TINY_PROMPTS[:1], 16, None)[0], griffin)
    assert_same(llm.answers(TINY_PROMPTS[:1], 16, {"dart": "dense"})[0], dense)
    processor = llm.core.input_processor
    with pytest.raises(VLLMValidationError, match="beam search cannot be pruned"):
        processor.resolve_watermarking(BeamSearchParams(beam_width=2, max_tokens=4))


def test_without_the_worker_pruning_is_refused(llama: Path, engine: Any) -> None:
    with pytest.raises(ConfigError, match=r"start it with --worker-cls dart_vllm.Worker"):
        engine(llama, worker="auto", dart={"method": "griffin"})
    llm = engine(llama, worker="auto")
    with pytest.raises(VLLMValidationError, match=r"start it with --worker-cls dart_vllm.Worker"):
        llm.add("1", TINY_PROMPTS[0], 4, GRIFFIN)
    assert_same(
        llm.answers(TINY_PROMPTS[:1], 8, None)[0], reference(llama, TINY_PROMPTS[0], 8, "dense")
    )
