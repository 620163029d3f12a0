"""The framework of every command with a results folder.

Such a command is a ``Study``: it defines its inputs, its units of work, how a unit is computed, and
the summary of all units.  ``run_study`` opens the folder (or resumes one with equal settings and
inputs), computes the missing units, and writes tables, figures, page and status.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from dart_llm.errors import (
    CellsFailed,
    DartError,
    LoadError,
    MissingExtra,
    ResultsError,
    failure_text,
)
from dart_llm.experiments.provenance import origin
from dart_llm.experiments.store import ROWS, SCHEMA, ResultLine, ResultsFolder, now, open_folder
from dart_llm.files import finite, write_json, write_lines, write_text
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.float32_products import float32_note
from dart_llm.models.loading import Check, load, memory_failure
from dart_llm.native.memory import peak
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.reporting.words import dtype_text, file_text
from dart_llm.session.run import other_model
from dart_llm.settings import ModelOptions, PruningOptions, ResultOptions, load_arguments

MAX_ROWS = 40
"""A table with more rows than this is not shown on the terminal."""

S = TypeVar("S", bound=ResultOptions)
AnyStudy = TypeVar("AnyStudy", bound="Study[Any]")
Line = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """A resumable unit of a study's work.

    ``key`` identifies the unit in every run of the study.  ``label`` is the unit's name in messages
    (if empty, ``key``).  ``data`` is any input for ``Study.compute``.
    """

    key: str
    label: str = ""
    data: Any = None


class Study(Generic[S]):
    """A command with a results folder: what it computes, and how it reports the results.

    A subclass defines ``kind``, ``units``, ``compute`` and ``summarise``; the other methods have
    defaults.  ``__init__`` should reject unknown names: it runs before any folder is created.
    """

    kind: str
    """The entry "kind" of config.json: the command's name."""
    document: str = ""
    """Name of the summary's file, e.g. ``detection.json``; ``detection.md`` has the tables."""
    on_error: Literal["stop", "record"] = "stop"
    """If a unit fails, either stop the run, or record the failure and compute the others."""
    fresh: bool = False
    """If True, nothing from earlier runs is reused."""
    progress: ClassVar[str] = ""
    """What the progress bar counts; "" means no bar, but a progress line for each unit."""
    noun: ClassVar[str] = "cell"
    """What progress lines call a unit ("cell 2 of 3"), if the number of units is known."""
    unit_times: ClassVar[str] = ""
    """The key in timing.json for the seconds of each computed unit; "" means not recorded."""
    shown: ClassVar[frozenset[str]] = frozenset({"style"})
    """Settings that affect how results are shown, but not the numbers."""

    folder: ResultsFolder

    def __init__(self, settings: S, ui: Ui) -> None:
        self.settings, self.ui = settings, ui
        self.model: Any = None
        self.tokenizer: Any = None
        self.identity: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.lines: list[Line] = []
        """The lines of results.jsonl."""
        self.failed: dict[str, str] = {}
        """Error messages of failed units, by key."""
        self.computed = 0
        """The number of units computed in this run; the others were already finished."""
        self.timing: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}

    @property
    def path(self) -> Path:
        """The results folder."""
        return self.folder.path

    # settings and model

    def inputs(self) -> Mapping[str, Any]:
        """Digests of the weights, texts and files that the settings refer to by name."""
        return {}

    def requested(self) -> dict[str, Any]:
        """The settings that determine the results."""
        return self.settings.model_dump(mode="json", exclude=set(self.shown))

    def identify(self) -> dict[str, Any]:
        """The run's identity: a run resumes an unfinished run with an equal identity."""
        return {"kind": self.kind, **self.requested(), "inputs": dict(self.inputs())}

    def prune_document(self) -> dict[str, Any]:
        """The entry "prune" of config.json: the pruning configuration."""
        settings = self.settings
        return settings.prune_config().to_dict() if isinstance(settings, PruningOptions) else {}

    def config_extra(self) -> dict[str, Any]:
        """More entries for config.json; they replace default entries of the same name."""
        return {}

    @property
    def load_settings(self) -> ModelOptions:
        """The settings with which the model is loaded."""
        assert isinstance(self.settings, ModelOptions)
        return self.settings

    @property
    def model_name(self) -> str:
        """The model's name, for out-of-memory messages."""
        return str(getattr(self.settings, "model", ""))

    def load(self) -> None:
        """Load what the units need; by default the model and its tokenizer."""
        self.model, self.tokenizer, self.timing["load_s"] = load_model(
            self.load_settings, self.ui, self.check
        )

    def check(self, tokenizer: Any, config: Any) -> None:
        """Raise an error if the settings do not fit the model; called before weights are read."""

    def around(self) -> contextlib.AbstractContextManager[Any]:
        """A context manager in which loading and computing run, e.g. a tracker."""
        return contextlib.nullcontext()

    @property
    def loaded(self) -> bool:
        """Whether loading is done; if a run fails before that, its new folder is removed."""
        return self.model is not None

    @property
    def device(self) -> str | None:
        """The device of the model, once it is loaded."""
        return None if self.model is None else str(self.model.device)

    # units

    def units(self) -> Iterable[Unit]:
        """The units in order; a generator may choose each next unit by looking at ``lines``."""
        raise NotImplementedError

    def finished(self, unit: Unit) -> Any:
        """The stored value of a unit from an earlier run, or None."""
        return self.folder.part(unit.key)

    def compute(self, unit: Unit) -> Any:
        """Compute a unit; return JSON-serialisable data, by default a line of results.jsonl."""
        raise NotImplementedError

    def save(self, unit: Unit, value: Any) -> None:
        """Store a computed unit, so that an interruption does not lose it."""
        self.folder.save_part(unit.key, value)

    def take(self, unit: Unit, value: Any) -> None:
        """Add the value of a unit, computed now or earlier, to ``lines``; write results.jsonl."""
        self.lines.append(value)
        write_lines(self.path / "results.jsonl", self.lines)

    def fail(self, unit: Unit, sentence: str) -> None:
        """Record a failed unit; called only if ``on_error`` is "record"."""
        self.take(unit, {"key": unit.key, "status": "failed", "error": sentence})

    @property
    def partial(self) -> bool:
        """Whether a later run with equal settings should continue this one."""
        return False

    # results

    def summarise(self) -> dict[str, Any]:
        """Return the summary of all lines, which is also the content of ``document``."""
        return {}

    def result_lines(self) -> Sequence[ResultLine]:
        """The measured numbers for rows.jsonl."""
        return ()

    def tables(self) -> Sequence[Table]:
        """The tables for CSV files and the terminal."""
        return ()

    def sentences(self) -> Sequence[str]:
        """The sentences that are shown after the tables and logged."""
        return ()

    def markdown(self) -> str:
        """The content of the Markdown file that is written beside ``document``."""
        parts = [f"{text}\n" for text in self.sentences()]
        return "\n".join([*parts, *(f"{table.markdown()}\n" for table in self.tables())])

    def figures(self) -> Iterable[Plot]:
        """The figures to save in the folder."""
        return ()

    def write_page(self) -> Path | None:
        """Write report.html and return its path, or return None if the study has no page."""
        return None

    def answer(self) -> dict[str, Any]:
        """The output of ``--json``."""
        return {"folder": str(self.path), **self.summary, "timing": self.timing}


