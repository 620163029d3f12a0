"""``dart-llm drift`` as a command: flags, one JSON document, exit by one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dart_llm.cli import commands as cli_drift
from dart_llm.cli.options import with_settings
from dart_llm.errors import CellsFailed, ConfigError
from dart_llm.studies.drift import study as drift_finish
from dart_llm.studies.drift.settings import DriftSettings
from drift_cases import TWO, write_rows
from lm_cases import place

app = typer.Typer()
app.command(name="drift")(with_settings(cli_drift.drift, DriftSettings))


def run(folder: Path, *arguments: str) -> tuple[int, str, BaseException | None]:
    given = ["--model", str(place() / "model"), "--results-dir", str(folder / "r"), *arguments]
    found = CliRunner().invoke(app, given)
    return found.exit_code, found.stdout, found.exception


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_finish, "write_pictures", lambda path, ui: None)


def test_json_is_one_document_with_the_summary(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "p.jsonl", [TWO])
    code, out, error = run(
        tmp_path, "--passages", file, "--methods", "never@0.25", "--prompt-tokens", "64", "--json"
    )
    assert (code, error) == (0, None)
    found = json.loads(out)
    assert [line["label"] for line in found["rows"]] == ["dense", "never@0.25"]
    assert found["rows"][1]["achieved_sparsity"] == pytest.approx(0.25, abs=0.01)
    assert Path(found["folder"]).parent.name == "drift-forced-model"


def test_a_detection_table_is_taken_into_the_study(tmp_path: Path) -> None:
    file, source = write_rows(tmp_path / "p.jsonl", [TWO]), tmp_path / "detect"
    asked = ["--passages", file, "--methods", "dense", "--prompt-tokens", "64", "--json"]
    code, _, error = run(tmp_path, *asked, "--detection", str(source))
    assert code == 1 and isinstance(error, ConfigError)
    assert str(error) == (
        f"--detection {source} holds no detection.json: give the results folder of a finished "
        "dart-llm detect"
    )
    source.mkdir()
    (source / "detection.json").write_text('{"rows": []}', encoding="utf-8")
    code, out, _ = run(tmp_path, *asked, "--detection", str(source))
    folder = Path(json.loads(out)["folder"])
    assert (folder / "detection.json").read_text(encoding="utf-8") == '{"rows": []}'
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "detection" not in config["settings"]  # of the report alone: resuming ignores it


def test_settings_of_a_file_and_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("passages: shipped\nmethods: drat\n", encoding="utf-8")
    code, _, error = run(tmp_path, "--config", str(tmp_path / "s.yaml"))
    assert code == 1 and isinstance(error, ConfigError)
    assert str(error) == "unknown method 'drat'; did you mean dart?"


def test_failed_cells_end_with_an_error_after_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("no")

    monkeypatch.setattr("dart_llm.studies.drift.study.compute", broken)
    code, out, error = run(
        tmp_path, "--prompt", "a tale", "--methods", "dense", "--generation", "9", "--json"
    )
    assert code == 1 and isinstance(error, CellsFailed)
    assert "1 of 1 cells failed" in str(error) and "ZeroDivisionError: no" in str(error)
    assert json.loads(out)["rows"][0]["failed"] == 1


def test_the_help_names_every_setting() -> None:
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    for name in DriftSettings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
