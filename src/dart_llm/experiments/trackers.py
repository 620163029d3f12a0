"""Trackio, wandb, mlflow, tensorboard through accelerate.tracking.

Experiment trackers behind one small interface: off by default, offline by default.

Every tracker is a backend in a file of its own, the only one that imports its package.  A tracker
is a copy of the numbers for people who look at curves; the results folder stays the record.  So a
backend that fails is reported once and never stops a run.
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
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast

from dart_llm.errors import ConfigError, DartError, MissingExtra, UnknownName
from dart_llm.files import finite

logger = logging.getLogger("dart_llm")

TRACKERS: dict[str, str] = {
    "trackio": "dart_llm.experiments.trackers",
    "wandb": "dart_llm.experiments.trackers",
    "mlflow": "dart_llm.experiments.trackers",
    "tensorboard": "dart_llm.experiments.trackers",
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


# Track with MLflow, in a local SQLite file unless ``MLFLOW_TRACKING_URI`` is set; imports mlflow.
#
# SQLite, because current versions of MLflow refuse its former file store.


BATCH = 100
"""MLflow takes that many parameters at once."""

LONGEST = 500
"""Characters of a parameter's value that every version of MLflow takes."""


class MlflowBackend:
    """One MLflow run, written through a client: no active run, no global tracking address."""

    def __init__(self, client: Any, entities: Any, run_id: str, where: str) -> None:
        self.where = where
        self._client, self._entities, self._run_id = client, entities, run_id

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Record settings as text."""
        all_of_them = [
            self._entities.Param(_name(key), str(value)[:LONGEST]) for key, value in values.items()
        ]
        for begin in range(0, len(all_of_them), BATCH):
            self._client.log_batch(self._run_id, params=all_of_them[begin : begin + BATCH])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        stamp = int(time.time() * 1000)
        self._client.log_batch(
            self._run_id,
            metrics=[
                self._entities.Metric(_name(key), value, stamp, step)
                for key, value in metrics.items()
            ],
        )

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


def open_mlflow(project: str, run_name: str, config: dict[str, Any], folder: Path) -> MlflowBackend:
    """A new run of the experiment ``project``, made when there is none of that name."""
    data = folder / "mlflow"
    remote = os.environ.get("MLFLOW_TRACKING_URI")
    if not remote:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # on by default since 3.2
        data.mkdir(parents=True, exist_ok=True)
    mlflow = optional("mlflow", "mlflow")
    entities = optional("mlflow.entities", "mlflow")
    address = remote or f"sqlite:///{(data / 'mlflow.db').as_posix()}"
    client = mlflow.MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name(project)
    if experiment is not None:
        number = experiment.experiment_id
    elif remote:
        number = client.create_experiment(project)
    else:
        files = (data / "artifacts").as_uri()
        number = client.create_experiment(project, artifact_location=files)
    run = client.create_run(number, run_name=run_name)
    backend = MlflowBackend(client, entities, run.info.run_id, _where(address, remote))
    backend.parameters(flat(config))
    return backend


def _where(address: str, remote: str | None) -> str:
    hint = "" if remote else f"; mlflow server --backend-store-uri {shlex.quote(address)}"
    return f"tracking to {address}{hint}"


def _name(text: str) -> str:
    """MLflow takes letters, digits, and these marks in names, on every system."""
    return re.sub(r"[^\w./ -]", "_", text)


# Track with TensorBoard event files, through torch's writer; needs the package tensorboard.


class TensorboardBackend:
    """One folder of event files."""

    def __init__(self, writer: Any, where: str) -> None:
        self.where = where
        self._writer = writer

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


def open_tensorboard(
    project: str, run_name: str, config: dict[str, Any], folder: Path
) -> TensorboardBackend:
    """Event files in ``folder / "tensorboard" / project / run_name``; settings as a text."""
    library = optional("torch.utils.tensorboard", "tensorboard")
    data = folder / "tensorboard"
    writer = library.SummaryWriter(log_dir=str(data / project / run_name))
    settings = json.dumps(finite(config), indent=1, default=str)
    writer.add_text("settings", "\n".join(f"    {line}" for line in settings.splitlines()))
    writer.flush()
    quoted = shlex.quote(str(data))
    return TensorboardBackend(writer, f"tracking to {quoted}; tensorboard --logdir {quoted}")


# Track with trackio: a local SQLite file; the only file that imports trackio.
#
# No dashboard is started and nothing is sent, unless the user has set ``TRACKIO_SPACE_ID`` or
# ``TRACKIO_SERVER_URL``.  ``TRACKIO_DIR`` wins over the results folder.


class TrackioBackend:
    """trackio's current run."""

    def __init__(self, library: Any, where: str) -> None:
        self.where = where
        self._library = library

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._library.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._library.finish()  # not Run.finish, which trackio would repeat, and print, at exit


def open_trackio(
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


# Track with Weights & Biases, offline unless ``WANDB_MODE`` says otherwise; imports wandb.


class WandbBackend:
    """One wandb run."""

    def __init__(self, run: Any, where: str) -> None:
        self.where = where
        self._run = run

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def open_wandb(project: str, run_name: str, config: dict[str, Any], folder: Path) -> WandbBackend:
    """A new run below ``folder / "wandb"``; without ``WANDB_MODE`` nothing is sent."""
    mode = os.environ.get("WANDB_MODE") or "offline"
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's own crash reports
    wandb = optional("wandb", "wandb")
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=project,
        name=run_name,
        config=config,
        dir=str(folder),
        mode=mode,
        settings={"console": "off", "quiet": True},  # terminal output is not copied
    )
    data = shlex.quote(str(folder / "wandb"))
    hint = f"; upload with wandb sync {data}/offline-run-*" if mode == "offline" else ""
    return WandbBackend(run, f"tracking to {data} (wandb, {mode}){hint}")
