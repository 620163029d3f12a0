"""A text against a reference: ROUGE, BLEU, BERTScore, sentences, and all numbers together."""

import math
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from transformers import AutoModel, AutoTokenizer

from dart_llm.errors import ConfigError, MissingExtra
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
    return load_tools(str(folder), bertscore=str(folder), bertscore_layers=2)


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


def by_formula(candidate, reference):
    """Papineni et al. 2002 on words, with 1/2, 1/4, ... in place of matches that are 0."""
    logs, zeros = [], 0
    for n in range(1, min(4, len(candidate)) + 1):
        written = Counter(zip(*(candidate[i:] for i in range(n)), strict=False))
        wanted = Counter(zip(*(reference[i:] for i in range(n)), strict=False))
        matches = sum((written & wanted).values())
        if not matches:
            zeros += 1
            matches = 0.5**zeros
        logs.append(math.log(matches / sum(written.values())))
    brevity = min(1.0, math.exp(1 - len(reference) / len(candidate)))
    return brevity * math.exp(sum(logs) / len(logs))


def test_bleu():
    for candidate, reference in (
        ("the cat sat on a mat", "the cat sat on the mat today"),
        ("the the the the", "the cat sat on the mat"),
        ("a dog ran far away and the cat sat", "the cat sat"),
    ):
        expected = by_formula(candidate.split(), reference.split())
        assert text_metrics.bleu_score(candidate, reference) == pytest.approx(expected)
    for text in ("word", "two words", "The cat sat on the mat. It slept.", "! ?"):
        assert (
            text_metrics.bleu_score(text, text)
            == text_metrics.bleu_score(text, f"  {text}\n")
            == 1.0
        )
    for unlike in (("", "a text"), ("a text", ""), ("", ""), ("all other words", "none is here")):
        assert text_metrics.bleu_score(*unlike) == 0.0
    version = pytest.importorskip("sacrebleu").__version__
    assert (
        text_metrics.signature()
        == f"nrefs:1|case:mixed|eff:yes|tok:13a|smooth:exp|version:{version}"
    )


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
    fresh = text_metrics.load_bertscore(str(folder), 2)
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


def test_encoders_that_bertscore_cannot_use(folder):
    with pytest.raises(ConfigError, match="no best layer of tiny: say how many layers to use"):
        text_metrics.load_bertscore(str(folder))
    for layers in (0, 4):
        with pytest.raises(ConfigError, match=f"tiny has 3 layers: give .* 1 to 3 .* not {layers}"):
            text_metrics.load_bertscore(str(folder), layers)


THREE = f"{A} {B} {D}"
MATCHES = [
    (THREE, f"{A}\n{B}\n\n{D}", 1.0, 1.0, 1.0),
    (f"{D} {B} {A}", THREE, 1.0, 1.0, 0.0),  # reversed: all but the order
    (B, THREE, (1 / 3 + 1) / 2, 1 / 3, None),
    (THREE, A, (1 + 1 / 3) / 2, 1.0, None),  # what was added lowers the similarity alone
    (A, B, 0.0, 0.0, None),
    *((candidate, reference, 0.0, 0.0, None) for candidate, reference in (*EMPTY, ("", ""))),
]


def test_sentences_that_match():
    for candidate, reference, similarity, coverage, order in MATCHES:
        found = match(candidate, reference, WordCounts())
        assert found[:2] == pytest.approx((similarity, coverage)) and found.order == order


def test_which_sentences_are_matched():
    looped = f"{A} {A} {B} {A} {B} {A}"  # repeated sentences meet their own copy
    found = match(looped, looped, WordCounts())
    assert (found.pairs, found.order) == (tuple((i, i) for i in range(6)), 1.0)
    cosines = np.array([[0.7, 0.1], [0.2, 0.699]])  # the threshold is included
    assert text_metrics.match_cosines(cosines, 0.7).coverage == 0.5
    assert text_metrics.match_cosines(cosines, 0.699).coverage == 1.0
    assert text_metrics.match_cosines(cosines, 0.71).pairs == ()
    # the most similar pairs first
    assert text_metrics.matched_pairs(np.array([[0.8, 0.95], [0.75, 0.9]]), 0.7) == [(0, 1), (1, 0)]
    both = text_metrics.match_cosines(np.array([[0.9], [0.8]]), 0.7)  # one sentence covers several
    assert (both.coverage, both.pairs, both.order) == (1.0, ((0, 0),), None)


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
    matched = match(candidate, reference, tools.embedder, 0.65)
    assert numbers(candidate, reference, tools) == {
        **text_metrics.rouge_scores(candidate, reference),
        "bleu": text_metrics.bleu_score(candidate, reference),
        "bertscore": tools.bert.score(candidate, reference),
        "document_similarity": pytest.approx(cosine(first, second), abs=1e-5),
        "sentence_similarity": matched.similarity,
        "sentence_coverage": matched.coverage,
        "sentence_order": matched.order,
    }
    for threshold in (0.0, 1.1):
        with pytest.raises(ConfigError, match=rf"in \(0, 1\], not from {threshold:g}"):
            load_tools(str(folder), threshold=threshold)


def test_notes_and_facts_name_the_models(tools):
    sha256 = tools.embedder.source.sha256
    label = f"tiny (folder, sha256 {sha256[:12]})"
    assert tools.notes == (
        "ROUGE: F-measures with Porter stemming, over the letters a-z and digits",
        f"BLEU: sacrebleu / 100, each text one segment, {text_metrics.signature()}",
        f"BERTScore: F1 with {label}, layer 2, no IDF, not rescaled; texts are cut at 22 tokens",
        f"document and sentences: {label}; longer texts: mean over windows of 22 tokens",
        "coverage and order: sentences match from a cosine of 0.65",
    )


def test_packages_are_imported_late_and_a_missing_one_is_named(monkeypatch, folder):
    for module, name in PACKAGES.items():
        text_metrics.rouge_scorer.cache_clear()
        text_metrics.bleu_scorer.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(MissingExtra, match=rf"needs {name}, .*'dart-llm\[drift\]'"):
                load_tools(str(folder), bertscore=str(folder), bertscore_layers=2)
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
