"""Whose turn it is, clients that go away, watchers, faults, limits in time, and the end."""

import contextlib
import json
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.engine.host import ConversationCache
from dart_llm.server.service import WATCHERS
from dart_llm.server.worker import FairQueue, Full
from serve_cases import (
    CHAT,
    CHAT_URL,
    KEYS,
    TEXT_URL,
    FakeEngine,
    bearer,
    events,
    read_until,
    request_bytes,
    running,
    until,
)

BOTH = ",".join(KEYS)


def test_clients_and_their_users_take_turns():
    queue = FairQueue(100)
    for item in ("g0", "g1", "g2"):
        queue.put("greedy", "", item)
    for user in "ab":
        for i in range(2):
            queue.put("key 1", user, f"{user}{i}")
    queue.put("late", "", "x")
    assert len(queue) == 8
    assert queue.remove("g1") and not queue.remove("g1")  # who left is not served
    assert queue.clear() == ["g0", "a0", "x", "g2", "b0", "a1", "b1"]
    assert queue.take() is None


def test_one_client_leaves_places_for_others():
    queue = FairQueue(4)
    for i in range(3):
        queue.put("greedy", str(i), str(i))
    with pytest.raises(Full) as caught:
        queue.put("greedy", "another", "3")
    assert (caught.value.waiting, caught.value.own) == (3, True)
    queue.put("other", "", "o")
    with pytest.raises(Full) as caught:
        queue.put("third", "", "t")
    assert (caught.value.waiting, caught.value.own) == (4, False)
    one = FairQueue(1)
    one.put("anybody", "", "a")
    with pytest.raises(Full):
        one.put("two", "", "b")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=40))
def test_nobody_waits_longer_than_a_round(arrivals):
    """Between two turns of one client, no other client has two."""
    queue = FairQueue(1000)
    for number, (client, user) in enumerate(arrivals):
        queue.put(str(client), str(user), (client, user, number))
    served = queue.clear()
    assert sorted(number for _, _, number in served) == list(range(len(arrivals)))
    for client in range(4):
        own = [i for i, one in enumerate(served) if one[0] == client]
        for first, second in zip(own, own[1:], strict=False):
            between = [one[0] for one in served[first + 1 : second]]
            assert len(between) == len(set(between))
        numbers = {}
        for one in (served[i] for i in own):
            assert numbers.get(one[1], -1) < one[2]  # a user's requests keep their order
            numbers[one[1]] = one[2]


def test_who_has_most_conversations_loses_one():
    kept, names = ConversationCache(4), "abcdef"
    for name in names:
        kept.put(name, name, "greedy" if name < "f" else "other")
    assert [kept.take(name) for name in names] == [None, None, "c", "d", "e", "f"]
    for name in names:
        kept.put(name, name, name)
    assert [kept.take(name) for name in names] == [None, None, *"cdef"]


@pytest.mark.parametrize(
    ("way", "stream"),
    [("close", True), ("close", False), ("reset", True), ("half", False), ("later", False)],
)
def test_a_client_that_goes_away_frees_the_model(way, stream):
    engine = FakeEngine(pause=0.2)
    with running(engine) as server:
        connection = server.connect()
        connection.sendall(request_bytes({**CHAT, "max_tokens": 1000, "stream": stream}))
        if way == "later":  # its own side first
            connection.shutdown(socket.SHUT_WR)
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
        until(lambda: engine.ended > 0)
        # the token in progress, and a busy machine's one
        assert engine.cancelled_at[0] <= left + (3 if way == "later" else 2)
        with server.client() as client:
            assert client.post(CHAT_URL, json=CHAT).status_code == 200


def test_who_leaves_while_waiting_never_runs():
    engine = FakeEngine(pause=0.05)
    with running(engine) as server:
        first = server.beside(max_tokens=10)
        until(lambda: bool(engine.asked))
        with server.connect() as connection:
            connection.sendall(request_bytes(CHAT))
            server.waiting(1)
        server.waiting(0)
        assert first.result(10).status_code == 200 and len(engine.asked) == 1


