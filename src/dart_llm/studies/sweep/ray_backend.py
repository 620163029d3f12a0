"""Compute the cells of a sweep on a running Ray cluster.  Only this file imports ray.

``RAY_ADDRESS`` names the cluster; the default is a cluster on this machine.  Workers return plain
data and write nothing.  If a worker dies, only its cell is lost; this cell is run again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from dart_llm.errors import LoadError, MissingExtra, chain, failure_text
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import keep_off_stdout, same_sigterm, silent
from dart_llm.studies.sweep.study import LoadedModelCache, Value

RETRIES = 3
"""Further attempts for a cell whose worker died."""

POLL_SECONDS = 2.0
"""The longest wait in seconds; it is short, so that Ctrl-C soon takes effect."""

FETCH_SECONDS = 300.0
"""The timeout in seconds for fetching a finished result."""

PASSED_ON = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Environment variables that workers get from this process."""


def results(
    cells: Sequence[Cell],
    compute: Callable[..., Value],
    workers: int | None,
    say: Callable[[str], None],
) -> Generator[tuple[Cell, Value | str]]:
    """Yield each cell with its value or the reason of its failure, as soon as the cell finishes.

    ``workers``: the number of cells computed at once; by default a quarter of the cluster's cores.
    Raises ``MissingExtra`` without ray, ``LoadError`` if the cluster cannot be reached.
    """
    with keep_off_stdout("ray_"), _cluster() as ray:
        resources = ray.cluster_resources()
        cores = int(resources.get("CPU", 1))
        slots = min(len(cells), workers or max(1, cores // 4))
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        threads = max(1, min(cores // slots, max(nodes, default=1)))
        gpu = resources.get("GPU", 0) >= 1 and all(cell.device != "cpu" for cell in cells)
        say(f"Ray: {slots} concurrent cells, {threads} threads each")
        task = ray.remote(
            num_cpus=threads,
            num_gpus=int(gpu),
            max_retries=RETRIES,
            runtime_env={"env_vars": worker_environment(threads)},
        )(_task)
        sweep = os.urandom(8).hex()
        waiting = list(reversed(cells))
        running: dict[Any, Cell] = {}
        try:
            while waiting or running:
                while waiting and len(running) < slots:
                    cell = waiting.pop()
                    running[task.remote(compute, cell.to_dict(), sweep)] = cell
                ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
                if not ready and not ray.is_initialized():
                    raise LoadError(
                        "the connection to Ray was lost; the same command resumes the run"
                    )
                for reference in ready:
                    cell = running.pop(reference)
                    yield cell, _value(ray, reference)
        finally:
            for reference in running:
                with contextlib.suppress(Exception):
                    ray.cancel(reference, force=True)


def _task(compute: Callable[..., Value], data: dict[str, Any], sweep: str) -> Value:
    return compute(Cell.from_dict(data), _cache(sweep))


@functools.lru_cache(maxsize=1)
def _cache(sweep: str) -> LoadedModelCache:
    """A cache that keeps this worker's model for all cells of ``sweep``, until the next sweep.

    A function cache is used because Ray tasks cannot access an object of their worker.
    """
    return LoadedModelCache()


def _value(ray: Any, reference: Any) -> Value | str:
    """The value of a finished cell, or the reason of its failure."""
    try:
        return dict(ray.get(reference, timeout=FETCH_SECONDS))
    except ray.exceptions.RayTaskError as error:
        return str(failure_text(error.cause))
    except ray.exceptions.OutOfMemoryError:
        return "the worker ran out of memory: give fewer workers"
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        name, tries = type(error).__name__, RETRIES + 1
        return f"the worker died in each of {tries} attempts ({name}); try fewer workers"


def worker_environment(threads: int) -> dict[str, str]:
    """A worker's environment variables: its number of threads, and the user's hub settings."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "2000",
        "TOKENIZERS_PARALLELISM": "false",
        **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
    }


@contextlib.contextmanager
def _cluster() -> Iterator[Any]:
    """The connected ray module; an existing connection is reused and stays open."""
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise MissingExtra("ray", "cluster") from None
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS") or "auto"
    try:
        with silent(), same_sigterm():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, OSError, RuntimeError, ValueError, TimeoutError) as error:
        token = any("AuthenticationError" in f"{type(cause)} {cause}" for cause in chain(error))
        why = "it requires a token: set RAY_AUTH_MODE=token" if token else failure_text(error)
        raise LoadError(
            f"the Ray cluster at {address} could not be reached ({why}): start one with "
            "ray start --head --node-ip-address 127.0.0.1, or correct RAY_ADDRESS"
        ) from error
    try:
        yield ray
    finally:
        with silent():
            ray.shutdown()
