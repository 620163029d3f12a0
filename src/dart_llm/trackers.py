"""Experiment trackers behind one small interface: off by default, offline by default.

Every tracker is a backend in a file of its own, the only one that imports its package.  A tracker
is a copy of the numbers for people who look at curves; the results folder stays the record.  So a
backend that fails is reported once and never stops a run.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Mapping
from importlib import import_module
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast

from dart_llm.errors import ConfigError, DartError, MissingExtra, UnknownName

logger = logging.getLogger("dart_llm")

TRACKERS: dict[str, str] = {
    "trackio": "dart_llm.tracker_trackio",
    "wandb": "dart_llm.tracker_wandb",
    "mlflow": "dart_llm.tracker_mlflow",
    "tensorboard": "dart_llm.tracker_tensorboard",
}
"""Name of a tracker, and the module that has its ``open_backend``."""

ACCOUNTING = (
    "achieved_sparsity",
    "sparsity_while_pruned",
    "dense_token_share",
    "remasks",
    "decoded_tokens",
    "ffn_bytes_share",
)
"""What stands beside every quality number."""

DENSE = {"achieved_sparsity": 0.0, "dense_token_share": 1.0, "remasks": 0.0}
"""The same of an untouched model, which has no accounting."""


class Backend(Protocol):
    """One tracker of one run.  ``where``: what it writes to, and how to look at it."""

    where: str

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record finite numbers by name at a step."""

    def close(self, failed: bool) -> None:
        """The run is over; everything logged is on disk when this returns."""


class Tracker:
    """A tracker that cannot hurt the run; without a backend it does nothing."""

    def __init__(self, name: str = "", backend: Backend | None = None) -> None:
        self.name = name
        self._backend = backend
        self._step = 0
        self._warned = False

    @property
    def where(self) -> str:
        """What is written to and how to look at it, in one line; "" when nothing is tracked."""
        return "" if self._backend is None else self._backend.where

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record numbers by name; what is not a finite number is left out.

        ``step`` None: one more than the largest step so far.
        """
        usable = {name: float(value) for name, value in metrics.items() if _is_finite(value)}
        if self._backend is None or not usable:
            return
        step = self._step if step is None else step
        self._step = max(self._step, step + 1)
        with self._guard("logging"):
            self._backend.log(usable, step)

    def log_measurement(self, measurement: Mapping[str, Any], label: str | None = None) -> None:
        """Record a ``Measurement.to_dict()``; see ``measurement_numbers`` for the names."""
        self.log(measurement_numbers(measurement, label))

    def close(self, failed: bool = False) -> None:
        """End the tracked run; a second call does nothing."""
        backend, self._backend = self._backend, None
        if backend is not None:
            with self._guard("closing"):
                backend.close(failed)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)

    @contextlib.contextmanager
    def _guard(self, doing: str) -> Iterator[None]:
        """Stdout belongs to the results; a failure is reported once and forgotten."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        except Exception as error:
            if not self._warned:
                logger.warning(
                    "the tracker %s failed while %s (%s: %s): the results are not affected, and "
                    "further failures are not reported",
                    self.name,
                    doing,
                    type(error).__name__,
                    _first_line(error),
                )
            self._warned = True


def open_tracker(
    name: str | None, project: str, run_name: str, config: Mapping[str, Any], folder: Path
) -> Tracker:
    """The tracker called ``name``, or one that does nothing when it is None.

    ``config``: JSON-able settings, shown beside the run.  ``folder``: local trackers write to a
    folder of their name in it; runs that share ``folder`` are shown side by side.  Open it before
    anything is computed: raises ``UnknownName``, ``MissingExtra`` (its package is not installed) or
    ``ConfigError`` (it cannot start).
    """
    if name is None:
        return Tracker()
    if name not in TRACKERS:
        raise UnknownName("tracker", name, TRACKERS)
    module = import_module(TRACKERS[name])
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            backend = module.open_backend(project, run_name, dict(config), folder.resolve())
    except DartError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the tracker {name} cannot start ({type(error).__name__}: {_first_line(error)}): "
            "correct its settings, or leave --tracker off"
        ) from error
    return Tracker(name, cast(Backend, backend))


def optional(module: str, extra: str) -> Any:
    """Import an optional package; raises ``MissingExtra`` when that is not possible."""
    try:
        return import_module(module)
    except ImportError:
        raise MissingExtra(extra, extra) from None


def measurement_numbers(measurement: Mapping[str, Any], label: str | None = None) -> dict[str, Any]:
    """Metrics and accounting as ``<task>/<name>``, or ``<task>/<label>/<name>`` with a label.

    The task comes first because trackers group by what stands before the first slash: the methods
    of one task then share a panel.
    """
    accounting = measurement.get("accounting") or DENSE
    numbers = dict(measurement.get("metrics") or {})
    numbers |= {name: accounting[name] for name in ACCOUNTING if name in accounting}
    prefix = "/".join(part for part in (str(measurement.get("task") or "task"), label) if part)
    return {f"{prefix}/{name}": value for name, value in numbers.items()}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, names joined by dots; what is None is left out."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = value
    return found


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
