"""How jobs that keep one results folder end: plots, and what is kept when they break off."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from dart_llm.errors import MissingExtra, ResultsError
from dart_llm.job_common import write_logs
from dart_llm.results import ResultsFolder
from dart_llm.ui import Ui


class Ending(Protocol):
    """What is asked of a job."""

    ui: Ui
    folder: ResultsFolder
    timing: dict[str, Any]

    @property
    def path(self) -> Path:
        """Its results folder."""


def write_plots(job: Ending, plots: Iterable[Any]) -> None:
    """Save plots (``plots.Plot``) and say where; without matplotlib say that instead."""
    from dart_llm import plots as saving

    try:
        for path in saving.save(job.path, plots):
            job.ui.say(f"plot: {path}")
    except MissingExtra as error:
        job.ui.say(f"no plots: {error}")


def keep(
    job: Ending, error: BaseException, write_config: Callable[[str], None], finished: bool
) -> None:
    """Keep what a job that broke off has; ``finished``: whether that is worth resuming."""
    with contextlib.suppress(ResultsError):
        write_config("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        if finished:
            job.ui.say(f"what was finished is kept in {job.path}; the same command resumes")
        write_logs(job.folder, job.ui.log, job.timing)


def complete(job: Ending, write_config: Callable[[str], None]) -> None:
    """The last steps of a job that has everything."""
    write_config("complete")
    write_logs(job.folder, job.ui.log, job.timing)
    job.folder.finish()
    job.ui.say(f"results: {job.path}")
