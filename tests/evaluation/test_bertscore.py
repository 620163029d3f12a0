"""BERTScore: by its definition, against the package's own scorer, and over several windows."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from dart_llm.errors import ConfigError, LoadError, MissingExtra
from dart_llm.evaluation.text_metrics import BertScorer, load_bertscore
from encoders import write_encoder

pytest.importorskip("bert_score")

A = "The cat sat in the garden all day and the dog ran on."
B = "Rain fell all night, the river ran deep and wide."
C = "The moon rose on a quiet house, a bird sang loud."
LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def scorer(folder: Path) -> BertScorer:
    return load_bertscore(str(folder), LAYERS)


def embedded(folder: Path, windows: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings of all tokens after two layers, and which of them are words."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    rows, words = [], []
    for window in windows:
        inputs = tokenizer(window, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states[LAYERS][0]
        rows.append(hidden.double().numpy())
        words += [False, *[True] * (len(hidden) - 2), False]
    joined = np.concatenate(rows)
    return joined / np.linalg.norm(joined, axis=1, keepdims=True), np.array(words)


def by_definition(
    folder: Path, candidate: list[str], reference: list[str]
) -> tuple[float, float, float]:
    """Precision, recall and F1 of texts that are given in windows."""
    (written, real), (wanted, needed) = embedded(folder, candidate), embedded(folder, reference)
    cosines = written @ wanted.T
    precision, recall = cosines.max(1)[real].mean(), cosines.max(0)[needed].mean()
    return precision, recall, 2 * precision * recall / (precision + recall)


def numbers(scorer: BertScorer, candidate: str, reference: str) -> tuple[float, float, float]:
    found = scorer.score(candidate, reference)
    return found.precision, found.recall, found.f1


@pytest.mark.parametrize(("candidate", "reference"), [(A, B), (B, "The cat sat."), ("dog", C)])
def test_short_texts_by_definition_and_as_the_package_scores_them(
    scorer: BertScorer, folder: Path, candidate: str, reference: str
) -> None:
    found = numbers(scorer, candidate, reference)
    assert found == pytest.approx(by_definition(folder, [candidate], [reference]), abs=1e-5)
    package = pytest.importorskip("bert_score").BERTScorer(
        model_type=str(folder), num_layers=LAYERS, use_fast_tokenizer=True, device="cpu"
    )
    expected = [float(value) for value in package.score([candidate], [reference])]
    assert found == pytest.approx(expected, abs=1e-5)


def test_long_texts_match_tokens_over_all_windows(scorer: BertScorer, folder: Path) -> None:
    found = numbers(scorer, f"{A} {B} {C}", f"{C} {A}")
    assert found == pytest.approx(by_definition(folder, [A, B, C], [C, A]), abs=1e-5)
    assert found[1] == pytest.approx(1.0)  # all of the reference is there
    assert found[0] < 0.999


def test_windows_are_not_compared_by_their_number(scorer: BertScorer) -> None:
    """The published averaging of chunk 1 with chunk 1, 2 with 2, ... calls this different."""
    assert numbers(scorer, f"{B} {C} {A}", f"{A} {B} {C}") == pytest.approx((1.0, 1.0, 1.0))
    unaligned = [scorer.score(one, other).f1 for one, other in ((B, A), (C, B), (A, C))]
    assert max(unaligned) < 0.99


def test_a_score_depends_on_its_pair_alone(scorer: BertScorer, folder: Path) -> None:
    """No IDF is taken from the first reference: the first pair is finite, the order is nothing."""
    pairs = [(A, A), (B, A), (C, B), (A, C)]
    fresh = load_bertscore(str(folder), LAYERS)
    forwards = [fresh.score(*pair) for pair in pairs]
    backwards = [scorer.score(*pair) for pair in reversed(pairs)]
    assert forwards == backwards[::-1]
    assert np.isfinite([one.f1 for one in forwards]).all()


@pytest.mark.parametrize("text", ["cat", A, f"{A} {B} {C}", "xylophone"])
def test_equal_texts_give_one(scorer: BertScorer, text: str) -> None:
    assert numbers(scorer, text, text) == pytest.approx((1.0, 1.0, 1.0), abs=1e-5)
    assert max(numbers(scorer, text, text)) <= 1.0


@pytest.mark.parametrize(("candidate", "reference"), [("", A), (A, " "), ("", "")])
def test_empty_texts_give_zero(
    scorer: BertScorer, candidate: str, reference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert numbers(scorer, candidate, reference) == (0.0, 0.0, 0.0)
    assert capsys.readouterr().err == ""


def test_the_label_names_encoder_layer_and_settings(scorer: BertScorer) -> None:
    assert scorer.window == 22
    assert scorer.label == (
        f"tiny (folder, sha256 {scorer.source.sha256[:12]}), layer 2, no IDF, not rescaled"
    )


def test_layers_that_are_missing_or_out_of_range(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no best layer of tiny: say how many layers to use"):
        load_bertscore(str(folder))
    for layers in (0, 4):
        with pytest.raises(ConfigError, match=f"tiny has 3 layers: give .* 1 to 3 .* not {layers}"):
            load_bertscore(str(folder), layers)


def test_models_that_are_no_encoder(tmp_path: Path) -> None:
    from checkpoints import write_folder

    with pytest.raises(LoadError, match=r"llama \(LlamaModel\) is no encoder that BERTScore"):
        load_bertscore(str(write_folder(tmp_path / "llama")), 1)
    (tmp_path / "config.json").write_text('{"model_type": "bert"')
    with pytest.raises(LoadError, match="could not be read as an encoder: "):
        load_bertscore(str(tmp_path), 1)


def test_the_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bert_score.utils", None)
    with pytest.raises(MissingExtra, match=r"needs bert-score.*'dart-llm\[drift\]'"):
        load_bertscore()


@pytest.mark.smollm2
def test_the_real_default_ranks_a_paraphrase_above_another_topic() -> None:
    scorer = load_bertscore()
    assert (scorer.layers, scorer.window) == (5, 510)
    assert len(scorer.model.encoder.layer) == 5
    text = "The cat is sleeping on the sofa."
    close = scorer.score("A cat sleeps on the couch.", text).f1
    far = scorer.score("Interest rates rose by a quarter of a point.", text).f1
    assert 0 < far < close - 0.2 < 1
