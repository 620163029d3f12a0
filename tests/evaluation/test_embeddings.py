"""Embeddings of texts: what the model says, windows averaged, empty text, missing packages."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from dart_llm.errors import LoadError, MissingExtra
from dart_llm.evaluation.encoders import Embedder, cosine, load_embedder, unit
from encoders import WIDTH, write_encoder

pytest.importorskip("sentence_transformers")

SHORT = "the cat sat on a mat"
LONG = "the cat sat in the garden all day . rain fell all night . red fish swam . a bird sang loud"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    return load_embedder(str(folder))


def pooled(folder: Path, text: str) -> np.ndarray:
    """Mean over the tokens of one window, by transformers alone."""
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state
    return hidden[0].double().mean(0).numpy()


def test_a_short_text_is_the_mean_of_its_tokens(embedder: Embedder, folder: Path) -> None:
    (row,) = embedder.embed([SHORT])
    assert row.shape == (WIDTH,)
    np.testing.assert_allclose(row, pooled(folder, SHORT), atol=1e-5)
    assert (embedder.window, embedder.count(SHORT), embedder.dimensions) == (22, 6, WIDTH)


def test_a_long_text_is_the_weighted_mean_of_its_windows(embedder: Embedder, folder: Path) -> None:
    one = "The cat sat in the garden all day, and the dog ran on. Rain fell all night."
    two = "Red fish swam."
    (row,) = embedder.embed([f"{one} {two}"])
    counts = [embedder.count(one), embedder.count(two)]
    assert counts == [20, 4]  # together more than 22
    expected = np.average([pooled(folder, one), pooled(folder, two)], axis=0, weights=counts)
    np.testing.assert_allclose(row, expected, atol=1e-5)


def test_nothing_of_a_long_text_is_dropped(embedder: Embedder) -> None:
    base = "The cat sat in the garden all day. " * 6
    first, second = embedder.embed([base + "Fish swam.", base + "The moon rose."])
    assert cosine(first, second) < 1 - 1e-6


def test_texts_do_not_depend_on_their_company(embedder: Embedder) -> None:
    alone = embedder.embed([SHORT])[0]
    together = embedder.embed([LONG, "", SHORT, LONG * 3])
    np.testing.assert_allclose(together[2], alone, atol=1e-5)
    np.testing.assert_array_equal(together[1], np.zeros(WIDTH))
    assert np.linalg.norm(together, axis=1)[[0, 2, 3]].min() > 0


def test_empty_input(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, WIDTH)
    assert not embedder.embed(["", " \n"]).any()


def test_cosine_and_unit() -> None:
    a, b = np.array([3.0, 4.0]), np.array([4.0, 3.0])
    assert cosine(a, b) == pytest.approx(24 / 25)
    assert cosine(a, a) == pytest.approx(1.0) and cosine(a, -a) == pytest.approx(-1.0)
    assert cosine(a, np.zeros(2)) == 0.0
    np.testing.assert_allclose(unit(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[{}]")
    with pytest.raises(LoadError, match="could not be read as a sentence-transformers model: "):
        load_embedder(str(tmp_path))


def test_the_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtra, match=r"needs sentence-transformers.*'dart-llm\[drift\]'"):
        load_embedder("nowhere/at-all")


@pytest.mark.smollm2
def test_the_real_default_tells_paraphrase_from_topic() -> None:
    embedder = load_embedder()
    assert (embedder.window, embedder.dimensions) == (254, 384)
    assert embedder.source.name == "all-MiniLM-L6-v2"
    rows = embedder.embed(
        [
            "The cat is sleeping on the sofa.",
            "A cat sleeps on the couch.",
            "The dog barked at the postman.",
        ]
    )
    assert cosine(rows[0], rows[1]) > 0.8
    assert cosine(rows[0], rows[2]) < 0.3
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
