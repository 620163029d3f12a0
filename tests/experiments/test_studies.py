"""The contract of every command that keeps a results folder: one suite over all studies.

A study is added by one ``Case``.  ``Counting``, at the end, shows what the runner does with units.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

import drift_cases
import quality_cases
import speed_cases
import tune_cases
from dart_llm.cli.app import app
from dart_llm.errors import CellsFailed, ConfigError, LoadError, ResultsError
from dart_llm.experiments import store
from dart_llm.experiments.store import ResultsFolder
from dart_llm.experiments.study import Study, Unit, run_study
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting import figures
from dart_llm.reporting.console import Ui
from dart_llm.settings import StudyOptions, merge
from dart_llm.studies.bench.study import SpeedStudy
from dart_llm.studies.bench.tune import TuneStudy
from dart_llm.studies.drift.detect import DetectionStudy
from dart_llm.studies.drift.settings import DetectSettings
from dart_llm.studies.drift.study import DriftStudy
from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.generate.study import RunStudy
from dart_llm.studies.inspection.settings import InspectSettings
from dart_llm.studies.inspection.study import InspectionStudy
from dart_llm.studies.quality.study import QualityStudy
from dart_llm.studies.sweep.settings import CompareSettings
from dart_llm.studies.sweep.study import MeasureStudy
from html_page import Page
from lm_cases import place


@dataclass(frozen=True)
class Case:
    """One study on a tiny model, with inputs and results below the current folder.

    ``timed``: its lines hold times.  ``finer``: it keeps pieces of its units.  ``adopts``: it
    reuses units of earlier runs.
    """

    name: str
    units: int
    study: Callable[..., Study[Any]]
    settings: Callable[[], Any]
    timed: bool = False
    finer: bool = False
    adopts: bool = False

    def make(self):
        return self.study(self.settings(), ui=Ui(quiet=True))


def write_inputs(version):
    """Those of all studies; another ``version`` changes all of them."""
    two, three = drift_cases.TWO, drift_cases.THREE
    drift_cases.write_rows(Path("passages.jsonl"), [two, three, {**two, "id": f"again {version}"}])
    Path("a.txt").write_text(3 * drift_cases.FIRST + "x" * version, encoding="utf-8")
    Path("b.txt").write_text(3 * drift_cases.SECOND, encoding="utf-8")
    documents = [*quality_cases.bees().documents, f"another document, {version}"]
    Path("own.txt").write_text("\n\n".join(documents), encoding="utf-8")
    drift_cases.write_rows(Path("own.jsonl"), [two, {**three, "id": f"three {version}"}])
    tune_cases.write_text(Path(), version)


def merged(cls, **given):
    whole = {"model": str(place() / "model"), "device": "cpu", **given}
    return merge(cls, whole, environment={})


def _detect():
    sizes = {"prompt_tokens": drift_cases.PROMPT, "horizon": 60, "thresholds": "0,2", "counts": "1"}
    texts = {"passages": "passages.jsonl", "signals": "attention,hidden"}
    return merged(DetectSettings, **sizes, **texts)


def _compare():
    given = {"tasks": "perplexity:a.txt,perplexity:b.txt", "methods": "griffin", "limit": 2}
    return merged(CompareSettings, **given, prompt_tokens=48, scored_tokens=24)


INSPECT = {"method": "griffin", "prompt_file": "a.txt", "prompt_b_file": "b.txt"}
SECTIONS = ("layers", "neurons", "overlap")
RUN = {"method": "griffin", "sparsity": 0.5, "prompt_file": "a.txt", "prompt_length": 40}
RUN |= {"generation": 4}
DRIFT = {"passages": "own.jsonl", "prompt_tokens": drift_cases.PROMPT, "methods": "never"}
QUALITY = {"text": ["own.txt"], "sparsities": "0.5,0.7", "oracle": "", "tasks": "continuation"}
QUALITY |= {"methods": "griffin,static", "slices": 2}
SPEED = {"calibration": "own.txt", "repeats": 3, "executors": "compact"}
TUNE = {"text": "bees.txt", "sparsities": "0.5", "repeats": 1}


INSPECTION = partial(InspectionStudy, what=SECTIONS)
CASES = (
    Case("detect", 3, DetectionStudy, _detect),
    Case("inspect", 3, INSPECTION, lambda: merged(InspectSettings, **INSPECT)),
    Case("compare", 4, MeasureStudy, _compare, finer=True, adopts=True),
    Case("run", 3, RunStudy, lambda: merged(RunSettings, **RUN), timed=True, finer=True),
    Case("drift", 4, DriftStudy, lambda: drift_cases.settings(Path(), **DRIFT)),
    Case("quality", 8, QualityStudy, lambda: quality_cases.settings(Path(), **QUALITY), finer=True),
    Case("speed", 3, SpeedStudy, lambda: speed_cases.settings(Path(), **SPEED), timed=True),
    Case("tune", 14, TuneStudy, lambda: tune_cases.settings(Path(), **TUNE), timed=True),
)
COMMANDS = {"inspect": ["inspect", *SECTIONS], "quality": ["bench", "quality"]}
COMMANDS |= {"speed": ["bench", "speed", "--threads=1"], "tune": ["tune", "--save=mine.yaml"]}
NEVER_EQUAL = {"timing.json", "config.json", "report.html"}  # they hold times


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_inputs(0)
    return request.param


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes most of the time of so small a study."""
    monkeypatch.setattr(figures, "render", lambda plot, kind: b"")


