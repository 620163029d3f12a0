"""SmolLM2-135M in float32 gives the tokens of ``prune`` in transformers, 40 for each prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TEXTS, Answer, Engine, _loaded, arguments, assert_same, reference
from vllm.exceptions import VLLMValidationError

COUNT = 40

METHODS = [
    ("griffin", {}),
    ("griffin-refresh", {"drift": "interval 12", "remask": {"observe_tokens": 6}}),
    ("dart", {}),
    (  # so that the last hidden states trigger re-masks
        "dart",
        {
            "drift": {"rule": "windows 4 1 0", "min_distance": 8, "max_dense_share": 0.9},
            "min_evidence": 0,
            "remask": {"observe_tokens": 6},
        },
    ),
]


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [tokenizer(text).input_ids for text in TEXTS]


@pytest.mark.parametrize("budget", [None, 40], ids=["whole", "chunked"])
def test_same_tokens(budget: int | None, smollm2: Path, prompts: Any, engine: Any) -> None:
    llm = engine(smollm2, dart={"learn": ["dart"]}, max_num_batched_tokens=budget)
    for method, settings in METHODS:
        expected = [
            reference(smollm2, ids, COUNT, method, sparsity=0.5, **settings) for ids in prompts
        ]
        extra = arguments(method, 0.5, **settings)
        for ids, answer in zip(prompts, expected, strict=True):
            assert_same(llm.answers([ids], COUNT, extra)[0], answer)
        for got, answer in zip(llm.answers(prompts, COUNT, extra), expected, strict=True):
            assert_same(got, answer)
    assert llm.pruning.totals.values["remasks"] > 0


def test_a_long_prompt(smollm2: Path, prompts: Any, engine: Any) -> None:
    ids = [token for prompt in prompts * 4 for token in prompt]
    llm = engine(smollm2, max_model_len=512, max_num_batched_tokens=100)
    for method, settings in (("dense", {}), ("griffin", {"sparsity": 0.5})):
        expected = reference(smollm2, ids, 16, method, **settings)
        assert_same(llm.answers([ids], 16, arguments(method, **settings))[0], expected)


def test_masks_of_a_file(smollm2: Path, prompts: Any, engine: Any, tmp_path: Path) -> None:
    """Named masks, the model narrowed at load, and the exported folder without any plug-in."""
    from safetensors.torch import save_file

    from dart_llm import prune

    model, ids = _loaded(smollm2), prompts[0]
    with prune(model, "griffin", sparsity=0.5, executor="masked") as run:
        model.generate(torch.tensor([ids]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        kept = run.masks()
        run.export(tmp_path / "narrow")
    file = str(tmp_path / "masks.safetensors")
    save_file({f"remask0.layer{n}.ids": torch.as_tensor(v) for n, v in kept.items()}, file)
    narrow = [reference(tmp_path / "narrow", ids, COUNT, "dense") for ids in prompts]

    llm = engine(smollm2, dart={"shared": {"topic": file}})
    expected = reference(smollm2, ids, COUNT, "griffin", sparsity=0.5)
    assert_same(llm.answers([ids], COUNT, {"dart_masks": "topic"})[0], expected)
    before = dict(llm.pruning.state.counts)
    assert_same(llm.answers([ids] * 3, COUNT, {"dart_masks": "topic"})[2], expected)
    after = llm.pruning.state.counts  # requests with the same mask share narrow weights
    assert after["rows"] <= before["rows"] + 1
    assert after["narrow"] >= before["narrow"] + COUNT - 2

    llm = engine(smollm2, dart={"masks": file})
    check_all(llm, prompts, narrow)
    with pytest.raises(VLLMValidationError, match="narrowed the model"):
        llm.add("1", ids, 4, arguments("griffin", 0.5))

    check_all(engine(tmp_path / "narrow", worker="auto"), prompts, narrow)


def check_all(llm: Engine, prompts: Any, expected: list[Answer]) -> None:
    for got, answer in zip(llm.answers(prompts, COUNT, None), expected, strict=True):
        assert_same(got, answer)


def test_settings_are_json_too(smollm2: Path, prompts: Any, engine: Any) -> None:
    method, settings = METHODS[1]
    extra = {"dart": method, "dart_sparsity": 0.3, "dart_settings": json.dumps(settings)}
    expected = reference(smollm2, prompts[0], 24, method, sparsity=0.3, **settings)
    assert_same(engine(smollm2).answers(prompts[:1], 24, extra)[0], expected)
