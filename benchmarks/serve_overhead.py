"""The time that the server adds to the library's, for the first token and each further token.

Library and server use the same engine in this process, in interleaved repetitions: the library by
``Engine.run``, the server over a socket to a client process.  Numbers are medians over pairs of
consecutive measurements.

Usage: python benchmarks/serve_overhead.py [--repeats 30] [--tokens 64] [--out serve-overhead]
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import common

from dart_llm.data.texts import read as read_text
from dart_llm.data.texts import subjects
from dart_llm.engine.engine import Engine
from dart_llm.engine.requests import Record, Token
from dart_llm.server.app import build
from dart_llm.server.run import Server, bind, server_config, warm_up
from dart_llm.server.schemas import ChatBody
from dart_llm.server.service import ModelFacts, Service
from dart_llm.server.settings import ServeSettings

FIRST_MS, SHARE = 5.0, 0.02
"""Limits: milliseconds added to the first token, share of time added to each further token."""
PROMPT_CHARACTERS = 600

CLIENT = r"""
import json, socket, sys, time
port = int(sys.argv[1])
connection = socket.create_connection(("127.0.0.1", port))
for line in sys.stdin:
    body = line.strip().encode()
    head = ("POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)).encode()
    began, times, seen = time.perf_counter(), [], b""
    connection.sendall(head + body)
    while b"data: [DONE]" not in seen:
        data = connection.recv(65536)
        now = time.perf_counter() - began
        times += [now] * data.count(b'"delta":{"content"')
        seen = seen[-64:] + data
    while not seen.endswith(b"0\r\n\r\n"):
        seen = seen[-64:] + connection.recv(65536)
    print(json.dumps(times), flush=True)
"""


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=30, help="requests of each kind")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per answer")
    parser.add_argument(
        "--sparsity",
        type=float,
        default=0.5,
        help="fraction of neurons that the pruned requests remove",
    )
    args = parser.parse_args()
    model, tokenizer = common.load_model(args)
    settings = ServeSettings(model=args.model, sparsity=args.sparsity, port=0)
    with Engine(model, tokenizer) as engine:
        engine.prepare(settings.prune_config())
        service = Service(engine, tokenizer, ModelFacts.from_model(model, args.model), settings)
        service.worker.start(lambda: warm_up(engine, tokenizer, [settings.prune_config()]))
        rows = _measured(service, engine, args)
    for row in rows:
        print(_line(row))
    data = {
        "repeats": args.repeats,
        "tokens": args.tokens,
        "bars": {"first_ms": FIRST_MS, "share": SHARE},
        "rows": rows,
        "passed": all(row["passed"] for row in rows),
    }
    if args.out:
        print(common.save(args.out, model, data))
    print(json.dumps({"passed": data["passed"]}))


def _measured(service: Service, engine: Engine, args: Any) -> list[dict[str, Any]]:
    listening = bind("127.0.0.1", 0)
    server = Server(server_config(build(service), service.settings), service)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    client = _Client(listening)
    try:
        return [
            _row(name, dart, service, engine, client, args)
            for name, dart in (("dense", {"method": "dense"}), ("dart", {}))
        ]
    finally:
        client.close()
        server.should_exit = True
        thread.join(30)


class _Client:
    """The client process: sends request bodies, returns the times of their tokens."""

    def __init__(self, listening: socket.socket) -> None:
        port = str(listening.getsockname()[1])
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, port],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def times(self, body: dict[str, Any]) -> list[float]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(body) + "\n")
        self.process.stdin.flush()
        times: list[float] = json.loads(self.process.stdout.readline())
        return times

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(10)


def _library(service: Service, engine: Engine, body: dict[str, Any]) -> list[float]:
    """Seconds until each token with a text, including template and tokenizer."""
    times: list[float] = []
    began = time.perf_counter()

    def emit(record: Record) -> None:
        if isinstance(record, Token) and record.text:
            times.append(time.perf_counter() - began)

    (ask,) = service.reader.requests(ChatBody.model_validate(body), "", "")
    engine.run(ask, emit)
    return times


def _row(
    name: str, dart: dict[str, Any], service: Service, engine: Engine, client: _Client, args: Any
) -> dict[str, Any]:
    text = "Go on with this text: " + read_text(subjects()[0])[:PROMPT_CHARACTERS]
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": args.tokens,
        "stream": True,
        "dart": dart,
    }
    sides: dict[str, list[list[float]]] = {"library": [], "server": []}
    for repeat in range(args.repeats + 1):
        order = ("library", "server") if repeat % 2 else ("server", "library")
        for side in order:
            times = client.times(body) if side == "server" else _library(service, engine, body)
            if repeat:  # the first repetition is a warm-up
                sides[side].append(times)
    counts = {len(times) for runs in sides.values() for times in runs}
    if len(counts) != 1:
        raise SystemExit(f"library and server wrote different texts: {sorted(counts)} pieces")
    first = {side: [1e3 * t[0] for t in runs] for side, runs in sides.items()}
    token = {
        side: [1e3 * (t[-1] - t[0]) / (len(t) - 1) for t in runs] for side, runs in sides.items()
    }
    # compare consecutive measurements, so that changing load on the machine affects both
    pairs = zip(first["server"], first["library"], strict=True)
    later = statistics.median(server - library for server, library in pairs)
    pairs = zip(token["server"], token["library"], strict=True)
    share = statistics.median(server / library - 1 for server, library in pairs)
    return {
        "row": name,
        "pieces": counts.pop(),
        "first_ms": {side: statistics.median(times) for side, times in first.items()},
        "token_ms": {side: statistics.median(times) for side, times in token.items()},
        "all_first_ms": first,
        "all_token_ms": token,
        "later_ms": later,
        "share": share,
        "passed": later <= FIRST_MS and share < SHARE,
    }


def _line(row: dict[str, Any]) -> str:
    first, token = row["first_ms"], row["token_ms"]
    return (
        f"{row['row']:6} first token {first['library']:.2f} -> {first['server']:.2f} ms "
        f"(+{row['later_ms']:.2f}), further tokens {token['library']:.3f} -> "
        f"{token['server']:.3f} ms ({row['share']:+.2%})"
    )


if __name__ == "__main__":
    main()
