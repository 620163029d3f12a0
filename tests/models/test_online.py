"""Against the real hub, by ``make test-online`` alone: every data set, and a model end to end.

Skipped unless ``DART_TEST_ONLINE=1``.  After it has passed, write the date into
``catalogue.LAST_RUN``, into the entries that were read, and into the docs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from dart_llm.data import texts
from dart_llm.data.datasets import (
    DATA_SETS,
    DataSet,
    documents,
    hub_text,
    mmlu_questions,
    rows,
)
from dart_llm.models.loading import load
from dart_llm.session.run import prune

pytestmark = [
    pytest.mark.online,
    pytest.mark.skipif(
        os.environ.get("DART_TEST_ONLINE") != "1", reason="needs the hub: make test-online"
    ),
]

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WAY_OUT = "run this test where the hub can be reached"


def leaves(value: Any) -> Iterator[Any]:
    """The values inside lists and mappings."""
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


@pytest.mark.parametrize("source", DATA_SETS.values(), ids=lambda source: source.name)
def test_five_rows_of_every_data_set(source: DataSet) -> None:
    if source.gated and not os.environ.get("HF_TOKEN"):
        pytest.skip(f"{source.hub_id} is gated: accept its conditions and set HF_TOKEN")
    found = list(islice(rows(replace(source, first=5), WAY_OUT), 5))
    assert len(found) == 5
    for role, columns in source.columns.items():
        for column in columns:
            values = [leaf for row in found for leaf in leaves(row[column])]
            assert all(isinstance(value, str | int) for value in values), (role, column)
            assert any(str(value).strip() for value in values), (role, column)


def test_texts_and_questions() -> None:
    assert "Robert Boulter" in hub_text("wikitext2", 20)
    assert len(hub_text("c4", 5)) > 500
    assert hub_text("hub:allenai/c4/en:validation[:5]:text").split() == (hub_text("c4", 5).split())
    assert hub_text("c4_train", 5) != hub_text("c4", 5)
    assert len(mmlu_questions("astronomy")) == 5 + 16
    assert {row["answer"] for row in mmlu_questions("anatomy", answers=True)} <= {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["xsum", "cnn_dailymail", "multi_news", "gov_report"])
def test_documents_have_clean_summaries(name: str) -> None:
    found = documents(name, 5)
    assert len({row["id"] for row in found}) == 5
    for row in found:
        assert len(row["document"]) > len(row["summary"]) > 10
        assert row["summary"][0] not in "[–"
        assert not {"|||||", "NEWLINE_CHAR"} & set(row["document"].split())


def test_a_model_of_the_hub_is_loaded_pruned_and_generates() -> None:
    model, tokenizer = load(MODEL)
    prompt = " ".join(texts.read("tides").split()[:40])  # too short a prompt is not pruned
    inputs = tokenizer(prompt, return_tensors="pt")
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    before = model.generate(**inputs, **settings)
    with prune(model, method="griffin", sparsity=0.5) as run:
        pruned = model.generate(**inputs, **settings)
    assert pruned.shape == before.shape
    assert run.report().sparsity_while_pruned == pytest.approx(0.5, abs=0.01)
    assert torch.equal(model.generate(**inputs, **settings), before)
