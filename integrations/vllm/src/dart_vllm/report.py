"""Counts of pruned requests: a log line per request, and metrics for the server's ``/metrics``.

The worker knows what a request achieved, and the server's process answers ``/metrics``.  They share
a small file of totals, which the worker replaces whenever a request ends.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dart_llm.pruning.records import RunReport

FOLDER = "DART_VLLM_METRICS"
"""Environment variable with the folder of the totals, for the engine's other processes."""

TOTALS = {
    "requests": "Pruned requests that ended.",
    "decoded_tokens": "Decoded tokens of pruned requests.",
    "dense_tokens": "Decoded tokens of pruned requests that ran dense.",
    "removed_share": "Fraction of FFN neurons removed, summed over decoded tokens.",
    "remasks": "Masks built after the first mask of a request.",
}
"""Names and descriptions of the totals; the metrics are called dart_NAME_total."""

_asked: Counter[str] = Counter()


def describe(name: str, report: RunReport) -> str:
    """The log line of a request that has ended."""
    remasks = f"{report.remasks} re-mask{'' if report.remasks == 1 else 's'}"
    return (
        f"DART {name}: {report.method}, {report.achieved_sparsity:.1%} of the FFN neurons removed, "
        f"mean over {report.decoded_tokens} decoded tokens "
        f"({round(report.dense_token_share * report.decoded_tokens)} of them dense), {remasks}"
    )


class Totals:
    """Sums over the requests that ended in this worker."""

    def __init__(self) -> None:
        self.values = dict.fromkeys(TOTALS, 0.0)

    def add(self, report: RunReport) -> None:
        """Add a request that has ended, and share the totals with the server's process."""
        tokens = report.decoded_tokens
        self.values["requests"] += 1
        self.values["decoded_tokens"] += tokens
        self.values["dense_tokens"] += round(report.dense_token_share * tokens)
        self.values["removed_share"] += report.achieved_sparsity * tokens
        self.values["remasks"] += report.remasks
        folder = os.environ.get(FOLDER)
        if folder is not None:
            path = Path(folder) / f"{os.getpid()}.json"
            with contextlib.suppress(OSError):  # a full disk must not end the engine
                path.with_suffix(".new").write_text(json.dumps(self.values))
                path.with_suffix(".new").replace(path)


def count_request(method: str) -> None:
    """Count a request that asks for a method."""
    _asked[method] += 1


class _Collector:
    """Reads the totals of all workers when Prometheus asks."""

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        asked = CounterMetricFamily(
            "dart_requests_asked", "Requests that asked for pruning.", labels=["method"]
        )
        for method, count in sorted(_asked.items()):
            asked.add_metric([method], count)
        yield asked
        sums: Counter[str] = Counter()
        for path in Path(os.environ[FOLDER]).glob("*.json"):
            sums.update(json.loads(path.read_text()))
        for name, text in TOTALS.items():
            yield CounterMetricFamily(f"dart_{name}", text, value=sums[name])


def share_metrics() -> None:
    """In a main process, make the folder of the totals and register the metrics.

    vLLM starts the processes of an engine by multiprocessing, and they use the folder of the
    process that started them.  A server that another program starts is a main process: it must not
    count in that program's folder, even if it inherits the variable.
    """
    if FOLDER in os.environ and multiprocessing.parent_process() is not None:
        return
    os.environ[FOLDER] = folder = tempfile.mkdtemp(prefix="dart-vllm-")
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked worker
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    try:
        from prometheus_client import REGISTRY
    except ImportError:
        return
    REGISTRY.register(_Collector())
