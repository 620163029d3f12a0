"""Study: settings -> identity -> folder -> resumable units -> tables, figures, page, status.

How jobs that keep one results folder end: plots, and what is kept when they break off.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dart_llm.errors import DartError, LoadError, MissingExtra, ResultsError, UnknownName
from dart_llm.experiments.provenance import git_state, machine, peak_memory_bytes, versions
from dart_llm.experiments.store import SCHEMA, ResultsFolder, now, timing_text
from dart_llm.files import write_text
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.devices import memory_failure
from dart_llm.models.loading import load
from dart_llm.reporting.console import Ui
from dart_llm.settings import BaseSettings

# What every job does: load the model, say where a result comes from, keep what was computed.


def write_logs(folder: ResultsFolder, said: Sequence[str], timing: dict[str, Any]) -> None:
    """output_<time>.log, what was said, and timing_<time>.log, for people."""
    write_text(folder.path / f"output_{folder.stamp}.log", "\n".join(said) + "\n")
    write_text(folder.path / f"timing_{folder.stamp}.log", timing_text(timing))


def load_model(settings: BaseSettings, ui: Ui) -> tuple[Any, Any, float]:
    """Model, tokenizer and the seconds it took."""
    for note in settings.notes:
        ui.say(note)
    begin = time.perf_counter()
    with ui.status(f"loading {settings.model}") as news:
        model, tokenizer = load(
            settings.model,
            dtype=settings.dtype,
            device=settings.device or (None if settings.device_map else "auto"),
            device_map=settings.device_map,
            revision=settings.revision,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
            cache_dir=settings.cache_dir,
            progress=news,
        )
    facts = checkpoint_facts(model)
    ui.say(
        f"{facts.get('name')}: file quantisation {facts.get('file_quantisation') or 'none'}, "
        f"dtype {facts.get('dtype')}, device {model.device}"
    )
    return model, tokenizer, time.perf_counter() - begin


def config_document(
    kind: str,
    identity: Mapping[str, Any],
    prune: Mapping[str, Any],
    model: Any,
    status: str,
    previous: Mapping[str, Any],
) -> dict[str, Any]:
    """config.json: what was asked for, and where the result comes from.

    ``identity``: what makes two runs the same run.  ``model``: None before it is loaded.
    """
    done = status in ("complete", "interrupted", "failed")
    return {
        "schema": SCHEMA,
        "kind": kind,
        "status": status,
        "settings": dict(identity),
        "prune": dict(prune),
        "command": sys.argv,
        "process": os.getpid(),
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
        "machine": machine(None if model is None else str(model.device)),
        "checkpoint": None if model is None else dict(checkpoint_facts(model)),
        "seed": identity.get("seed"),
        "started": previous.get("started", now().isoformat()),
        "finished": now().isoformat() if done else None,
    }


class Ending(Protocol):
    """What is asked of a job; ``model`` is None until it is loaded."""

    ui: Ui
    timing: dict[str, Any]
    model: Any

    @property
    def folder(self) -> ResultsFolder:
        """Its results folder."""

    @property
    def path(self) -> Path:
        """The path of that."""


def write_plots(job: Ending, plots: Iterable[Any]) -> None:
    """Save plots (``plots.Plot``) and say where; without matplotlib say that instead."""
    from dart_llm.reporting import figures

    try:
        for path in figures.save(job.path, plots):
            job.ui.say(f"plot: {path}")
    except MissingExtra as error:
        job.ui.say(f"no plots: {error}")


@contextlib.contextmanager
def resumable(
    job: Ending, leave: Callable[[str], None], model: str, dtype: str | None
) -> Iterator[Callable[[], None]]:
    """The work of a job: when it breaks off, ``leave(status)`` puts in order what there is.

    What it gives is called when the work is done, and notes in ``timing`` what that took.

    A new folder goes away again where the model could not be loaded.  Raises what stopped the work,
    and ``LoadError`` with next steps where memory ran out.
    """
    if job.folder.resumed or job.folder.note:
        job.ui.say(f"resuming {job.path}" if job.folder.resumed else job.folder.note)
    started = time.perf_counter()

    def took() -> None:
        job.timing["total_s"] = time.perf_counter() - started
        job.timing["peak_memory_bytes"] = peak_memory_bytes()

    try:
        yield took
    except BaseException as error:
        job.ui.end_line()
        if _never_began(job, error):
            job.folder.discard()
        else:
            with contextlib.suppress(ResultsError):  # a full disk must not hide the first error
                leave("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        memory = memory_failure(error, model, dtype or "the checkpoint's dtype")
        if memory is not None and not isinstance(error, DartError):
            raise memory from None
        raise
    finally:
        job.folder.release()


def _never_began(job: Ending, error: BaseException) -> bool:
    empty = not job.folder.resumed and not job.folder.parts
    return empty and job.model is None and isinstance(error, UnknownName | LoadError)


def leave(job: Ending, status: str, write_config: Callable[[str], None], finished: bool) -> None:
    """What a job that broke off leaves behind; ``finished``: whether that is worth resuming."""
    write_config(status)
    if finished:
        job.ui.say(f"what was finished is kept in {job.path}; the same command resumes")
    write_logs(job.folder, job.ui.log, job.timing)


def complete(
    job: Ending, write_config: Callable[[str], None], write_pages: Callable[[], None] = lambda: None
) -> None:
    """The last steps of a job that has everything; pages are made from its finished files."""
    write_config("complete")
    write_pages()
    write_logs(job.folder, job.ui.log, job.timing)
    job.folder.finish()
    job.ui.say(f"results: {job.path}")
