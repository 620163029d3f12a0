"""Who may ask, and how much: hosts, origins, keys, bodies, connections, and every answer's head."""

import contextlib
import json
import re
import select

import pytest

from dart_llm.errors import ConfigError
from dart_llm.server import app
from dart_llm.server.run import bind, page_address
from dart_llm.server.settings import ServeSettings
from dart_llm.settings import merge
from serve_cases import CHAT, CHAT_URL, KEYS, bearer, request_bytes, running

BOTH = ",".join(KEYS)


@pytest.fixture(scope="module")
def server():
    with running(max_body_kib=4) as server:
        yield server


def code(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["code"])


def test_every_answer_is_guarded(server):
    with server.client() as client:
        for path in ("/", "/nix", "/v1/models", "/metrics"):
            headers = client.get(path, headers={"Origin": server.url}).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy and "script-src 'self'" in policy
            assert "unsafe" not in policy and "*" not in policy and "server" not in headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["x-request-id"].startswith("req_")
            assert not [name for name in headers if name.lower().startswith("access-control")]


def test_the_server_answers_to_its_own_names_alone(server):
    """DNS rebinding: a page of another name, whose address is ours, has that name as Host."""
    names = "localhost 127.0.0.1 LOCALHOST:99 [::1]:8000 localhost. localhost.:8000"
    foreign = "evil.example localhost.evil.example 127.0.0.1.nip.io 127.0.0.1:8111@evil.com "
    foreign += "evil.com@127.0.0.1 [::1]evil.com localhost:80:evil localhost: localhost.. "
    foreign += "localhost/x [::1"
    with server.client() as client:
        for host in names.split():
            assert client.get("/healthz", headers={"Host": host}).status_code == 200, host
        for host in (*foreign.split(), "", "localhost evil"):
            refused = client.get("/healthz", headers={"Host": host})
            assert (refused.status_code, code(refused)) == (403, "host_not_allowed"), host
    with running(allow_host="dart.example, other") as added, added.client() as client:
        for host, status in (("DART.example:80", 200), ("localhost", 200), ("evil", 403)):
            assert client.get("/healthz", headers={"Host": host}).status_code == status


def test_pages_of_other_sites_are_refused(server):
    with server.client() as client:
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://localhost:1"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ):
            refused = client.post(CHAT_URL, json=CHAT, headers=headers)
            assert (refused.status_code, code(refused)) == (403, "origin_not_allowed"), headers
            assert client.get("/api/events", headers=headers).status_code == 403
        preflight = client.options(CHAT_URL, headers={"Origin": "https://evil.example"})
        link = client.get("/", headers={"Sec-Fetch-Site": "cross-site"})
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):  # what forms can send
            headers = {"Content-Type": kind}
            form = client.post(CHAT_URL, content=json.dumps(CHAT), headers=headers)
            assert form.status_code == 415
    assert (preflight.status_code, link.status_code) == (403, 200)
    assert not server.engine.asked


def test_keys(monkeypatch):
    """Every key is compared, by ``compare_digest``, and digests of one length are."""
    compared = []

    def compare(one, other):
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(app.hmac, "compare_digest", compare)
    wrong = ["", f"Bearer {KEYS[0]}x", "Bearer", KEYS[0], f"Basic {KEYS[0]}", f"Bearer {BOTH}"]
    paths = ("/v1/models", "/metrics", "/api/runs", "/api/events", "/openapi.json", "/x")
    with running(api_key=BOTH) as locked, locked.client() as client:
        for path in ("/", "/healthz"):
            assert client.get(path).status_code == 200
        assert "model" not in client.get("/healthz").json()
        for given in wrong:
            for path in paths:
                refused = client.get(path, headers={"Authorization": given})
                assert (refused.status_code, code(refused)) == (401, "invalid_api_key")
                assert refused.headers["www-authenticate"] == "Bearer"
        compared.clear()
        body = {**CHAT, "dart": {"conversation": "c"}}
        for number in (0, 1):
            assert client.post(CHAT_URL, json=body, headers=bearer(number)).status_code == 200
    assert [len(part) for pair in compared for part in pair] == [32] * 8
    first, second = (ask.conversation for ask in locked.engine.asked)  # each key is a client
    assert first != second and not any(key in f"{first}{second}" for key in KEYS)


