"""Cells of a sweep as tasks of a Ray cluster; the only file that imports ray.

With ``RAY_ADDRESS`` the cells go to that cluster, else to one that is started here, listens on
127.0.0.1 only, has no dashboard, and is shut down afterwards.  Workers return plain data and write
nothing.  A worker that dies loses only its cell, which is run again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import sys
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

from dart_llm.errors import DartError, LoadError, MissingExtra, chain
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import environment, keep_off_stdout, same_sigterm, silent
from dart_llm.studies.sweep.compute import LoadedModelCache, Value, failed_value

RETRIES = 3
"""Further attempts for a cell whose worker died."""

POLL_SECONDS = 2.0

CONNECT_SECONDS = 10.0

FETCH_SECONDS = 300.0
"""A finished result may take so long to arrive."""

SILENT_SECONDS = 60.0
"""After so long without a free worker a message is shown."""

OBJECT_STORE_BYTES = 256 * 2**20

_PASSED_ON = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")

_OWN = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": str(RETRIES),
}
"""Settings of a cluster that is started here.  The first is Ray's switch to a single machine:
without it every port is open to the network, for Ray takes 127.0.0.1 to mean the outer address."""

_REFUSED = (ConnectionError, OSError, RuntimeError, ValueError, TimeoutError)


class Pool(NamedTuple):
    """An open cluster: ``slots`` cells at once, ``threads`` of each, for Ray ``cpus`` of each."""

    ray: Any
    slots: int
    threads: int
    cpus: int


def results(
    cells: Sequence[Cell],
    compute: Callable[..., Value],
    workers: int | None,
    say: Callable[[str], None],
) -> Generator[tuple[Cell, Value]]:
    """Cells with their values, in the order in which they finish.

    Raises ``MissingExtra`` without ray, ``LoadError`` when the cluster cannot be reached.
    """
    with cluster(workers, len(cells)) as pool:
        say(f"Ray: {pool.slots} cells at once, {pool.threads} threads each")
        task = pool.ray.remote(
            num_cpus=pool.cpus,
            num_gpus=_gpus(pool.ray, cells),
            max_retries=RETRIES,
            runtime_env={"env_vars": worker_environment(pool.threads)},
        )(_task)
        sweep = uuid.uuid4().hex
        waiting = list(reversed(cells))
        running: dict[Any, Cell] = {}
        try:
            while waiting or running:
                while waiting and len(running) < pool.slots:
                    cell = waiting.pop()
                    running[task.remote(compute, cell.to_dict(), sweep)] = cell
                for reference in _ready(pool.ray, list(running), say):
                    cell = running.pop(reference)
                    yield cell, _value(pool.ray, reference, cell)
        finally:
            for reference in running:
                with contextlib.suppress(Exception):
                    pool.ray.cancel(reference, force=True)


def _task(compute: Callable[..., Value], data: dict[str, Any], sweep: str) -> Value:
    return compute(data, _cache(sweep))


@functools.lru_cache(maxsize=1)
def _cache(sweep: str) -> LoadedModelCache:
    """This worker's model between the cells of ``sweep``; dropped at the next sweep's first cell.

    Remembered here, because Ray gives a task no object of its worker.
    """
    return LoadedModelCache()


def _ready(ray: Any, references: list[Any], say: Callable[[str], None]) -> list[Any]:
    """Wait for the next results, in short steps so that Ctrl-C is heard."""
    waited = 0.0
    while True:
        ready, _ = ray.wait(references, num_returns=1, timeout=POLL_SECONDS)
        if ready:
            return list(ready)
        if not ray.is_initialized():
            raise LoadError("the connection to Ray was lost; the same command resumes")
        waited += POLL_SECONDS
        if waited == SILENT_SECONDS:
            total, free = ray.cluster_resources(), ray.available_resources()
            if free.get("CPU", 0.0) >= total.get("CPU", 0.0):  # none is in use
                say("no Ray worker has taken a cell yet: the cluster has no free processor")


def _value(ray: Any, reference: Any, cell: Cell) -> Value:
    """The value of a finished cell, or that of a failed one when its workers died."""
    try:
        return dict(ray.get(reference, timeout=FETCH_SECONDS))
    except ray.exceptions.RayTaskError as error:
        sentence = f"{type(error.cause).__name__}: {_short(error.cause)}"
    except ray.exceptions.OutOfMemoryError:
        sentence = "the worker ran out of memory: give fewer workers"
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        name, tries = type(error).__name__, RETRIES + 1
        sentence = f"the worker died in each of {tries} attempts ({name}); try fewer workers"
    return failed_value(cell, sentence)


def worker_environment(threads: int) -> dict[str, str]:
    """Variables of a worker: its share of the cores, and the user's settings of the hub."""
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "2000",
        "TOKENIZERS_PARALLELISM": "false",
        **passed,
    }


