"""The contract of every command that keeps a results folder: one suite over all studies.

A study is added by one ``Case``.  ``Counting``, at the end, shows what the runner does with units.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from dart_llm.cli.app import app
from dart_llm.errors import CellsFailed, ConfigError, LoadError, ResultsError, UnknownName
from dart_llm.experiments import store
from dart_llm.experiments.store import ResultsFolder
from dart_llm.experiments.study import Study, Unit, run_study
from dart_llm.files import write_json
from dart_llm.reporting import figures
from dart_llm.reporting.console import Ui
from dart_llm.settings import StudyOptions, merge
from dart_llm.studies.bench.speed import SpeedStudy
from dart_llm.studies.bench.tune import TuneStudy
from dart_llm.studies.drift.detect import DetectionStudy
from dart_llm.studies.drift.settings import DetectSettings
from dart_llm.studies.drift.study import DriftStudy
from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.generate.study import RunStudy
from dart_llm.studies.inspection.settings import InspectSettings
from dart_llm.studies.inspection.study import InspectionStudy
from dart_llm.studies.quality.study import QualityStudy
from dart_llm.studies.sweep.settings import CompareSettings, PerplexitySettings
from dart_llm.studies.sweep.study import MeasureStudy
from drift_cases import FIRST, PROMPT, SECOND, THREE, TWO, write_rows
from drift_cases import settings as drift_settings
from html_page import Page
from lm_cases import place
from quality_cases import bees
from quality_cases import settings as quality_settings
from speed_cases import settings as speed_settings
from tiny import CONFIGS
from tune_cases import settings as tune_settings
from tune_cases import write_text as tune_text


@dataclass(frozen=True)
class Case:
    """One study on a tiny model, with inputs and results below the current folder.

    ``prepare`` writes the inputs of one version.  ``command``: with its flags, where its answer is
    the document.  ``timed``: its lines hold times.  ``finer``: it keeps pieces of its units.
    ``adopts``: it reuses units of earlier runs.
    """

    name: str
    units: int
    prepare: Callable[[int], None]
    make: Callable[[Ui], Study[Any]]
    command: tuple[str, Callable[[], dict[str, Any]]] | None = None
    timed: bool = False
    finer: bool = False
    adopts: bool = False


def _model(**given):
    return {"model": str(place() / "model"), "device": "cpu", **given}


def _passages(version):
    again = {**TWO, "id": f"again {version}"}
    write_rows(Path("passages.jsonl"), [TWO, THREE, again])


def _detect():
    sizes = {"prompt_tokens": PROMPT, "horizon": 60, "thresholds": "0,2", "counts": "1"}
    return _model(**sizes, passages="passages.jsonl", signals="attention,hidden")


def _detection(ui):
    return DetectionStudy(merge(DetectSettings, _detect(), environment={}), ui)


def _texts(version):
    Path("a.txt").write_text(3 * FIRST + "x" * version, encoding="utf-8")
    Path("b.txt").write_text(3 * SECOND, encoding="utf-8")


def _inspect():
    return _model(method="griffin", prompt_file="a.txt", prompt_b_file="b.txt")


def _inspection(ui):
    asked = merge(InspectSettings, _inspect(), environment={})
    return InspectionStudy(asked, ("layers", "neurons", "overlap"), ui)


def _quality_text(version):
    documents = [*bees().documents, f"another document, {version}"]
    Path("own.txt").write_text("\n\n".join(documents), encoding="utf-8")


def _quality(ui):
    given = {"text": ["own.txt"], "sparsities": "0.5,0.7", "oracle": "", "cells": "continuation"}
    return QualityStudy(quality_settings(Path(), methods="griffin,static", slices=2, **given), ui)


def _shape(version):
    kind, layers = CONFIGS["llama"]
    Path("own.json").write_text(json.dumps({"model_type": kind, **layers, "note": version}))


def _speed(ui):
    given = {"shape": "own.json", "repeats": 3, "executors": "compact"}
    return SpeedStudy(speed_settings(Path(), **given), ui, bandwidth_mib=1)


def _drift_passages(version):
    write_rows(Path("own.jsonl"), [TWO, {**THREE, "id": f"three {version}"}])


def _drift(ui):
    given = {"passages": "own.jsonl", "prompt_tokens": PROMPT, "methods": "never"}
    return DriftStudy(drift_settings(Path(), **given), ui)


def _perplexity(ui):
    sizes = {"prompt_tokens": 48, "scored_tokens": 24, "limit": 2}
    given = _model(data="a.txt,b.txt", method="griffin", **sizes)
    return MeasureStudy(merge(PerplexitySettings, given, environment={}), ui)


def _compare(ui):
    sizes = {"prompt_tokens": 48, "scored_tokens": 24, "limit": 2}
    given = _model(tasks="perplexity:a.txt,perplexity:b.txt", methods="griffin", **sizes)
    return MeasureStudy(merge(CompareSettings, given, environment={}), ui)


def _run(ui):
    prompt = {"prompt_file": "a.txt", "prompt_length": 40, "generation": 4}
    given = _model(method="griffin", sparsity=0.5, **prompt)
    return RunStudy(RunSettings(**given), ui)


def _tune_text(version):
    tune_text(Path(), version)


def _tune(ui):
    return TuneStudy(tune_settings(Path(), text="bees.txt", sparsities="0.5", repeats=1), ui)


CASES = (
    Case("detect", 3, _passages, _detection, ("detect", _detect)),
    Case("inspect", 3, _texts, _inspection, ("inspect layers neurons overlap", _inspect)),
    Case("perplexity", 4, _texts, _perplexity, finer=True),
    Case("compare", 4, _texts, _compare, finer=True, adopts=True),
    Case("run", 3, _texts, _run, timed=True, finer=True),
    Case("drift", 4, _drift_passages, _drift),
    Case("quality", 8, _quality_text, _quality, finer=True),
    Case("speed", 3, _shape, _speed, timed=True),
    Case("tune", 14, _tune_text, _tune, timed=True),
)
NEVER_EQUAL = {"timing.json", "config.json", "report.html"}
"""Files that hold times; the page shows them."""


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request.param.prepare(0)
    return request.param


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes most of the time of so small a study."""
    monkeypatch.setattr(figures, "save", lambda folder, wanted, style: [])
    for study in (InspectionStudy, MeasureStudy, DriftStudy, RunStudy, TuneStudy):
        monkeypatch.setattr(study, "write_page", lambda self: None)
        monkeypatch.setattr(study, "figures", lambda self: ())


