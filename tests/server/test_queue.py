"""The queue, clients that go away, faults, limits in time, and the end."""

import socket

import pytest

import serve_cases
from serve_cases import CHAT, CHAT_URL, FakeEngine, bearer, events, request_bytes, running, until

BOTH = ",".join(serve_cases.KEYS)


def test_one_client_leaves_places_for_others():
    engine = FakeEngine(pause=0.05)
    with running(engine, max_waiting=4, api_key=BOTH) as server, server.client() as client:
        posts = [server.beside(headers=bearer(0), max_tokens=40)]
        until(lambda: bool(engine.asked))
        for number in range(3):
            posts.append(server.beside(headers=bearer(0)))
            server.waiting(number + 1)
        for stream in (False, True):
            body = {**CHAT, "stream": stream}
            refused = client.post(CHAT_URL, json=body, headers=bearer(0))
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        posts.append(server.beside(headers=bearer(1)))
        engine.pause = 0.0
        assert [post.result(20).status_code for post in posts] == [200] * 5


@pytest.mark.parametrize(
    ("way", "stream"), [("close", True), ("close", False), ("reset", True), ("half", False)]
)
def test_a_client_that_goes_away_frees_the_model(way, stream):
    engine = FakeEngine(pause=0.2)
    with running(engine) as server:
        connection = server.connect()
        connection.sendall(request_bytes({**CHAT, "max_tokens": 1000, "stream": stream}))
        until(lambda: bool(engine.asked))
        if stream:
            serve_cases.read_until(connection, b"w1 ")
        if way == "reset":
            option = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # linger 0: RST in place of FIN
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        if way == "half":
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
        left = engine.index
        until(lambda: engine.ended > 0)
        # the token in progress, and a busy machine's one
        assert engine.cancelled_at[0] <= left + 2
        with server.client() as client:
            assert client.post(CHAT_URL, json=CHAT).status_code == 200


def test_requests_run_one_at_a_time_in_their_order():
    """Who leaves while waiting never runs; others come between the prompts of one request."""
    engine = FakeEngine(pause=0.5)  # until all wait
    with running(engine) as server:
        posts = [server.beside(serve_cases.TEXT_URL, prompt=["a", "b"], max_tokens=40)]
        until(lambda: bool(engine.asked))
        with server.connect() as connection:
            connection.sendall(request_bytes(CHAT))
            server.waiting(1)
        server.waiting(0)
        for number in range(3):
            posts.append(server.beside(seed=number))
            server.waiting(number + 1)
        engine.pause = 0.0
        assert [post.result(20).status_code for post in posts] == [200] * 4
    assert engine.most_at_once == 1
    assert [ask.sampling.seed for ask in engine.asked[1:]] == [0, 1, 2, None]


def test_a_request_that_takes_too_long_is_given_up():
    """A stream says so at its end; who does not read holds nobody."""
    engine = FakeEngine(pause=0.05)
    with running(engine, request_timeout=1) as server, server.client() as client:
        whole = client.post(CHAT_URL, json={**CHAT, "max_tokens": 1000})
        until(lambda: engine.ended == 1, 2)
        stream = client.post(CHAT_URL, json={**CHAT, "max_tokens": 1000, "stream": True})
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "timeout")
    records = events(stream.text)
    assert stream.status_code == 200 and len(records) > 2
    assert records[-1]["error"]["code"] == "timeout"
    engine = FakeEngine()
    with running(engine, max_tokens=4000) as server, server.connect() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(request_bytes({**CHAT, "max_tokens": 4000, "stream": True}))
        until(lambda: engine.ended > 0)


@pytest.mark.contract("no text in logs unless asked")
def test_a_fault_is_told_without_its_insides(caplog):
    engine = FakeEngine(fault=ValueError("secret prompt"), fault_at=0)
    with running(engine) as server, server.client() as client:
        whole = client.post(CHAT_URL, json=CHAT)
        engine.fault_at = 2
        late = client.post(CHAT_URL, json={**CHAT, "stream": True})
        records = client.post("/api/events", json=CHAT)
        engine.fault = None
        assert client.post(CHAT_URL, json=CHAT).status_code == 200
    assert [response.status_code for response in (whole, late, records)] == [500, 200, 200]
    errors = [whole.json(), events(late.text)[-1]]
    assert {error["error"]["code"] for error in errors} == {"internal_error"}
    assert whole.headers["x-request-id"] in errors[0]["error"]["message"]
    assert events(records.text)[-1]["kind"] == "error"
    assert "secret" not in whole.text + late.text + records.text
    assert whole.headers["x-request-id"] in caplog.text and "ValueError" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.contract("no text in logs unless asked")
def test_prompts_are_logged_only_when_asked(caplog):
    body = {"messages": [{"role": "user", "content": "my secret"}], "max_tokens": 1}
    caplog.set_level("INFO", "dart_llm.serve")
    with running(verbose=True) as server, server.client() as client:
        client.post(CHAT_URL, json=body)
        client.post(CHAT_URL, json={**body, "my secret": 1})
        client.get("/my secret")
    assert f"POST {CHAT_URL} 200" in caplog.text and "secret" not in caplog.text
    with running(log_prompts=True) as server, server.client() as client:
        client.post(CHAT_URL, json=body)
    assert "my secret" in caplog.text


@pytest.mark.parametrize(("grace", "last"), [(5, None), (0.2, "shutting_down")])
def test_the_end_lets_an_answer_finish_in_time_and_sends_the_others_away(grace, last):
    engine = FakeEngine(pause=0.02)
    with running(engine, grace=grace, max_tokens=4000) as server:
        first = server.beside(max_tokens=4000 if last else 20, stream=True)
        until(lambda: bool(engine.asked))
        second = server.beside()
        server.waiting(1)
        server.server.should_exit = True
        answer, refused = first.result(10), second.result(10)
    end = events(answer.text)[-1]
    assert answer.status_code == 200  # it had begun
    assert (end and end["error"]["code"]) == last and bool(engine.cancelled_at) == bool(last)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert int(refused.headers["retry-after"]) > 0
