"""A text against a reference: ROUGE, BLEU, BERTScore, sentences, encoders, and all together."""

import math
import random
import re
import shutil
import sys

import httpx
import numpy as np
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from scipy.stats import kendalltau
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from dart_llm.errors import LoadError, MissingExtra
from dart_llm.evaluation import text_metrics
from dart_llm.evaluation.text_metrics import (
    NUMBERS,
    compare,
    load_tools,
    match,
    rouge_scores,
    sentences,
)
from dart_llm.files import file_sha256

PACKAGES = {"rouge_score.rouge_scorer": "rouge-score", "sacrebleu.metrics": "sacrebleu"}
for package in PACKAGES:
    pytest.importorskip(package)

A, B, C = "The cat sat on a mat.", "Rain fell all night.", "The moon rose on a quiet house."
D = "Birds sang loudly today."
ONE = dict.fromkeys(NUMBERS, pytest.approx(1.0, abs=1e-5))
EMPTY = [("", A), (A, ""), (" \n", A), (A, "\t")]
WORDS = (
    "a the cat dog sat ran on in mat garden rain fell sun shone all day night red blue fish swam "
    "bird sang loud quiet house stood hill river ran deep wide moon rose . , ! ?"
).split()
POSITIONS, WINDOW = 26, 22
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random BERT: 3 layers, windows of 22 tokens between [CLS] and [SEP]."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": POSITIONS}
    config = BertConfig(vocab_size=len(vocabulary), initializer_range=0.5, **sizes)
    BertModel(config).save_pretrained(folder)
    places = {word: place for place, word in enumerate(vocabulary)}
    BertTokenizerFast(vocab=places, model_max_length=POSITIONS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return load_tools(str(folder))


class WordCounts:
    """Stands for an encoder: a text's vector counts its words, so that cosines are known."""

    def __init__(self):
        self.places = {}

    def embed(self, texts):
        rows = np.zeros((len(texts), 200))
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[self.places.setdefault(word, len(self.places))] += 1
        return rows


def test_rouge_by_hand():
    """Prediction of 6 words, reference of 3: all 3 are found, in order, with 1 of 2 bigrams."""
    scores = rouge_scores("the black cat sat down again", "the cat sat")
    assert scores["rouge1"] == scores["rougeL"] == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert scores["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 5) / (1 / 2 + 1 / 5))
    assert rouge_scores(A, A) == {name: pytest.approx(1.0) for name in text_metrics.METRICS}
    assert rouge_scores("running dogs", "run dog")["rouge2"] == pytest.approx(1.0)  # stemmed
    first, second = "The cat sat on the mat.", "Dogs were barking all night."
    scores = rouge_scores(f"{second} {first}", f"{first} {second}")
    assert scores["rougeLsum"] == pytest.approx(1.0)  # the order of sentences is ignored
    assert scores["rougeL"] == pytest.approx(6 / 11)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said: "No." She left.', ['He said: "No."', "She left."]),
        ("Mr. Smith met J. K. Brown. They left.", ["Mr. Smith met J. K. Brown.", "They left."]),
        ("The U.S. Army came. So did Dr. Who.", ["The U.S. Army came.", "So did Dr. Who."]),
        ("It cost 3.5m. 20 people paid.", ["It cost 3.5m.", "20 people paid."]),
        ("a line\n\n  another  \n", ["a line", "another"]),
        ("", []),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_bleu():
    """Of 6 words 5 are found, of 5 pairs 4, of 4 triples 3, of 3 quadruples 2; 7 were wanted."""
    score = text_metrics.bleu_score("the cat sat on a mat", "the cat sat on a hat today")
    precisions = (5 / 6) * (4 / 5) * (3 / 4) * (2 / 3)
    assert score == pytest.approx(precisions ** (1 / 4) * math.exp(1 - 7 / 6))
    for text in ("word", "two words", "The cat sat on the mat. It slept.", "! ?"):
        assert text_metrics.bleu_score(text, f"  {text}\n") == 1.0
    assert text_metrics.bleu_score("all other words", "none is here") == 0.0


def read_by_hand(folder, text):
    """Unit embeddings of a text's tokens after two layers, and the mean of the last over all."""
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        output = AutoModel.from_pretrained(folder)(**inputs, output_hidden_states=True)
    rows = output.hidden_states[2][0, 1:-1].double().numpy()  # five sixths of three layers
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), output.last_hidden_state[0].double()


def test_texts_are_read_in_windows(encoder, folder):
    assert (encoder.layers, encoder.window) == (2, WINDOW)
    words = ("the cat sat on a mat and the dog ran deep " * 3).split()  # 33, a token each
    for text, parts in ((A, [A]), (" ".join(words), [words[:WINDOW], words[WINDOW:]])):
        parts = [part if isinstance(part, str) else " ".join(part) for part in parts]
        rows, last = zip(*(read_by_hand(folder, part) for part in parts), strict=True)
        tokens, whole = encoder.read(text)
        np.testing.assert_allclose(tokens, np.concatenate(rows), atol=1e-6)
        np.testing.assert_allclose(whole, torch.cat(last).mean(0), atol=1e-6)
    assert text_metrics.cosine(np.array([3.0, 4]), np.array([4.0, 3])) == pytest.approx(24 / 25)
    assert text_metrics.cosine(np.zeros(2), np.ones(2)) == 0.0


def test_bertscore_by_definition(encoder, folder):
    for candidate, reference in ((A, B), (B, "The cat sat."), ("dog", C), ("cat", "cat")):
        written, wanted = (read_by_hand(folder, text)[0] for text in (candidate, reference))
        cosines = written @ wanted.T
        precision, recall = cosines.max(1).mean(), cosines.max(0).mean()
        score = text_metrics.bertscore(encoder.read(candidate)[0], encoder.read(reference)[0])
        assert score == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)
    assert text_metrics.bertscore(encoder.read("\u200b")[0], encoder.read(A)[0]) == 0.0


