"""What goes wrong in a drift study: failed cells, a full disk, sources that do not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from dart_llm.errors import CellsFailed, ConfigError, ResultsError
from dart_llm.reporting.console import Ui
from dart_llm.studies.drift import study as drift_cell
from drift_cases import (
    THREE,
    TWO,
    draw_nothing,
    forced,
    free,
    lines,
    load_json,
    settings,
    study,
    write_rows,
)
from lm_cases import break_position, loaded


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with NaN from a position on that the second passage alone reaches."""
    folder = tmp_path_factory.mktemp("broken") / "model"
    model, tokenizer = loaded()
    place = len(TWO["text"]) + 20
    break_position(copy.deepcopy(model), place).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_cells_that_fail_are_marked_and_the_others_go_on(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "p.jsonl", [THREE, TWO])
    asked = forced(tmp_path, methods="never", model=broken, passages=file)
    with pytest.raises(
        CellsFailed, match=r"2 of 4 cells failed, .*the first, forced/three/dense"
    ) as e:
        study(asked, Ui(quiet=True))
    (folder,) = (tmp_path / "results").glob("*/*")
    rows = lines(folder / "results.jsonl")
    assert [row["status"] for row in rows] == ["failed", "failed", "done", "done"]
    assert "the passage three: the loss of its token" in rows[0]["error"]
    assert rows[0]["loss"] is None and rows[0]["topics"] == [] and rows[0]["checks"] == []
    assert e.value.document["rows"][1]["failed"] == 1 and e.value.document["rows"][1]["cells"] == 1
    assert load_json(folder / "config.json")["status"] == "failed"
    summary = load_json(folder / "summary.json")["rows"]
    assert [(line["cells"], line["failed"]) for line in summary] == [(1, 1), (1, 1)]
    tried = []
    real = drift_cell.compute
    monkeypatch.setattr(
        "dart_llm.studies.drift.study.compute",
        lambda cell, *rest: (tried.append(cell.key), real(cell, *rest))[1],
    )
    with pytest.raises(CellsFailed):  # the same command tries those again, and only those
        study(asked, Ui(quiet=True))
    assert tried == ["forced/three/dense/0", "forced/three/never@0.5/0"]
    assert len(list((tmp_path / "results").glob("*/*"))) == 1


def test_a_method_that_cannot_be_prepared_fails_its_cells(tmp_path: Path) -> None:
    asked = forced(tmp_path, methods="wanda,never", calibration=str(tmp_path / "none.txt"))
    with pytest.raises(CellsFailed, match=r"2 of 6 cells failed.*wanda@0.5/0: .*none\.txt"):
        study(asked)


def test_a_full_disk_ends_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise ResultsError("no space")

    monkeypatch.setattr(drift_cell, "write_masks", full)
    with pytest.raises(ResultsError, match="no space"):
        study(forced(tmp_path, methods="never"))
    (folder,) = (tmp_path / "results").glob("*/*")
    assert load_json(folder / "config.json")["status"] == "failed"
    assert [row["label"] for row in lines(folder / "results.jsonl")] == ["dense"]


def test_a_passage_that_does_not_fit_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    asked = forced(tmp_path, prompt_tokens=len(TWO["text"]))
    with pytest.raises(ConfigError, match=r'the passage "two" has \d+ tokens before its first'):
        study(asked)
    (folder,) = (tmp_path / "results").glob("*/*")
    assert lines(folder / "results.jsonl") == []


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for make, kind in ((forced, "passages"), (free, "prompts")):
        sentence = (
            f"--{kind} .*none: there is no such file; --{kind} shipped takes the package's own"
        )
        with pytest.raises(ConfigError, match=sentence):
            study(make(tmp_path, **{kind: str(tmp_path / "none")}))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"the file .*bytes\.jsonl cannot be read as UTF-8 text"):
        study(forced(tmp_path, passages=str(tmp_path / "bytes.jsonl")))
    (tmp_path / "bad.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 1 of .*bad\.jsonl is not JSON"):
        study(free(tmp_path, prompts=str(tmp_path / "bad.jsonl")))
    rows = [{"id": "a/b", "text": "x"}, {"id": "a-b", "text": "y"}]
    with pytest.raises(ConfigError, match='ids "a/b" and "a-b" would give two cells one file'):
        study(free(tmp_path, prompts=write_rows(tmp_path / "c.jsonl", rows)))
    for name in ("é" * 120, "a\0b"):
        file = write_rows(tmp_path / "d.jsonl", [{**TWO, "id": name}])
        with pytest.raises(ConfigError, match=r'no file can be named after the id "(é{40}|a\0b)'):
            study(forced(tmp_path, passages=file))
    with pytest.raises(ConfigError, match="the prompt is not valid UTF-8"):
        study(settings(tmp_path, prompt="bees \udcff"))
    assert not (tmp_path / "results").exists()
