"""Track with MLflow, in a local SQLite file unless ``MLFLOW_TRACKING_URI`` is set; imports mlflow.

SQLite, because current versions of MLflow refuse its former file store.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dart_llm.trackers import flat, optional

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


def open_backend(
    project: str, run_name: str, config: dict[str, Any], folder: Path
) -> MlflowBackend:
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