def quiet():
    return Ui(quiet=True)


def config(path):
    return dict(json.loads((path / "config.json").read_text(encoding="utf-8")))


def stopped(case, units, error, raised=KeyboardInterrupt):
    """A study that computed ``units`` units when ``error`` came, and raised ``raised``."""
    study = case.make(quiet())
    compute = study.compute

    def stop(unit):
        if study.computed == units:
            raise error
        return compute(unit)

    study.compute = stop
    with pytest.raises(raised):
        run_study(study)
    return study


def results(path):
    """The bytes of the files that two runs of equal settings share."""
    return {
        file.name: file.read_bytes()
        for file in sorted(path.iterdir())
        if file.is_file() and file.suffix != ".log" and file.name not in NEVER_EQUAL
    }


@pytest.mark.contract("a finished folder is complete and says where it comes from")
@pytest.mark.contract("a page has every figure of its study")
def test_a_finished_folder(case):
    study = run_study(case.make(quiet()))
    found = config(study.path)
    assert (found["kind"], found["status"]) == (case.name, "complete")
    inputs = json.dumps(found["settings"]["inputs"])  # the weights, or the shape of random ones
    assert '"model": "' in inputs or '"shape": "' in inputs
    assert found["versions"] and found["checkpoint"]["dtype"]
    assert found["started"] <= found["finished"]
    names = {path.name for path in study.path.iterdir()}
    stamp = study.folder.stamp
    assert {"timing.json", f"output_{stamp}.log", f"timing_{stamp}.log"} <= names
    assert "parts.jsonl" not in names and ".lock" not in names
    assert study.computed == case.units and study.timing["total_s"] > 0
    assert study.ui.log[-1] == f"results: {study.path}"
    drawn = {figure.name: figure for figure in study.figures()}
    assert {path.stem for path in study.path.glob("plots/*")} == set(drawn)
    page = study.path / "report.html"
    assert drawn or page.exists()
    if page.exists():
        assert f"report: {page}" in study.ui.log
        shown = Page(page.read_text(encoding="utf-8"))
        described = [str(image["alt"]) for image in shown.attributes("img")]
        for figure in drawn.values():
            assert figure.alt in described or figure.title in shown.text.replace("\xa0", " ")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.contract("equal bytes however often a study is interrupted")
