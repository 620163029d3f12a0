"""Who may ask, and how much: hosts, origins, keys, bodies, and what every answer carries."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import select
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from dart_llm.errors import ConfigError
from dart_llm.server import app as serve_app
from dart_llm.server.settings import ServeSettings
from dart_llm.settings import merge
from serve_cases import CHAT, FakeEngine, Running, request_bytes, running

URL = "/v1/chat/completions"
KEY, OTHER = "a-long-secret-key", "another-secret-key"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_body_kib=4) as found:
        yield found


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with running(api_key=f"{KEY},{OTHER}") as found:
        yield found


def head(response: httpx.Response) -> dict[str, str]:
    return {name.lower(): value for name, value in response.headers.items()}


@pytest.mark.parametrize("path", ["/", "/healthz", "/nix", "/v1/models", "/metrics"])
def test_every_answer_is_guarded(server: Running, path: str) -> None:
    with server.client() as client:
        found = head(client.get(path, headers={"Origin": server.url}))
    policy = found["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy
    assert "unsafe" not in policy and "*" not in policy
    assert found["x-content-type-options"] == "nosniff"
    assert found["referrer-policy"] == "no-referrer"
    assert found["x-request-id"].startswith("req_")
    assert not [name for name in found if name.startswith("access-control")]
    assert "server" not in found


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[(host, 200) for host in ("localhost", "127.0.0.1", "LOCALHOST:99", "[::1]:8000")],
        *[(host, 403) for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io")],
        *[(host, 403) for host in ("", "127.0.0.1:8111@evil.com", "localhost:80:evil")],
        ("localhost.", 200),
    ],
)
def test_the_server_answers_to_its_own_names(server: Running, host: str, status: int) -> None:
    with server.client() as client:
        response = client.get("/healthz", headers={"Host": host})
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "host_not_allowed"


def test_names_can_be_added() -> None:
    with running(allow_host="dart.example, other") as server, server.client() as client:
        for host, status in (("DART.example:80", 200), ("localhost", 200), ("evil", 403)):
            assert client.get("/healthz", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_other_sites_are_refused(server: Running, headers: dict[str, str]) -> None:
    with server.client() as client:
        response = client.post(URL, json=CHAT, headers=headers)
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "origin_not_allowed"
        assert client.get("/api/events", headers=headers).status_code == 403
        preflight = client.options(URL, headers={"Origin": "https://evil.example"})
    assert preflight.status_code == 403


def test_a_link_from_elsewhere_opens_the_page(server: Running) -> None:
    with server.client() as client:
        assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_forms_of_pages_are_refused(server: Running, kind: str) -> None:
    with server.client() as client:
        response = client.post(URL, content=json.dumps(CHAT), headers={"Content-Type": kind})
    assert response.status_code == 415
    assert not server.engine.asked


def test_keys(locked: Running) -> None:
    with locked.client() as client:
        for path in ("/", "/healthz"):
            assert client.get(path).status_code == 200
        wrong: list[dict[str, str]] = [
            {},
            {"Authorization": f"Bearer {KEY}x"},
            {"Authorization": "Bearer"},
            {"Authorization": KEY},
            {"Authorization": f"Basic {KEY}"},
            {"Authorization": f"Bearer {KEY},{OTHER}"},
        ]
        for headers in wrong:
            for path in (
                "/v1/models",
                "/metrics",
                "/api/runs",
                "/api/events",
                "/openapi.json",
                "/x",
            ):
                response = client.get(path, headers=headers)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        for key in (KEY, OTHER):
            response = client.post(URL, json=CHAT, headers={"Authorization": f"Bearer {key}"})
            assert response.status_code == 200


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is compared, by ``compare_digest``, and digests of one length are."""
    from dart_llm.server import security as serve_guard

    seen: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        seen.append((one, other))
        return one == other

    monkeypatch.setattr(serve_guard.hmac, "compare_digest", compare)
    with running(api_key=f"{KEY},{OTHER}") as server, server.client() as client:
        client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    assert [len(part) for pair in seen for part in pair] == [32] * 4


def test_keys_are_clients_of_the_queue() -> None:
    engine = FakeEngine()
    with running(engine, api_key=f"{KEY},{OTHER}") as server, server.client() as client:
        body = {**CHAT, "dart": {"conversation": "c"}}
        for key in (KEY, OTHER):
            client.post(URL, json=body, headers={"Authorization": f"Bearer {key}"})
    first, second = (ask.conversation for ask in engine.asked)
    assert first != second
    assert KEY not in str(first) and OTHER not in str(second)


