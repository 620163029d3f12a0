"""Malformed requests: none may make the server fail (5xx) or hang.

A quarter is written by hand, from broken JSON to broken HTTP.  schemathesis generates the others
from the server's OpenAPI schema, with errors in each field.

Usage: python benchmarks/serve_malformed.py [--requests 1000] [--out serve-malformed]
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import socket
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LONGEST = 10.0
"""Seconds within which the server must answer or close."""
PATIENCE = 2.0
"""Seconds without an answer after which the client stops sending."""
NAMES = 20
"""Requests that schemathesis makes for a route whose only input is a name."""
POSTS = ("/v1/chat/completions", "/v1/completions", "/api/events")
USER = {"role": "user", "content": "hi"}
LONG = "x" * 2_000_000
NESTED = "[" * 5000 + "]" * 5000

BODIES: tuple[bytes, ...] = (
    b"",
    b" ",
    b"{",
    b"[]",
    b"null",
    b"0",
    b'"x"',
    b"{}",
    b"{]",
    b'{"messages"}',
    b"\x00\x01\x02",
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b'{"messages": NaN}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": Infinity}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "x", "seed": ' + b"9" * 6000 + b"}",
    b'{"prompt": "x", "prompt": "y"}',
    b'{"prompt": "\\ud83d"}',
    b'{"prompt": "\\udc00\\ud800"}',
    b'{"prompt": "x"} trailing',
    b"prompt=x&max_tokens=5",
    b"<xml/>",
    f'{{"prompt": {NESTED}}}'.encode(),
    json.dumps({"messages": [USER], "metadata": json.loads("[" * 900 + "]" * 900)}).encode(),
    json.dumps({"prompt": LONG}).encode(),
    json.dumps({"prompt": [[1] * 100_000]}).encode(),
)
"""Bodies that are sent to every route in ``POSTS``."""

WRONG: tuple[dict[str, Any], ...] = (
    {"messages": []},
    {"messages": {}},
    {"messages": "hi"},
    {"messages": [[]]},
    {"messages": [None]},
    {"messages": [{"role": "user"}], "n": 10**30},
    {"messages": [{"role": "tool", "content": "x"}]},
    {"messages": [{**USER, "content": [{"type": "image_url", "image_url": "x"}]}]},
    {"messages": [{**USER, "content": 5}]},
    {"messages": [USER] * 5000},
    {"messages": [USER], "stop": [""]},
    {"messages": [USER], "stop": "x" * 5000},
    {"messages": [USER], "stop": ["a"] * 50},
    {"messages": [USER], "max_tokens": -1},
    {"messages": [USER], "max_tokens": 10**18},
    {"messages": [USER], "max_tokens": 1.5},
    {"messages": [USER], "temperature": -1e308},
    {"messages": [USER], "temperature": "hot"},
    {"messages": [USER], "top_p": -0.1},
    {"messages": [USER], "seed": 2**64},
    {"messages": [USER], "logprobs": 5},
    {"messages": [USER], "top_logprobs": 5},
    {"messages": [USER], "stream": "yes"},
    {"messages": [USER], "stream_options": {"include_usage": True}},
    {"messages": [USER], "model": "../../etc/passwd"},
    {"messages": [USER], "model": "\x00"},
    {"messages": [USER], "user": "u" * 10_000},
    {"messages": [USER], "dart": []},
    {"messages": [USER], "dart": {"method": "wanda"}},
    {"messages": [USER], "dart": {"method": "dense-4bit"}},
    {"messages": [USER], "dart": {"method": "__import__('os')"}},
    {"messages": [USER], "dart": {"sparsity": 1.0}},
    {"messages": [USER], "dart": {"sparsity": 0.9999999999, "masking_step": 10**9}},
    {"messages": [USER], "dart": {"drift": "interval 0"}},
    {"messages": [USER], "dart": {"drift": "interval 9" + "9" * 200}},
    {"messages": [USER], "dart": {"conversation": ""}},
    {"messages": [USER], "tools": [{"type": "function"}]},
    {"messages": [USER], "response_format": {"type": "json_schema"}},
    {"messages": [USER], "__proto__": {"x": 1}},
    {"prompt": [1.5]},
    {"prompt": [-1]},
    {"prompt": [10**9]},
    {"prompt": [[1], ["a"]]},
    {"prompt": [None]},
    {"prompt": ["a", "b"]},
    {"prompt": "x", "suffix": "y"},
    {"prompt": "x", "echo": True, "best_of": 5},
    {"prompt": "x", "logprobs": 99},
)
"""Invalid JSON objects that are sent to every route in ``POSTS``."""

RAW: tuple[bytes, ...] = (
    b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET /healthz\r\n\r\n",
    b"GET /healthz HTTP/1.0\r\n\r\n",
    b"GET /healthz HTTP/9.9\r\nHost: localhost\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 5000 + b"\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
    b"GET /static/../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /static/%2e%2e/%2e%2e/secret HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /api/runs/..%2f..%2fetc HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /api/runs/%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /api/runs/%ff%fe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/models/%0d%0aX: HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET //////// HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://evil.example/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"BREW /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /api/events HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 500\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
    b"Content-Length: 2\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\n"
    b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    bytes(range(256)) * 8,
)
"""Bytes that are sent directly to the socket."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a request; ``status``: None if the connection was closed."""

    what: str
    status: int | None
    seconds: float

    @property
    def bad(self) -> bool:
        return self.seconds >= LONGEST or (self.status is not None and self.status >= 500)