def test_an_interrupted_study_resumes_to_the_same_bytes(case):
    whole = run_study(case.make(quiet()), fresh=True).path.rename("whole")  # not reused below
    first = stopped(case, 1, KeyboardInterrupt())
    assert config(first.path)["status"] == "interrupted"
    kept = f"what was finished is kept in {first.path}; the same command resumes"
    assert first.ui.log[-1] == kept
    assert (
        (first.path / f"output_{first.folder.stamp}.log").read_text("utf-8").endswith(f"{kept}\n")
    )
    second = stopped(case, 1, KeyboardInterrupt())
    assert second.path == first.path and second.ui.log[0] == f"resuming {first.path}"
    last = run_study(case.make(quiet()))
    assert last.path == first.path
    assert case.finer or last.computed == case.units - 2
    assert config(last.path)["status"] == "complete"
    assert set(results(last.path)) == set(results(whole))
    if not case.timed:
        assert results(last.path) == results(whole)
    anew = run_study(case.make(quiet()))
    assert anew.path != last.path and anew.computed == (0 if case.adopts else case.units)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.contract("a changed input is another run")
def test_a_changed_input_is_another_run(case):
    first = stopped(case, 1, KeyboardInterrupt())
    case.prepare(1)
    other = run_study(case.make(quiet()))
    assert other.path != first.path and other.computed == case.units
    said = rf"{re.escape(str(first.path))} is not resumed: .* changed since it began"
    assert re.fullmatch(said, other.ui.log[0])
    case.prepare(0)
    assert run_study(case.make(quiet())).path == first.path


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("error", [ValueError("broken"), MemoryError()])
def test_an_error_keeps_what_was_finished(case, error):
    records = case.make(quiet()).on_error == "record"
    raised = LoadError if isinstance(error, MemoryError) else ValueError
    study = stopped(case, 1, error, CellsFailed if records else raised)
    assert config(study.path)["status"] == "failed"
    kept = (study.path / "parts.jsonl").read_text().splitlines()
    assert len(kept) == 1 or (case.finer and kept)
    assert len(study.failed) == (case.units - 1 if records else 0)
    assert records or study.ui.log[-1].endswith("the same command resumes")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.contract("a full disk is one sentence and hides no other error")
def test_a_full_disk(case, monkeypatch):
    def full(self, key, value):
        raise ResultsError("cannot write parts.jsonl: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ResultsFolder, "save_part", full)
        with pytest.raises(ResultsError, match="No space left"):
            run_study(case.make(quiet()))
    (left,) = Path("results").glob("*/*")
    assert config(left)["status"] == "failed"
    with monkeypatch.context() as patch:
        patch.setattr(store, "MIN_FREE_BYTES", 2**62)
        with pytest.raises(ResultsError, match="MiB are free where results go"):
            run_study(case.make(quiet()), fresh=True)
    assert [*Path("results").glob("*/*")] == [left]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.contract("--json is one document")
def test_json_is_the_document(case):
    if case.command is None:
        pytest.skip("its answer holds more")
    name, flags = case.command
    given = [word for k, v in flags().items() for word in (f"--{k.replace('_', '-')}", str(v))]
    done = CliRunner().invoke(app, [*name.split(), *given, "--json"])
    assert (done.exit_code, done.stderr) == (0, ""), done.exception
    answer = json.loads(done.stdout)
    folder = Path(answer.pop("folder"))
    assert answer.pop("timing") == json.loads((folder / "timing.json").read_text())
    document = case.make(quiet()).document
    assert answer == json.loads((folder / document).read_text(encoding="utf-8"))


@pytest.mark.contract("a full disk is one sentence and hides no other error")
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    write_json(tmp_path / "a.json", 1)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResultsError, match="No space left"):
        write_json(tmp_path / "a.json", [2, 3])
    assert (tmp_path / "a.json").read_text() == "1\n"