def test_large_bodies_are_refused(server):
    def sized(size):
        body = json.dumps({**CHAT, "user": ""}).encode()
        return body + b" " * (size - len(body))

    def chunks(size):
        for start in range(0, size, 1024):
            yield sized(size)[start : start + 1024]

    headers = {"Content-Type": "application/json"}
    with server.client() as client:
        for content in (sized, chunks):  # with its length announced, and without
            assert client.post(CHAT_URL, content=content(4096), headers=headers).status_code == 200
            refused = client.post(CHAT_URL, content=content(4097), headers=headers)
            assert (refused.status_code, code(refused)) == (413, "request_too_large")
            assert "larger than 4096 bytes" in refused.text
    with server.connect() as connection:  # one without an end
        head = request_bytes({}).partition(b"Content-Length")[0]
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(5):
            connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()


@pytest.mark.parametrize("pieces", [0, 40])
def test_a_slow_body_is_given_up(monkeypatch, pieces):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    with running() as server, server.connect() as connection:
        connection.sendall(request_bytes({"prompt": "x" * 99})[:-100])
        with contextlib.suppress(ConnectionError):  # it is closed while we write
            for _ in range(pieces):
                connection.sendall(b" ")
                if select.select([connection], [], [], 0.05)[0]:
                    break
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


def test_slow_clients_do_not_keep_others_from_their_answers():
    half = request_bytes({"prompt": "x"})[:-5]
    with running() as server, server.client() as client, contextlib.ExitStack() as stack:
        for data in (half, half[:20], b"") * 20:
            stack.enter_context(server.connect()).sendall(data)
        assert client.post(CHAT_URL, json=CHAT).status_code == 200


def test_other_methods_and_addresses(server):
    with server.client() as client:
        for path in ("/v2", "/static/../app.py", "/static/%2e%2e/app.py", "/docs"):
            assert (client.get(path).status_code, code(client.get(path))) == (404, "not_found")
        elsewhere = client.post("/v1/responses", json={"input": "hi"})
        assert code(elsewhere) == "not_found" and "/v1/chat/completions" in elsewhere.text
        response = client.get(CHAT_URL)
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
        got, head = client.get("/static/main.js"), client.head("/static/main.js")
        assert head.content == b"" and head.headers["content-type"] == got.headers["content-type"]


def test_settings():
    for given, said in [
        ({"host": "0.0.0.0"}, "also give --api-key"),
        ({"api_key": "short"}, "at least 8 printable ASCII"),
        ({"api_key": "a-good-long-key," + 8 * "\u00e9"}, "printable"),
        ({"methods": "dart,nix"}, "unknown method 'nix'"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(said)) as caught:
            ServeSettings.model_validate(given)
        assert "a-good" not in str(caught.value)
    for key in (1234567890123, ["a-secret-key"]):  # YAML reads a key of digits as a number
        with pytest.raises(ConfigError, match=r"^api_key: input should be a valid string$"):
            merge(ServeSettings, {"api_key": key})
    given = ServeSettings(host="0.0.0.0", api_key=f" {KEYS[0]} , {KEYS[1]} ")
    assert (given.keys, given.hosts) == (KEYS, None)
    assert ServeSettings(host="127.8.9.1").is_loopback
    assert "[::1]" in (ServeSettings(host="::1").hosts or ())
    with contextlib.closing(bind("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert page_address(given, listening) == f"http://127.0.0.1:{port}/"


def test_past_runs_are_not_for_several_keys(tmp_path):
    for settings, status in (({}, 200), ({"api_key": KEYS[0]}, 200), ({"api_key": BOTH}, 403)):
        with running(results_dir=str(tmp_path), **settings) as server, server.client() as client:
            runs = client.get("/api/runs", headers=bearer(0))
            run = client.get("/api/runs/x", headers=bearer(0))
        assert runs.status_code == status
        assert status == 200 or code(runs) == code(run) == "runs_not_shared"
