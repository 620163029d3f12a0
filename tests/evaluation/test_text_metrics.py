"""A text against a reference: ROUGE, BLEU, BERTScore, sentences, and all numbers together."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dart_llm.errors import ConfigError, LoadError, MissingExtra
from dart_llm.evaluation.encoders import cosine, load_embedder, sentences
from dart_llm.evaluation.text_metrics import (
    METRICS,
    NAMES,
    NUMBERS,
    THRESHOLD,
    BertScorer,
    SentenceMatch,
    TextTools,
    bleu_score,
    bleu_scorer,
    compare,
    load_bertscore,
    load_tools,
    match,
    match_cosines,
    matched_pairs,
    ordered_share,
    rouge_scorer,
    rouge_scores,
    signature,
)
from encoders import WordCounts, write_encoder

for package in ("sentence_transformers", "bert_score", "sacrebleu", "rouge_score"):
    pytest.importorskip(package)

A, B, C = "The cat sat on a mat.", "Rain fell all night.", "The moon rose on a quiet house."
ONE = dict.fromkeys(NAMES, pytest.approx(1.0, abs=1e-5))
EMPTY = [("", A), (A, ""), (" \n", A), (A, "\t")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tools(folder: Path) -> TextTools:
    return load_tools(str(folder), bertscore=str(folder), bertscore_layers=2)


@pytest.fixture(scope="module")
def scorer(tools: TextTools) -> BertScorer:
    return tools.bert


def numbers(candidate: str, reference: str, tools: TextTools) -> dict[str, float | None]:
    return compare(candidate, reference, tools).to_dict()


def test_rouge_by_hand() -> None:
    """Prediction of 6 words, reference of 3: all 3 are found, in order, with 1 of 2 bigrams."""
    found = rouge_scores("the black cat sat down again", "the cat sat")
    assert found["rouge1"] == found["rougeL"] == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert found["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 5) / (1 / 2 + 1 / 5))
    text = "The cat sat on the mat. It was happy."
    assert rouge_scores(text, text) == {name: pytest.approx(1.0) for name in METRICS}
    for nothing in ("Nothing in common", "", " \n"):
        assert rouge_scores(nothing, text) == dict.fromkeys(METRICS, 0.0)
    assert rouge_scores("running dogs", "run dog")["rouge2"] == pytest.approx(1.0)  # stemmed


def test_rouge_lsum_ignores_the_order_of_sentences_and_rouge_l_does_not():
    first, second = "The cat sat on the mat.", "Dogs were barking all night."
    found = rouge_scores(f"{second} {first}", f"{first} {second}")
    assert found["rougeLsum"] == pytest.approx(1.0)
    assert found["rougeL"] == pytest.approx(6 / 11)


def test_line_breaks_make_no_difference_to_rouge_lsum():
    reference = "Dogs barked. The cat sat."
    joined = rouge_scores("The cat sat. Dogs barked.", reference)
    assert joined == rouge_scores("The cat sat.\n\nDogs barked.\n", reference)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said: "No." She left.', ['He said: "No."', "She left."]),
        ("Mr. Smith met J. K. Brown. They left.", ["Mr. Smith met J. K. Brown.", "They left."]),
        ("The U.S. Army came. So did Dr. Who.", ["The U.S. Army came.", "So did Dr. Who."]),
        ("It cost 3.5m. 20 people paid.", ["It cost 3.5m.", "20 people paid."]),
        ("no capital. no split", ["no capital. no split"]),
        ("a line\n\n  another  \n", ["a line", "another"]),
        ("", []),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_bleu_of_equal_and_of_unlike_texts() -> None:
    for text in ("word", "two words", "The cat sat on the mat. It slept.", "! ?"):
        assert bleu_score(text, text) == bleu_score(text, f"  {text}\n") == 1.0
    assert bleu_score("One sentence.\n\nAnother one.", "One sentence. Another one.") == 1.0
    unlike = [("", "a text"), ("a text", ""), ("", ""), ("all other words", "none is shared here")]
    for candidate, reference in unlike:
        assert bleu_score(candidate, reference) == 0.0
    version = pytest.importorskip("sacrebleu").__version__
    assert signature() == f"nrefs:1|case:mixed|eff:yes|tok:13a|smooth:exp|version:{version}"


def by_formula(candidate: list[str], reference: list[str]) -> float:
    """Papineni et al. 2002 on words, with 1/2, 1/4, ... in place of matches that are 0."""
    logs, zeros = [], 0
    for n in range(1, min(4, len(candidate)) + 1):
        written = Counter(zip(*(candidate[i:] for i in range(n)), strict=False))
        wanted = Counter(zip(*(reference[i:] for i in range(n)), strict=False))
        matches: float = sum((written & wanted).values())
        if not matches:
            zeros += 1
            matches = 0.5**zeros
        logs.append(math.log(matches / sum(written.values())))
    brevity = min(1.0, math.exp(1 - len(reference) / len(candidate)))
    return brevity * math.exp(sum(logs) / len(logs))


@pytest.mark.parametrize(
    ("candidate", "reference"),
    [
        ("the cat sat on a mat", "the cat sat on the mat today"),
        ("the the the the", "the cat sat on the mat"),
        ("the cat", "the cat sat on the mat"),
        ("a dog ran far away and the cat sat", "the cat sat"),
    ],
)
def test_against_the_formula(candidate: str, reference: str) -> None:
    expected = by_formula(candidate.split(), reference.split())
    assert bleu_score(candidate, reference) == pytest.approx(expected)


def bert(scorer: BertScorer, candidate: str, reference: str) -> tuple[float, float, float]:
    score = scorer.score(candidate, reference)
    return score.precision, score.recall, score.f1


def embedded(folder: Path, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings of all tokens after two layers, and which of them are words."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        output = AutoModel.from_pretrained(folder)(**inputs, output_hidden_states=True)
    rows = output.hidden_states[2][0].double().numpy()
    words = np.array([False, *[True] * (len(rows) - 2), False])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), words


PAIRS = [(A, B), (B, "The cat sat."), ("dog", C), ("cat", "cat"), ("xylophone", "xylophone")]


def test_bertscore_by_definition(scorer: BertScorer, folder: Path) -> None:
    for candidate, reference in PAIRS:
        (written, real), (wanted, needed) = embedded(folder, candidate), embedded(folder, reference)
        cosines = written @ wanted.T
        precision, recall = cosines.max(1)[real].mean(), cosines.max(0)[needed].mean()
        expected = (precision, recall, 2 * precision * recall / (precision + recall))
        assert bert(scorer, candidate, reference) == pytest.approx(expected, abs=1e-5)
        assert max(bert(scorer, candidate, candidate)) <= 1.0


def test_bertscore_of_a_pair_depends_on_that_pair_alone(scorer: BertScorer, folder: Path) -> None:
    """No IDF is taken from the first reference: the first pair is finite, the order is nothing."""
    fresh = load_bertscore(str(folder), 2)
    forwards = [fresh.score(*pair) for pair in PAIRS]
    assert forwards == [scorer.score(*pair) for pair in reversed(PAIRS)][::-1]
    assert np.isfinite([score.f1 for score in forwards]).all()


def test_bertscore_of_long_and_of_empty_texts(
    scorer: BertScorer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scorer.window == 22
    long = " ".join(["the cat sat on a mat and the dog ran"] * 3)
    cut = " ".join(long.split()[:22])
    assert bert(scorer, long, B) == pytest.approx(bert(scorer, cut, B), abs=1e-6)
    for candidate, reference in (*EMPTY, ("", "")):
        assert bert(scorer, candidate, reference) == (0.0, 0.0, 0.0)
    assert capsys.readouterr().err == ""


def test_encoders_that_bertscore_cannot_use(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="no best layer of tiny: say how many layers to use"):
        load_bertscore(str(folder))
    for layers in (0, 4):
        with pytest.raises(ConfigError, match=f"tiny has 3 layers: give .* 1 to 3 .* not {layers}"):
            load_bertscore(str(folder), layers)
    (tmp_path / "config.json").write_text('{"model_type": "bert"')
    with pytest.raises(LoadError, match="could not be read as an encoder: "):
        load_bertscore(str(tmp_path), 1)


def found(candidate: str, reference: str) -> SentenceMatch:
    return match(candidate, reference, WordCounts())


D = "Birds sang loudly today."
THREE = f"{A} {B} {D}"

MATCHES = [
    (THREE, f"{A}\n{B}\n\n{D}", 1.0, 1.0, 1.0),
    (f"{D} {B} {A}", THREE, 1.0, 1.0, 0.0),  # reversed: all but the order
    (B, THREE, (1 / 3 + 1) / 2, 1 / 3, None),
    (THREE, A, (1 + 1 / 3) / 2, 1.0, None),  # what was added lowers the similarity alone
    (A, A, 1.0, 1.0, None),
    (A, B, 0.0, 0.0, None),
    *((candidate, reference, 0.0, 0.0, None) for candidate, reference in (*EMPTY, ("", ""))),
]


@pytest.mark.parametrize(("candidate", "reference", "similarity", "coverage", "order"), MATCHES)
def test_sentences_that_match(
    candidate: str, reference: str, similarity: float, coverage: float, order: float | None
) -> None:
    matched = found(candidate, reference)
    assert matched.similarity == pytest.approx(similarity)
    assert matched.coverage == pytest.approx(coverage)
    assert matched.order == order


def test_repeated_sentences_meet_their_own_copy() -> None:
    looped = f"{A} {A} {B} {A} {B} {A}"
    assert found(looped, looped).pairs == tuple((i, i) for i in range(6))
    assert found(looped, looped).order == 1.0


def test_the_threshold_is_included() -> None:
    cosines = np.array([[0.7, 0.1], [0.2, 0.699]])
    assert match_cosines(cosines, 0.7).coverage == 0.5
    assert match_cosines(cosines, 0.699).coverage == 1.0
    assert match_cosines(cosines, 0.71).pairs == ()


def test_the_most_similar_pairs_are_matched_first() -> None:
    cosines = np.array([[0.8, 0.9], [0.75, 0.95]])
    assert matched_pairs(cosines, 0.7) == [(0, 0), (1, 1)]
    assert matched_pairs(np.array([[0.8, 0.95], [0.75, 0.9]]), 0.7) == [(0, 1), (1, 0)]
    assert matched_pairs(np.array([[0.8, 0.95], [0.6, 0.9]]), 0.7) == [(0, 1)]


def test_coverage_lets_one_sentence_cover_several() -> None:
    both = match_cosines(np.array([[0.9], [0.8]]), 0.7)
    assert (both.coverage, both.pairs, both.order) == (1.0, ((0, 0),), None)


def test_rounding_does_not_pull_equal_texts_apart() -> None:
    noisy = np.ones((3, 3)) - np.array([[2e-8, 0, 1e-8], [0, 3e-8, 0], [1e-8, 0, 2e-8]])
    assert match_cosines(noisy, 0.7).pairs == ((0, 0), (1, 1), (2, 2))


def test_order_is_kendalls_tau_on_another_scale() -> None:
    kendalltau = pytest.importorskip("scipy.stats").kendalltau
    draw = random.Random(0)
    for size in range(2, 12):
        places = draw.sample(range(40), size)
        expected = (1 + kendalltau(range(size), places).statistic) / 2
        assert ordered_share(places) == pytest.approx(expected)
    assert ordered_share([3]) is None
    assert ordered_share([]) is None


def test_equal_texts_give_one(tools: TextTools) -> None:
    text = f"{A} {B}\n\n{C} {B}"
    assert numbers(text, text, tools) == ONE
    assert list(numbers(text, text, tools)) == list(NAMES)
    assert all(number.higher_is_better and number.meaning for number in NUMBERS)
    assert max(value for value in numbers(text, text, tools).values() if value) <= 1.0


def test_equal_texts_longer_than_a_window_give_one(tools: TextTools) -> None:
    text = " ".join([A, B, C] * 20)
    assert numbers(text, text, tools) == ONE


def test_one_sentence(tools: TextTools) -> None:
    assert numbers(A, A, tools) == {**ONE, "sentence_order": None}
    assert numbers("Rain", "Rain", tools) == {**ONE, "rouge2": None, "sentence_order": None}
    found = numbers(A, B, tools)
    assert found["sentence_order"] is None
    assert all(isinstance(found[name], float) for name in NAMES if name != "sentence_order")


@pytest.mark.parametrize(("candidate", "reference"), EMPTY)
def test_one_empty_text_gives_zero(tools: TextTools, candidate: str, reference: str) -> None:
    expected = {**dict.fromkeys(NAMES, 0.0), "sentence_order": None}
    assert numbers(candidate, reference, tools) == expected


def test_two_empty_texts_have_no_numbers(tools: TextTools) -> None:
    assert numbers("", " ", tools) == dict.fromkeys(NAMES)


def test_a_reference_without_letters_has_no_rouge(tools: TextTools) -> None:
    found = numbers("?!", "?!", tools)
    assert [found[name] for name in METRICS] == [None] * 4
    assert found["bleu"] == 1.0
    assert [numbers("!?", A, tools)[name] for name in METRICS] == [0.0] * 4


def test_each_number_is_that_of_its_own_file(tools: TextTools) -> None:
    candidate, reference = f"{C} {A} The dog ran.", f"{A} {B} {C}"
    found = numbers(candidate, reference, tools)
    assert {name: found[name] for name in METRICS} == rouge_scores(candidate, reference)
    assert found["bleu"] == bleu_score(candidate, reference)
    assert found["bertscore"] == tools.bert.score(candidate, reference).f1
    first, second = (tools.embedder.embed([text])[0] for text in (candidate, reference))
    assert found["document_similarity"] == pytest.approx(cosine(first, second), abs=1e-5)
    matched = match(candidate, reference, tools.embedder, 0.65)
    assert found["sentence_similarity"] == matched.similarity
    assert found["sentence_coverage"] == matched.coverage
    assert found["sentence_order"] == matched.order


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
        f"BLEU: sacrebleu / 100, each text one segment, {signature()}",
        f"BERTScore: F1 with {label}, layer 2, no IDF, not rescaled; texts are cut at 22 tokens",
        f"document and sentences: {label}; longer texts: mean over windows of 22 tokens",
        "coverage and order: sentences match from a cosine of 0.65",
    )
    facts = json.loads(json.dumps(tools.to_dict()))
    assert facts["embedder"]["sha256"] == sha256
    assert (facts["bertscore"]["layers"], facts["bertscore"]["idf"]) == (2, False)
    assert facts["sentence_threshold"] == 0.65


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("rouge_score.rouge_scorer", "rouge-score"),
        ("sacrebleu.metrics", "sacrebleu"),
        ("bert_score", "bert-score"),
        ("sentence_transformers", "sentence-transformers"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, package: str
) -> None:
    rouge_scorer.cache_clear()
    bleu_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"needs {package}, .*'dart-llm\[drift\]'"):
        load_tools(str(folder), bertscore=str(folder), bertscore_layers=2)


def test_the_packages_are_not_imported_with_the_module() -> None:
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


SAME = [
    ("The cat is sleeping on the sofa.", "A cat sleeps on the couch."),
    (
        "Farmers move their cattle to the hills.",
        "The farmers drive their cattle up into the hills.",
    ),
    (
        "The bank raised interest rates by a quarter point.",
        "Interest rates were increased 0.25 percent by the bank.",
    ),
    ("Water boils at 100 degrees Celsius.", "At one hundred degrees, water starts to boil."),
    (
        "The study found no effect of the drug.",
        "Researchers saw no difference between the drug and placebo.",
    ),
    ("He left early because he felt ill.", "Feeling sick, he went home before the end."),
]
OTHER = [
    "The cat chased a mouse in the kitchen.",
    "Farmers milk their cows before dawn.",
    "The bank closed forty branches this year.",
    "Ice melts when it is warm.",
    "The study enrolled 300 patients in two hospitals.",
    "He arrived late because of the traffic.",
]
"""About the topic of the pair of ``SAME`` at the same place, and something else."""


@pytest.mark.smollm2
def test_the_threshold_parts_paraphrases_from_the_same_topic() -> None:
    embedder = load_embedder()
    texts = [*(one for one, _ in SAME), *(two for _, two in SAME), *OTHER]
    first, same, other = np.split(embedder.embed(texts), 3)
    close = [cosine(a, b) for a, b in zip(first, same, strict=True)]
    far = [cosine(a, b) for a, b in zip(first, other, strict=True)]
    assert (round(min(close), 2), round(max(close), 2)) == (0.7, 0.91)
    assert (round(min(far), 2), round(max(far), 2)) == (0.15, 0.61)
    assert max(far) + 0.03 < THRESHOLD < min(close) - 0.03