def run_study(study: AnyStudy, fresh: bool = False) -> AnyStudy:
    """Compute every unit that is not finished yet; write and show the results; return ``study``.

    ``fresh``: if True, begin a new folder.  If an interruption or an error stops the run, finished
    units are kept and the exception is re-raised.  ``CellsFailed`` is raised at the end if failed
    units were recorded.
    """
    settings, study.fresh = study.settings, fresh
    study.identity = study.identify()
    study.folder = open_folder(
        Path(settings.results_dir), settings.experiment, study.identity, fresh
    )
    with _resumable(study), study.ui.working("preparing"):
        began = time.perf_counter()
        _write_config(study, "running")
        with study.around():
            study.load()
            _write_config(study, "running")
            _compute_units(study)
        study.timing["total_s"] = time.perf_counter() - began
        study.timing["peak_memory_bytes"] = peak()
        with study.ui.working("tables and figures"):
            _finish(study)
    if study.failed:
        key, sentence = next(iter(study.failed.items()))
        raise CellsFailed(
            f"{len(study.failed)} of {len(study.lines)} cells failed; the others are kept in "
            f"{study.path}; the first failure, {key}: {sentence}",
            finite(study.answer()),
        )
    return study


@contextlib.contextmanager
def _resumable(study: Study[Any]) -> Iterator[None]:
    """A context manager for a study's work; after an error, a later run can resume the folder.

    A new folder is removed if the model was not loaded.  The error is re-raised; if memory ran out,
    a ``LoadError`` that suggests what to do is raised instead.
    """
    folder, ui = study.folder, study.ui
    if folder.resumed:
        ui.say(f"resuming {study.path}")
    if folder.changed:
        ui.say(folder.changed)
    try:
        yield
    except BaseException as error:
        ui.end_line()
        unloaded = not study.loaded and isinstance(error, DartError)
        if unloaded and not folder.resumed and not folder.parts:
            folder.discard()
        else:
            with contextlib.suppress(ResultsError):  # a full disk must not hide the first error
                stopped = isinstance(error, KeyboardInterrupt)
                _write_config(study, "interrupted" if stopped else "failed")
                if study.lines or folder.parts:
                    kept = f"finished work is kept in {study.path}"
                    ui.say(f"{kept}; the same command resumes the run")
                _write_log(study)
        if not isinstance(error, DartError) and (memory := _memory_failure(study, error)):
            raise memory from None
        raise
    finally:
        folder.release()


def _memory_failure(study: Study[Any], error: BaseException) -> LoadError | None:
    dtype = getattr(study.settings, "dtype", None) or "the checkpoint's dtype"
    return memory_failure(error, study.model_name, dtype)


