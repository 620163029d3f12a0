"""Encoders: what their names mean, texts as vectors, and long texts in windows that fit."""

import shutil

import httpx
import numpy as np
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModel, AutoTokenizer

from dart_llm.errors import LoadError
from dart_llm.evaluation.encoders import (
    EncoderSource,
    cosine,
    find_encoder,
    load_embedder,
    windows,
)
from dart_llm.files import file_sha256
from encoders import WIDTH, count_words, write_encoder

pytest.importorskip("sentence_transformers")
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def embedder(folder):
    return load_embedder(str(folder))


def test_windows_hold_whole_sentences_in_their_order():
    text = "  One two.\n\nThree  four.  "
    assert windows(text, count_words, 4) == windows(text, count_words, None) == [text.strip()]
    assert windows(" \n\t ", count_words, 5) == []
    text = "One two. Three four five. Six. Seven eight. Nine."
    five = ["One two. Three four five.", "Six. Seven eight. Nine."]
    assert windows(text, count_words, 5) == five
    four = ["One two.", "Three four five. Six.", "Seven eight. Nine."]
    assert windows(text, count_words, 4) == four
    words = [f"w{i}" for i in range(23)]  # what fits no window is cut
    found = windows(" ".join(words), count_words, 5)
    assert " ".join(found).split() == words and max(map(count_words, found)) <= 5
    found = windows("x" * 30 + "y", len, 8)
    assert "".join(found) == "x" * 30 + "y" and max(map(len, found)) <= 8


def pooled(folder, text):
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state
    return hidden[0].double().mean(0).numpy()


def test_a_text_is_the_weighted_mean_of_its_windows(embedder, folder):
    short = "the cat sat on a mat"
    assert (embedder.window, embedder.count(short), embedder.dimensions) == (22, 6, WIDTH)
    one = "The cat sat in the garden all day, and the dog ran on. Rain fell all night."
    two = "Red fish swam."
    counts = [embedder.count(one), embedder.count(two)]
    assert counts == [20, 4]  # together more than 22
    rows = embedder.embed([f"{one} {two}", "", short, " \n"])  # whatever their company
    expected = np.average([pooled(folder, one), pooled(folder, two)], axis=0, weights=counts)
    np.testing.assert_allclose(rows[0], expected, atol=1e-5)
    np.testing.assert_allclose(rows[2], pooled(folder, short), atol=1e-5)
    assert not rows[[1, 3]].any()
    assert cosine(np.array([3.0, 4]), np.array([4.0, 3])) == pytest.approx(24 / 25)
    assert cosine(rows[0], rows[1]) == 0.0
    base = "The cat sat in the garden all day. " * 6  # nothing of a long text is dropped
    assert cosine(*embedder.embed([base + "Fish swam.", base + "The moon rose."])) < 1 - 1e-6


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """In place of the hub's library: repositories by id, of which the wanted files are copied."""
    weights = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    safe = {**weights, "onnx/model.onnx": folder / "vocab.txt"}
    old = {**safe, "pytorch_model.bin": weights["model.safetensors"]}
    del old["model.safetensors"]
    repositories = {"tiny/safe": safe, "sentence-transformers/old": old}

    def download(name, cache_dir, ignore_patterns):
        if name not in repositories:
            response = httpx.Response(404, request=httpx.Request("GET", f"https://hub/{name}"))
            raise RepositoryNotFoundError("not found", response=response)
        target = tmp_path / name / COMMIT
        for path in filter_repo_objects(repositories[name], ignore_patterns=ignore_patterns):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repositories[name][path], target / path)
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)


def test_hub_ids_and_bare_names(hub, folder):
    sha256 = file_sha256(folder / "model.safetensors")
    first, second = find_encoder("tiny/safe"), find_encoder("old")
    names = [{p.name for p in one.rglob("*") if p.is_file()} for one in (first.folder, folder)]
    assert names[0] == names[1]
    assert (first.name, first.origin, first.revision) == ("tiny/safe", "hub", COMMIT)
    assert first.label == f"tiny/safe (hub, revision {COMMIT[:12]}, sha256 {sha256[:12]})"
    assert (second.name, second.sha256) == ("sentence-transformers/old", sha256)
    with pytest.raises(LoadError, match="the hub has no model 'nobody/nothing' that you may read"):
        find_encoder("nobody/nothing")


def test_folders(tmp_path, folder, monkeypatch):
    sha256 = file_sha256(folder / "model.safetensors")
    source = find_encoder(str(folder))
    assert source == EncoderSource("tiny", folder.resolve(), "folder", sha256)
    assert source.label == f"tiny (folder, sha256 {sha256[:12]})"
    monkeypatch.chdir(tmp_path)
    refused = {
        ".": r"not an encoder, for it has neither modules\.json nor",
        "a/b/c": "there is no folder",
    }
    for name, words in refused.items():
        with pytest.raises(LoadError, match=words):
            find_encoder(name)