def test_large_bodies_are_refused(server: Running) -> None:
    def chunks(size: int) -> Iterator[bytes]:
        yield json.dumps(CHAT)[:-1].encode() + b', "user": "'
        for _ in range(size):
            yield b"u" * 1024

    with server.client() as client:
        announced = client.post(URL, json={**CHAT, "user": "u" * 5000})
        headers = {"Content-Type": "application/json"}
        unannounced = client.post(URL, content=chunks(8), headers=headers)
        short = client.post(URL, content=chunks(2), headers=headers)
        assert client.post(URL, json=CHAT).status_code == 200
    for response in (announced, unannounced):
        assert response.status_code == 413
        assert "larger than 4096 bytes" in response.json()["error"]["message"]
    assert short.status_code == 400  # cut off, so no JSON


def test_an_endless_body_is_not_waited_for(server: Running) -> None:
    connection = server.connect()
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    for _ in range(5):
        connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
    answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()
    connection.close()


@pytest.mark.parametrize("pieces", [0, 40])
def test_a_slow_body_is_given_up(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    """Also one that goes on arriving, a byte at a time."""
    monkeypatch.setattr(serve_app, "Rules", functools.partial(serve_app.Rules, body_seconds=0.2))
    with running() as server:
        connection = server.connect()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        with contextlib.suppress(ConnectionError):  # it is closed while we write
            for _ in range(pieces):
                connection.sendall(b" ")
                if select.select([connection], [], [], 0.05)[0]:
                    break
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")
        connection.close()


def test_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    from dart_llm.server import run as serve_run

    monkeypatch.setattr(serve_run, "TICKS", 1)
    monkeypatch.setattr(serve_run, "SILENT_CHECKS", 3)
    with running(FakeEngine(pause=0.3)) as server:
        silent, half, used = (server.connect() for _ in range(3))
        half.sendall(b"GET /healthz HTTP/1.1\r\nHost: local")
        used.sendall(request_bytes({**CHAT, "max_tokens": 3}))
        assert silent.recv(1) == b""
        assert half.recv(1) == b""
        assert used.recv(100).startswith(b"HTTP/1.1 200")  # it took longer, and was waited for
        for connection in (silent, half, used):
            connection.close()


def test_other_methods_and_addresses(server: Running) -> None:
    with server.client() as client:
        for response, status in (
            (client.get(URL), 405),
            (client.delete("/v1/models"), 405),
            (client.get("/v2"), 404),
            (client.get("/static/../serve_app.py"), 404),
            (client.get("/static/%2e%2e/serve_app.py"), 404),
            (client.get("/docs"), 404),
        ):
            assert response.status_code == status
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host": "0.0.0.0"}, "give --api-key too"),
        ({"host": "192.168.1.2"}, "give --api-key too"),
        ({"host": "::"}, "give --api-key too"),
        ({"host": "example.org"}, "give --api-key too"),
        ({"api_key": "short"}, "8 or more plain characters"),
        ({"api_key": "a-good-long-key,\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9"}, "plain"),
        ({"port": 65536}, "at most 65535"),
        ({"port": -1}, "must be at least 0"),
        ({"max_waiting": 0}, "must be at least 1"),
        ({"grace": float("inf")}, "grace = inf: input should be a finite number"),
        ({"temperature": 3.0}, "at most 2"),
        ({"methods": "dart,nix"}, "unknown method 'nix'"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        ServeSettings.model_validate(settings)
    assert "a-good" not in str(caught.value)


def test_another_bind_needs_a_key_only() -> None:
    given = ServeSettings(host="0.0.0.0", api_key=f" {KEY} , {OTHER} ")
    assert given.keys == (KEY, OTHER)
    assert given.hosts is None
    assert ServeSettings(host="::1").is_loopback
    assert ServeSettings(host="127.8.9.1").is_loopback
    assert "[::1]" in (ServeSettings(host="::1").hosts or ())


@pytest.mark.parametrize("key", [1234567890123, ["a-secret-key"]])
def test_a_key_is_in_no_message(key: Any) -> None:
    """YAML reads a key of digits as a number."""
    with pytest.raises(ConfigError, match=r"^api_key: input should be a valid string$"):
        merge(ServeSettings, {"api_key": key})
