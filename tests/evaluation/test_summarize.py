"""``summarize``: prompts cut to fit, the protocols on a tiny model, refusals."""

import copy

import pytest
import torch

from dart_llm.errors import ConfigError, DartError, UnknownName
from dart_llm.evaluation import text_metrics
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.summarization import CUE, INSTRUCTION, count, fit
from dart_llm.models.loading import load
from dart_llm.session.run import prune
from steps import Same
from summary_cases import DOCUMENTS, OPTIONS, candidate, run, texts_of, write_documents
from tiny_gpt2 import make_talk, write_gpt2

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
ONE = MeasureOptions(max_output=12, limit=1)
LONG = "".join(f"sentence number {i} is here. " for i in range(1, 41))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    model, tokenizer = load(write_gpt2(tmp_path_factory.mktemp("gpt2")), dtype="float32")
    make_talk(model, tokenizer)
    return model, tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("data") / "four.jsonl")


@pytest.fixture(scope="module")
def dense(loaded, data):
    return run(candidate(loaded), data)


def frame(document):
    return f"{INSTRUCTION}\n\n{document}\n\n{CUE}".lower()


def test_a_long_document_loses_its_end_and_nothing_else_does(loaded):
    base, room = loaded[1], 700 - 40 - len(frame(""))  # one token per character, lower case
    prompt = fit(base, " A short one.\n", 1024, 100)
    assert base.decode(prompt.ids) == frame("a short one.")
    for context in (150, 301, 1024):
        prompt = fit(base, LONG, context, 40)
        assert prompt.shortened and base.decode(prompt.ids) == frame(prompt.document)
        assert context - len("sentence ") <= len(prompt.ids) + 40 <= context
        assert LONG.startswith(f"{prompt.document} ")  # the cut follows a word
    assert fit(base, "x" * 900, 700, 40).document == "x" * room
    for context in (8, 40 + len(frame(""))):
        with pytest.raises(ConfigError, match=f"context of {context} leaves no room"):
            fit(base, LONG, context, 40)


def test_the_chat_template_is_used_where_there_is_one_and_survives(loaded):
    base, chat = loaded[1], copy.deepcopy(loaded[1])
    chat.chat_template = TEMPLATE
    prompt = fit(chat, LONG, 400, 40)
    assert chat.decode(prompt.ids) == f"<s>user: {frame(prompt.document)}</s><s>assistant: "
    assert fit(chat, LONG, 400, 40, chat=False).ids == fit(base, LONG, 400, 40).ids


def greedy(loaded, prompt, tokens=OPTIONS.max_output):
    model, tokenizer = loaded
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True))


def test_dense_end_to_end(loaded, data, dense):
    assert [item["id"] for item in dense.items] == ["cat", "dog", "duck", "pig"]
    for row, item, sample in zip(DOCUMENTS, dense.items, dense.samples, strict=True):
        prompt = fit(loaded[1], row["document"], 1024, 12).ids
        assert sample["text"] == greedy(loaded, prompt)
        assert (sample["finish"], item["tokens"], sample["shortened"]) == ("length", 12, False)
        scores = {name: item[name] for name in text_metrics.METRICS}
        assert scores == text_metrics.rouge_scores(sample["text"], row["summary"])
    for name in text_metrics.METRICS:
        mean = sum(item[name] for item in dense.items) / 4
        assert dense.metrics[name] == pytest.approx(mean)
    assert dense.notes == ("the summary was cut at 12 tokens in 4 of 4 documents",)
    two = MeasureOptions(max_output=12, limit=2)
    task = f"summarize:{data}"
    assert (count(task, OPTIONS), count(task, two)) == (4, 2)
    assert run(candidate(loaded), data, two).items == dense.items[:2]


