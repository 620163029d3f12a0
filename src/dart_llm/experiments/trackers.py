"""Trackio, wandb, mlflow and tensorboard through ``accelerate.tracking``: off by default, and
offline unless configured otherwise.

A tracker is a copy of the numbers for people who look at curves; the results folder stays the
record.  So a tracker that fails is reported once and never stops a run.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError, MissingExtra, check_name
from dart_llm.experiments.provenance import environment
from dart_llm.experiments.result_line import ResultLine
from dart_llm.experiments.store import flat

logger = logging.getLogger("dart_llm")

TRACKERS = ("trackio", "wandb", "mlflow", "tensorboard")

PROJECT = "dart-llm"

LONGEST = 500
"""Characters of a parameter's value that every version of MLflow takes."""

Log = Callable[[ResultLine], None]


@contextlib.contextmanager
def tracked(
    name: str | None,
    run_name: str,
    config: Mapping[str, Any],
    folder: Path,
    say: Callable[[str], None],
) -> Iterator[Log]:
    """A function that logs a result line; it does nothing where ``name`` is None.

    Local trackers write below ``folder``.  Raises ``UnknownName``, ``MissingExtra`` (the package is
    not installed) or ``ConfigError`` (it cannot start) before anything is computed.
    """
    if name is None:
        yield lambda line: None
        return
    check_name("tracker", name, TRACKERS)
    folder = folder.resolve()
    with environment(_local(name, folder)):
        try:
            with contextlib.redirect_stdout(io.StringIO()), _hub_offline():
                backend = _start(name, run_name, flat(config), folder)
        except ImportError:
            raise MissingExtra(name, name) from None
        except Exception as error:
            raise ConfigError(
                f"the tracker {name} cannot start ({type(error).__name__}: {_first_line(error)}): "
                "correct its settings, or leave --tracker off"
            ) from error
        say(f"tracking with {name}: {_hint(name, folder)}")
        failures, steps = list[Exception](), itertools.count()

        def log(line: ResultLine) -> None:
            call = partial(backend.log, numbers(line, name), step=next(steps))
            _quietly(name, failures, call)

        try:
            yield log
        finally:
            # trackio's run would finish, and print, once more at exit
            finish = import_module(name).finish if name == "trackio" else backend.finish
            _quietly(name, failures, finish)


def _local(name: str, folder: Path) -> dict[str, str]:
    """Variables by which a tracker stays on this machine, where its user has not set them."""
    data = folder / name
    data.mkdir(parents=True, exist_ok=True)
    variables = {
        "wandb": {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"},
        "mlflow": {
            "MLFLOW_TRACKING_URI": f"sqlite:///{(data / 'mlflow.db').as_posix()}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        "trackio": {"TRACKIO_DIR": str(data)},
    }
    wanted = variables.get(name, {})
    return {variable: value for variable, value in wanted.items() if not os.environ.get(variable)}


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
        terminal = {"console": "off", "quiet": True}  # its output is not copied
        backend = tracking.WandBTracker(PROJECT, dir=str(folder), settings=terminal, **options)
    elif name == "mlflow":
        artifacts = (folder / name / "artifacts").as_uri()
        backend = tracking.MLflowTracker(PROJECT, artifacts, run_name=run_name)
    else:
        backend = tracking.TensorBoardTracker(run_name, folder / name / PROJECT)
    backend.start()
    if name == "mlflow":
        known = {re.sub(r"[^\w./ -]", "_", key): str(v)[:LONGEST] for key, v in config.items()}
        backend.store_init_configuration(known)
    elif name == "tensorboard":  # its hyperparameters take no lists
        backend.log({"settings": "\n".join(f"    {key}: {v}" for key, v in config.items())})
    return backend


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    """``trackio.init`` asks the hub for the user's name if there is a token; not when offline."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
    constants.HF_HUB_OFFLINE = before or not remote
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hint(name: str, folder: Path) -> str:
    """Where the numbers are, and the command that shows them."""
    where = shlex.quote(str(folder / name))
    if name == "trackio":
        data = shlex.quote(os.environ["TRACKIO_DIR"])
        return f"TRACKIO_DIR={data} trackio show --project {PROJECT}"
    if name == "mlflow":
        return f"mlflow server --backend-store-uri {shlex.quote(os.environ['MLFLOW_TRACKING_URI'])}"
    if name == "wandb":
        mode = os.environ["WANDB_MODE"]
        return f"wandb sync {where}/offline-run-*" if mode == "offline" else f"{where}, {mode}"
    return f"tensorboard --logdir {where}"


def numbers(line: ResultLine, tracker: str = "") -> dict[str, float]:
    """The value and its accounting as ``<task>/<label>/<name>``.

    Trackers group by what comes before the first slash: the methods of a task share a panel.
    """
    known = {
        line.metric: line.value,
        "achieved_sparsity": line.achieved,
        "dense_token_share": line.dense_share,
        "remasks": line.remasks,
    }
    prefix = f"{line.task}/{line.label}"
    if tracker == "mlflow":  # takes letters, digits and these marks on every system
        prefix = re.sub(r"[^\w./ -]", "_", prefix)
    return {f"{prefix}/{key}": float(value) for key, value in known.items() if value is not None}


def _quietly(name: str, failures: list[Exception], call: Callable[[], None]) -> None:
    """Stdout belongs to the results; the first failure is logged, and none stops the run."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            call()
    except Exception as error:
        if not failures:
            logger.warning(
                "the tracker %s failed (%s: %s): the results are not affected, and further "
                "failures are not reported",
                name,
                type(error).__name__,
                _first_line(error),
            )
        failures.append(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