def _gpus(ray: Any, cells: Sequence[Cell]) -> int:
    """GPUs of a task: one where the cluster has some and no cell asks for the CPU."""
    has = ray.cluster_resources().get("GPU", 0) >= 1
    return int(has and all(cell.device != "cpu" for cell in cells))


@contextlib.contextmanager
def cluster(workers: int | None, most: int) -> Iterator[Pool]:
    """An open cluster for at most ``most`` cells at once; closed afterwards.

    A connection that was open before is used as it is, and stays open.
    """
    ray = _import()
    cores = os.cpu_count() or 1
    if ray.is_initialized():
        with keep_off_stdout("ray_"):
            yield _shared(ray, workers, most)
        return
    address = os.environ.get("RAY_ADDRESS", "")
    address = "" if address == "local" else address  # "": to be started here
    loopback = not address or _at_loopback(ray, address)
    with keep_off_stdout("ray_"), environment({} if address else _OWN), _one_machine(loopback):
        try:
            with silent(), same_sigterm():
                if address:
                    _join(ray, address)
                    pool = _shared(ray, workers, most)
                else:
                    slots = min(most, workers or max(1, cores // 4))
                    _start(ray, slots)
                    pool = Pool(ray, slots, max(1, cores // slots), 1)
            yield pool
        finally:
            with silent():
                ray.shutdown()


def _at_loopback(ray: Any, address: str) -> bool:
    """Whether the cluster at ``address`` listens on 127.0.0.1 alone.

    Ray itself would try an address that does not answer for many minutes: raises ``LoadError``
    after seconds.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "://" in address:
        return False  # auto, or Ray's client, which report their own errors
    local = host in ("127.0.0.1", "localhost")
    if _answers(ray.util.get_node_ip_address() if local else host, int(port)):
        return False
    if local and _answers(host, int(port)):
        return True
    raise _unreachable(address, "nothing answers there")


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _unreachable(address: str, why: str) -> LoadError:
    return LoadError(
        f"the Ray cluster at {address} could not be reached ({why}); correct RAY_ADDRESS, or unset "
        "it to start a cluster here"
    )


def _shared(ray: Any, workers: int | None, most: int) -> Pool:
    """A part of a shared cluster: a quarter of its cores as workers by default."""
    cores = int(ray.cluster_resources().get("CPU", 1))
    slots = min(most, workers or max(1, cores // 4))
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    largest = max(nodes, default=1)
    threads = max(1, min(cores // slots, largest))
    return Pool(ray, slots, threads, threads)


def _import() -> Any:
    try:
        import ray
        import ray.exceptions
        import ray.util
    except ImportError:
        raise MissingExtra("ray", "cluster") from None
    return ray


def _join(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except _REFUSED as error:
        token = any("AuthenticationError" in f"{type(one)} {one}" for one in chain(error))
        why = "it wants its token: set RAY_AUTH_MODE=token" if token else _short(error)
        raise _unreachable(address, why) from error


def _start(ray: Any, slots: int) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=slots,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
    except _REFUSED as error:
        raise LoadError(
            f"Ray could not be started here ({_short(error)}); use the local engine"
        ) from error
    if ray.util.get_node_ip_address() != "127.0.0.1":
        raise DartError(
            f"this version of ray ({ray.__version__}) does not stay on 127.0.0.1: start a cluster "
            "yourself and name it in RAY_ADDRESS, or use the local engine"
        )


def _short(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


@contextlib.contextmanager
def _one_machine(wanted: bool) -> Iterator[None]:
    """Keep Ray on 127.0.0.1; it reads its switch when it is imported."""
    constants = vars(sys.modules["ray._private.ray_constants"]) if wanted else {}
    known = constants.get("ENABLE_RAY_CLUSTER")
    constants["ENABLE_RAY_CLUSTER"] = False
    try:
        yield
    finally:
        constants["ENABLE_RAY_CLUSTER"] = known
