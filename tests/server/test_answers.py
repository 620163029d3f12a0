"""What the server answers, mostly by an engine without a model: shapes, fields, streams, errors."""

import re

import pytest

from dart_llm.engine.requests import Sampling
from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.server.schemas import ACCOUNTING
from serve_cases import CHAT, CHAT_URL, TEXT_URL, FakeEngine, events, running

STREAM = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def server():
    with running(max_tokens=50, sparsity=0.25, methods="dart") as server:
        yield server


def post(server, url, **body):
    with server.client() as client:
        response = client.post(url, json=body)
    assert response.status_code == 200, response.text
    return response


def request_of(server, url, **body):
    """What the engine gets for a body."""
    post(server, url, **body)
    return server.engine.asked[-1]


def choices_of(chunks, index):
    return [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]


def test_a_chat_completion_and_its_stream(server):
    answer = post(server, CHAT_URL, **CHAT, model="fake").json()
    assert answer["id"].startswith("chatcmpl-") and isinstance(answer["created"], int)
    assert (answer["object"], answer["model"]) == ("chat.completion", "fake-model")
    message = {"role": "assistant", "content": "w0 w1 w2 w3 ", "refusal": None}
    rest = {"logprobs": None, "finish_reason": "length"}
    assert answer["choices"] == [{"index": 0, "message": message, **rest}]
    prompt = len("<user>hi<assistant>")
    usage = {"prompt_tokens": prompt, "completion_tokens": 4, "total_tokens": prompt + 4}
    assert answer["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}
    assert answer["timings"]["predicted_per_second"] == 2000.0
    assert set(answer["dart"]) == set(ACCOUNTING)
    assert (answer["dart"]["method"], answer["dart"]["achieved_sparsity"]) == ("griffin", 0.25)
    body = {**CHAT, "n": 2, "stop": "ww2", "logprobs": True, "top_logprobs": 2}
    whole = post(server, CHAT_URL, **body).json()
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["length", "stop"]
    streamed = post(server, CHAT_URL, **body, **STREAM)
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, last, done = events(streamed.text)
    assert done is None and last["choices"] == []
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk["usage"] is None for chunk in chunks) and last["usage"] == whole["usage"]
    for key in ("timings", "dart"):
        assert chunks[-1][key] == last[key] == whole[key]
    for choice in whole["choices"]:
        parts = choices_of(chunks, choice["index"])
        assert "".join(c["delta"].get("content", "") for c in parts) == choice["message"]["content"]
        scored = [e for c in parts if c["logprobs"] for e in c["logprobs"]["content"]]
        assert scored == choice["logprobs"]["content"]
        reasons = [c["finish_reason"] for c in parts if c["finish_reason"]]
        assert reasons == [choice["finish_reason"]]
    records = events(post(server, "/api/events", **CHAT).text)
    assert [record["kind"] for record in records] == ["start", *["token"] * 4, "done"]
    assert records[-1]["texts"] == ["w0 w1 w2 w3 "]


def test_a_completion(server):
    answer = post(server, TEXT_URL, prompt="abc", logprobs=1, stop="w2").json()
    assert answer["object"] == "text_completion"
    logprobs = {"tokens": ["w0 ", "w1 "], "token_logprobs": [-0.5, -0.5], "text_offset": [0, 3]}
    logprobs["top_logprobs"] = [{"t0": -1.0}] * 2
    choice = {"text": "w0 w1 ", "logprobs": logprobs, "finish_reason": "stop"}
    assert answer["choices"] == [{"index": 0, **choice}]
    for prompt in (["abc"], [97, 98, 99], [[97, 98, 99]]):
        assert request_of(server, TEXT_URL, prompt=prompt).ids == (97, 98, 99)


