"""Experiment trackers (Weights & Biases, MLflow, ...), through ``accelerate``.

They are off by default, and offline unless configured otherwise.  A tracker gets only a copy of
the numbers, to plot curves; the results folder has the originals.  If a tracker fails, the failure
is therefore reported once and does not stop the run.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError, MissingExtra, check_name
from dart_llm.experiments.provenance import environment
from dart_llm.experiments.store import ResultLine
from dart_llm.reporting.page import flat

logger = logging.getLogger("dart_llm")

TRACKERS = ("trackio", "wandb", "mlflow", "tensorboard")

PROJECT = "dart-llm"

LONGEST = 500  # characters: every MLflow version accepts values of this length

Log = Callable[[ResultLine], None]


@contextlib.contextmanager
def tracked(
    name: str | None,
    run_name: str,
    config: Mapping[str, Any],
    folder: Path,
    say: Callable[[str], None],
) -> Iterator[Log]:
    """Start a tracker; yield a function that logs a result line (a no-op if ``name`` is None).

    Local trackers write into ``folder``.  Raises ``UnknownName``, ``MissingExtra`` (the package is
    not installed) or ``ConfigError`` (the tracker cannot start), before any computation.
    """
    if name is None:
        yield lambda line: None
        return
    check_name("tracker", name, TRACKERS)
    folder = folder.resolve()
    (folder / name).mkdir(parents=True, exist_ok=True)
    with environment(_local(name, folder / name)):
        try:
            with contextlib.redirect_stdout(io.StringIO()), _hub_offline():
                backend = _start(name, run_name, flat(config), folder)
        except ImportError:
            raise MissingExtra(name, name) from None
        except Exception as error:
            raise ConfigError(
                f"the tracker {name} cannot start ({_reason(error)}): "
                "correct its settings, or omit --tracker"
            ) from error
        address = {"trackio": "TRACKIO_DIR", "mlflow": "MLFLOW_TRACKING_URI"}.get(name, "")
        say(f"tracking with {name}: {os.environ.get(address, folder / name)}")
        failures, steps = list[Exception](), itertools.count()

        def log(line: ResultLine) -> None:
            with _quiet(name, failures):
                backend.log(numbers(line, name), step=next(steps))

        try:
            yield log
        finally:
            with _quiet(name, failures):
                # trackio.finish() prevents a second finish at exit, which would print
                (import_module(name) if name == "trackio" else backend).finish()


def _local(name: str, data: Path) -> dict[str, str]:
    """Environment variables that keep a tracker local, without those that the user has set."""
    variables = {
        "wandb": {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"},
        "mlflow": {
            "MLFLOW_TRACKING_URI": f"sqlite:///{(data / 'mlflow.db').as_posix()}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        "trackio": {"TRACKIO_DIR": str(data)},
    }
    defaults = variables.get(name, {})
    return {variable: value for variable, value in defaults.items() if not os.environ.get(variable)}


def _start(name: str, run_name: str, config: Mapping[str, Any], folder: Path) -> Any:
    from accelerate import PartialState, tracking

    if name != "tensorboard":
        import_module(name)
    PartialState()
    options: dict[str, Any] = {"name": run_name, "config": dict(config)}
    backend: Any
    if name == "trackio":
        options |= {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        backend = tracking.TrackioTracker(PROJECT, resume="allow", **options)
    elif name == "wandb":
        terminal = {"console": "off", "quiet": True}  # do not copy terminal output
        backend = tracking.WandBTracker(PROJECT, dir=str(folder), settings=terminal, **options)
    elif name == "mlflow":
        artifacts = (folder / name / "artifacts").as_uri()
        backend = tracking.MLflowTracker(PROJECT, artifacts, run_name=run_name)
    else:
        backend = tracking.TensorBoardTracker(run_name, folder / name / PROJECT)
    backend.start()
    if name == "mlflow":
        backend.store_init_configuration({_plain(k): str(v)[:LONGEST] for k, v in config.items()})
    elif name == "tensorboard":  # TensorBoard's settings cannot be lists
        backend.log({"settings": "\n".join(f"    {key}: {v}" for key, v in config.items())})
    return backend


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    """Keep ``trackio.init`` from asking the hub for the user's name, unless it logs to a server."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
    constants.HF_HUB_OFFLINE = before or not remote
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def numbers(line: ResultLine, tracker: str = "") -> dict[str, float]:
    """The numbers of a line by name, ``<task>/<label>/<metric>``.

    Trackers group names by the text before the first slash, so the methods of a task share a panel.
    """
    values = {
        line.metric: line.value,
        "achieved_sparsity": line.achieved,
        "dense_token_share": line.dense_share,
        "remasks": line.remasks,
    }
    prefix = f"{line.task}/{line.label}"
    prefix = _plain(prefix) if tracker == "mlflow" else prefix
    return {f"{prefix}/{key}": float(value) for key, value in values.items() if value is not None}


def _plain(name: str) -> str:
    """Replace characters that MLflow does not accept on every system."""
    return re.sub(r"[^\w./ -]", "_", name)


@contextlib.contextmanager
def _quiet(name: str, failures: list[Exception]) -> Iterator[None]:
    """Suppress the tracker's stdout and exceptions; the first exception is logged."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except Exception as error:
        if not failures:
            logger.warning(
                "the tracker %s failed (%s): the results are not affected, and further failures "
                "are not reported",
                name,
                _reason(error),
            )
        failures.append(error)


def _reason(error: BaseException) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
