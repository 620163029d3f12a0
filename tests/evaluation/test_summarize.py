"""``summarize``: end to end on a tiny model, the protocols, and what must be refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch

from dart_llm.data import texts
from dart_llm.errors import ConfigError, DartError, UnknownName
from dart_llm.evaluation import text_metrics as rouge
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.summarization import count, fit
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.prepare import PreparedMethod as Candidate
from dart_llm.session.run import prune
from steps import Same
from summary_cases import (
    DOCUMENTS,
    OPTIONS,
    Both,
    candidate,
    load_writer,
    run,
    texts_of,
    write_documents,
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Both:
    return load_writer(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_documents(tmp_path_factory.mktemp("data") / "four.jsonl")


@pytest.fixture
def ending(loaded) -> Callable[[str], Both]:
    """The model and a tokenizer that ends sequences with a letter."""

    def make(letter: str) -> Both:
        tokenizer = copy.deepcopy(loaded[1])
        tokenizer.eos_token = letter
        return loaded[0], tokenizer

    return make


def greedy(loaded, prompt: list[int], tokens: int = OPTIONS.max_output) -> str:
    model, tokenizer = loaded
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True))


def test_dense_end_to_end(loaded, data):
    measured = run(candidate(loaded), data)
    assert (measured.task, measured.metric) == (f"summarize:{data}", "rougeL")
    assert measured.higher_is_better and measured.accounting is None and measured.masks == 0
    assert [item["id"] for item in measured.items] == ["cat", "dog", "duck", "pig"]
    for row, item, sample in zip(DOCUMENTS, measured.items, measured.samples, strict=True):
        prompt = fit(loaded[1], row["document"], 1024, 12).ids
        assert sample["prompt_tokens"] == len(prompt)
        assert sample["text"] == greedy(loaded, prompt)
        assert sample["reference"] == row["summary"]
        assert (sample["finish"], item["tokens"], sample["shortened"]) == ("length", 12, False)
        scores = {name: item[name] for name in rouge.METRICS}
        assert scores == rouge.rouge_scores(sample["text"], row["summary"])
    for name in rouge.METRICS:
        mean = sum(item[name] for item in measured.items) / 4
        assert measured.metrics[name] == pytest.approx(mean)
    assert measured.notes == ("the summary was cut at 12 tokens in 4 of 4 documents",)
    json.dumps(measured.to_dict(), allow_nan=False)


def test_limit_and_count(loaded, data):
    assert count(data, OPTIONS) == 4
    two = MeasureOptions(max_output=12, limit=2)
    assert count(data, two) == 2
    assert [item["id"] for item in run(candidate(loaded), data, two).items] == ["cat", "dog"]


def test_pruned_summaries_are_those_of_prune(loaded, data):
    model, tokenizer = loaded
    with Same(model):
        measured = run(candidate(loaded, "griffin"), data)
    for row, text in zip(DOCUMENTS, texts_of(measured), strict=True):
        with prune(model, "griffin", sparsity=0.5):
            assert text == greedy(loaded, fit(tokenizer, row["document"], 1024, 12).ids)
    assert texts_of(measured) != texts_of(run(candidate(loaded), data))
    assert measured.accounting is not None
    assert "sequences" not in measured.accounting
    assert measured.accounting["achieved_sparsity"] == pytest.approx(0.5)
    assert measured.accounting["decoded_tokens"] == 4 * 11
    prompts = sum(sample["prompt_tokens"] for sample in measured.samples)
    assert measured.accounting["prompt_tokens"] == prompts
    assert measured.masks == 4
    assert [int(layer.sum()) for layer in measured.counts] == [4 * 24] * 4  # half of 48 neurons


@pytest.mark.parametrize("protocol", ["decode", "full", "published"])
def test_sparsity_zero_is_dense(loaded, data, protocol):
    dense = run(candidate(loaded), data)
    options = MeasureOptions(max_output=12, protocol=protocol)
    nothing = run(candidate(loaded, "griffin", 0.0), data, options)
    assert texts_of(nothing) == texts_of(dense)
    assert nothing.items == dense.items
    assert nothing.accounting is not None
    assert nothing.accounting["achieved_sparsity"] == 0


def test_full_prunes_the_prompt_with_masks_of_its_dense_pass(loaded, data):
    model, tokenizer = loaded
    full = run(candidate(loaded, "griffin"), data, MeasureOptions(max_output=12, protocol="full"))
    for row, text in zip(DOCUMENTS, texts_of(full), strict=True):
        prompt = fit(tokenizer, row["document"], 1024, 12).ids
        with prune(model, "griffin", sparsity=0.5) as chooser, torch.inference_mode():
            model(torch.tensor([prompt]))
            kept = {i: mask.ids for i, mask in enumerate(chooser.select()) if mask is not None}
        with prune(model, masks=kept) as given, given.decoding(prompt=True):
            assert text == greedy(loaded, prompt)
    assert full.accounting is not None
    prompts = sum(sample["prompt_tokens"] for sample in full.samples)
    assert full.accounting["decoded_tokens"] == prompts + 4 * 11
    assert full.accounting["dense_token_share"] == 0
    assert full.masks == 4
    assert texts_of(full) != texts_of(run(candidate(loaded, "griffin"), data))


def test_published_equals_full_and_says_so(loaded, data):
    found = candidate(loaded, "griffin")
    full, published = (
        run(found, data, MeasureOptions(max_output=12, protocol=protocol))
        for protocol in ("full", "published")
    )
    assert published.samples == full.samples and published.items == full.items
    assert published.accounting == full.accounting
    assert "published protocol" in published.notes[0] and "equals full" in published.notes[0]
    assert published.notes[1:] == full.notes


@pytest.mark.parametrize("where", ["tokenizer", "model"])
@pytest.mark.parametrize("method", [None, "griffin"])
def test_a_summary_ends_with_the_sequence(loaded, data, ending, where, method, monkeypatch):
    one = MeasureOptions(max_output=12, limit=1)
    text = texts_of(run(candidate(loaded, method), data, one))[0]
    end = next(letter for letter in text[2:] if letter not in text[:2])
    both = loaded
    if where == "tokenizer":
        both = ending(end)
    else:
        ids = [2, loaded[1].convert_tokens_to_ids(end)]
        monkeypatch.setattr(loaded[0].generation_config, "eos_token_id", ids)
    measured = run(candidate(both, method), data, one)
    sample, length = measured.samples[0], text.index(end)
    assert sample["finish"] == "stop"
    assert sample["text"] == text[:length]
    assert measured.items[0]["tokens"] == length
    assert measured.notes == ()
    if method:
        assert measured.accounting is not None
        assert measured.accounting["decoded_tokens"] == length


@pytest.mark.parametrize("method", [None, "griffin"])
def test_an_empty_summary_scores_zero_and_is_counted(loaded, data, ending, method):
    one = MeasureOptions(max_output=12, limit=1)
    first = texts_of(run(candidate(loaded), data, one))[0][0]
    measured = run(candidate(ending(first), method), data, one)
    assert measured.metrics == dict.fromkeys(rouge.METRICS, 0.0)
    assert (measured.items[0]["tokens"], measured.samples[0]["text"]) == (0, "")
    notes = ["the summary is empty and scores 0 in 1 of 1 documents"]
    if method:
        notes.append("the summary ended before a token ran pruned in 1 of 1 documents")
    assert list(measured.notes) == notes


def test_a_dense_summary_that_should_be_pruned_fails(loaded, data):
    found = candidate(loaded, "griffin", masking_step=50)
    with pytest.raises(ConfigError, match=r"griffin@0.5: all 11 decoded tokens .* ran dense"):
        run(found, data)
    short = run(found, data, MeasureOptions(max_output=2))
    assert "the summary ended before a token ran pruned in 4 of 4 documents" in short.notes


def test_logits_that_are_not_finite_are_refused(loaded, data):
    model = loaded[0]
    weight = model.transformer.ln_f.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0] = float("nan")
        for method in (None, "griffin"):
            with pytest.raises(DartError, match="a logit of document cat is not finite"):
                run(candidate(loaded, method), data)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_settings_that_mean_nothing(loaded, data):
    with pytest.raises(UnknownName, match="did you mean decode"):
        run(candidate(loaded), data, MeasureOptions(protocol="decoding"))
    with pytest.raises(ConfigError, match="at least 1 token"):
        run(candidate(loaded), data, MeasureOptions(max_output=0))
    with pytest.raises(ConfigError, match="no chat template"):
        run(candidate(loaded), data, MeasureOptions(apply_chat_template=True))
    with pytest.raises(ConfigError, match="context of 1024 leaves no room"):
        run(candidate(loaded), data, MeasureOptions(max_output=1000))


def test_shortened_documents_are_counted(loaded, tmp_path):
    path, text = tmp_path / "long.jsonl", "the cat went to the market. " * 60
    path.write_text(json.dumps({"document": text, "summary": "a cat."}) + "\n", encoding="utf-8")
    measured = run(candidate(loaded), str(path))
    sample = measured.samples[0]
    assert sample["shortened"]
    assert len(sample["document"]) < len(text) and text.startswith(sample["document"])
    assert 1024 - 12 - len("the cat went to the market. ") < sample["prompt_tokens"] <= 1024 - 12
    assert "the document was shortened to fit the context in 1 of 1 documents" in measured.notes


@pytest.mark.smollm2
def test_truth_on_a_real_text(smollm2, tmp_path):
    path, text = tmp_path / "one.jsonl", texts.read("tides")[:1500]
    row = {"document": text, "summary": "Gravity of Moon and Sun makes the tides of the sea."}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    options = MeasureOptions(max_output=32)
    dense = run(Candidate(*smollm2, None), str(path), options)
    sample = dense.samples[0]
    assert sample["chat"] and not sample["shortened"]
    assert sample["prompt_tokens"] == 379
    assert sample["text"].startswith("The tide is the slow rise and fall of the sea")
    assert 0.3 < dense.metrics["rouge1"] < 0.6
    config = PruneConfig.build("dart", sparsity=0.5)
    pruned = run(Candidate(*smollm2, config), str(path), options)
    assert "tide" in pruned.samples[0]["text"] and pruned.samples[0]["text"] != sample["text"]
    assert 0.1 < pruned.metrics["rouge1"] < 0.6
    assert pruned.accounting is not None
    assert pruned.accounting["sparsity_while_pruned"] == pytest.approx(0.5, abs=1e-3)
    assert pruned.accounting["decoded_tokens"] == pruned.items[0]["tokens"] - 1 == 31
