"""Track with trackio: a local SQLite file; the only file that imports trackio.

No dashboard is started and nothing is sent, unless the user has set ``TRACKIO_SPACE_ID`` or
``TRACKIO_SERVER_URL``.  ``TRACKIO_DIR`` wins over the results folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dart_llm.trackers import optional

logger = logging.getLogger("dart_llm")


class TrackioBackend:
    """trackio's current run."""

    def __init__(self, library: Any, where: str) -> None:
        self.where = where
        self._library = library

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._library.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._library.finish()  # not Run.finish, which trackio would repeat, and print, at exit


def open_backend(
    project: str, run_name: str, config: dict[str, Any], folder: Path
) -> TrackioBackend:
    """A run of that name, continued when there is one."""
    remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
    trackio = _library(folder / "trackio")
    with contextlib.nullcontext() if remote else _hub_offline():
        trackio.init(
            project=project,
            name=run_name,
            config={key: value for key, value in config.items() if not key.startswith("_")},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
    show = f"trackio show --project {shlex.quote(project)}"
    local = shlex.quote(str(trackio.TRACKIO_DIR))
    return TrackioBackend(
        trackio,
        f"tracking to {remote} with trackio"
        if remote
        else f"tracking to {local}; TRACKIO_DIR={local} {show}",
    )


def _library(wanted: Path) -> Any:
    """Import trackio, which reads its folder from the environment when it is imported."""
    if os.environ.get("TRACKIO_DIR"):
        return optional("trackio", "trackio")
    os.environ["TRACKIO_DIR"] = str(wanted)
    try:
        trackio = optional("trackio", "trackio")
    finally:
        del os.environ["TRACKIO_DIR"]
    if Path(trackio.TRACKIO_DIR) != wanted:
        logger.warning(
            "trackio was imported before and goes on writing to %s, not to %s",
            trackio.TRACKIO_DIR,
            wanted,
        )
    return trackio


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    """``trackio.init`` asks the hub for the user's name if there is a token; not when offline."""
    constants = optional("huggingface_hub.constants", "trackio")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
