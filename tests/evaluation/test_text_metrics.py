"""All numbers of a pair of texts together: equal, empty and one-sentence texts; the real models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dart_llm.errors import ConfigError, MissingExtra
from dart_llm.evaluation import text_metrics as bleu
from dart_llm.evaluation import text_metrics as rouge
from dart_llm.evaluation.encoders import cosine, load_embedder
from dart_llm.evaluation.text_metrics import NAMES, NUMBERS, TextTools, compare, load_tools, match
from encoders import write_encoder

pytest.importorskip("sentence_transformers")
pytest.importorskip("bert_score")
pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

A, B, C = "The cat sat on a mat.", "Rain fell all night.", "The moon rose on a quiet house."
ONE = dict.fromkeys(NAMES, pytest.approx(1.0, abs=1e-5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tools(folder: Path) -> TextTools:
    return load_tools(str(folder), bertscore=str(folder), bertscore_layers=2)


def numbers(candidate: str, reference: str, tools: TextTools) -> dict[str, float | None]:
    return compare(candidate, reference, tools).to_dict()


def test_equal_texts_give_one(tools: TextTools) -> None:
    text = f"{A} {B}\n\n{C} {B}"
    assert numbers(text, text, tools) == ONE
    assert list(numbers(text, text, tools)) == list(NAMES)
    assert max(value for value in numbers(text, text, tools).values() if value) <= 1.0


def test_equal_texts_longer_than_a_window_give_one(tools: TextTools) -> None:
    text = " ".join([A, B, C] * 20)
    assert numbers(text, text, tools) == ONE


def test_one_sentence(tools: TextTools) -> None:
    assert numbers(A, A, tools) == {**ONE, "sentence_order": None}
    found = numbers(A, B, tools)
    assert found["sentence_order"] is None
    assert all(isinstance(found[name], float) for name in NAMES if name != "sentence_order")


def test_one_word(tools: TextTools) -> None:
    found = numbers("Rain", "Rain", tools)
    assert found == {**ONE, "rouge2": None, "sentence_order": None}


@pytest.mark.parametrize(("candidate", "reference"), [("", A), (A, ""), (" \n", A), (A, "\t")])
def test_one_empty_text_gives_zero(tools: TextTools, candidate: str, reference: str) -> None:
    expected = {**dict.fromkeys(NAMES, 0.0), "sentence_order": None}
    assert numbers(candidate, reference, tools) == expected


def test_two_empty_texts_have_no_numbers(tools: TextTools) -> None:
    assert numbers("", " ", tools) == dict.fromkeys(NAMES)


def test_a_reference_without_letters_has_no_rouge(tools: TextTools) -> None:
    found = numbers("?!", "?!", tools)
    assert [found[name] for name in rouge.METRICS] == [None] * 4
    assert found["bleu"] == 1.0
    assert [numbers("!?", A, tools)[name] for name in rouge.METRICS] == [0.0] * 4


def test_each_number_is_that_of_its_own_file(tools: TextTools) -> None:
    candidate, reference = f"{C} {A} The dog ran.", f"{A} {B} {C}"
    found = numbers(candidate, reference, tools)
    assert {name: found[name] for name in rouge.METRICS} == rouge.rouge_scores(candidate, reference)
    assert found["bleu"] == bleu.bleu_score(candidate, reference)
    assert found["bertscore"] == tools.bert.score(candidate, reference).f1
    first, second = (tools.embedder.embed([text])[0] for text in (candidate, reference))
    assert found["document_similarity"] == pytest.approx(cosine(first, second), abs=1e-5)
    sentences = match(candidate, reference, tools.embedder, 0.65)
    assert found["sentence_similarity"] == sentences.similarity
    assert found["sentence_coverage"] == sentences.coverage
    assert found["sentence_order"] == sentences.order


def test_the_threshold_is_used(folder: Path, tools: TextTools) -> None:
    strict = TextTools(tools.embedder, tools.bert, 1.0)
    found = numbers("The cat sat on the mat.", f"{A} {B}", strict)
    assert found["sentence_coverage"] == 0.0
    assert "sentences match from a cosine of 1" in strict.notes[-1]
    for threshold in (0.0, 1.1):
        with pytest.raises(ConfigError, match=rf"in \(0, 1\], not from {threshold:g}"):
            load_tools(str(folder), threshold=threshold)


def test_notes_and_facts_name_the_models(tools: TextTools) -> None:
    sha256 = tools.embedder.source.sha256
    label = f"tiny (folder, sha256 {sha256[:12]})"
    assert tools.notes == (
        "ROUGE: F-measures with Porter stemming, over the letters a-z and digits",
        f"BLEU: sacrebleu / 100, each text one segment, {bleu.signature()}",
        f"BERTScore: F1 with {label}, layer 2, no IDF, not rescaled",
        f"document and sentences: {label}; longer texts: mean over windows of 22 tokens",
        "coverage and order: sentences match from a cosine of 0.65",
    )
    facts = json.loads(json.dumps(tools.to_dict()))
    assert facts["embedder"]["sha256"] == sha256
    assert (facts["bertscore"]["layers"], facts["bertscore"]["idf"]) == (2, False)
    assert facts["sentence_threshold"] == 0.65


def test_names_are_unique_and_every_number_says_its_direction() -> None:
    assert len(set(NAMES)) == len(NAMES) == 10
    assert all(number.higher_is_better and number.meaning for number in NUMBERS)


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("rouge_score.rouge_scorer", "rouge-score"),
        ("sacrebleu.metrics", "sacrebleu"),
        ("bert_score.utils", "bert-score"),
        ("sentence_transformers", "sentence-transformers"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, package: str
) -> None:
    rouge.rouge_scorer.cache_clear()
    bleu.bleu_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"needs {package}, .*'dart-llm\[drift\]'"):
        load_tools(str(folder), bertscore=str(folder), bertscore_layers=2)


def test_the_packages_are_not_imported_with_the_module() -> None:
    import subprocess

    names = ("sentence_transformers", "bert_score", "sacrebleu", "rouge_score", "scipy")
    code = "import sys, dart_llm.evaluation.text_metrics; "
    code += f"print([n for n in {names!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.smollm2
def test_the_real_models_rank_texts_as_people_would() -> None:
    tools = load_tools()
    assert tools.embedder.source == load_embedder().source == tools.bert.source
    reference = (
        "The river floods every spring. Farmers move their cattle to the hills. In summer the "
        "water falls and the fields are green."
    )
    close = (
        "Each spring the river floods. The farmers drive their cattle up into the hills. When "
        "summer comes the water is low and the fields turn green."
    )
    far = (
        "The central bank raised its rates. Shares fell in the morning. Analysts expect that "
        "lending will slow down."
    )
    assert numbers(reference, reference, tools) == ONE
    near, other = numbers(close, reference, tools), numbers(far, reference, tools)
    for name in NAMES[:-1]:
        assert near[name] > other[name], name
    assert (near["sentence_coverage"], near["sentence_order"]) == (1.0, 1.0)
    assert (other["sentence_coverage"], other["sentence_order"]) == (0.0, None)
