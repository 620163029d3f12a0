"""A server on a free port of this machine, and an engine without a model behind it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from dart_llm.engine.events import (
    Done,
    Likely,
    PromptToken,
    Record,
    Scores,
    Start,
    Timings,
    Token,
    Usage,
)
from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import GenerationResult as Answer
from dart_llm.pruning.records import RunReport
from dart_llm.server.app import build
from dart_llm.server.run import Server, bind, server_config
from dart_llm.server.service import ModelFacts, Service
from dart_llm.server.settings import ServeSettings

VOCAB = 256
CHAT_URL = "/v1/chat/completions"
FACTS = ModelFacts("fake-model", ("fake",), 4096, VOCAB, {"name": "fake-model"})


class Encoded:
    def __init__(self, ids: list[int]) -> None:
        self.input_ids = ids


class ByteTokenizer:
    """Every byte is a token; a conversation is written as ``<role>text``."""

    chat_template = "there is one"

    def __call__(self, text: str, **options: Any) -> Encoded:
        return Encoded(list(text.encode()))

    def decode(self, ids: list[int], **options: Any) -> str:
        return bytes(ids).decode(errors="replace")

    def apply_chat_template(self, turns: list[dict[str, str]], **options: Any) -> str:
        return "".join(f"<{one['role']}>{one['content']}" for one in turns) + "<assistant>"


def report(method: str, asked: float | None, tokens: int) -> RunReport:
    share = asked or 0.0
    return RunReport(
        method=method,
        requested_sparsity=asked,
        achieved_sparsity=share,
        sparsity_while_pruned=share,
        dense_token_share=0.0 if share else 1.0,
        prompt_tokens=3,
        decoded_tokens=tokens,
        remasks=0,
        remask_causes={},
        layers=(),
        executor="masked",
        ffn_flops_share=1 - share,
        ffn_bytes_share=1 - share,
        ffn_flops_share_if_compact=1 - share,
        ffn_bytes_share_if_compact=1 - share,
        ffn_share_of_bytes=0.5,
        extra_memory_bytes=0,
        sequences=(),
    )


@dataclass
class FakeEngine:
    """Answers ``w0 w1 w2 ...``; choice i writes ``w`` i times more.  ``pause``: s per token."""

    pause: float = 0.0
    fault: Exception | None = None
    fault_at: int = 0
    asked: list[Ask] = field(default_factory=list)
    cancelled_at: list[int] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    most_at_once: int = 0
    index: int = 0
    """Of the token in progress."""
    _inside: int = 0

    def run(
        self,
        ask: Ask,
        emit: Callable[[Record], None],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Answer:
        self.asked.append(ask)
        self._inside += 1
        self.most_at_once = max(self.most_at_once, self._inside)
        try:
            return self._run(ask, emit, cancelled)
        finally:
            self._inside -= 1
            self.ended.append(time.perf_counter())

    def _run(
        self, ask: Ask, emit: Callable[[Record], None], cancelled: Callable[[], bool]
    ) -> Answer:
        sampling, config = ask.sampling, ask.config
        method = "dense" if config is None else config.method
        share = 0.0 if config is None else config.target
        prompt = tuple(PromptToken(one, chr(one)) for one in ask.ids)
        emit(Start(ask.id, "fake-model", method, share, {}, "masked", 1, (8,), prompt))
        if sampling.prompt_logprobs:
            emit(self._scores(ask))
        texts, finish = [""] * sampling.n, ["length"] * sampling.n
        for index in range(sampling.max_tokens):
            self.index = index
            if self.fault is not None and index == self.fault_at:
                raise self.fault
            if cancelled():
                self.cancelled_at.append(index)
                finish = ["cancelled"] * sampling.n
                break
            if self.pause:
                time.sleep(self.pause)
            for choice in range(sampling.n):
                piece = f"{'w' * (choice + 1)}{index} "
                if finish[choice] == "stop":
                    continue
                if any(stop in texts[choice] + piece for stop in sampling.stop):
                    finish[choice] = "stop"
                    continue
                texts[choice] += piece
                emit(self._token(ask, choice, index, piece))
            if all(reason == "stop" for reason in finish):
                break
        tokens = sum(len(text.split()) for text in texts)
        usage = Usage(len(ask.ids), tokens, 0)
        timings = Timings(len(ask.ids), 1.0, tokens, 2.0)
        accounting = report(method, share, tokens)
        emit(Done(ask.id, tuple(finish), tuple(texts), usage, timings, accounting))
        return Answer(ask.id, tuple(texts), (), tuple(finish), usage, timings, accounting)

    def _scores(self, ask: Ask) -> Scores:
        """Every token after the first has -1 / its id, beside the likeliest, ``t0`` with -0.001."""
        top = tuple(Likely(i, f"t{i}", -0.001 - i) for i in range(ask.sampling.logprobs or 0))
        later = ask.ids[1:]
        return Scores((None, *(-1 / one for one in later)), ((), *(top for _ in later)))

    def _token(self, ask: Ask, choice: int, index: int, piece: str) -> Token:
        top = None
        if ask.sampling.logprobs is not None:
            top = tuple(Likely(i, f"t{i}", -1.0 - i) for i in range(ask.sampling.logprobs))
        phase = "prefill" if index == 0 else "dense" if ask.config is None else "pruned"
        scored = None if ask.sampling.logprobs is None else -0.5
        return Token(choice, index, index, piece, piece, phase, scored, top, self.pause)


@dataclass
class Running:
    """A server in this process."""

    url: str
    service: Service
    engine: Any
    server: Server

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@contextlib.contextmanager
def running(
    engine: Any = None,
    tokenizer: Any = None,
    facts: ModelFacts = FACTS,
    **settings: Any,
) -> Iterator[Running]:
    """Serve ``engine`` (default: a fake one) until the block ends, at most 20 s longer."""
    engine = engine or FakeEngine()
    merged = ServeSettings.model_validate({"port": 0, "method": "griffin", "grace": 1, **settings})
    service = Service(engine, tokenizer or ByteTokenizer(), facts, merged)
    listening = bind("127.0.0.1", 0)
    server = Server(server_config(build(service), merged), service)
    service.worker.start()
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield Running(url, service, engine, server)
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
        assert not thread.is_alive(), "the server did not end"


@contextlib.contextmanager
def running_model(model: Any, tokenizer: Any, **settings: Any) -> Iterator[Running]:
    """Serve a model, by a real engine, until the block ends."""
    from dart_llm.engine.engine import Engine

    facts = ModelFacts.of(model, str(settings.get("model", "smollm2-135m")))
    with Engine(model, tokenizer) as engine, running(engine, tokenizer, facts, **settings) as found:
        yield found


def benchmark(name: str) -> Any:
    """A module of benchmarks/, for what it and the tests share."""
    if name not in sys.modules:
        path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something holds; fails after ``seconds``.

    Time in which this process was stopped does not count: what it waits for was stopped too.
    """
    waited, last = 0.0, time.monotonic()
    while not holds():
        assert waited < seconds, "it never came true"
        time.sleep(0.002)
        now = time.monotonic()
        waited += min(0.1, now - last)
        last = now


def events(text: str) -> list[Any]:
    """The data of an event stream; [DONE] as None."""
    found = []
    for line in text.split("\n\n"):
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            found.append(None if data == "[DONE]" else json.loads(data))
    return found


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


class Watched(ByteTokenizer):
    """Counts the texts in work; none is done before ``free`` is set.  A token: ``width`` bytes."""

    def __init__(self, width: int = 1, held: bool = False) -> None:
        self.width = width
        self.free = threading.Event()
        self.lengths: list[int] = []
        self.inside = self.most = 0
        if not held:
            self.free.set()

    def __call__(self, text: str, **options: Any) -> Encoded:
        self.lengths.append(len(text))
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.free.wait(20)
        self.inside -= 1
        return Encoded(list(text.encode())[:: self.width])


def request_bytes(body: dict[str, Any], url: str = CHAT_URL) -> bytes:
    """A POST as it goes over the wire."""
    data = json.dumps(body).encode()
    head = f"POST {url} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    """What arrives up to and with ``mark``."""
    found = b""
    while mark not in found:
        data = connection.recv(65536)
        assert data, found
        found += data
    return found
