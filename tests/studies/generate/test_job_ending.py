"""How jobs end that break off: what stays, what goes, what is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dart_llm.cli.app import app
from dart_llm.errors import UnknownName
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
