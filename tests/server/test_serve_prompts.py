"""Several prompts in one request, prompts that are echoed, and the scores of their tokens."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

import pytest

from dart_llm.engine.events import Likely, PromptToken, Scores, Start, Token
from dart_llm.server.responses import Format
from engine_cases import tokenizer
from serve_cases import FakeEngine, events, read_until, request_bytes, running, running_model, until
from tiny import tiny

URL = "/v1/completions"
DENSE = {"dart": {"method": "dense"}}


def test_several_prompts_are_answered_as_each_alone() -> None:
    prompts = ["the moon", "a tide of letters", "q"]
    body = {"max_tokens": 6, "n": 2, "logprobs": 2, "temperature": 0.7, "seed": 3}
    with running_model(tiny(), tokenizer(), method="griffin") as server, server.client() as client:
        alone = [client.post(URL, json={**body, "prompt": one}).json() for one in prompts]
        found = client.post(URL, json={**body, "prompt": prompts}).json()
        ids = [tokenizer()(one).input_ids for one in prompts]
        assert client.post(URL, json={**body, "prompt": ids}).json()["choices"] == found["choices"]
        streamed = events(client.post(URL, json={**body, "prompt": prompts, "stream": True}).text)
    assert [choice["index"] for choice in found["choices"]] == list(range(6))
    wanted = [choice for answer in alone for choice in answer["choices"]]
    for choice, one in zip(found["choices"], wanted, strict=True):
        assert {**choice, "index": 0} == {**one, "index": 0}
    assert len({choice["text"] for choice in found["choices"]}) > 3
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert found["usage"][key] == sum(answer["usage"][key] for answer in alone)
    assert found["dart"] == [answer["dart"] for answer in alone]
    assert [one["prompt_n"] for one in found["timings"]] == [len(one) for one in ids]
    assert streamed[-1] is None and len([one for one in streamed if one is None]) == 1
    for choice in found["choices"]:
        own = [c for chunk in streamed[:-1] for c in chunk["choices"]]
        own = [c for c in own if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
    assert streamed[-2]["dart"] == found["dart"]


def test_between_two_prompts_of_a_list_others_have_their_turn() -> None:
    engine = FakeEngine(pause=0.02)
    with running(engine) as server:

        def post(prompt: Any, user: str) -> None:
            with server.client() as client:
                client.post(URL, json={"prompt": prompt, "user": user, "max_tokens": 5})

        many = threading.Thread(target=post, args=([[1], [2], [3]], "many"))
        many.start()
        until(lambda: bool(engine.asked))
        other = threading.Thread(target=post, args=([9], "other"))
        other.start()
        many.join(20)
        other.join(20)
    assert [ask.ids for ask in engine.asked] == [(1,), (9,), (2,), (3,)]


def test_who_goes_away_leaves_with_all_prompts() -> None:
    engine = FakeEngine(pause=0.05)
    with running(engine) as server:
        body = {"prompt": [[1], [2], [3]], "max_tokens": 50, "stream": True}
        with server.connect() as connection:
            connection.sendall(request_bytes(body, URL))
            read_until(connection, b"w1 ")
        until(lambda: bool(engine.ended))
        with server.client() as client:
            assert client.post(URL, json={"prompt": [9], "max_tokens": 1}).status_code == 200
        assert server.service.worker.waiting == 0
    assert [ask.ids for ask in engine.asked] == [(1,), (9,)]


def test_a_fault_ends_a_list() -> None:
    engine = FakeEngine(fault=RuntimeError("secret"), fault_at=1)
    with running(engine) as server, server.client() as client:
        response = client.post(URL, json={"prompt": [[1], [2]], "max_tokens": 5})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert client.get("/healthz").status_code == 200
    assert [ask.ids for ask in engine.asked] == [(1,)]


def test_echo() -> None:
    with running() as server, server.client() as client:
        body = {"prompt": ["ab", "c"], "echo": True, "max_tokens": 2}
        plain = client.post(URL, json=body).json()
        found = client.post(URL, json={**body, "logprobs": 1, **DENSE}).json()
        read = client.post(URL, json={**body, "max_tokens": 0, "logprobs": 1, **DENSE}).json()
        chunks = events(
            client.post(URL, json={**body, "stream": True, "logprobs": 1, **DENSE}).text
        )
    for answer in (plain, found):
        assert [choice["text"] for choice in answer["choices"]] == ["abw0 w1 ", "cw0 w1 "]
    assert plain["choices"][0]["logprobs"] is None
    assert found["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "w0 ", "w1 "],
        "token_logprobs": [None, -1 / 98, -0.5, -0.5],
        "top_logprobs": [None, {"t0": -0.001}, {"t0": -1.0}, {"t0": -1.0}],
        "text_offset": [0, 1, 2, 5],
    }
    assert [choice["text"] for choice in read["choices"]] == ["ab", "c"]
    assert read["choices"][0]["logprobs"]["token_logprobs"] == [None, -1 / 98]
    assert read["choices"][0]["finish_reason"] == "length"
    assert read["usage"]["completion_tokens"] == 0
    own = [c for chunk in chunks[:-1] for c in chunk["choices"] if c["index"] == 0]
    assert "".join(c["text"] for c in own) == "abw0 w1 "
    parts = [c["logprobs"] for c in own if c["logprobs"]]
    for key, values in found["choices"][0]["logprobs"].items():
        assert [one for part in parts for one in part[key]] == values


def test_the_token_that_ends_an_answer_is_counted_beside_an_echo() -> None:
    """Clients cut the last token off to find those of the prompt."""
    for echo, tokens in ((True, ["p", "</s>"]), (False, [])):
        shape = Format("m", 1, True, echo=echo)
        shape.keep(Start("id", "m", "dense", 0.0, {}, "masked", 1, (8,), (PromptToken(5, "p"),)))
        if echo:
            shape.keep(Scores((None,), ((),)))
        shape.keep(Token(0, 0, 2, "", "</s>", "prefill", -0.5, (), 0.1))
        shape.keep(_done(""))
        (choice,) = json.loads(shape.whole())["choices"]
        assert choice["logprobs"]["tokens"] == tokens
        assert choice["text"] == ("p" if echo else "")


def _done(text: str) -> Any:
    from dart_llm.engine.events import Done, Timings, Usage
    from serve_cases import report

    made = report("dense", 0.0, 1)
    return Done("id", ("stop",), (text,), Usage(1, 1, 0), Timings(1, 1.0, 0, 0.0), made)


def test_of_two_tokens_with_one_text_the_likelier_is_told() -> None:
    shape = Format("m", 1, True)
    top = (Likely(1, "\ufffd", -0.1), Likely(2, "\ufffd", -3.0))
    shape.keep(Token(0, 0, 1, "x", "\ufffd", "dense", -0.1, top, 0.1))
    (scored,) = shape.choices[0].every
    assert shape._logprobs([scored], 0)["top_logprobs"] == [{"\ufffd": -0.1}]


@pytest.mark.parametrize("length", [1, 2, 64, 65, 150])
def test_scores_are_those_of_the_model(length: int) -> None:
    import torch

    from dart_llm.engine.engine import Engine
    from dart_llm.engine.requests import GenerationRequest as Ask
    from dart_llm.engine.requests import Sampling

    model, ids = tiny(), tuple((7 * i) % 90 + 3 for i in range(length))
    with torch.no_grad():
        wanted = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    records: list[Any] = []
    with Engine(model, tokenizer()) as engine:
        sampling = Sampling(max_tokens=0, logprobs=3, prompt_logprobs=True)
        answer = engine.run(Ask(ids, sampling), records.append)
        greedy = engine.run(Ask(ids, Sampling(max_tokens=1, logprobs=0, prompt_logprobs=True)))
        plain = engine.run(Ask(ids, Sampling(max_tokens=1)))
    assert [record.kind for record in records] == ["start", "scores", "done"]
    assert (answer.finish, answer.texts, answer.tokens) == (("length",), ("",), ((),))
    assert greedy.tokens == plain.tokens
    scores = records[1]
    assert len(scores.logprobs) == len(scores.top) == length
    assert scores.logprobs[0] is None and scores.top[0] == ()
    for place in range(1, length):
        expected = wanted[place - 1]
        assert scores.logprobs[place] == pytest.approx(float(expected[ids[place]]), abs=1e-5)
        best = expected.topk(3)
        assert [one.id for one in scores.top[place]] == best.indices.tolist()
        assert math.exp(scores.top[place][0].logprob) <= 1
    assert scores.to_dict()["kind"] == "scores"
