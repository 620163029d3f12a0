"""Encoders: what their names mean, texts as vectors, and long texts in windows that fit."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
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
from fake_hub import COMMIT, Repository, _Handler, serve

pytest.importorskip("sentence_transformers")


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


CLIENT = """
import json, sys
from dart_llm.evaluation.encoders import find_encoder
from dart_llm.errors import LoadError
for name in json.loads(sys.argv[1]):
    said = []
    try:
        found = find_encoder(name, progress=said.append)
        files = sorted(str(p.relative_to(found.folder)) for p in found.folder.rglob("*.*"))
        answer = {**found.to_dict(), "files": files, "label": found.label}
    except LoadError as error:
        answer = {"error": str(error)}
    print(json.dumps({**answer, "said": said}))
"""


@pytest.fixture
def trees(monkeypatch):
    """Let the fake hub list a repository's files, which a download of several asks for."""
    answer = _Handler.do_GET

    def do_get(handler):
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/?]+(?:\?.*)?", handler.path)
        if not match:
            return answer(handler)
        listed = [
            {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            for path, content in handler.state.repositories[match[1]].files.items()
        ]
        return handler._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

    monkeypatch.setattr(_Handler, "do_GET", do_get)


def client(endpoint, home, *names, offline="0"):
    """Answers of a process of its own: the hub library reads its settings when imported."""
    environment = {key: value for key, value in os.environ.items() if key != "DART_CACHE"}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"NO_PROXY": "127.0.0.1", "XDG_CACHE_HOME": str(home / "cache")}
    environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    command = [sys.executable, "-c", CLIENT, json.dumps(names)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_ids_and_bare_names(trees, tmp_path, folder):
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    weights = files["model.safetensors"]
    safe = {**files, "onnx/model.onnx": b"onnx"}
    old = {**safe, "pytorch_model.bin": weights}
    del old["model.safetensors"]
    repositories = {
        "tiny/safe": Repository(safe),
        "sentence-transformers/old": Repository(old),
        "meta/private": Repository(status=401, api_status=401),
    }
    names = ("tiny/safe", "old", "meta/private", "nobody/nothing")
    home = tmp_path / "home"
    with serve(repositories) as hub:
        first, second, *refused = client(hub.endpoint, home, *names)
    sha256 = file_sha256(folder / "model.safetensors")
    assert first["files"] == sorted(files)
    assert (first["name"], first["source"], first["revision"]) == ("tiny/safe", "hub", COMMIT)
    assert first["label"] == f"tiny/safe (hub, revision {COMMIT[:12]}, sha256 {sha256[:12]})"
    assert (second["name"], second["sha256"]) == ("sentence-transformers/old", sha256)
    for name, answer in zip(names[2:], refused, strict=True):
        assert answer["error"].startswith(f"the hub has no model '{name}' that you may read")
    again, never = client("http://127.0.0.1:9", home, "tiny/safe", "tiny/never", offline="1")
    assert again["sha256"] == first["sha256"] == sha256
    assert "tiny/never" in never["error"]
    assert "give a local folder or all-MiniLM-L6-v2" in never["error"]


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
