"""A server on a free port of this machine, and an engine without a model behind it."""

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx

from dart_llm.engine.requests import Done, Likely, PromptToken, Scores, Start, Timings, Token, Usage
from dart_llm.pruning.records import RunReport
from dart_llm.server.app import build
from dart_llm.server.run import Server, bind, server_config
from dart_llm.server.service import ModelFacts, Service
from dart_llm.server.settings import ServeSettings

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
FACTS = ModelFacts("fake-model", ("fake",), 4096, 256, {"name": "fake-model"})
POOL = ThreadPoolExecutor(12)
KEYS = ("a-long-secret-key", "another-secret-key")


def bearer(number):
    return {"Authorization": f"Bearer {KEYS[number]}"}


class ByteTokenizer:
    """Every byte is a token; a conversation is written as ``<role>text``."""

    chat_template = "there is one"

    def __call__(self, text, **options):
        return SimpleNamespace(input_ids=list(text.encode()))

    def decode(self, ids, **options):
        return bytes(ids).decode(errors="replace")

    def apply_chat_template(self, turns, **options):
        return "".join(f"<{one['role']}>{one['content']}" for one in turns) + "<assistant>"


def report(method, requested, tokens):
    share = requested or 0.0
    fields = {"method": method, "requested_sparsity": requested, "achieved_sparsity": share}
    fields |= {"sparsity_while_pruned": share, "dense_token_share": 0.0 if share else 1.0}
    fields |= {"prompt_tokens": 3, "decoded_tokens": tokens, "ffn_share_of_bytes": 0.5}
    fields |= {"remask_causes": {}, "layers": (), "sequences": (), "executor": "masked"}
    names = ("remasks", "extra_memory_bytes", "ffn_bytes_share", "ffn_bytes_share_if_compact")
    return RunReport(**fields, **dict.fromkeys(names, 0))


@dataclass
class FakeEngine:
    """Answers ``w0 w1 w2 ...``; choice i writes ``w`` i times more.  ``pause``: s per token.

    ``index``: of the token in progress; ``fault`` is raised at the token ``fault_at``.
    """

    pause: float = 0.0
    fault: Exception | None = None
    fault_at: int = 0
    asked: list = field(default_factory=list)
    cancelled_at: list = field(default_factory=list)
    ended = at_once = most_at_once = index = 0

    def run(self, ask, emit, cancelled=lambda: False):
        self.asked.append(ask)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self._run(ask, emit, cancelled)
        finally:
            self.at_once -= 1
            self.ended += 1

    def _run(self, ask, emit, cancelled):
        sampling, config = ask.sampling, ask.config
        method, share = ("dense", 0.0) if config is None else (config.method, config.target)
        prompt = tuple(PromptToken(one, chr(one)) for one in ask.ids)
        emit(Start(ask.id, "fake-model", method, share, {}, "masked", 1, (8,), prompt))
        if sampling.prompt_logprobs:  # -1 / its id for each token after the first
            top = tuple(Likely(i, f"t{i}", -0.001 - i) for i in range(sampling.logprobs))
            values = [-1 / token for token in ask.ids[1:]]
            emit(Scores((None, *values), ((), *[top] * len(values))))
        texts, finish = [""] * sampling.n, ["length"] * sampling.n
        for index in range(sampling.max_tokens):
            self.index = index
            if self.fault is not None and index == self.fault_at:
                raise self.fault
            if cancelled():
                self.cancelled_at.append(index)
                finish = ["cancelled"] * sampling.n
                break
            time.sleep(self.pause)
            for choice in range(sampling.n):
                piece = f"{'w' * (choice + 1)}{index} "
                if any(stop in texts[choice] + piece for stop in sampling.stop):
                    finish[choice] = "stop"
                if finish[choice] != "stop":
                    texts[choice] += piece
                    emit(self._token(ask, choice, index, piece))
        tokens = sum(len(text.split()) for text in texts)
        usage, timings = Usage(len(ask.ids), tokens, 0), Timings(len(ask.ids), 1.0, tokens, 2.0)
        made = report(method, share, tokens)
        emit(Done(ask.id, tuple(finish), tuple(texts), usage, timings, made))

    def _token(self, ask, choice, index, piece):
        phase = "prefill" if index == 0 else "dense" if ask.config is None else "pruned"
        scored = (None, None)
        if ask.sampling.logprobs is not None:
            likely = (Likely(i, f"t{i}", -1.0 - i) for i in range(ask.sampling.logprobs))
            scored = (-0.5, tuple(likely))
        return Token(choice, index, index, piece, piece, phase, *scored, self.pause)


@dataclass
class Running:
    url: str
    service: Service
    engine: Any
    server: Server

    def client(self, **options):
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, **options)

    def connect(self):
        return socket.create_connection(("127.0.0.1", int(self.url.rsplit(":", 1)[1])), timeout=20)

    def beside(self, url=CHAT_URL, headers=None, **body):
        """Post from a thread of its own; the response is the future's result."""

        def post():
            with self.client() as client:
                data = {**(CHAT if url == CHAT_URL else {}), **body}
                return client.post(url, json=data, headers=headers)

        return POOL.submit(post)

    def waiting(self, count):
        until(lambda: self.service.worker.waiting == count)


@contextlib.contextmanager
def running(engine=None, tokenizer=None, facts=FACTS, **settings):
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
def running_model(model, tokenizer, **settings):
    from dart_llm.engine.engine import Engine

    facts = ModelFacts.from_model(model, str(settings.get("model", "smollm2-135m")))
    with Engine(model, tokenizer) as engine, running(engine, tokenizer, facts, **settings) as found:
        yield found


@contextlib.contextmanager
def serving(*arguments):
    """``dart-llm serve ARGUMENTS`` as a process until the block ends, and what it ``said``."""
    command = [sys.executable, "-m", "dart_llm", "serve", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    made = SimpleNamespace(process=process, said="", url="")

    def read():
        for line in process.stderr:
            made.said += line

    def end(number):
        """A signal ends it within ten seconds."""
        process.send_signal(number)
        assert process.wait(10) == 0
        until(lambda: made.said.endswith("ended\n"))
        assert "Traceback" not in made.said

    made.end = end
    threading.Thread(target=read, daemon=True).start()
    try:
        until(lambda: "(Ctrl-C ends)" in made.said or process.poll() is not None, 300)
        found = re.search(r"serving \S+ at (http://127\.0\.0\.1:\d+)/", made.said)
        assert found, made.said
        made.url = found[1]
        yield made
    finally:
        process.kill()
        process.wait(20)


def until(holds, seconds=10.0):
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


def events(text):
    """The data of an event stream; [DONE] as None."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [None if one == "[DONE]" else json.loads(one) for one in data]


def request_bytes(body, url=CHAT_URL):
    data = json.dumps(body).encode()
    head = f"POST {url} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data


def read_until(connection, mark):
    """What arrives up to and with ``mark``."""
    found = b""
    while mark not in found:
        data = connection.recv(65536)
        assert data, found
        found += data
    return found
