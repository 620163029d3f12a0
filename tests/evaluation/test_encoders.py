"""Encoders: what their names mean, texts as vectors, and long texts in windows that fit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from dart_llm.errors import ConfigError, LoadError
from dart_llm.evaluation.encoders import (
    Embedder,
    EncoderSource,
    cosine,
    find_encoder,
    load_embedder,
    unit,
    windows,
)
from dart_llm.files import file_sha256
from encoders import WIDTH, count_words, write_encoder
from fake_hub import COMMIT, Repository, _Handler, serve

pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("models") / "tiny")


def test_a_text_that_fits_stays_as_it_is() -> None:
    text = "  One two.\n\nThree  four.  "
    assert windows(text, count_words, 4) == ["One two.\n\nThree  four."]
    assert windows(text, count_words, None) == ["One two.\n\nThree  four."]
    assert windows("", count_words, 5) == windows(" \n\t ", count_words, 5) == []


def test_sentences_are_packed_in_their_order() -> None:
    text = "One two. Three four five. Six. Seven eight. Nine."
    assert windows(text, count_words, 5) == [
        "One two. Three four five.",
        "Six. Seven eight. Nine.",
    ]
    assert windows(text, count_words, 4) == [
        "One two.",
        "Three four five. Six.",
        "Seven eight. Nine.",
    ]


def test_what_fits_no_window_is_cut() -> None:
    words = [f"w{i}" for i in range(23)]
    found = windows(" ".join(words), count_words, 5)
    assert [word for piece in found for word in piece.split()] == words
    assert max(map(count_words, found)) <= 5
    found = windows("x" * 30 + "y", len, 8)
    assert "".join(found) == "x" * 30 + "y"
    assert max(map(len, found)) <= 8
    assert windows("ab", lambda text: 3 * len(text), 2) == ["a", "b"]  # a character is the end
    for limit in (0, -1):
        with pytest.raises(ConfigError, match=f"at least 1 token, not {limit}"):
            windows("one", count_words, limit)


SHORT = "the cat sat on a mat"
LONG = "the cat sat in the garden all day . rain fell all night . red fish swam . a bird sang loud"


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
def trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fake hub list a repository's files, which a download of several asks for."""
    answer = _Handler.do_GET

    def do_get(handler: _Handler) -> None:
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/?]+(?:\?.*)?", handler.path)
        if not match:
            return answer(handler)
        files = handler.state.repositories[match[1]].files.items()
        listed = [
            {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            for path, content in files
        ]
        return handler._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

    monkeypatch.setattr(_Handler, "do_GET", do_get)


def client(endpoint: str, home: Path, names: list[str], offline: str = "0") -> list[dict]:
    """Answers of a process of its own: the hub library reads its settings when imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "XDG_CACHE_HOME": str(home / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
    }
    environment.pop("DART_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(names)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_ids_bare_names_and_the_default_from_the_hub(trees: None, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "tiny")
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    safe = {**files, "onnx/model.onnx": b"onnx", "pytorch_model.bin": b"old", "notes.md": b"#"}
    weights = safe.pop("model.safetensors")
    old = {**safe, "pytorch_model.bin": weights}
    safe["model.safetensors"] = weights
    repositories = {
        "tiny/safe": Repository(safe),
        "sentence-transformers/old": Repository(old),
        "sentence-transformers/all-MiniLM-L6-v2": Repository(safe),
        "meta/private": Repository(status=401, api_status=401),
    }
    home = tmp_path / "home"
    with serve(repositories) as hub:
        first, second, default, private, missing = client(
            hub.endpoint,
            home,
            ["tiny/safe", "old", "all-MiniLM-L6-v2", "meta/private", "nobody/nothing"],
        )
        assert not hub.downloads["tiny/safe/pytorch_model.bin"]
    sha256 = file_sha256(folder / "model.safetensors")
    assert "error" not in first, first
    assert first["files"] == sorted(files)
    assert (first["name"], first["source"], first["revision"]) == ("tiny/safe", "hub", COMMIT)
    assert first["sha256"] == sha256
    assert first["label"] == f"tiny/safe (hub, revision {COMMIT[:12]}, sha256 {sha256[:12]})"
    assert first["said"] == [f"downloading tiny/safe: {len(weights) / 1e6:.1f} MB"]
    assert (second["name"], second["sha256"]) == ("sentence-transformers/old", sha256)
    assert "pytorch_model.bin" in second["files"]
    assert default["name"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert default["said"][-2].endswith(
        "; trying sentence-transformers/all-MiniLM-L6-v2 on the hub"
    )
    assert private["error"].startswith("the hub has no model 'meta/private' that you may read")
    assert missing["error"].startswith("the hub has no model 'nobody/nothing' that you may read")
    again, never = client("http://127.0.0.1:9", home, ["tiny/safe", "tiny/never"], offline="1")
    assert again["sha256"] == sha256
    assert never["error"] == (
        "tiny/never is not in the hub's cache and HF_HUB_OFFLINE is set; unset it to download, or "
        "give a local folder or all-MiniLM-L6-v2"
    )


def test_a_folder_is_named_with_its_checksum(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "tiny")
    sha256 = file_sha256(folder / "model.safetensors")
    source = find_encoder(str(folder))
    assert source == EncoderSource("tiny", folder.resolve(), "folder", sha256)
    assert source.label == f"tiny (folder, sha256 {sha256[:12]})"


def test_a_folder_that_holds_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no encoder, for it has neither modules\.json nor"):
        find_encoder(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "what is this", ".."])
def test_paths_that_are_not_there(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match=r"there is no folder|is no encoder"):
        find_encoder(name)
