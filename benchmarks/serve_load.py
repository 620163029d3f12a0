"""Many clients at once: 200 requests from 16 clients, dense and pruned, a third cancelled half-way.

Every completed greedy answer must equal the answer that the library computes for this request
alone.  No request may fail except with 429.  Memory may grow by at most 5 %.

Usage: python benchmarks/serve_load.py [--requests 200] [--clients 16] [--out serve-load]
"""

from __future__ import annotations

import collections
import http.client
import json
import random
import statistics
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

MEMORY = 0.05
"""Share by which memory may grow."""
SECONDS = 60.0
"""Seconds that a request may take, including its wait in the queue."""
SHORTEST = 30
"""Tokens of the shortest prompt; each further prompt has one token more."""
TRIES = 200
"""How often a request that gets 429 is sent at most."""


@dataclass(frozen=True)
class Plan:
    """One request.  ``cancel_after``: pieces of the stream after which the client disconnects."""

    body: dict[str, Any]
    key: int
    """Index of the expected text."""
    cancel_after: int | None = None


@dataclass
class Tally:
    """Outcomes of all requests."""

    completed: int = 0
    cancelled: int = 0
    sent_away: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def plans(bodies: Sequence[dict[str, Any]], requests: int, seed: int = 0) -> list[Plan]:
    """``requests`` plans that cycle through ``bodies``, shuffled; a third is cancelled half-way."""
    chance, result = random.Random(seed), []
    for number in range(requests):
        key = number % len(bodies)
        body = bodies[key]
        cancelled = number % 3 == 2
        stream = cancelled or number % 2 == 0
        after = max(1, body["max_tokens"] // 2) if cancelled else None
        result.append(Plan({**body, "stream": stream}, key, after))
    chance.shuffle(result)
    return result


def run(url: str, requests: Sequence[Plan], clients: int, expected: Sequence[str]) -> Tally:
    """Send all requests from ``clients`` threads; each sends its next after an answer."""
    tally, left = Tally(), collections.deque(requests)

    def work(name: str) -> None:
        while True:
            try:
                plan = left.popleft()
            except IndexError:
                return
            try:
                _one(url, plan, name, expected, tally)
            except Exception as error:
                with tally.lock:
                    tally.errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(f"client {i}",)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS * len(requests))
    return tally


def _one(url: str, plan: Plan, user: str, expected: Sequence[str], tally: Tally) -> None:
    began = time.perf_counter()
    for _ in range(TRIES):
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=SECONDS)
        try:
            body = json.dumps({**plan.body, "user": user})
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", body, headers)
            response = connection.getresponse()
            if response.status == 429:
                wait = float(response.headers["Retry-After"])
                with tally.lock:
                    tally.sent_away += 1
                time.sleep(min(1.0, wait))
                continue
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {response.read()[:200]!r}")
            text = _text(response, plan)
            with tally.lock:
                if text is None:
                    tally.cancelled += 1
                else:
                    tally.completed += 1
                    tally.seconds.append(time.perf_counter() - began)
                    if text != expected[plan.key]:
                        tally.wrong.append(f"{text!r} instead of {expected[plan.key]!r}")
            return
        finally:
            connection.close()
    raise RuntimeError(f"got 429 {TRIES} times")


def _text(response: http.client.HTTPResponse, plan: Plan) -> str | None:
    """The whole text; None if the request was cancelled."""
    if not plan.body["stream"]:
        return str(json.loads(response.read())["choices"][0]["text"])
    text, pieces, ended = "", 0, False
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            ended = True
        elif data:
            chunk = json.loads(data)
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            text += chunk["choices"][0]["text"]
            pieces += bool(chunk["choices"][0]["text"])
        if plan.cancel_after is not None and pieces >= plan.cancel_after:
            return None
    if not ended:
        raise RuntimeError("the stream broke off")
    return text


