"""What ``--dry-run`` assumes where nothing was measured."""

from __future__ import annotations

import pytest

from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.model_facts import ModelSize, model_size, named_weights
from dart_llm.studies.sweep.study import rough_items, rough_tokens


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("meta-llama/Llama-3.1-8B", 8_000_000_000),
        ("Qwen/Qwen2.5-0.5B-Instruct", 500_000_000),
        ("HuggingFaceTB/SmolLM2-135M/", 135_000_000),
        ("mistralai/Mixtral-8x7B-v0.1", None),
        ("nobody/nothing", None),
        ("70b-club/model", None),
    ],
)
def test_weights_by_the_name(name: str, weights: int | None) -> None:
    assert named_weights(name) == weights


def test_a_hub_model_without_the_hub() -> None:
    assert model_size(Cell("nobody/thing-8B", "dense", "x")) == ModelSize(None, 8_000_000_000)


@pytest.mark.parametrize(
    ("task", "limit", "items"),
    [
        ("hellaswag", None, 10042),
        ("hellaswag", 200, 200),
        ("rte", 5000, 277),
        ("mmlu", 2, 114),
        ("mmlu", 1000, 14042),
        ("summarize:xsum", None, 11334),
        ("summarize:mine.jsonl", None, 100),
        ("mine", 5000, 5000),
    ],
)
def test_items(task: str, limit: int | None, items: int) -> None:
    assert rough_items(Cell("m", "dense", task, options=MeasureOptions(limit=limit))) == items


def test_examples_that_a_task_brings() -> None:
    usual = rough_tokens(Cell("m", "dense", "medmcqa", options=MeasureOptions(limit=1)))
    none = rough_tokens(
        Cell("m", "dense", "medmcqa", options=MeasureOptions(limit=1, num_fewshot=0))
    )
    assert (usual, none) == (2400, 400)
