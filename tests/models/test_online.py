"""Against the real hub, by ``make test-online`` alone: every data set, and a model end to end.

Skipped unless ``DART_TEST_ONLINE=1``.  After it has passed, write the date into
``catalogue.LAST_RUN``, into the entries that were read, and into the docs.
"""

import os
from dataclasses import replace
from itertools import islice

import pytest
import torch

from dart_llm.data import texts
from dart_llm.data.datasets import DATA_SETS, documents, hub_text, mmlu_questions, rows
from dart_llm.models.loading import load
from dart_llm.session.run import prune

pytestmark = [
    pytest.mark.online,
    pytest.mark.skipif(
        os.environ.get("DART_TEST_ONLINE") != "1", reason="needs the hub: make test-online"
    ),
]


@pytest.mark.parametrize("source", DATA_SETS.values(), ids=lambda source: source.name)
def test_five_rows_of_every_data_set(source):
    if source.gated and not os.environ.get("HF_TOKEN"):
        pytest.skip(f"{source.hub_id} is gated: accept its conditions and set HF_TOKEN")
    found = list(islice(rows(replace(source, first=5), "run this test online"), 5))
    assert len(found) == 5
    for role, columns in source.columns.items():
        for column in columns:
            said = [str(row[column]).strip(" []{}'\",") for row in found]
            assert any(said), (role, column)


def test_texts_questions_and_documents():
    assert "Robert Boulter" in hub_text("wikitext2", 20)
    assert hub_text("hub:allenai/c4/en:validation[:5]:text").split() == (hub_text("c4", 5).split())
    assert hub_text("c4_train", 5) != hub_text("c4", 5)
    assert len(mmlu_questions("astronomy")) == 5 + 16
    assert {row["answer"] for row in mmlu_questions("anatomy", answers=True)} <= {0, 1, 2, 3}
    for name in ("xsum", "cnn_dailymail", "multi_news", "gov_report"):
        read = documents(name, 5)
        assert len({row.id for row in read}) == 5
        for row in read:  # clean summaries
            assert len(row.document) > len(row.summary) > 10 and row.summary[0] not in "[–"
            assert not {"|||||", "NEWLINE_CHAR"} & set(row.document.split())


def test_a_model_of_the_hub_is_loaded_and_pruned():
    model, tokenizer = load("HuggingFaceTB/SmolLM2-135M-Instruct")
    inputs = tokenizer(" ".join(texts.read("tides").split()[:40]), return_tensors="pt")
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    before = model.generate(**inputs, **settings)
    with prune(model, method="griffin", sparsity=0.5) as run:
        assert model.generate(**inputs, **settings).shape == before.shape
    assert run.report().sparsity_while_pruned == pytest.approx(0.5, abs=0.01)
    assert torch.equal(model.generate(**inputs, **settings), before)