def test_several_prompts_with_echo(server):
    body = {"prompt": ["ab", "c"], "echo": True, "max_tokens": 2, "n": 2}
    plain = post(server, TEXT_URL, **body).json()
    scored = {**body, "logprobs": 1, "dart": {"method": "dense"}}
    whole = post(server, TEXT_URL, **scored).json()
    read = post(server, TEXT_URL, **{**scored, "max_tokens": 0}).json()
    for answer in (plain, whole):
        texts = [choice["text"] for choice in answer["choices"]]
        assert texts == ["abw0 w1 ", "abww0 ww1 ", "cw0 w1 ", "cww0 ww1 "]
    assert plain["choices"][0]["logprobs"] is None
    assert whole["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "w0 ", "w1 "],
        "token_logprobs": [None, -1 / 98, -0.5, -0.5],
        "top_logprobs": [None, {"t0": -0.001}, {"t0": -1.0}, {"t0": -1.0}],
        "text_offset": [0, 1, 2, 5],
    }
    assert [choice["text"] for choice in read["choices"]] == ["ab", "ab", "c", "c"]
    assert read["choices"][0]["logprobs"]["token_logprobs"] == [None, -1 / 98]
    assert whole["usage"]["prompt_tokens"] == 3 and read["usage"]["completion_tokens"] == 0
    assert [each["prompt_n"] for each in whole["timings"]] == [2, 1] and len(whole["dart"]) == 2
    *chunks, done = events(post(server, TEXT_URL, **scored, stream=True).text)
    assert done is None and None not in chunks and "usage" not in chunks[0]
    assert chunks[-1]["dart"] == whole["dart"]
    for choice in whole["choices"]:
        parts = choices_of(chunks, choice["index"])
        assert "".join(c["text"] for c in parts) == choice["text"]
        offsets = [at for c in parts if c["logprobs"] for at in c["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]


def test_every_field_reaches_the_engine(server):
    parts = [{"type": "text", "text": "a"}]
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    dart = {"method": "griffin", "sparsity": 0.5, "masking_step": 2, "drift": "interval 64"}
    sampling = {"max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": -3, "n": 2}
    sampling |= {"stop": ["x", "y"], "logprobs": True, "top_logprobs": 3}
    request = request_of(server, CHAT_URL, messages=messages, dart=dart, **sampling)
    assert bytes(request.ids).decode() == "<system>be<user>a<assistant>"
    assert request.sampling == Sampling(7, 0.5, 0.9, -3, 2, ("x", "y"), 3)
    drift = {"rule": "interval 64"}
    assert request.config == PruneConfig.build("griffin", sparsity=0.5, masking_step=2, drift=drift)
    plain = request_of(server, CHAT_URL, messages=CHAT["messages"])
    assert (plain.sampling.temperature, plain.sampling.max_tokens) == (0.0, 50)
    assert plain.config == PruneConfig.build("griffin", sparsity=0.25)
    assert request_of(server, CHAT_URL, **CHAT, top_p=0).sampling.top_p == 1e-6
    for dart in ({"method": "dense"}, {"sparsity": 0}):
        assert request_of(server, CHAT_URL, **CHAT, dart=dart).config is None

    def name(user, **dart):
        body = {**CHAT, "user": user, "dart": {"conversation": "c", **dart}}
        return request_of(server, CHAT_URL, **body).conversation

    assert len({name("a"), name("b"), name("a", sparsity=0)}) == 3
    assert name("a") == name("a", sparsity=0.5)


IDLE = {"method": "dart-token", "drift": "paper"}
LONG, WRONG, METHOD = "context_length_exceeded", "invalid_value", "dart.method"
NOT_READY, KEPT = "method_not_ready", {"dart": {"conversation": "c"}}
UNREADY = "--methods griffin,dart,glass, or use method griffin or dart (GET /api/methods"
REFUSED = [
    (CHAT_URL, {**CHAT, "model": "gpt"}, "'gpt' is not served here", "model", "model_not_found"),
    (CHAT_URL, {**CHAT, "n": 5}, "n 5 is too large: at most 4", "n", WRONG),
    (CHAT_URL, {**CHAT, "top_logprobs": 1}, "requires logprobs", "top_logprobs", WRONG),
    (CHAT_URL, {**CHAT, "max_tokens": 0}, "asks for no answer", "max_tokens", WRONG),
    (CHAT_URL, {**CHAT, "dart": {"method": "nix"}}, "unknown method 'nix'", METHOD, WRONG),
    (CHAT_URL, {**CHAT, "dart": {"method": "glass"}}, UNREADY, METHOD, NOT_READY),
    (CHAT_URL, {**CHAT, "dart": IDLE}, "so there is no mask to rebuild: drop", "dart", WRONG),
    (CHAT_URL, {**CHAT, "n": 2, "dart": {"conversation": "c"}}, "use n=1", None, WRONG),
    (TEXT_URL, {"prompt": ["a"] * 65}, "65 prompts are too many: at most 64", "prompt", WRONG),
    (TEXT_URL, {"prompt": ["a", "b"], **KEPT}, "give only one prompt", "dart.conversation", WRONG),
    (TEXT_URL, {"prompt": "a", "echo": True, "logprobs": 1}, 'use method "dense"', None, WRONG),
    (TEXT_URL, {"prompt": [""]}, "the prompt is empty", "prompt", WRONG),
    (TEXT_URL, {"prompt": [1, 256]}, "token ids must be 0 to 255", "prompt", WRONG),
    (TEXT_URL, {"prompt": "a" * 4096}, "has 4096, which leaves no room", None, LONG),
    (TEXT_URL, {"prompt": "a" * 4097}, "is 4096 tokens, but the prompt", None, LONG),
]
ROOM = [
    (CHAT_URL, {**CHAT, "max_tokens": 10**18}, 50),
    (CHAT_URL, {**CHAT, "max_completion_tokens": -1}, 50),
    (TEXT_URL, {"prompt": "a" * 4090, "max_tokens": 40}, 6),
    (TEXT_URL, {"prompt": "a" * 4095}, 1),
]


def test_what_cannot_be_answered_is_explained(server):
    for url, body, tokens in ROOM:
        assert request_of(server, url, **body).sampling.max_tokens == tokens
    before = len(server.engine.asked)
    with server.client() as client:
        for url, body, message, param, code in REFUSED:
            response = client.post(url, json=body)
            assert response.status_code == (404 if code == "model_not_found" else 400), body
            error = response.json()["error"]
            assert message in error["message"] and (error["param"], error["code"]) == (param, code)
    assert len(server.engine.asked) == before
    with running(FakeEngine(fault=ConfigError("drop it"))) as other:
        response = other.beside().result(20)  # what the engine refuses
    assert (response.status_code, response.json()["error"]["message"]) == (400, "drop it")


def test_other_routes(server):
    with server.client() as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["fake-model"]
        assert client.get("/healthz").json()["model"] == "fake-model"
        methods = client.get("/api/methods").json()
        prompts = client.get("/api/prompts").json()["prompts"]
        assert client.get("/").headers["content-type"].startswith("text/html")
        client.post(CHAT_URL, json=CHAT)
        server.service.metrics.counters["prompt_tokens"].inc(2**40)
        text = client.get("/metrics").text
    ready = {method["name"]: method["ready"] for method in methods["methods"]}
    assert ready["griffin"] and ready["dart"] and not ready["glass"]
    assert (methods["defaults"]["sparsity"], methods["limits"]["max_tokens"]) == (0.25, 50)
    assert {"title", "text", "note"} <= set(prompts[0]) and "dart" in prompts[0]
    counters = re.findall(r"^dart_llm_(\S+) (\S+)$", text, re.MULTILINE)
    values = {name: float(value) for name, value in counters}
    assert values['requests_total{route="/v1/chat/completions",status="200"}'] >= 1
    assert values['generated_tokens_total{phase="pruned"}'] >= 3
    assert values["prompt_tokens_total"] % 2**20 > 0  # every digit is kept
    assert values["queue_seconds_count"] == values["first_token_seconds_count"] >= 1
    with running(method="griffin", methods=None) as other, other.client() as client:
        prompts = client.get("/api/prompts").json()["prompts"]
    assert not any("dart" in prompt for prompt in prompts)  # this server has no masks for them
    assert all("start the server with --methods dart" in prompt["note"] for prompt in prompts)
