"""How connections and addresses are handled: half-closed ones, HEAD, heads, hosts, methods."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

from dart_llm.server.run import bind, link
from dart_llm.server.security import host_name
from dart_llm.server.settings import ServeSettings
from serve_cases import CHAT, FakeEngine, Running, request_bytes, running, until

URL = "/v1/chat/completions"
END = b"\r\n0\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


def rest(connection: socket.socket) -> bytes:
    found = b""
    while data := connection.recv(65536):
        found += data
    return found


@pytest.mark.parametrize("stream", [True, False])
def test_who_ended_the_own_side_gets_the_answer(stream: bool) -> None:
    engine = FakeEngine(pause=0.1)
    with running(engine) as server, server.connect() as connection:
        connection.sendall(request_bytes({**CHAT, "stream": stream}))
        connection.shutdown(socket.SHUT_WR)
        found = rest(connection)
        assert server.service.worker.alive
    while found.startswith(b"HTTP/1.1 100 "):
        found = found.partition(b"\r\n\r\n")[2]
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert engine.cancelled_at == []
    if stream:
        assert b"[DONE]" in body and body.endswith(END)
    else:
        assert json.loads(body)["choices"][0]["message"]["content"] == "w0 w1 w2 w3 "


def test_who_ended_the_own_side_and_leaves_later_frees_the_model() -> None:
    engine = FakeEngine(pause=0.1)
    with running(engine) as server:
        connection = server.connect()
        connection.sendall(request_bytes({**CHAT, "max_tokens": 1000}))
        connection.shutdown(socket.SHUT_WR)
        until(lambda: engine.index >= 3)
        connection.close()
        left = engine.index
        until(lambda: bool(engine.ended))
    assert engine.cancelled_at[0] <= left + 5


def test_half_a_body_and_an_end_is_no_request(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(request_bytes(CHAT)[:-3])
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection) == b""


@pytest.mark.parametrize("path", ["/", "/healthz", "/v1/models", "/static/main.js", "/nix"])
def test_head_is_get_without_the_body(server: Running, path: str) -> None:
    with server.client() as client:
        got, head = client.get(path), client.head(path)
        assert client.get(path).status_code == got.status_code  # the connection goes on
    assert head.status_code == got.status_code
    assert head.content == b"" and got.content
    names = ("content-type", "content-length", "content-security-policy")
    assert {n: head.headers[n] for n in names} == {n: got.headers[n] for n in names}


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", URL, "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("PUT", "/api/events", "GET, POST"),
        ("HEAD", "/api/events", "GET, POST"),
        ("POST", "/v1/models/x", "GET"),
    ],
)
def test_another_method_is_told_the_right_ones(
    server: Running, method: str, path: str, allow: str
) -> None:
    with server.client() as client:
        response = client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allow)
    if method != "HEAD":
        assert response.json()["error"]["message"].endswith("alone")


@pytest.mark.parametrize(("size", "status"), [(60_000, b"200"), (66_000, b"400")])
@pytest.mark.parametrize("whole", [True, False])
def test_a_head_has_at_most_64_kib(server: Running, size: int, status: bytes, whole: bool) -> None:
    """Also one that came at once."""
    with server.connect() as connection:
        line = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
        data = line + b"X: " + b"x" * size + b"\r\n\r\n"
        if not whole:
            connection.sendall(data[:30_000])
            time.sleep(0.05)
            data = data[30_000:]
        connection.sendall(data)
        assert connection.recv(100).split(b" ")[1] == status


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:80", "localhost"),
        ("localhost.", "localhost"),
        ("localhost.:8000", "localhost"),
        ("127.0.0.1:8111", "127.0.0.1"),
        ("[::1]:8111", "[::1]"),
        ("my_host.example-1", "my_host.example-1"),
        ("127.0.0.1:8111@evil.com", ""),
        ("evil.com@127.0.0.1", ""),
        ("[::1]evil.com", ""),
        ("localhost:80:evil", ""),
        ("localhost:", ""),
        ("localhost..", "localhost."),
        ("localhost/x", ""),
        ("localhost evil", ""),
        ("[::1", ""),
        ("", ""),
    ],
)
def test_a_host_is_read_exactly(value: str, name: str) -> None:
    assert host_name(value) == name


def test_an_address_of_openai_that_is_not_here_names_the_one_that_is(server: Running) -> None:
    with server.client() as client:
        for method in ("POST", "GET"):
            response = client.request(method, "/v1/responses", json={"input": "hi"})
            assert response.status_code == 404
            error = response.json()["error"]
            assert (error["code"], error["type"]) == ("not_found", "not_found_error")
            assert "use /v1/chat/completions" in error["message"]


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "[::1]"),
        ("localhost", "localhost"),
    ],
)
def test_the_link_can_be_opened(host: str, shown: str) -> None:
    listening = bind("127.0.0.1", 0)
    try:
        port = listening.getsockname()[1]
        settings = ServeSettings(host=host, api_key="a-long-secret-key")
        assert link(settings, listening) == f"http://{shown}:{port}/"
    finally:
        listening.close()


def test_counters_keep_every_digit(server: Running) -> None:
    counted = server.service.metrics
    with server.client() as client:
        for more, total in (
            (1_234_567, 1_234_567.0),
            (4, 1_234_571.0),
            (2**40, 2.0**40 + 1_234_571),
        ):
            counted.prompt_tokens.inc(more)
            text = client.get("/metrics").text
            (line,) = [
                x for x in text.splitlines() if x.startswith("dart_llm_prompt_tokens_total ")
            ]
            assert float(line.split()[1]) == total
