"""Trackio, wandb, mlflow and tensorboard through ``accelerate.tracking``: off, and offline, unless
asked for.

A tracker is a copy of the numbers for people who look at curves; the results folder stays the
record.  So a tracker that fails is reported once and never stops a run.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError, DartError, MissingExtra, check_name
from dart_llm.experiments.store import flat
from dart_llm.files import finite

logger = logging.getLogger("dart_llm")

TRACKERS = ("trackio", "wandb", "mlflow", "tensorboard")

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

LONGEST = 500
"""Characters of a parameter's value that every version of MLflow takes."""


class Tracker(contextlib.AbstractContextManager["Tracker"]):
    """A tracker that cannot hurt the run; without a backend it does nothing.

    ``backend``: an ``accelerate.tracking.GeneralTracker``.  ``where``: what is written to and how
    to look at it, in one line.
    """

    def __init__(self, name: str = "", backend: Any = None, where: str = "") -> None:
        self.name = name
        self.where = where
        self._backend = backend
        self._step = 0
        self._warned = False

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record numbers by name; what is not a finite number is left out.

        ``step`` None: one more than the largest step so far.
        """
        usable = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        }
        if self._backend is None or not usable:
            return
        step = self._step if step is None else step
        self._step = max(self._step, step + 1)
        if self.name == "mlflow":  # takes letters, digits, and these marks, on every system
            usable = {re.sub(r"[^\w./ -]", "_", name): value for name, value in usable.items()}
        with self._guard("logging"):
            self._backend.log(usable, step=step)

    def log_measurement(self, measurement: Mapping[str, Any], label: str | None = None) -> None:
        """Record a ``Measurement.to_dict()`` under the names of ``measurement_numbers``."""
        self.log(measurement_numbers(measurement, label))

    def close(self, failed: bool = False) -> None:
        """End the tracked run; a second call does nothing."""
        backend, self._backend = self._backend, None
        if backend is None:
            return
        with self._guard("closing"):
            if self.name == "wandb":  # accelerate's finish does not say that a run failed
                backend.tracker.finish(exit_code=int(failed))
            elif self.name == "mlflow":
                import_module("mlflow").end_run("FAILED" if failed else "FINISHED")
            elif self.name == "trackio":  # Run.finish would be repeated, and print, at exit
                import_module("trackio").finish()
            else:
                backend.finish()

    def __exit__(self, kind: object, *more: object) -> None:
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
    check_name("tracker", name, TRACKERS)
    start = {"trackio": _trackio, "wandb": _wandb, "mlflow": _mlflow, "tensorboard": _tensorboard}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            backend, where = start[name](project, run_name, dict(config), folder.resolve())
    except ImportError:
        raise MissingExtra(name, name) from None
    except DartError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the tracker {name} cannot start ({type(error).__name__}: {_first_line(error)}): "
            "correct its settings, or leave --tracker off"
        ) from error
    return Tracker(name, backend, f"tracking to {where}")


def _started(kind: str, *arguments: Any, **options: Any) -> Any:
    """One of accelerate's trackers, which log where they are through its own state."""
    from accelerate import PartialState, tracking

    PartialState()
    backend = getattr(tracking, kind)(*arguments, **options)
    backend.start()
    return backend


def _tensorboard(project: str, run_name: str, config: Any, folder: Path) -> tuple[Any, str]:
    """Event files in ``folder / "tensorboard" / project / run_name``; settings as a text."""
    data = folder / "tensorboard"
    backend = _started("TensorBoardTracker", run_name, data / project)
    settings = json.dumps(finite(config), indent=1, default=str)
    backend.log({"settings": "\n".join(f"    {line}" for line in settings.splitlines())})
    quoted = shlex.quote(str(data))
    return backend, f"{quoted}; tensorboard --logdir {quoted}"


def _wandb(project: str, run_name: str, config: Any, folder: Path) -> tuple[Any, str]:
    """A new run below ``folder / "wandb"``; without ``WANDB_MODE`` nothing is sent."""
    mode = os.environ.get("WANDB_MODE") or "offline"
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's own crash reports
    folder.mkdir(parents=True, exist_ok=True)
    backend = _started(
        "WandBTracker",
        project,
        name=run_name,
        config=config,
        dir=str(folder),
        mode=mode,
        settings={"console": "off", "quiet": True},  # terminal output is not copied
    )
    data = shlex.quote(str(folder / "wandb"))
    hint = f"; upload with wandb sync {data}/offline-run-*" if mode == "offline" else ""
    return backend, f"{data} (wandb, {mode}){hint}"


def _mlflow(project: str, run_name: str, config: Any, folder: Path) -> tuple[Any, str]:
    """A new run of the experiment ``project``, in a local SQLite file (current versions refuse the
    former file store) unless ``MLFLOW_TRACKING_URI`` is set."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # on by default since 3.2
    mlflow = import_module("mlflow")
    address, hint, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), "", None
    if not address:
        data = folder / "mlflow"
        data.mkdir(parents=True, exist_ok=True)
        address = f"sqlite:///{(data / 'mlflow.db').as_posix()}"
        artifacts = (data / "artifacts").as_uri()
        hint = f"; mlflow server --backend-store-uri {shlex.quote(address)}"
    mlflow.set_tracking_uri(address)
    if hint:
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # else the next run took it for the user's
    backend = _started("MLflowTracker", project, artifacts, run_name=run_name)
    settings = {re.sub(r"[^\w./ -]", "_", key): value for key, value in flat(config).items()}
    backend.store_init_configuration({key: str(v)[:LONGEST] for key, v in settings.items()})
    return backend, f"{address}{hint}"


def _trackio(project: str, run_name: str, config: Any, folder: Path) -> tuple[Any, str]:
    """A run of that name, continued when there is one, in a local SQLite file.

    No dashboard is started and nothing is sent, unless the user has set ``TRACKIO_SPACE_ID`` or
    ``TRACKIO_SERVER_URL``.  ``TRACKIO_DIR`` wins over the results folder.
    """
    remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
    library = _import_trackio(folder / "trackio")
    with contextlib.nullcontext() if remote else _hub_offline():
        backend = _started(
            "TrackioTracker",
            project,
            name=run_name,
            config={key: value for key, value in config.items() if not key.startswith("_")},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
    if remote:
        return backend, f"{remote} with trackio"
    local = shlex.quote(str(library.TRACKIO_DIR))
    return backend, f"{local}; TRACKIO_DIR={local} trackio show --project {shlex.quote(project)}"


def _import_trackio(folder: Path) -> Any:
    """trackio, which reads its folder from the environment when it is first imported."""
    own = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = own or str(folder)
    try:
        return import_module("trackio")
    finally:
        if not own:
            del os.environ["TRACKIO_DIR"]


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    """``trackio.init`` asks the hub for the user's name if there is a token; not when offline."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


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


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