def settled(url: str, seconds: float = 20.0) -> dict[str, float]:
    """The server's gauges once no request runs or waits; ``SystemExit`` after ``seconds``."""
    names = ("dart_llm_waiting_requests", "dart_llm_running_requests")
    end = time.monotonic() + seconds
    while True:
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=10)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        gauges = {
            name: float(line.split()[1])
            for name in names
            for line in lines
            if line.startswith(name + " ")
        }
        if not any(gauges.values()):
            return gauges
        if time.monotonic() > end:
            raise SystemExit(f"the server is still busy: {gauges}")
        time.sleep(0.1)


def measure(
    url: str,
    memory: Callable[[], int],
    bodies: Sequence[dict[str, Any]],
    expected: Sequence[str],
    requests: int,
    clients: int,
) -> dict[str, Any]:
    """Run an uncounted warm-up round, then the load; return the counts and whether they passed."""
    run(url, plans(bodies, 2 * len(bodies) + clients, seed=1), clients, expected)
    settled(url)
    before, began = memory(), time.perf_counter()
    tally = run(url, plans(bodies, requests), clients, expected)
    took = time.perf_counter() - began
    settled(url)
    after = memory()
    grown = after / before - 1
    return {
        "requests": requests,
        "clients": clients,
        "completed": tally.completed,
        "cancelled": tally.cancelled,
        "sent_away_429": tally.sent_away,
        "wrong": tally.wrong[:10],
        "errors": tally.errors[:10],
        "seconds": took,
        "median_request_s": statistics.median(tally.seconds) if tally.seconds else None,
        "memory_before": before,
        "memory_after": after,
        "memory_grown": grown,
        "passed": (
            tally.completed + tally.cancelled == requests
            and not tally.wrong
            and not tally.errors
            and grown <= MEMORY
        ),
    }


def expected_texts(model: Any, tokenizer: Any, bodies: Sequence[dict[str, Any]]) -> list[str]:
    """The greedy texts of ``bodies`` by the library, each with a separate engine."""
    from dart_llm.engine.engine import Engine
    from dart_llm.engine.requests import GenerationRequest as Ask
    from dart_llm.engine.requests import Sampling
    from dart_llm.pruning.config import PruneConfig

    texts = []
    for body in bodies:
        settings = dict(body["dart"])
        method = settings.pop("method")
        config = None if method == "dense" else PruneConfig.build(method, **settings)
        ask = Ask(tuple(body["prompt"]), Sampling(max_tokens=body["max_tokens"]), config)
        with Engine(model, tokenizer) as engine:
            texts.append(engine.run(ask).texts[0])
    return texts


def main() -> None:
    import common
    import serve_process

    from dart_llm.data.texts import read, subjects

    parser = common.parser(__doc__ or "")
    parser.add_argument("--requests", type=int, default=200, help="total number of requests")
    parser.add_argument("--lengths", type=int, default=60, help="number of prompt lengths")
    parser.add_argument("--clients", type=int, default=16, help="clients at the same time")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per answer")
    parser.add_argument("--max-waiting", type=int, default=12, help="the server's --max-waiting")
    args = parser.parse_args()
    model, tokenizer = common.load_model(args)
    darts = [
        {"method": "dense"},
        {"method": "dart", "sparsity": 0.3},
        {"method": "griffin", "sparsity": 0.5},
        {"method": "dart", "sparsity": 0.7, "drift": "never"},
    ]
    texts = [tokenizer(read(subject), verbose=False).input_ids for subject in subjects()[:3]]
    bodies = [
        {
            "prompt": texts[number % len(texts)][: SHORTEST + number],
            "max_tokens": args.tokens,
            "temperature": 0,
            "dart": darts[number % len(darts)],
        }
        for number in range(args.lengths)
    ]
    expected = expected_texts(model, tokenizer, bodies)
    waiting = str(args.max_waiting)
    with serve_process.serving("--model", args.model, "--max-waiting", waiting) as server:
        data = measure(server.url, server.rss, bodies, expected, args.requests, args.clients)
    data |= {"max_waiting": args.max_waiting, "lengths": args.lengths}
    print(json.dumps(data, indent=1))
    if args.out:
        print(common.save(args.out, model, data))


if __name__ == "__main__":
    main()
