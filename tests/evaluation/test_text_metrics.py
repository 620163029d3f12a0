"""A text against a reference: ROUGE, BLEU, BERTScore, sentences, and all numbers together."""

import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from transformers import AutoModel, AutoTokenizer

from dart_llm.errors import MissingExtra
from dart_llm.evaluation import text_metrics
from dart_llm.evaluation.encoders import cosine, sentences
from dart_llm.evaluation.text_metrics import METRICS, NAMES, compare, load_tools, match
from encoders import WordCounts, write_encoder

PACKAGES = {
    "rouge_score.rouge_scorer": "rouge-score",
    "sacrebleu.metrics": "sacrebleu",
    "bert_score": "bert-score",
    "sentence_transformers": "sentence-transformers",
}
for package in PACKAGES:
    pytest.importorskip(package)

A, B, C = "The cat sat on a mat.", "Rain fell all night.", "The moon rose on a quiet house."
D = "Birds sang loudly today."
ONE = dict.fromkeys(NAMES, pytest.approx(1.0, abs=1e-5))
EMPTY = [("", A), (A, ""), (" \n", A), (A, "\t")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tools(folder):
    return load_tools(str(folder), bertscore=str(folder))


def numbers(candidate, reference, tools):
    return compare(candidate, reference, tools).to_dict()


def test_rouge_by_hand():
    """Prediction of 6 words, reference of 3: all 3 are found, in order, with 1 of 2 bigrams."""
    found = text_metrics.rouge_scores("the black cat sat down again", "the cat sat")
    assert found["rouge1"] == found["rougeL"] == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert found["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 5) / (1 / 2 + 1 / 5))
    text = "The cat sat on the mat. It was happy."
    assert text_metrics.rouge_scores(text, text) == {name: pytest.approx(1.0) for name in METRICS}
    assert text_metrics.rouge_scores("running dogs", "run dog")["rouge2"] == pytest.approx(
        1.0
    )  # stemmed
    first, second = "The cat sat on the mat.", "Dogs were barking all night."
    found = text_metrics.rouge_scores(f"{second} {first}", f"{first} {second}")
    assert found["rougeLsum"] == pytest.approx(1.0)  # the order of sentences is ignored
    assert found["rougeL"] == pytest.approx(6 / 11)


SENTENCES = [
    ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
    ('He said: "No." She left.', ['He said: "No."', "She left."]),
    ("Mr. Smith met J. K. Brown. They left.", ["Mr. Smith met J. K. Brown.", "They left."]),
    ("The U.S. Army came. So did Dr. Who.", ["The U.S. Army came.", "So did Dr. Who."]),
    ("It cost 3.5m. 20 people paid.", ["It cost 3.5m.", "20 people paid."]),
    ("a line\n\n  another  \n", ["a line", "another"]),
    ("", []),
]


def test_sentences():
    assert [sentences(text) for text, _ in SENTENCES] == [expected for _, expected in SENTENCES]


def test_bleu():
    """Of 6 words 5 are found, of 5 pairs 4, of 4 triples 3, of 3 quadruples 2; 7 were wanted."""
    found = text_metrics.bleu_score("the cat sat on a mat", "the cat sat on a hat today")
    precisions = (5 / 6) * (4 / 5) * (3 / 4) * (2 / 3)
    assert found == pytest.approx(precisions ** (1 / 4) * math.exp(1 - 7 / 6))
    for text in ("word", "two words", "The cat sat on the mat. It slept.", "! ?"):
        assert text_metrics.bleu_score(text, f"  {text}\n") == 1.0
    for unlike in (("", "a text"), ("a text", ""), ("", ""), ("all other words", "none is here")):
        assert text_metrics.bleu_score(*unlike) == 0.0


def embedded(folder, text):
    """Unit embeddings of all tokens after two layers, and which of them are words."""
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        output = AutoModel.from_pretrained(folder)(**inputs, output_hidden_states=True)
    rows = output.hidden_states[2][0].double().numpy()
    words = np.array([False, *[True] * (len(rows) - 2), False])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), words


def test_bertscore_by_definition(tools, folder):
    """Of each pair alone: no IDF is taken from the first reference, and the order is nothing."""
    pairs = [(A, B), (B, "The cat sat."), ("dog", C), ("cat", "cat"), ("xylophone", "xylophone")]
    fresh = text_metrics.load_bertscore(str(folder))
    assert fresh.layers == 2  # five sixths of three
    scores = [fresh.score(*pair) for pair in pairs]
    assert scores == [tools.bert.score(*pair) for pair in reversed(pairs)][::-1]
    for (candidate, reference), score in zip(pairs, scores, strict=True):
        (written, real), (wanted, needed) = embedded(folder, candidate), embedded(folder, reference)
        cosines = written @ wanted.T
        precision, recall = cosines.max(1)[real].mean(), cosines.max(0)[needed].mean()
        expected = 2 * precision * recall / (precision + recall)
        assert score == pytest.approx(expected, abs=1e-5) and score <= 1
    long = " ".join(["the cat sat on a mat and the dog ran"] * 3)
    cut = " ".join(long.split()[:22])
    assert fresh.score(long, B) == pytest.approx(fresh.score(cut, B), abs=1e-6)


THREE = f"{A} {B} {D}"
MATCHES = [
    (THREE, f"{A}\n{B}\n\n{D}", 1.0, 1.0),
    (f"{D} {B} {A}", THREE, 1.0, 0.0),  # reversed
    (B, THREE, 1 / 3, None),
    (THREE, A, 1.0, None),
    (A, B, 0.0, None),
    *((candidate, reference, 0.0, None) for candidate, reference in (*EMPTY, ("", ""))),
]


def test_sentences_that_match():
    for candidate, reference, coverage, order in MATCHES:
        found = match(candidate, reference, WordCounts())
        assert (found.coverage, found.order) == (pytest.approx(coverage), order)
    looped = f"{A} {A} {B} {A} {B} {A}"  # repeated sentences match in order
    assert match(looped, looped, WordCounts()) == (1.0, 1.0)


def test_which_sentences_are_matched():
    cosines = np.array([[0.7, 0.1], [0.2, 0.699]])  # the threshold is included
    for threshold, pairs in ((0.7, [(0, 0)]), (0.699, [(0, 0), (1, 1)]), (0.71, [])):
        assert text_metrics.matched_pairs(cosines, threshold) == pairs
    # the most similar pairs first
    assert text_metrics.matched_pairs(np.array([[0.8, 0.95], [0.75, 0.9]]), 0.7) == [(0, 1), (1, 0)]
    equal = np.ones((3, 3))
    assert text_metrics.matched_pairs(equal, 0.7) == [(0, 0), (1, 1), (2, 2)]


def test_order_is_kendalls_tau_on_another_scale():
    draw = random.Random(0)
    for size in range(2, 12):
        places = draw.sample(range(40), size)
        expected = (1 + kendalltau(range(size), places).statistic) / 2
        assert text_metrics.ordered_share(places) == pytest.approx(expected)
    assert text_metrics.ordered_share([3]) is text_metrics.ordered_share([]) is None


def test_equal_and_degenerate_texts(tools):
    for text in (f"{A} {B}\n\n{C} {B}", " ".join([A, B, C] * 20)):  # the second fits no window
        found = numbers(text, text, tools)
        assert found == ONE and list(found) == list(NAMES)
    assert numbers(A, A, tools) == {**ONE, "sentence_order": None}
    assert numbers("Rain", "Rain", tools) == {**ONE, "rouge2": None, "sentence_order": None}
    for candidate, reference in EMPTY:
        expected = {**dict.fromkeys(NAMES, 0.0), "sentence_order": None}
        assert numbers(candidate, reference, tools) == expected
    assert numbers("", " ", tools) == dict.fromkeys(NAMES)
    found = numbers("?!", "?!", tools)  # a reference without letters has no ROUGE
    assert [found[name] for name in (*METRICS, "bleu")] == [None] * 4 + [1.0]


def test_each_number_is_that_of_its_own_function(folder, tools):
    candidate, reference = f"{C} {A} The dog ran.", f"{A} {B} {C}"
    first, second = (tools.embedder.embed([text])[0] for text in (candidate, reference))
    matched = match(candidate, reference, tools.embedder)
    assert numbers(candidate, reference, tools) == {
        **text_metrics.rouge_scores(candidate, reference),
        "bleu": text_metrics.bleu_score(candidate, reference),
        "bertscore": tools.bert.score(candidate, reference),
        "document_similarity": pytest.approx(cosine(first, second), abs=1e-5),
        "sentence_coverage": matched.coverage,
        "sentence_order": matched.order,
    }


def test_packages_are_imported_late_and_a_missing_one_is_named(monkeypatch, folder):
    for module, name in PACKAGES.items():
        text_metrics.rouge_scorer.cache_clear()
        text_metrics.bleu_scorer.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(MissingExtra, match=rf"needs {name}, .*'dart-llm\[drift\]'"):
                load_tools(str(folder), bertscore=str(folder))
    code = "import sys, dart_llm.evaluation.text_metrics; "
    code += f"print([n for n in {list(PACKAGES)!r} if n.partition('.')[0] in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.smollm2
def test_the_real_models_rank_texts_as_people_would():
    tools = load_tools()
    assert tools.embedder.source == tools.bert.source
    assert (tools.embedder.window, tools.embedder.dimensions) == (254, 384)
    reference, close, far = (
        "The river floods every spring. Farmers move their cattle to the hills. In summer the "
        "water falls and the fields are green.",
        "Each spring the river floods. The farmers drive their cattle up into the hills. When "
        "summer comes the water is low and the fields turn green.",
        "The central bank raised its rates. Shares fell in the morning. Analysts expect that "
        "lending will slow down.",
    )
    near, other = numbers(close, reference, tools), numbers(far, reference, tools)
    assert all(near[name] > other[name] for name in NAMES[:-1])
    assert (near["sentence_coverage"], near["sentence_order"]) == (1.0, 1.0)
    assert (other["sentence_coverage"], other["sentence_order"]) == (0.0, None)