class CountSettings(StudyOptions):
    """The unit that fails, and how many there are."""

    broken: str = ""
    count: int = 3

    @property
    def experiment(self):
        return "count"


class Counting(Study[CountSettings]):
    """Units a, b, ...; another one is added when the first ones are done."""

    kind = "count"
    document = "count.json"
    on_error = "record"
    fault: Exception | None = ConfigError("b is too long")

    def requested(self):
        return self.settings.model_dump(exclude={"broken"})

    def load(self):
        self.timing["load_s"] = 0.0

    def config_extra(self):
        return {"seed": [0], "cells": len(self.lines)}

    def units(self):
        for name in "abcdefgh"[: self.settings.count]:
            yield Unit(name, f"unit {name}")
        yield Unit(f"sum {sum(line.get('value', 0) for line in self.lines)}")

    def compute(self, unit):
        if unit.key == self.settings.broken and self.fault:
            raise self.fault
        return {"key": unit.key, "value": len(unit.key)}

    def summarise(self):
        return {"lines": len(self.lines)}

    def sentences(self):
        return [f"{len(self.lines)} lines"]


@pytest.fixture
def count(tmp_path):
    return lambda **given: Counting(CountSettings(results_dir=str(tmp_path), **given), quiet())


@pytest.mark.contract("a failed unit is recorded and the others go on")
def test_a_failed_unit_is_recorded_and_tried_again(count):
    study = count(broken="b")
    with pytest.raises(CellsFailed, match=r"1 of 4 cells failed, .* the first, b: b is too long"):
        run_study(study)
    assert study.lines[1] == {"key": "b", "status": "failed", "error": "b is too long"}
    assert "unit b failed: b is too long" in study.ui.log
    assert config(study.path)["status"] == "failed"
    again = run_study(count())
    assert again.path == study.path and config(again.path)["status"] == "complete"
    assert again.computed == 2  # b, and the sum: a unit may follow from the lines before it
    assert [line["key"] for line in again.lines] == ["a", "b", "c", "sum 3"]
    assert (again.path / "count.md").read_text() == "4 lines\n"
    assert (config(again.path)["seed"], config(again.path)["cells"]) == ([0], 4)
    assert again.answer() == {"folder": str(again.path), "lines": 4, "timing": again.timing}
    assert not (again.path / "parts.jsonl").exists()


def test_any_fault_of_a_unit_is_a_sentence_and_others_stop_all(count):
    def broken(fault, error):
        study = count(broken="b")
        study.fault = fault
        with pytest.raises(error) as caught:
            run_study(study, fresh=True)
        return study, caught.value

    for fault, sentence in (
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError(), "ValueError"),
        (MemoryError(), "does not fit in memory as the checkpoint's dtype"),
    ):
        study, error = broken(fault, CellsFailed)
        assert sentence in str(error) and error.document["folder"] == str(study.path)
    for stop in (ResultsError("no space left"), KeyboardInterrupt()):
        study, _ = broken(stop, type(stop))
        assert [line["key"] for line in study.lines] == ["a"] and not study.failed


@pytest.mark.parametrize("error", [UnknownName("model", "a", ()), LoadError("b")])
def test_a_folder_goes_only_where_no_model_came(count, error):
    def stopped():
        study = count()
        study.load = mock.Mock(side_effect=error)
        with pytest.raises(type(error)):
            run_study(study)
        return study.path

    path = stopped()
    assert not path.exists() and not path.parent.exists()
    broken = count(broken="b")
    broken.fault = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_study(broken)
    assert stopped() == broken.path and config(broken.path)["status"] == "failed"


def test_a_full_disk_at_the_end_hides_no_error(count, monkeypatch):
    study = count(broken="a")
    study.on_error = "stop"

    def breaks(unit):
        full = mock.Mock(side_effect=ResultsError("no space left"))
        monkeypatch.setattr("dart_llm.experiments.study.write_json", full)
        raise ValueError("the first")

    study.compute = breaks
    with pytest.raises(ValueError, match="the first"):
        run_study(study)