THREE = f"{A} {B} {D}"


def test_sentences_that_match():
    for candidate, reference, coverage, order in (
        (THREE, f"{A}\n{B}\n\n{D}", 1.0, 1.0),
        (f"{D} {B} {A}", THREE, 1.0, 0.0),  # reversed
        (B, THREE, 1 / 3, None),
        (THREE, A, 1.0, None),
        (A, B, 0.0, None),
        *((candidate, reference, 0.0, None) for candidate, reference in (*EMPTY, ("", ""))),
    ):
        assert match(candidate, reference, WordCounts()) == (pytest.approx(coverage), order)
    looped = f"{A} {A} {B} {A} {B} {A}"  # repeated sentences match in order
    assert match(looped, looped, WordCounts()) == (1.0, 1.0)
    cosines = np.array([[0.7, 0.1], [0.2, 0.699]])  # the threshold is included
    for threshold, pairs in ((0.7, [(0, 0)]), (0.699, [(0, 0), (1, 1)]), (0.71, [])):
        assert text_metrics.matched_pairs(cosines, threshold) == pairs
    # the most similar pairs first
    assert text_metrics.matched_pairs(np.array([[0.8, 0.95], [0.75, 0.9]]), 0.7) == [(0, 1), (1, 0)]


def test_order_is_kendalls_tau_on_another_scale():
    draw = random.Random(0)
    for size in range(2, 12):
        places = draw.sample(range(40), size)
        expected = (1 + kendalltau(range(size), places).statistic) / 2
        assert text_metrics.ordered_share(places) == pytest.approx(expected)
    assert text_metrics.ordered_share([3]) is text_metrics.ordered_share([]) is None


