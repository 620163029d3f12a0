"""How jobs end that break off: what stays, what goes, what is said."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dart_llm.cli.app import app
from dart_llm.errors import ConfigError, LoadError, ResultsError, UnknownName
from dart_llm.experiments.store import ResultsFolder, open_folder
from dart_llm.experiments.study import leave
from dart_llm.experiments.study import resumable as kept
from dart_llm.reporting.console import Ui
from lm_cases import place
from quality_cases import job

COMMANDS = {
    "run": ("run", "--prompt", "hi"),
    "perplexity": ("perplexity", "--data", "embedded"),
    "eval": ("eval", "--tasks", "arc_easy"),
    "summarize": ("summarize", "--data", "xsum"),
    "drift": ("drift", "--passages", "shipped", "--limit", "1"),
    "detect": ("detect", "--limit", "1"),
    "inspect": ("inspect", "--passage", "01-bees-to-mortgages"),
    "quality": ("bench", "quality", "--text", "embedded"),
    "speed": ("bench", "speed"),
}


@dataclass
class Work:
    """A job as ``kept`` sees it."""

    folder: ResultsFolder
    model: Any = None
    ui: Ui = field(default_factory=lambda: Ui(quiet=True))
    timing: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder.path


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(open_folder(tmp_path, "x", {}))


def stop(work: Work, error: BaseException, left: list[str]) -> None:
    with kept(work, left.append, "tiny", None):
        raise error


@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_that_is_not_there_leaves_no_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*COMMANDS[name], "--model", "nosuch"])
    assert isinstance(done.exception, UnknownName)
    assert str(done.exception).startswith("unknown model 'nosuch'")
    assert [path.name for path in tmp_path.rglob("*")] == ["results"]


def test_a_second_model_that_is_not_there_keeps_the_first(tmp_path: Path) -> None:
    ui, model = Ui(quiet=True), str(place() / "model")
    with pytest.raises(UnknownName, match="unknown model 'nosuch'"):
        job(
            tmp_path, ui, model=[model, "nosuch"], sparsities="0.5", oracle="", cells="continuation"
        )
    (config,) = (tmp_path / "results").rglob("config.json")
    assert json.loads(config.read_text())["status"] == "failed"
    told = f"what was finished is kept in {config.parent}; the same command resumes"
    assert ui.log[-1] == told


@pytest.mark.parametrize("error", [UnknownName("model", "a", ()), LoadError("b")])
def test_a_folder_goes_only_where_no_model_came(work: Work, error: Exception) -> None:
    left: list[str] = []
    work.model = object()
    with pytest.raises(type(error), match=re.escape(str(error))):
        stop(work, error, left)
    assert left == ["failed"] and work.path.is_dir()
    work.model = None
    work.folder.save_part("one", 1)
    with pytest.raises(type(error)):
        stop(work, error, left)
    assert left == ["failed", "failed"] and work.path.is_dir()
    work.folder.parts.clear()
    with pytest.raises(type(error)):
        stop(work, error, left)
    assert left == ["failed", "failed"] and not work.path.exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "interrupted"), (ConfigError("a"), "failed"), (OSError(), "failed")],
)
def test_what_stopped_the_work_is_raised_again(
    work: Work, error: BaseException, status: str
) -> None:
    left: list[str] = []
    with pytest.raises(type(error)) as caught:
        stop(work, error, left)
    assert caught.value is error and left == [status]


def test_a_lack_of_memory_is_a_sentence(work: Work) -> None:
    left: list[str] = []
    with pytest.raises(LoadError, match="tiny does not fit in memory as the checkpoint's dtype"):
        stop(work, MemoryError(), left)
    assert left == ["failed"]


def test_a_full_disk_hides_no_error(work: Work) -> None:
    def full(status: str) -> None:
        raise ResultsError("no space left")

    with pytest.raises(ValueError, match="the first"), kept(work, full, "tiny", None):
        raise ValueError("the first")


def test_what_the_work_took_is_noted_when_it_is_done(work: Work) -> None:
    with kept(work, [].append, "tiny", None) as took:
        assert work.timing == {}
        took()
    assert work.timing["total_s"] >= 0 and work.timing["peak_memory_bytes"] > 2**20
    assert work.ui.log == []


def test_a_job_that_goes_on_says_so(work: Work) -> None:
    work.folder = replace(work.folder, resumed=True)
    with kept(work, [].append, "tiny", None):
        assert work.ui.log == [f"resuming {work.path}"]


@pytest.mark.parametrize("finished", [True, False])
def test_what_is_left(work: Work, finished: bool) -> None:
    seen: list[str] = []
    work.timing = {"load_s": 1.5}
    leave(work, "failed", seen.append, finished)
    assert seen == ["failed"]
    told = f"what was finished is kept in {work.path}; the same command resumes"
    assert work.ui.log == ([told] if finished else [])
    stamp = work.folder.stamp
    names = {path.name for path in work.path.iterdir()} - {".lock"}
    assert names == {f"output_{stamp}.log", f"timing_{stamp}.log"}
    assert "load_s" in (work.path / f"timing_{stamp}.log").read_text()
