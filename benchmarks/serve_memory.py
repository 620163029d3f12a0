"""Memory of a server: prompts of many lengths, then large request bodies in parallel.

1. Prompts of many lengths in random order, alternately dense and pruned: memory after the first
   hundred requests and after all.
2. Parallel requests with bodies of the largest accepted size, whose text is far too long for the
   model: peak memory meanwhile, and the response times of other routes.

Usage: python benchmarks/serve_memory.py [--requests 600] [--lengths 200] [--out serve-memory]
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import statistics
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

FIRST = 100
"""Requests after which memory is measured the first time."""
GROWTH = 0.05
"""Share by which memory may grow from then on."""
EXTRA = 100 << 20
"""Bytes of memory that all large bodies together may take."""
ROUTES = ("/healthz", "/api/runs")
"""Routes that are requested meanwhile."""
SHORTEST, STEP = 8, 1
"""Tokens of the shortest prompt, and the difference between successive lengths."""


def post(url: str, body: bytes) -> tuple[int, bytes]:
    """Status and answer of ``/v1/completions``."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=120)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def many_lengths(
    url: str,
    memory: Callable[[], int],
    ids: Sequence[int],
    darts: Sequence[dict[str, Any]],
    requests: int,
    lengths: int,
    first: int = FIRST,
) -> dict[str, Any]:
    """The first part; ``ids``: token ids, at least as many as in the longest prompt."""
    sizes = [SHORTEST + STEP * (number % lengths) for number in range(requests)]
    random.Random(0).shuffle(sizes)
    measured = {"before": memory()}
    for number, size in enumerate(sizes, 1):
        dart = darts[number % len(darts)]
        body = {"prompt": ids[:size], "max_tokens": 4, "temperature": 0, "dart": dart}
        status, answer = post(url, json.dumps(body).encode())
        if status != 200:
            raise SystemExit(f"{status}: {answer[:300]!r}")
        if number % FIRST == 0:
            print(f"{number} requests: {memory() >> 20} MiB", file=sys.stderr, flush=True)
        if number in (first, requests):
            measured[str(number)] = memory()
    grown = measured[str(requests)] / measured[str(first)] - 1
    return {
        "requests": requests,
        "lengths": lengths,
        "longest": max(sizes),
        "memory": measured,
        "grown": grown,
        "passed": grown <= GROWTH,
    }


@contextlib.contextmanager
def beside(work: Callable[[], None], pause: float) -> Iterator[None]:
    """Repeat ``work`` in a thread while the block runs, for at most two minutes."""
    over, end = threading.Event(), time.monotonic() + 120

    def loop() -> None:
        while not over.is_set() and time.monotonic() < end:
            work()
            over.wait(pause)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(30)


def large_bodies(url: str, memory: Callable[[], int], bodies: int, size: int) -> dict[str, Any]:
    """The second part: ``bodies`` of ``size`` bytes."""
    piece = "e\u0301"
    frame = json.dumps({"prompt": "", "max_tokens": 1})
    text = piece * ((size - len(frame)) // len(piece.encode()))
    body = frame.replace('""', f'"{text}"').encode()
    seconds: dict[str, list[float]] = {route: [] for route in ROUTES}
    before, seen = memory(), [memory()]
    statuses: list[int] = []

    def other() -> None:
        for route in ROUTES:
            connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
            began = time.perf_counter()
            connection.request("GET", route)
            connection.getresponse().read()
            seconds[route].append(time.perf_counter() - began)
            connection.close()

    def send() -> None:
        status, answer = post(url, body)
        if status != 400 or b"context_length_exceeded" not in answer:
            raise SystemExit(f"{status}: {answer[:300]!r}")
        statuses.append(status)

    threads = [threading.Thread(target=send, daemon=True) for _ in range(bodies)]
    began = time.perf_counter()
    with beside(other, 0.01), beside(lambda: seen.append(memory()), 0.005):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        took = time.perf_counter() - began
    extra = max(seen) - before
    return {
        "bodies": bodies,
        "bytes_each": len(body),
        "refused": len(statuses),
        "seconds": took,
        "memory_before": before,
        "memory_most": max(seen),
        "memory_after": memory(),
        "extra": extra,
        "other_routes_s": {
            route: {"asked": len(each), "median": statistics.median(each), "slowest": max(each)}
            for route, each in seconds.items()
        },
        "passed": len(statuses) == bodies and extra <= EXTRA,
    }


def main() -> None:
    import common
    import serve_process

    from dart_llm.data.texts import read, subjects

    parser = common.parser(__doc__ or "")
    parser.add_argument("--requests", type=int, default=600, help="requests of the first part")
    parser.add_argument("--lengths", type=int, default=200, help="number of prompt lengths")
    parser.add_argument("--bodies", type=int, default=12, help="number of parallel large bodies")
    args = parser.parse_args()
    model, tokenizer = common.load_model(args)
    text = "".join(read(subject) for subject in subjects())
    ids = tokenizer(text, verbose=False).input_ids
    darts = [{"method": "dense"}, {"method": "dart"}, {"method": "griffin", "sparsity": 0.5}]
    with serve_process.serving("--model", args.model) as server:
        parts = {
            "lengths": many_lengths(
                server.url, server.rss, ids, darts, args.requests, args.lengths
            ),
            "bodies": large_bodies(server.url, server.rss, args.bodies, 1_020_000),
        }
    data = {
        **parts,
        "bars": {"growth": GROWTH, "extra": EXTRA},
        "passed": all(part["passed"] for part in parts.values()),
    }
    print(json.dumps(data, indent=1))
    if args.out:
        print(common.save(args.out, model, data))


if __name__ == "__main__":
    main()
