"""Tiny models of all tested architectures give the tokens of ``prune`` in transformers."""

from __future__ import annotations

from typing import Any

import pytest
from cases import TINY_PROMPTS, arguments, assert_same, reference

GATED = ("llama", "llama-bias", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")

METHODS = {
    "griffin": {},
    "griffin-refresh": {"drift": "interval 6", "remask": {"observe_tokens": 4}},
    # layers of unequal counts, the residual stream, compensation, the attention's output
    "dart-prompt": {
        "min_evidence": 0,
        "drift": {"rule": "windows 2 1 0", "min_distance": 4, "max_dense_share": 0.9},
        "remask": {"observe_tokens": 4},
    },
}


@pytest.mark.parametrize("name", GATED)
def test_same_tokens(name: str, tiny: Any, engine: Any) -> None:
    folder, llm = tiny(name), engine(tiny(name))
    dense = [reference(folder, ids, 24, "dense") for ids in TINY_PROMPTS]
    for method, settings in METHODS.items():
        expected = [
            reference(folder, ids, 24, method, sparsity=0.4, **settings) for ids in TINY_PROMPTS
        ]
        assert [e.tokens for e in expected] != [d.tokens for d in dense]
        extra = arguments(method, 0.4, **settings)
        for ids, answer in zip(TINY_PROMPTS, expected, strict=True):
            assert_same(llm.answers([ids], 24, extra)[0], answer)
        for got, answer in zip(llm.answers(TINY_PROMPTS, 24, extra), expected, strict=True):
            assert_same(got, answer)
    for got, answer in zip(llm.answers(TINY_PROMPTS, 24, None), dense, strict=True):
        assert_same(got, answer)
    assert all(llm.pruning.state.counts[way] for way in ("dense", "narrow", "rows"))


@pytest.mark.parametrize(("name", "reason"), [("mixtral", "MixtralDecoderLayer"), ("gpt2", "GPT2")])
def test_other_ffns_are_refused_by_name(name: str, reason: str, tiny: Any, engine: Any) -> None:
    with pytest.raises(Exception, match=f"{reason}.*dart-vllm cannot"):
        engine(tiny(name))
