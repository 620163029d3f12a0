"""How jobs that keep one results folder end: plots, and what is kept when they break off."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from dart_llm.devices import memory_failure
from dart_llm.errors import DartError, LoadError, MissingExtra, ResultsError, UnknownName
from dart_llm.job_common import write_logs
from dart_llm.provenance import peak_memory_bytes
from dart_llm.results import ResultsFolder
from dart_llm.ui import Ui


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
    from dart_llm import plots as saving

    try:
        for path in saving.save(job.path, plots):
            job.ui.say(f"plot: {path}")
    except MissingExtra as error:
        job.ui.say(f"no plots: {error}")


@contextlib.contextmanager
def kept(
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