def hand_written(url: str) -> Iterator[Outcome]:
    """Send all of the above, each on a new connection."""
    port = int(urllib.parse.urlsplit(url).port or 0)
    for raw in RAW:
        yield exchange(port, raw)
    bodies = [*BODIES, *(json.dumps(body).encode() for body in WRONG)]
    for path, body in itertools.product(POSTS, bodies):
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        yield exchange(port, head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)


def exchange(port: int, data: bytes) -> Outcome:
    """Send ``data`` and wait for a status or the end of the connection.

    An incomplete request gets no answer: then the client closes its sending side.
    """
    began, answer = time.perf_counter(), b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
            with contextlib.suppress(OSError):  # refused early, but an answer may have been sent
                connection.sendall(data)
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(LONGEST - PATIENCE)
                answer = connection.recv(65536)
    except TimeoutError:
        return Outcome(shown(data), None, LONGEST)
    except OSError:
        pass  # closed by the server
    status = int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else None
    return Outcome(shown(data), status, time.perf_counter() - began)


def shown(data: bytes) -> str:
    """The beginning of a request, for display."""
    return repr(data[:160])


def from_schema(url: str, count: int, seed: int = 0) -> list[Outcome]:
    """Send at least ``count`` requests that schemathesis generates from ``/openapi.json``."""
    import requests
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded
    from schemathesis import GenerationMode

    session = requests.Session()
    session.trust_env = False
    description = session.get(f"{url}/openapi.json", timeout=LONGEST).json()
    schema = schemathesis.openapi.from_dict(description)
    operations = [result.ok() for result in schema.get_all_operations()]
    named = [route for route in operations if "{" in route.path]  # their only input is a name
    posts = [route for route in operations if route.method.upper() == "POST"]
    few = min(NAMES, count // 10)
    examples = {route.path: few for route in named}
    examples |= {route.path: -(-(count - few * len(named)) // len(posts)) for route in posts}
    outcomes: list[Outcome] = []
    for operation in (*named, *posts):
        mode = GenerationMode.NEGATIVE if operation in posts else GenerationMode.POSITIVE
        strategy = operation.as_strategy(generation_mode=mode)

        @seeded(seed)
        @settings(
            max_examples=examples[operation.path],
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy)
        def send(case: Any) -> None:
            began, status = time.perf_counter(), None
            try:
                response = case.call(base_url=url, session=session, timeout=LONGEST)
                status = response.status_code
            except requests.Timeout:
                pass
            except requests.RequestException:
                return  # the client library refuses to send this request
            took = time.perf_counter() - began
            outcomes.append(Outcome(f"{case.method} {case.path} {case.body!r:.160}", status, took))

        send()
    return outcomes


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts per status, the slowest request, and requests that failed or hung."""
    counts = collections.Counter(str(one.status or "closed") for one in outcomes)
    return {
        "requests": len(outcomes),
        "statuses": dict(sorted(counts.items())),
        "slowest_s": max(one.seconds for one in outcomes),
        "bad": [vars(one) for one in outcomes if one.bad][:20],
        "passed": not any(one.bad for one in outcomes),
    }


def main() -> None:
    import common
    import serve_process

    parser = common.parser(__doc__ or "")
    parser.add_argument("--requests", type=int, default=1000, help="total number of requests")
    args = parser.parse_args()
    began = time.perf_counter()
    with serve_process.serving("--model", args.model, "--max-tokens", "4") as server:
        outcomes = list(hand_written(server.url))
        hand = summary(outcomes)
        made = from_schema(server.url, max(1, args.requests - len(outcomes)))
        alive = exchange(int(server.url.rsplit(":", 1)[1]), _HEALTH)
    data = {
        "hand_written": hand,
        "from_schema": summary(made),
        "all": summary([*outcomes, *made]),
        "alive_after": alive.status == 200,
        "seconds": time.perf_counter() - began,
    }
    print(json.dumps(data, indent=1))
    if args.out:
        print(common.save(args.out, None, data))


_HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

if __name__ == "__main__":
    main()