def config(path):
    return dict(json.loads((path / "config.json").read_text(encoding="utf-8")))


def stopped(case, units, error, raised=KeyboardInterrupt):
    """A study that computed ``units`` units when ``error`` came, and raised ``raised``."""
    study = case.make()
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
    files = [file for file in path.glob("*.*") if file.suffix != ".log"]
    return {file.name: file.read_bytes() for file in files if file.name not in NEVER_EQUAL}


@pytest.mark.contract("a finished folder is complete and says where it comes from")
@pytest.mark.contract("a page has every figure of its study")
def test_a_finished_folder(case):
    study = run_study(case.make())
    written = config(study.path)
    assert (written["kind"], written["status"]) == (case.name, "complete")
    inputs = json.dumps(written["settings"]["inputs"])  # the weights, or the shape of random ones
    assert '"model": "' in inputs or '"shape": "' in inputs
    assert written["versions"] and written["checkpoint"]["dtype"]
    assert written["started"] <= written["finished"]
    names = {path.name for path in study.path.iterdir()}
    assert {"timing.json", f"output_{study.folder.stamp}.log", "rows.jsonl"} <= names
    assert not {"parts.jsonl", ".lock"} & names
    assert study.computed == case.units and study.timing["total_s"] > 0
    assert study.ui.log[-1] == f"results: {study.path}"
    drawn = {figure.name: figure for figure in study.figures()}
    assert {path.stem for path in study.path.glob("plots/*")} == set(drawn)
    page = study.path / "report.html"
    assert drawn or page.exists()
    if page.exists():
        assert f"report: {page}" in study.ui.log
        images = Page(page.read_text(encoding="utf-8")).attributes("img")
        assert {figure.alt for figure in drawn.values()} <= {image["alt"] for image in images}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.contract("equal bytes however often a study is interrupted")
@pytest.mark.contract("a changed input is another run")
def test_an_interrupted_study_resumes_to_the_same_bytes(case):
    first = stopped(case, 1, KeyboardInterrupt())
    assert config(first.path)["status"] == "interrupted"
    kept = f"finished work is kept in {first.path}; the same command resumes the run"
    assert first.ui.log[-1] == kept
    log = (first.path / f"output_{first.folder.stamp}.log").read_text("utf-8")
    assert log.endswith(f"{kept}\n")
    write_inputs(1)
    other = stopped(case, 0, KeyboardInterrupt())
    said = rf"{re.escape(str(first.path))} is not resumed: .* changed since it began"
    assert other.path != first.path and re.fullmatch(said, other.ui.log[0])
    write_inputs(0)
    last = run_study(case.make())
    assert last.path == first.path and last.ui.log[0] == f"resuming {first.path}"
    assert last.lines[: len(first.lines)] == first.lines
    assert case.finer or last.computed == case.units - 1
    assert config(last.path)["status"] == "complete"
    anew = run_study(case.make(), fresh=True)
    assert anew.path != last.path and anew.computed == case.units
    assert set(results(last.path)) == set(results(anew.path))
    if not case.timed:
        assert results(last.path) == results(anew.path)
    if case.adopts:
        assert run_study(case.make()).computed == 0


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.contract("a full disk is one sentence and hides no other error")
def test_an_error_keeps_what_was_finished(case, monkeypatch):
    records = case.make().on_error == "record"
    study = stopped(case, 1, MemoryError(), CellsFailed if records else LoadError)
    assert config(study.path)["status"] == "failed"
    kept = (study.path / "parts.jsonl").read_text().splitlines()
    assert len(kept) == 1 or (case.finer and kept)
    assert len(study.failed) == (case.units - 1 if records else 0)
    assert records or study.ui.log[-1].endswith("the same command resumes the run")

    def full(self, key, value):
        raise ResultsError("cannot write parts.jsonl: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ResultsFolder, "save_part", full)
        with pytest.raises(ResultsError, match="No space left"):
            run_study(case.make(), fresh=True)
    with monkeypatch.context() as patch:
        patch.setattr(store, "MIN_FREE_BYTES", 2**62)
        with pytest.raises(ResultsError, match="MiB are free for results in"):
            run_study(case.make(), fresh=True)
    left = [config(path)["status"] for path in Path("results").glob("*/[0-9]*")]
    assert left == ["failed"] * 2


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.contract("--json is one document")
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in COMMANDS], indirect=True, ids=lambda case: case.name
)
def test_json_is_the_document(case):
    settings, threads = case.settings(), torch.get_num_threads()
    values = {name: getattr(settings, name) for name in settings.model_fields_set}
    joined = {k: ",".join(map(str, v)) for k, v in values.items() if isinstance(v, tuple | list)}
    flags = [f"--{name.replace('_', '-')}={v}" for name, v in (values | joined).items()]
    done = CliRunner().invoke(app, [*COMMANDS[case.name], *flags, "--json"])
    assert (done.exit_code, done.stderr) == (0, ""), done.exception
    answer = json.loads(done.stdout)
    folder = Path(answer.pop("folder"))
    assert answer.pop("timing") == json.loads((folder / "timing.json").read_text())
    assert answer.pop("computed", case.units) == case.units
    if answer.pop("setting", None):
        assert PruneConfig.build("file:mine.yaml").method in ("dense", "griffin")
    if case.name == "speed":
        assert answer["machine"]["threads"] == 1 and torch.get_num_threads() == threads
    document = case.make().document
    assert answer == json.loads((folder / document).read_text(encoding="utf-8"))


