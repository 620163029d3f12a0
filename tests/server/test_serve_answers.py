"""What the server answers, with an engine that has no model: shapes, fields, streams, errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dart_llm.pruning.config import PruneConfig
from dart_llm.server.responses import ACCOUNTING
from serve_cases import CHAT, Running, events, running

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_tokens=50, sparsity=0.25, methods="dart") as found:
        yield found


def asked(server: Running, url: str, **body: Any) -> Any:
    """The ``Ask`` that the engine was given for ``body``."""
    with server.client() as client:
        response = client.post(url, json=body)
    assert response.status_code == 200, response.text
    return server.engine.asked[-1]


def test_a_chat_completion(server: Running) -> None:
    with server.client() as client:
        answer = client.post(CHAT_URL, json={**CHAT, "model": "fake"}).json()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "fake-model"
    assert isinstance(answer["created"], int)
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "w0 w1 w2 w3 ", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    prompt = len("<user>hi<assistant>")
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 4,
        "total_tokens": prompt + 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer["timings"]["predicted_n"] == 4
    assert answer["timings"]["predicted_per_second"] == 2000.0
    assert set(answer["dart"]) == set(ACCOUNTING)
    assert answer["dart"]["method"] == "griffin"
    assert answer["dart"]["achieved_sparsity"] == 0.25


def test_a_completion_of_text_and_of_tokens(server: Running) -> None:
    with server.client() as client:
        answer = client.post(TEXT_URL, json={"prompt": "abc", "logprobs": 1, "stop": "w2"}).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "w0 w1 ",
            "logprobs": {
                "tokens": ["w0 ", "w1 "],
                "token_logprobs": [-0.5, -0.5],
                "top_logprobs": [{"t0": -1.0}, {"t0": -1.0}],
                "text_offset": [0, 3],
            },
            "finish_reason": "stop",
        }
    ]
    for prompt in ("abc", ["abc"], [97, 98, 99], [[97, 98, 99]]):
        assert asked(server, TEXT_URL, prompt=prompt).ids == (97, 98, 99)
    assert asked(server, TEXT_URL, prompt="abc").sampling.max_tokens == 16


def test_streams_say_the_same(server: Running) -> None:
    body = {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with server.client() as client:
        whole = client.post(CHAT_URL, json=body).json()
        response = client.post(CHAT_URL, json={**body, **options})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, last, done = events(response.text)
    assert done is None
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert chunks[-1]["timings"] == last["timings"] == whole["timings"]
    assert chunks[-1]["dart"] == last["dart"] == whole["dart"]
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(c["delta"].get("content", "") for c in own)
        assert text == choice["message"]["content"]
        scored = [e for c in own if c["logprobs"] for e in c["logprobs"]["content"]]
        assert scored == choice["logprobs"]["content"]
        assert scored[0]["top_logprobs"][1] == {"token": "t1", "logprob": -2.0, "bytes": [116, 49]}
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["length"]


def test_a_stream_of_a_completion(server: Running) -> None:
    with server.client() as client:
        body = {"prompt": "a", "max_tokens": 3, "stream": True, "logprobs": 0}
        found = events(client.post(TEXT_URL, json=body).text)
    assert found[-1] is None
    assert "".join(chunk["choices"][0]["text"] for chunk in found[:-1]) == "w0 w1 w2 "
    assert [chunk["choices"][0]["logprobs"] for chunk in found[:2]] == [
        {
            "tokens": [f"w{i} "],
            "token_logprobs": [-0.5],
            "top_logprobs": [{}],
            "text_offset": [3 * i],
        }
        for i in range(2)
    ]
    assert "usage" not in found[0]


def test_every_field_reaches_the_engine(server: Running) -> None:
    found = asked(
        server,
        CHAT_URL,
        messages=[
            {"role": "developer", "content": "be"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
        ],
        max_completion_tokens=3,
        temperature=0.5,
        top_p=0.9,
        seed=-7,
        n=2,
        stop=["x", "y"],
        logprobs=True,
        top_logprobs=4,
        user="me",
        dart={"method": "griffin", "sparsity": 0.5, "masking_step": 2, "drift": "interval 64"},
    )
    sampling = found.sampling
    assert bytes(found.ids) == b"<system>be<user>a<assistant>"
    assert (sampling.max_tokens, sampling.n, sampling.seed) == (3, 2, -7)
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.9)
    assert (sampling.stop, sampling.logprobs) == (("x", "y"), 4)
    assert found.config == PruneConfig.build(
        "griffin", sparsity=0.5, masking_step=2, drift={"rule": "interval 64"}
    )


def test_what_holds_when_nothing_is_said(server: Running) -> None:
    found = asked(server, CHAT_URL, messages=CHAT["messages"])
    assert (found.sampling.temperature, found.sampling.max_tokens) == (0.0, 50)
    assert found.config == PruneConfig.build("griffin", sparsity=0.25)
    assert found.conversation is None
    assert asked(server, CHAT_URL, **CHAT, top_p=0).sampling.top_p == 1e-6


@pytest.mark.parametrize(
    "dart", [{"method": "dense"}, {"sparsity": 0}, {"method": "dart", "sparsity": 0}]
)
def test_dense_requests(server: Running, dart: dict[str, Any]) -> None:
    assert asked(server, CHAT_URL, **CHAT, dart=dart).config is None


def test_another_method_keeps_the_sparsity_of_the_server(server: Running) -> None:
    found = asked(server, CHAT_URL, **CHAT, dart={"method": "dart"}).config
    assert found == PruneConfig.build("dart", sparsity=0.25)


def test_conversations_belong_to_their_user(server: Running) -> None:
    def name(user: str, **dart: Any) -> str:
        body = {**CHAT, "user": user, "dart": {"conversation": "c", **dart}}
        return str(asked(server, CHAT_URL, **body).conversation)

    names = {name("a"), name("b"), name("a", sparsity=0)}
    assert len(names) == 3
    assert name("a") == name("a", sparsity=0.5)


LONG = "context_length_exceeded"
REFUSED: list[tuple[str, dict[str, Any], str, str | None, str]] = [
    (CHAT_URL, {**CHAT, "model": "gpt"}, "the model 'gpt' is not served here", "model",
     "model_not_found"),
    (CHAT_URL, {**CHAT, "n": 5}, "n 5 is too large: at most 4", "n", ""),
    (CHAT_URL, {**CHAT, "max_tokens": 0}, "input should be 1 or more", "max_tokens", ""),
    (CHAT_URL, {**CHAT, "max_completion_tokens": 0}, "1 or more", "max_completion_tokens", ""),
    (CHAT_URL, {**CHAT, "top_logprobs": 1}, "top_logprobs goes with logprobs", "top_logprobs", ""),
    (CHAT_URL, {**CHAT, "stream_options": {}}, "goes with stream: true", "stream_options", ""),
    (CHAT_URL, {**CHAT, "dart": {"method": "nix"}}, "unknown method 'nix'", "dart.method", ""),
    (CHAT_URL, {**CHAT, "dart": {"drift": "nix"}}, "unknown drift rule 'nix'", "dart.drift", ""),
    (CHAT_URL, {**CHAT, "dart": {"method": "dart", "sparsity": 0.2, "drift": "interval 0"}},
     "interval", "dart.drift", ""),
    (CHAT_URL, {**CHAT, "dart": {"method": "glass"}}, "--methods griffin,dart,glass",
     "dart.method", "method_not_ready"),
    (CHAT_URL, {**CHAT, "dart": {"method": "dense-8bit"}}, "needs a copy of the model",
     "dart.method", ""),
    (CHAT_URL, {**CHAT, "dart": {"method": "dense", "sparsity": 0.5}}, "removes nothing",
     "dart.sparsity", ""),
    (CHAT_URL, {**CHAT, "n": 2, "dart": {"conversation": "c"}}, "ask for n 1", None, ""),
    (TEXT_URL, {"prompt": ""}, "the prompt is empty", "prompt", ""),
    (TEXT_URL, {"prompt": []}, "the prompt is empty", "prompt", ""),
    (TEXT_URL, {"prompt": ["a"] * 65}, "65 prompts are too many: at most 64", "prompt", ""),
    (TEXT_URL, {"prompt": ["a", ""]}, "the prompt is empty", "prompt", ""),
    (TEXT_URL, {"prompt": ["a", "b"], "dart": {"conversation": "c"}}, "give one",
     "dart.conversation", ""),
    (TEXT_URL, {"prompt": "a", "max_tokens": 0}, "0 asks for no answer", "max_tokens", ""),
    (TEXT_URL, {"prompt": "a", "max_tokens": 0, "echo": True}, "echo with logprobs",
     "max_tokens", ""),
    (TEXT_URL, {"prompt": "a", "echo": True, "logprobs": 1}, 'ask for method "dense"', None, ""),
    (TEXT_URL, {"prompt": [1, 256]}, "token ids lie in 0 to 255", "prompt", ""),
    (TEXT_URL, {"prompt": [-1]}, "token ids lie in 0 to 255", "prompt", ""),
    (TEXT_URL, {"prompt": "a" * 4096}, "has 4096, which leaves no room", None, LONG),
    (TEXT_URL, {"prompt": "a" * 4097}, "is 4096 tokens, but the prompt", None, LONG),
    (TEXT_URL, {}, "prompt: field required", "prompt", "missing_required_parameter"),
]  # fmt: skip


@pytest.mark.parametrize(("url", "body", "said", "param", "code"), REFUSED)
def test_what_cannot_be_answered_is_explained(
    server: Running, url: str, body: dict[str, Any], said: str, param: str | None, code: str
) -> None:
    before = len(server.engine.asked)
    with server.client() as client:
        response = client.post(url, json=body)
    assert response.status_code == (404 if code == "model_not_found" else 400)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]
    assert (error["param"], error["code"]) == (param, code or "invalid_value")
    assert len(server.engine.asked) == before


@pytest.mark.parametrize(
    ("url", "body", "tokens"),
    [
        (CHAT_URL, {**CHAT, "max_tokens": 51}, 50),
        (CHAT_URL, {**CHAT, "max_tokens": 4096}, 50),
        (CHAT_URL, {**CHAT, "max_tokens": 10**18}, 50),
        (CHAT_URL, {**CHAT, "max_tokens": -1}, 50),
        (CHAT_URL, {**CHAT, "max_completion_tokens": -1}, 50),
        (CHAT_URL, {**CHAT, "max_completion_tokens": 7}, 7),
        (CHAT_URL, {**CHAT, "top_logprobs": 0}, 4),
        (TEXT_URL, {"prompt": "a", "max_tokens": -1}, 50),
        (TEXT_URL, {"prompt": "a" * 4090, "max_tokens": 40}, 6),
        (TEXT_URL, {"prompt": "a" * 4095}, 1),
    ],
)
def test_answers_end_where_the_room_does(
    server: Running, url: str, body: dict[str, Any], tokens: int
) -> None:
    assert asked(server, url, **body).sampling.max_tokens == tokens


def test_all_records_of_a_request(server: Running) -> None:
    with server.client() as client:
        found = events(client.post("/api/events", json=CHAT).text)
    assert [record["kind"] for record in found] == ["start", *["token"] * 4, "done"]
    assert found[-1]["texts"] == ["w0 w1 w2 w3 "]
    assert found[-1]["report"]["method"] == "griffin"


def test_other_routes(server: Running, tmp_path: Path) -> None:
    with server.client() as client:
        models = client.get("/v1/models").json()
        assert [model["id"] for model in models["data"]] == ["fake-model"]
        assert client.get("/v1/models/fake").json()["id"] == "fake-model"
        assert client.get("/v1/models/other").status_code == 404
        assert client.get("/healthz").json()["status"] == "ok"
        methods = client.get("/api/methods").json()
        prompts = client.get("/api/prompts").json()
        page = client.get("/")
    ready = {one["name"]: one["ready"] for one in methods["methods"]}
    assert ready["griffin"] and ready["dart"] and ready["dense"]
    assert not ready["glass"] and not ready["dense-8bit"]
    assert methods["defaults"]["sparsity"] == 0.25
    assert methods["defaults"]["drift"] is None
    assert methods["limits"]["max_tokens"] == 50
    assert {"title", "text", "note"} <= set(prompts["prompts"][0])
    assert page.headers["content-type"].startswith("text/html")


def test_metrics_count(server: Running) -> None:
    with server.client() as client:
        client.post(CHAT_URL, json=CHAT)
        text = client.get("/metrics").text
    values = dict(re.findall(r"^(dart_llm\S+) (\S+)$", text, re.MULTILINE))
    assert float(values['dart_llm_requests_total{route="/v1/chat/completions",status="200"}']) >= 1
    assert float(values['dart_llm_generated_tokens_total{phase="pruned"}']) >= 3
    assert float(values['dart_llm_finished_total{method="griffin",reason="length"}']) >= 1
    assert float(values["dart_llm_running_requests"]) == 0
    count = float(values["dart_llm_first_token_seconds_count"])
    assert count == float(values['dart_llm_first_token_seconds_bucket{le="+Inf"}']) >= 1
    named = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    lines = re.findall(r"^(dart_llm\w+?)(?:_bucket|_sum|_count)?[ {]", text, re.MULTILINE)
    assert len(named) >= 13
    assert set(lines) <= named