def test_who_goes_away_leaves_with_all_prompts_of_a_list():
    engine = FakeEngine(pause=0.05)
    body = {"prompt": [[1], [2], [3]], "max_tokens": 50, "stream": True}
    with running(engine) as server:
        with server.connect() as connection:
            connection.sendall(request_bytes(body, TEXT_URL))
            read_until(connection, b"w1 ")
        until(lambda: engine.ended > 0)
        with server.client() as client:
            assert client.post(TEXT_URL, json={"prompt": [9], "max_tokens": 1}).status_code == 200
        assert server.service.worker.waiting == 0
    assert [ask.ids for ask in engine.asked] == [(1,), (9,)]


def test_requests_run_one_at_a_time_and_users_in_turn():
    engine = FakeEngine(pause=0.5)  # until all wait
    with running(engine) as server:
        posts = [server.beside(max_tokens=40)]
        until(lambda: bool(engine.asked))
        for number, user in enumerate(["greedy"] * 4 + ["other"] * 2):
            posts.append(server.beside(user=user, seed=number))
            server.waiting(number + 1)
        body = {"prompt": [[1], [2]], "max_tokens": 1, "user": "list", "seed": 6}
        posts.append(server.beside(TEXT_URL, **body))
        server.waiting(7)
        engine.pause = 0.0
        assert [post.result(20).status_code for post in posts] == [200] * 8
    assert engine.most_at_once == 1
    # between two prompts of a list others have their turn
    assert [ask.sampling.seed for ask in engine.asked[1:]] == [0, 4, 6, 1, 5, 6, 2, 3]


def test_too_many_waiting_are_sent_away():
    engine = FakeEngine(pause=0.05)
    with running(engine, max_waiting=2) as server:
        first = server.beside(max_tokens=20)
        until(lambda: bool(engine.asked))
        second = server.beside()
        server.waiting(1)
        for stream in (False, True):
            sent_away = server.beside(stream=stream).result(20)
            assert sent_away.status_code == 429
            assert 1 <= int(sent_away.headers["retry-after"]) <= 60
            assert sent_away.json()["error"]["code"] == "rate_limit_exceeded"
        assert first.result(20).status_code == second.result(20).status_code == 200


def test_a_request_that_takes_too_long_is_given_up():
    """A stream says so at its end; who does not read holds nobody."""
    engine = FakeEngine(pause=0.05)
    with running(engine, request_timeout=1) as server, server.client() as client:
        whole = client.post(CHAT_URL, json={**CHAT, "max_tokens": 1000})
        until(lambda: engine.ended == 1, 2)
        stream = client.post(CHAT_URL, json={**CHAT, "max_tokens": 1000, "stream": True})
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "timeout")
    found = events(stream.text)
    assert stream.status_code == 200 and len(found) > 2
    assert found[-1]["error"]["code"] == "timeout"
    engine = FakeEngine()
    with (
        running(engine, max_tokens=100_000, request_timeout=20) as server,
        server.connect() as lazy,
        server.client() as client,
    ):
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(request_bytes({**CHAT, "max_tokens": 4000, "stream": True}))
        until(lambda: engine.ended > 0)
        assert client.post(CHAT_URL, json=CHAT).status_code == 200


@pytest.mark.contract("no text in logs unless asked")
def test_a_fault_is_told_without_its_insides(caplog):
    engine = FakeEngine(fault=ValueError("secret prompt"), fault_at=0)
    with running(engine) as server, server.client() as client:
        whole = client.post(CHAT_URL, json=CHAT)
        many = client.post(TEXT_URL, json={"prompt": [[1], [2]], "max_tokens": 5})
        engine.fault_at = 2
        late = client.post(CHAT_URL, json={**CHAT, "stream": True})
        records = client.post("/api/events", json=CHAT)
        engine.fault = None
        assert client.post(CHAT_URL, json=CHAT).status_code == 200
    assert [one.status_code for one in (whole, many, late, records)] == [500, 500, 200, 200]
    errors = [whole.json(), many.json(), events(late.text)[-1]]
    assert {error["error"]["code"] for error in errors} == {"internal_error"}
    assert whole.headers["x-request-id"] in errors[0]["error"]["message"]
    assert events(records.text)[-1]["kind"] == "error"
    assert engine.asked[1].ids == (1,) and len(engine.asked) == 5  # a fault ends a list
    assert "secret" not in whole.text + many.text + late.text + records.text
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