class CountSettings(StudyOptions):
    @property
    def experiment(self):
        return "count"


class Counting(Study[CountSettings]):
    """Units a, b, c; another one follows from the first ones."""

    kind = "count"
    document = "count.json"
    on_error = "record"
    fault: BaseException | None = None
    """Raised in place of b."""

    def load(self):
        self.timing["load_s"] = 0.0

    def units(self):
        for name in "abc":
            yield Unit(name, f"unit {name}")
        yield Unit(f"sum {sum(line.get('value', 0) for line in self.lines)}")

    def compute(self, unit):
        if unit.key == "b" and self.fault:
            raise self.fault
        return {"key": unit.key, "value": len(unit.key)}

    def summarise(self):
        return {"lines": len(self.lines)}

    def sentences(self):
        return [f"{len(self.lines)} lines"]


@pytest.fixture
def count(tmp_path):
    def make(fault=None):
        study = Counting(CountSettings(results_dir=str(tmp_path)), Ui(quiet=True))
        study.fault = fault
        return study

    return make


@pytest.mark.contract("a failed unit is recorded and the others go on")
def test_a_failed_unit_is_recorded_and_tried_again(count):
    study = count(ConfigError("b is too long"))
    with pytest.raises(
        CellsFailed, match=r"1 of 4 cells failed; .* the first failure, b: b is too long"
    ):
        run_study(study)
    assert study.lines[1] == {"key": "b", "status": "failed", "error": "b is too long"}
    assert "unit b failed: b is too long" in study.ui.log
    assert config(study.path)["status"] == "failed"
    again = run_study(count())
    assert again.path == study.path and config(again.path)["status"] == "complete"
    assert again.computed == 2  # b, and the sum: a unit may follow from the lines before it
    assert [line["key"] for line in again.lines] == ["a", "b", "c", "sum 3"]
    assert (again.path / "count.md").read_text() == "4 lines\n"
    assert again.answer() == {"folder": str(again.path), "lines": 4, "timing": again.timing}


def test_a_folder_goes_only_where_no_model_came(count):
    def run(fault, load):
        study = count(fault)
        study.load = mock.Mock(side_effect=load)
        with pytest.raises((LoadError, KeyboardInterrupt)):
            run_study(study)
        return study.path

    path = run(None, LoadError("b"))
    assert not path.exists() and not path.parent.exists()
    path = run(KeyboardInterrupt(), None)
    assert run(None, LoadError("b")) == path and config(path)["status"] == "failed"


def test_a_full_disk_at_the_end_hides_no_error(count, monkeypatch):
    def breaks(unit):
        full = mock.Mock(side_effect=ResultsError("no space left"))
        monkeypatch.setattr("dart_llm.experiments.study.write_json", full)
        raise ValueError("the first")

    study = count()
    study.on_error, study.compute = "stop", breaks
    with pytest.raises(ValueError, match="the first"):
        run_study(study)