def test_pruned_summaries_are_those_of_prune(loaded, data, dense):
    model, tokenizer = loaded
    with Same(model):
        result = run(candidate(loaded, "griffin"), data)
    full = MeasureOptions("full", max_output=12)
    full = run(candidate(loaded, "griffin"), data, full)
    for row, text, whole in zip(DOCUMENTS, texts_of(result), texts_of(full), strict=True):
        prompt = fit(tokenizer, row["document"], 1024, 12).ids
        with prune(model, "griffin", sparsity=0.5):
            assert text == greedy(loaded, prompt)
        with prune(model, "griffin", sparsity=0.5) as chooser, torch.inference_mode():
            model(torch.tensor([prompt]))  # full: masks of the prompt's dense pass, for it too
            kept = {i: mask.ids for i, mask in enumerate(chooser.select()) if mask is not None}
        with prune(model, masks=kept) as given, given.decoding(prompt=True):
            assert whole == greedy(loaded, prompt)
    assert run(candidate(loaded, "griffin", 0.0), data).items == dense.items
    assert result.accounting["achieved_sparsity"] == pytest.approx(0.5)
    assert result.accounting["decoded_tokens"] == 4 * 11
    prompts = sum(sample["prompt_tokens"] for sample in result.samples)
    assert result.accounting["prompt_tokens"] == prompts
    assert full.accounting["decoded_tokens"] == prompts + 4 * 11
    assert full.accounting["dense_token_share"] == 0
    published = run(candidate(loaded, "griffin"), data, MeasureOptions("published", max_output=12))
    assert published.samples == full.samples and published.accounting == full.accounting
    assert "published protocol" in published.notes[0] and "equals full" in published.notes[0]


@pytest.mark.parametrize(("where", "method"), [("tokenizer", "griffin"), ("model", None)])
def test_a_summary_ends_with_the_sequence(loaded, data, where, method, monkeypatch):
    text = texts_of(run(candidate(loaded, method), data, ONE))[0]
    end = next(letter for letter in text[2:] if letter not in text[:2])
    model, tokenizer = loaded[0], copy.deepcopy(loaded[1])
    if where == "tokenizer":
        tokenizer.eos_token = end
    else:
        ids = [2, tokenizer.convert_tokens_to_ids(end)]
        monkeypatch.setattr(model.generation_config, "eos_token_id", ids)
    result = run(candidate((model, tokenizer), method), data, ONE)
    sample, length = result.samples[0], text.index(end)
    assert (sample["finish"], sample["text"]) == ("stop", text[:length])
    assert result.items[0]["tokens"] == length and result.notes == ()
    assert method is None or result.accounting["decoded_tokens"] == length


def test_empty_and_shortened_documents_are_counted(loaded, data, dense, tmp_path):
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.eos_token = texts_of(dense)[0][0]
    empty = "the summary is empty and scores 0 in 1 of 1 documents"
    unpruned = "the summary ended before any token ran pruned in 1 of 1 documents"
    result = run(candidate((loaded[0], tokenizer), "griffin"), data, ONE)
    assert result.metrics == dict.fromkeys(text_metrics.METRICS, 0.0)
    assert result.notes == (empty, unpruned) and result.items[0]["tokens"] == 0
    text = "the cat went to the market. " * 60
    path = write_documents(tmp_path / "long.jsonl", {"document": text, "summary": "a cat."})
    result = run(candidate(loaded), path)
    assert result.samples[0]["shortened"] and text.startswith(result.samples[0]["document"])
    assert 0 <= 1024 - 12 - result.samples[0]["prompt_tokens"] < len("the cat went to the market. ")
    assert "the document was shortened to fit the context in 1 of 1 documents" in result.notes


def test_what_is_refused(loaded, data, monkeypatch):
    late = candidate(loaded, "griffin", masking_step=50)
    with pytest.raises(ConfigError, match=r"griffin@0.5: all 11 decoded tokens .* ran dense"):
        run(late, data)
    for options, kind, words in (
        (MeasureOptions("decoding"), UnknownName, "did you mean decode"),
        (MeasureOptions(apply_chat_template=True), ConfigError, "no chat template"),
        (MeasureOptions(max_output=1000), ConfigError, "context of 1024 leaves no room"),
    ):
        with pytest.raises(kind, match=words):
            run(candidate(loaded), data, options)
    weight = loaded[0].transformer.ln_f.weight
    monkeypatch.setattr(weight, "data", torch.full_like(weight.data, torch.nan))
    with pytest.raises(DartError, match="a logit of document cat is not finite"):
        run(candidate(loaded, "griffin"), data)
