"""Several keys on one server: what each may see, and that none takes the places of the others."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from dart_llm.engine.host import ConversationCache as Kept
from dart_llm.server.service import WATCHERS
from engine_cases import tokenizer
from serve_cases import CHAT, FakeEngine, Running, events, running, running_model, until
from tiny import tiny

URL = "/v1/chat/completions"
KEYS = ("a-long-secret-key", "another-secret-key")


def bearer(number: int) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[number]}"}


def watching(server: Running, headers: dict[str, str], seen: list[bytes]) -> threading.Thread:
    def watch() -> None:
        url = "/api/events"
        with server.client() as client, client.stream("GET", url, headers=headers) as response:
            seen.extend(response.iter_raw())

    before = len(server.service.live)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    until(lambda: len(server.service.live) == before + 1)
    return thread


def test_with_keys_everybody_watches_their_own() -> None:
    seen: tuple[list[bytes], list[bytes]] = ([], [])
    with running(FakeEngine(), api_key=",".join(KEYS)) as server, server.client() as client:
        threads = [watching(server, bearer(number), seen[number]) for number in range(2)]
        ids = [
            client.post(URL, json=CHAT, headers=bearer(number)).headers["x-request-id"]
            for number in (0, 1, 0)
        ]
        until(lambda: all(b'"done"' in b"".join(one) for one in seen))
        server.server.should_exit = True
        for thread in threads:
            thread.join(20)
    found = [events(b"".join(one).decode()) for one in seen]
    assert {one.get("request") for one in found[0]} == {None, ids[0], ids[2]}
    assert {one.get("request") for one in found[1]} == {None, ids[1]}
    assert [one["kind"] for one in found[1]] == ["hello", "start", *["token"] * 4, "done"]


def test_one_client_leaves_places_to_watch() -> None:
    with running(api_key=",".join(KEYS)) as server, server.client() as client:
        own, lines = WATCHERS * 3 // 4, []
        for number in [0] * own + [1]:
            connection = server.connect()
            lines.append(connection)
            head = f"GET /api/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: {number}\r\n\r\n"
            connection.sendall(head.replace(f": {number}", f": Bearer {KEYS[number]}").encode())
            until(lambda: len(server.service.live) == len(lines))
        refused = client.get("/api/events", headers=bearer(0))
        assert len(server.service.live) == own + 1
        for connection in lines:
            connection.close()
    assert refused.status_code == 429
    assert "too many of yours watch already" in refused.json()["error"]["message"]


def test_past_runs_are_not_for_several_keys(tmp_path: Path) -> None:
    def statuses(**settings: Any) -> list[int]:
        with running(results_dir=str(tmp_path), **settings) as server, server.client() as client:
            headers = bearer(0) if "api_key" in settings else {}
            found = client.get("/api/runs", headers=headers)
            one = client.get("/api/runs/x", headers=headers)
            if found.status_code == 403:
                error = found.json()["error"]
                assert error["code"] == "runs_not_shared" and "--share-runs" in error["message"]
        return [found.status_code, one.status_code]

    assert statuses() == [200, 404]
    assert statuses(api_key=KEYS[0]) == [200, 404]
    assert statuses(api_key=",".join(KEYS)) == [403, 403]
    assert statuses(api_key=",".join(KEYS), share_runs=True) == [200, 404]


def test_health_names_the_model_where_no_key_guards_it() -> None:
    with running() as server, server.client() as client:
        assert client.get("/healthz").json()["model"] == "fake-model"
    with running(api_key=KEYS[0]) as server, server.client() as client:
        found = client.get("/healthz").json()
    assert found["status"] == "ok" and "model" not in found


def test_who_has_most_conversations_loses_one() -> None:
    kept, names = Kept(4), "abcdef"
    for name in names:
        kept.put(name, name, "greedy" if name < "f" else "other")  # type: ignore[arg-type]
    assert [kept.take(name) for name in names] == [None, None, "c", "d", "e", "f"]
    for name in names:
        kept.put(name, name, name)  # type: ignore[arg-type]
    assert [kept.take(name) for name in names] == [None, None, *"cdef"]


def test_conversations_of_one_key_do_not_drop_anothers() -> None:
    settings = {"api_key": ",".join(KEYS), "method": "griffin"}
    model, ids = tiny(), list(range(3, 20))
    with running_model(model, tokenizer(), **settings) as server, server.client() as client:

        def ask(number: int, name: str, prompt: list[int]) -> dict[str, Any]:
            body = {"prompt": prompt, "max_tokens": 3, "dart": {"conversation": name}}
            found: dict[str, Any] = client.post(
                "/v1/completions", json=body, headers=bearer(number)
            ).json()
            return found["usage"]

        ask(0, "mine", ids)
        for number in range(6):
            ask(1, f"theirs {number}", ids)
        usage = ask(0, "mine", [*ids, 5, 6, 7])
    assert usage["prompt_tokens_details"]["cached_tokens"] >= len(ids)


@pytest.mark.parametrize("keys", [(), KEYS])
def test_a_flood_of_unfinished_bodies(monkeypatch: pytest.MonkeyPatch, keys: Any) -> None:
    """Who asks whether the server states gets an answer, and so does another key."""
    from dart_llm.server import app as serve_app

    rules = serve_app.Rules
    monkeypatch.setattr(serve_app, "Rules", lambda *a, **more: rules(*a, **more, at_once=20))
    settings = {"api_key": ",".join(keys)} if keys else {}
    half = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
        b"Authorization: Bearer %s\r\nContent-Type: application/json\r\n\r\n{" % KEYS[0].encode()
    )
    with running(**settings) as server, server.client() as client, contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(server.connect()).sendall(half)
        count = server.service.metrics.registry.get_sample_value
        until(lambda: (count("dart_llm_http_requests") or 0) >= 15)
        for _ in range(3):
            assert client.get("/healthz").status_code == 200
        own = client.post(URL, json=CHAT, headers=bearer(0))
        assert own.status_code == 429
        if keys:
            assert client.post(URL, json=CHAT, headers=bearer(1)).status_code == 200
    assert json.loads(own.text)["error"]["code"] == "rate_limit_exceeded"