def watching(server, seen, headers=None):
    def watch():
        url = "/api/events"
        with server.client() as client, client.stream("GET", url, headers=headers) as response:
            seen.extend(response.iter_raw())

    before = len(server.service.live)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    until(lambda: len(server.service.live) == before + 1)
    return thread


def test_watchers_see_no_text_and_with_keys_their_own_requests_alone():
    seen = [[], []]
    asked = {"messages": [{"role": "user", "content": "my secret"}], "max_tokens": 3}
    body = {**asked, "logprobs": True, "top_logprobs": 2}
    with running(FakeEngine(), api_key=BOTH) as server, server.client() as client:
        threads = [watching(server, seen[number], bearer(number)) for number in range(2)]
        answers = [client.post(CHAT_URL, json=body, headers=bearer(n)) for n in (0, 1, 0)]
        until(lambda: all(b'"done"' in b"".join(one) for one in seen))
        server.server.should_exit = True  # a watcher does not keep the server from its end
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
    ids = [answer.headers["x-request-id"] for answer in answers]
    found = [events(b"".join(one).decode()) for one in seen]
    assert {one.get("request") for one in found[0]} == {None, ids[0], ids[2]}
    assert {one.get("request") for one in found[1]} == {None, ids[1]}
    assert [one["kind"] for one in found[1]] == ["hello", "start", *["token"] * 3, "done"]
    text = json.dumps(found)
    assert "secret" not in text and "w0" not in text and '"t0"' not in text
    assert not {"id", "text", "piece", "top", "texts"} & {*found[1][2], *found[1][-1]}


def test_one_client_leaves_places_to_watch():
    own = WATCHERS * 3 // 4
    with (
        running(api_key=BOTH) as server,
        server.client() as client,
        contextlib.ExitStack() as stack,
    ):
        for count, number in enumerate([0] * own + [1], 1):
            head = "GET /api/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\r\n"
            connection = stack.enter_context(server.connect())
            connection.sendall(head.format(KEYS[number]).encode())
            until(lambda expected=count: len(server.service.live) == expected)
        refused = client.get("/api/events", headers=bearer(0))
    assert refused.status_code == 429
    assert "too many of yours watch already" in refused.json()["error"]["message"]


def test_a_watcher_that_sends_a_large_body_is_let_go():
    with running(max_body_kib=1) as server, server.connect() as connection:
        head = b"GET /api/events HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head)
        read_until(connection, b"hello")
        assert len(server.service.live) == 1
        connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        until(lambda: len(server.service.live) == 0)


def test_the_end_lets_an_answer_finish_and_sends_the_others_away():
    engine = FakeEngine(pause=0.02)
    with running(engine, grace=5) as server:
        first = server.beside(max_tokens=20, user="running")
        until(lambda: bool(engine.asked))
        second = server.beside(user="waiting")
        server.waiting(1)
        server.server.should_exit = True
        finished, refused = first.result(10), second.result(10)
    assert (finished.status_code, refused.status_code) == (200, 503)
    assert finished.json()["choices"][0]["finish_reason"] == "length"
    assert refused.json()["error"]["code"] == "shutting_down"
    assert int(refused.headers["retry-after"]) > 0


def test_the_end_cancels_an_answer_that_is_too_long():
    engine = FakeEngine(pause=0.02)
    with running(engine, grace=0.2, max_tokens=10_000) as server:
        long = server.beside(max_tokens=4000, stream=True)
        until(lambda: bool(engine.asked))
        server.server.should_exit = True
        answer = long.result(5)
    assert answer.status_code == 200  # it had begun
    assert events(answer.text)[-1]["error"]["code"] == "shutting_down"
    assert engine.cancelled_at
