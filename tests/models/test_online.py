"""Against the real hub, by ``make test-online`` alone: every data set, and a model end to end.

Skipped unless ``DART_TEST_ONLINE=1``.  After it has passed, write the date into
``datasets.LAST_RUN`` and into the docs.
"""

import os
from dataclasses import replace
from itertools import islice

import pytest
import torch

from dart_llm.data import texts
from dart_llm.data.datasets import DATA_SETS, rows
from dart_llm.models.loading import load
from dart_llm.session.run import prune

SKIPPED = os.environ.get("DART_TEST_ONLINE") != "1"
pytestmark = [
    pytest.mark.online,
    pytest.mark.skipif(SKIPPED, reason="needs the hub: make test-online"),
]


@pytest.mark.parametrize("source", DATA_SETS.values(), ids=lambda source: source.name)
def test_five_rows_of_every_data_set(source):
    if source.gated and not os.environ.get("HF_TOKEN"):
        pytest.skip(f"{source.hub_id} is gated: accept its conditions and set HF_TOKEN")
    first = list(islice(rows(replace(source, first=5), "run this test online"), 5))
    assert len(first) == 5
    for role, columns in source.columns.items():
        for column in columns:
            values = [str(row[column]).strip(" []{}'\",") for row in first]
            assert any(values), (role, column)


def test_a_model_of_the_hub_is_loaded_and_pruned():
    model, tokenizer = load("HuggingFaceTB/SmolLM2-135M-Instruct")
    inputs = tokenizer(" ".join(texts.read("tides").split()[:40]), return_tensors="pt")
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    before = model.generate(**inputs, **settings)
    with prune(model, method="griffin", sparsity=0.5) as run:
        assert model.generate(**inputs, **settings).shape == before.shape
    assert run.report().sparsity_while_pruned == pytest.approx(0.5, abs=0.01)
    assert torch.equal(model.generate(**inputs, **settings), before)
