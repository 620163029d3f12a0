"""Names of encoders: folders, hub ids, bare names, and what is said when there is none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dart_llm.errors import LoadError
from dart_llm.evaluation.encoders import EncoderSource, find_encoder
from dart_llm.files import file_sha256
from encoders import write_encoder
from fake_hub import COMMIT, Repository, _Handler, serve

CLIENT = """
import json, sys
from dart_llm.encoder_source import find_encoder
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