def test_equal_and_degenerate_texts(encoder):
    for text in (f"{A} {B}\n\n{C} {B}", " ".join([A, B, C] * 20)):  # the second fits no window
        numbers = compare(text, text, encoder)
        assert numbers == ONE and list(numbers) == list(NUMBERS)
    single = {**ONE, "rouge2": None, "sentence_order": None}
    assert compare("Rain", "Rain", encoder) == single
    for candidate, reference in EMPTY:
        expected = {**dict.fromkeys(NUMBERS, 0.0), "sentence_order": None}
        assert compare(candidate, reference, encoder) == expected
    assert compare("", " ", encoder) == dict.fromkeys(NUMBERS)
    numbers = compare("?!", "?!", encoder)  # a reference without letters has no ROUGE
    assert [numbers[name] for name in (*text_metrics.METRICS, "bleu")] == [None] * 4 + [1.0]
    candidate, reference = f"{C} {A} The dog ran.", f"{A} {B} {C}"
    (written, first), (wanted, second) = encoder.read(candidate), encoder.read(reference)
    coverage, order = match(candidate, reference, encoder)
    assert compare(candidate, reference, encoder) == {
        **rouge_scores(candidate, reference),
        "bleu": text_metrics.bleu_score(candidate, reference),
        "bertscore": text_metrics.bertscore(written, wanted),
        "document_similarity": pytest.approx(text_metrics.cosine(first, second)),
        "sentence_coverage": coverage,
        "sentence_order": order,
    }


def test_encoders_of_folders_and_of_the_hub(folder, tmp_path, monkeypatch):
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    repository = {**files, "onnx/model.onnx": folder / "config.json"}

    def download(name, cache_dir, ignore_patterns):
        if name != "tiny/safe":
            response = httpx.Response(404, request=httpx.Request("GET", f"https://hub/{name}"))
            raise RepositoryNotFoundError("not found", response=response)
        for path in filter_repo_objects(repository, ignore_patterns=ignore_patterns):
            (tmp_path / COMMIT / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository[path], tmp_path / COMMIT / path)
        return str(tmp_path / COMMIT)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    sha256, hub = file_sha256(folder / "model.safetensors"), text_metrics.find_encoder("tiny/safe")
    assert {p.name for p in hub.folder.rglob("*") if p.is_file()} == {*files}
    assert (hub.name, hub.origin, hub.revision) == ("tiny/safe", "hub", COMMIT)
    assert hub.label == f"tiny/safe (hub, revision {COMMIT[:12]}, sha256 {sha256[:12]})"
    source = text_metrics.EncoderSource("tiny", folder.resolve(), "folder", sha256)
    assert text_metrics.find_encoder(str(folder)) == source
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("nobody/nothing", "the hub has no model 'nobody/nothing' that you may read"),
        ("a/b/c", "folder a/b/c does not exist; give a hub id"),
        (str(tmp_path / "empty"), "empty could not be read as an encoder"),
    ):
        with pytest.raises(LoadError, match=words):
            load_tools(name)


def test_a_missing_package_is_named(monkeypatch, folder):
    for module, name in PACKAGES.items():
        text_metrics.rouge_scorer.cache_clear()
        text_metrics.bleu_scorer.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(MissingExtra, match=rf"needs {name}, .*'dart-llm\[drift\]'"):
                load_tools(str(folder))


@pytest.mark.smollm2
def test_the_real_encoder_ranks_texts_as_people_would():
    encoder = load_tools()
    assert (encoder.window, encoder.layers) == (254, 5)
    reference, close, far = (
        "The river floods every spring. Farmers move their cattle to the hills. In summer the "
        "water falls and the fields are green.",
        "Each spring the river floods. The farmers drive their cattle up into the hills. When "
        "summer comes the water is low and the fields turn green.",
        "The central bank raised its rates. Shares fell in the morning. Analysts expect that "
        "lending will slow down.",
    )
    near, other = compare(close, reference, encoder), compare(far, reference, encoder)
    assert all(near[name] > other[name] for name in list(NUMBERS)[:-1])
    assert (near["sentence_coverage"], near["sentence_order"]) == (1.0, 1.0)
    assert (other["sentence_coverage"], other["sentence_order"]) == (0.0, None)
