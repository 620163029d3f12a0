"""Many clients and one model: fair turns, clients that go away, limits, and the end."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest

from serve_cases import (
    CHAT,
    FakeEngine,
    Running,
    events,
    read_until,
    request_bytes,
    running,
    until,
)

URL = "/v1/chat/completions"


def post_beside(server: Running, results: list[Any], **body: Any) -> threading.Thread:
    """Post from a thread of its own; the response is added to ``results``."""

    def post() -> None:
        with server.client() as client:
            results.append(client.post(URL, json={**CHAT, **body}))

    thread = threading.Thread(target=post, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("way", "stream"), [("close", True), ("close", False), ("reset", True), ("half", False)]
)
def test_a_client_that_goes_away_frees_the_model(way: str, stream: bool) -> None:
    engine = FakeEngine(pause=0.2)
    with running(engine) as server:
        connection = server.connect()
        connection.sendall(request_bytes({**CHAT, "max_tokens": 1000, "stream": stream}))
        until(lambda: bool(engine.asked))
        if stream:
            read_until(connection, b"w1 ")
        if way == "reset":
            option = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # linger 0: RST in place of FIN
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        if way == "half":
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
        left = engine.index
        until(lambda: bool(engine.ended))
        assert engine.cancelled_at[0] <= left + 2  # the token in progress, and a busy machine's one
        with server.client() as client:
            assert client.post(URL, json=CHAT).status_code == 200


def test_who_leaves_while_waiting_never_runs() -> None:
    engine = FakeEngine(pause=0.05)
    with running(engine) as server:
        first: list[Any] = []
        thread = post_beside(server, first, max_tokens=10)
        until(lambda: bool(engine.asked))
        waiting = server.connect()
        waiting.sendall(request_bytes(CHAT))
        until(lambda: server.service.worker.waiting == 1)
        waiting.close()
        until(lambda: server.service.worker.waiting == 0)
        thread.join(10)
        assert first[0].status_code == 200
    assert len(engine.asked) == 1


def test_requests_run_one_at_a_time_and_users_in_turn() -> None:
    engine = FakeEngine(pause=0.5)  # until all wait
    with running(engine) as server:
        results: list[Any] = []
        threads = [post_beside(server, results, max_tokens=40)]
        until(lambda: bool(engine.asked))
        for number, user in enumerate(["greedy"] * 4 + ["other"] * 2):
            threads.append(post_beside(server, results, user=user, seed=number))
            until(lambda expected=number + 1: server.service.worker.waiting == expected)
        engine.pause = 0.0
        for thread in threads:
            thread.join(20)
    assert [response.status_code for response in results] == [200] * 7
    assert engine.most_at_once == 1
    assert [ask.sampling.seed for ask in engine.asked[1:]] == [0, 4, 1, 5, 2, 3]


def test_too_many_waiting_are_sent_away() -> None:
    engine = FakeEngine(pause=0.05)
    with running(engine, max_waiting=2) as server:
        results: list[Any] = []
        threads = [post_beside(server, results, max_tokens=20)]
        until(lambda: bool(engine.asked))
        threads.append(post_beside(server, results))
        until(lambda: server.service.worker.waiting == 1)
        with server.client() as client:
            response = client.post(URL, json=CHAT)
            stream = client.post(URL, json={**CHAT, "stream": True})
        for thread in threads:
            thread.join(20)
    for sent_away in (response, stream):
        assert sent_away.status_code == 429
        assert 1 <= int(sent_away.headers["retry-after"]) <= 60
        assert sent_away.json()["error"]["code"] == "rate_limit_exceeded"
    assert [one.status_code for one in results] == [200, 200]


def test_a_request_that_takes_too_long_is_given_up() -> None:
    engine = FakeEngine(pause=0.05)
    with running(engine, request_timeout=1) as server, server.client() as client:
        response = client.post(URL, json={**CHAT, "max_tokens": 1000})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "timeout"
        until(lambda: bool(engine.ended), 2)


def test_a_stream_that_takes_too_long_says_so_at_its_end() -> None:
    engine = FakeEngine(pause=0.05)
    with running(engine, request_timeout=1) as server, server.client() as client:
        response = client.post(URL, json={**CHAT, "max_tokens": 1000, "stream": True})
        events = [line for line in response.text.split("\n\n") if line]
    assert response.status_code == 200 and len(events) > 2
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_client_that_does_not_read_does_not_hold_the_model() -> None:
    engine = FakeEngine()
    with running(engine, max_tokens=100_000, request_timeout=20) as server:
        lazy = server.connect()
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(
            request_bytes({"messages": CHAT["messages"], "max_tokens": 4000, "stream": True})
        )
        until(lambda: bool(engine.ended))
        with server.client() as client:
            assert client.post(URL, json=CHAT).status_code == 200
        lazy.close()


def test_watchers_see_no_text() -> None:
    engine = FakeEngine(pause=0.01)
    with running(engine) as server, server.client() as client:
        seen: list[bytes] = []

        def watch() -> None:
            with server.client() as watcher, watcher.stream("GET", "/api/events") as response:
                seen.extend(response.iter_raw())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        until(lambda: len(server.service.live) == 1)
        body = {"messages": [{"role": "user", "content": "my secret"}], "max_tokens": 3}
        answered = client.post(URL, json={**body, "logprobs": True, "top_logprobs": 2})
        until(lambda: b'"done"' in b"".join(seen))
        server.server.should_exit = True  # a watcher does not keep the server from its end
        thread.join(10)
        assert not thread.is_alive()
    found = events(b"".join(seen).decode())
    assert [record["kind"] for record in found] == ["hello", "start", *["token"] * 3, "done"]
    own = {record["request"] for record in found[1:]}
    assert own == {answered.headers["x-request-id"]}
    text = json.dumps(found)
    assert "secret" not in text and "w0" not in text and '"t0"' not in text
    assert not {"id", "text", "piece", "top"} & set(found[2])
    assert "texts" not in found[-1]


def test_a_watcher_that_sends_a_large_body_is_let_go() -> None:
    with running(max_body_kib=1) as server:
        connection = server.connect()
        connection.sendall(
            b"GET /api/events HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        read_until(connection, b"hello")
        assert len(server.service.live) == 1
        connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        until(lambda: len(server.service.live) == 0)
        connection.close()


def test_the_end_lets_an_answer_finish_and_sends_the_others_away() -> None:
    engine = FakeEngine(pause=0.02)
    results: list[Any] = []
    with running(engine, grace=5) as server:
        threads = [post_beside(server, results, max_tokens=20, user="running")]
        until(lambda: bool(engine.asked))
        threads.append(post_beside(server, results, user="waiting"))
        until(lambda: server.service.worker.waiting == 1)
        server.server.should_exit = True
        for thread in threads:
            thread.join(10)
    by_status = {response.status_code: response for response in results}
    assert set(by_status) == {200, 503}
    assert by_status[200].json()["choices"][0]["finish_reason"] == "length"
    assert by_status[503].json()["error"]["code"] == "shutting_down"
    assert int(by_status[503].headers["retry-after"]) > 0


def test_the_end_cancels_an_answer_that_is_too_long() -> None:
    engine = FakeEngine(pause=0.02)
    results: list[Any] = []
    with running(engine, grace=0.2, max_tokens=10_000) as server:
        thread = post_beside(server, results, max_tokens=4000, stream=True)
        until(lambda: bool(engine.asked))
        began = time.monotonic()
        server.server.should_exit = True
        thread.join(10)
        assert time.monotonic() - began < 5
    assert results[0].status_code == 200  # it had begun
    assert events(results[0].text)[-1]["error"]["code"] == "shutting_down"
    assert engine.cancelled_at