def _compute_units(study: Study[Any]) -> None:
    """Compute the units in order; for a progress bar, all units are first listed and counted."""
    units, ui = study.units(), study.ui
    with contextlib.ExitStack() as stack:
        if isinstance(units, Generator):  # closing it may close a Ray cluster
            stack.callback(units.close)
        if study.progress:
            units = list(units)
            advance = stack.enter_context(ui.progress(study.progress, len(units)))
            for unit in units:
                _compute(study, unit)
                advance(1)
            return
        total = len(units) if isinstance(units, Sequence) else 0
        for number, unit in enumerate(units, 1):
            with ui.working(unit.label or unit.key, number if total else 0, total, study.noun):
                _compute(study, unit)


def _compute(study: Study[Any], unit: Unit) -> None:
    value = study.finished(unit)
    if value is None:
        began = time.perf_counter()
        try:
            value = study.compute(unit)
        except Exception as error:
            if study.on_error == "stop" or isinstance(error, ResultsError):  # e.g. a full disk
                raise
            _record_failure(study, unit, error)
            return
        study.save(unit, value)
        study.computed += 1
        if study.unit_times:
            took = time.perf_counter() - began
            study.timing.setdefault(study.unit_times, {})[unit.key] = took
    study.take(unit, value)


def _record_failure(study: Study[Any], unit: Unit, error: Exception) -> None:
    memory = None if isinstance(error, DartError) else _memory_failure(study, error)
    sentence = failure_text(memory or error)
    reason = "for the same reason" if sentence in study.failed.values() else sentence
    study.ui.say(f"{unit.label or unit.key} failed: {reason}")
    study.failed[unit.key] = sentence
    study.fail(unit, sentence)


def _write_config(study: Study[Any], status: str) -> None:
    """Write config.json: the settings, the status, and the provenance of the results."""
    model = study.model
    done = status in ("complete", "interrupted", "failed")
    config = {
        "schema": SCHEMA,
        "kind": study.kind,
        "document": study.document,
        "status": status,
        "settings": dict(study.identity),
        "given": study.settings.given,
        "prune": study.prune_document(),
        **origin(study.device),
        "checkpoint": None if model is None else dict(checkpoint_facts(model)),
        "seed": study.identity.get("seed"),
        "started": study.config.get("started", now().isoformat()),
        "finished": now().isoformat() if done else None,
    }
    study.config = {**config, **study.config_extra()}
    write_json(study.path / "config.json", study.config)


def _finish(study: Study[Any]) -> None:
    study.summary = study.summarise()
    if study.document:
        write_json(study.path / study.document, study.summary)
    write_json(study.path / "timing.json", study.timing)
    write_lines(study.path / ROWS, [line.model_dump() for line in study.result_lines()])
    for table in study.tables():
        table.write_csv(study.path)
        if table.terminal and len(table.rows) <= MAX_ROWS:
            study.ui.table(table)
    if study.document:
        write_text((study.path / study.document).with_suffix(".md"), study.markdown())
    for sentence in study.sentences():
        study.ui.say(sentence)
    _write_figures(study)
    _write_config(study, "failed" if study.failed else "complete")
    if page := study.write_page():  # after config.json: the page shows the status
        study.ui.say(f"report: {page}")
    _write_log(study)
    if not study.failed and not study.partial:  # otherwise a later run resumes the folder
        study.folder.finish()
    study.ui.say(f"results: {study.path}")


def _write_figures(study: Study[Any]) -> None:
    """Save the figures and report their paths, or report that matplotlib is missing."""
    from dart_llm.reporting import figures

    try:
        for path in figures.save(study.path, study.figures(), study.settings.style):
            study.ui.say(f"plot: {path}")
    except MissingExtra as error:
        study.ui.say(f"no plots: {error}")


def _write_log(study: Study[Any]) -> None:
    """Write the messages to output_<time>.log."""
    path = study.path / f"output_{study.folder.stamp}.log"
    write_text(path, "\n".join(study.ui.log) + "\n")


def announce_model(model: Any, ui: Ui) -> None:
    """Report the loaded checkpoint, its number format and its device."""
    facts = checkpoint_facts(model)
    ui.say(
        f"{facts.get('name')}: {file_text(facts)}, dtype {dtype_text(facts)}, device {model.device}"
    )
    if note := float32_note(model):
        ui.say(note)


def load_model(
    settings: ModelOptions, ui: Ui, check: Check | None = None
) -> tuple[Any, Any, float]:
    """Return model, tokenizer and the seconds that loading took; ``check`` goes to ``load``."""
    for note in settings.notes:
        ui.say(note)
    begin = time.perf_counter()
    with ui.status(f"loading {settings.model}") as news:
        model, tokenizer = load(**load_arguments(settings), progress=news, check=check)
    announce_model(model, ui)
    if isinstance(settings, PruningOptions) and (note := other_model(settings.method, model)):
        ui.say(note)
    return model, tokenizer, time.perf_counter() - begin
