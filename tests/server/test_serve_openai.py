"""The official client and curl against the real model: every documented field, and errors."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from serve_cases import Running, running_model

pytestmark = pytest.mark.smollm2

MODEL = "SmolLM2-135M-Instruct"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
GRIFFIN = {"dart": {"method": "griffin", "sparsity": 0.5}}
DENSE = {"dart": {"method": "dense"}}


@pytest.fixture(scope="module")
def server(smollm2: Any) -> Iterator[Running]:
    with running_model(*smollm2, method="griffin", sparsity=0.3, max_tokens=64) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    transport = openai.DefaultHttpxClient(trust_env=False)
    base = f"{server.url}/v1"
    with openai.OpenAI(base_url=base, api_key="none", http_client=transport, max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, **options: Any) -> Any:
    asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(**asked)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve("smollm2-135m").id == MODEL
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("gpt")


def test_a_dense_answer(client: openai.OpenAI, smollm2: Any) -> None:
    _, tokenizer = smollm2
    found = chat(client, extra_body=DENSE)
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert found.usage.prompt_tokens == ids.shape[1]
    assert found.dart["dense_token_share"] == 1
    assert "Paris" in found.choices[0].message.content


def test_a_pruned_answer_and_its_accounting(client: openai.OpenAI) -> None:
    found = chat(client, extra_body=GRIFFIN)
    assert found.object == "chat.completion"
    assert found.model == MODEL
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason in ("stop", "length")
    assert found.usage.completion_tokens <= 12
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.dart["method"] == "griffin"
    assert found.dart["achieved_sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert found.dart["remask_causes"] == {"first": 1}
    timings = found.timings
    assert timings["prompt_n"] == found.usage.prompt_tokens
    assert timings["predicted_per_token_ms"] == pytest.approx(
        timings["predicted_ms"] / timings["predicted_n"]
    )
    assert chat(client).dart["requested_sparsity"] == 0.3  # the server's own


@pytest.mark.parametrize("dart", [GRIFFIN, DENSE])
def test_a_stream_says_the_same(client: openai.OpenAI, dart: Any) -> None:
    whole = chat(client, extra_body=dart)
    options = {"include_usage": True}
    chunks = list(chat(client, stream=True, stream_options=options, extra_body=dart))
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].dart["achieved_sparsity"] == whole.dart["achieved_sparsity"]
    reasons = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]


def test_several_choices(client: openai.OpenAI) -> None:
    found = chat(client, n=3, temperature=1, seed=5, extra_body=GRIFFIN)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in found.choices}) > 1
    assert found.dart["remask_causes"] == {"first": 1}  # one batch, one mask
    greedy = chat(client, n=2, extra_body=GRIFFIN)
    alone = chat(client, extra_body=GRIFFIN).choices[0].message.content
    assert [choice.message.content for choice in greedy.choices] == [alone, alone]
    chunks = list(chat(client, n=2, stream=True, extra_body=GRIFFIN))
    for index in range(2):
        own = [c for chunk in chunks for c in chunk.choices if c.index == index]
        text = "".join(c.delta.content or "" for c in own)
        assert text == greedy.choices[index].message.content


def test_log_probabilities(client: openai.OpenAI, smollm2: Any) -> None:
    _, tokenizer = smollm2
    found = chat(client, max_tokens=3, logprobs=True, top_logprobs=4, extra_body=DENSE).choices[0]
    content = found.logprobs.content
    assert "".join(one.token for one in content) == found.message.content
    for one in content:
        assert bytes(one.bytes).decode() == one.token
        assert one.logprob == one.top_logprobs[0].logprob  # greedy: the likeliest
        assert [t.logprob for t in one.top_logprobs] == sorted(
            (t.logprob for t in one.top_logprobs), reverse=True
        )
        assert sum(math.exp(t.logprob) for t in one.top_logprobs) <= 1 + 1e-4
    prompt = tokenizer("The sky is").input_ids
    text = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=1, temperature=0, logprobs=2, extra_body=DENSE
    )
    scored = text.choices[0].logprobs
    assert scored.tokens == [text.choices[0].text]
    assert scored.token_logprobs == [max(scored.top_logprobs[0].values())]
    assert len(scored.top_logprobs[0]) == 2
    assert scored.text_offset == [0]


def test_a_conversation_reads_only_what_is_new(client: openai.OpenAI) -> None:
    body = {"dart": {**GRIFFIN["dart"], "conversation": "cities"}}
    first = chat(client, extra_body=body)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    further = [*QUESTION, answer, {"role": "user", "content": "And of Spain?"}]
    second = chat(client, messages=further, extra_body=body)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert 0 < cached < second.usage.prompt_tokens
    assert second.timings["prompt_n"] == second.usage.prompt_tokens - cached
    assert second.dart["achieved_sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "kind", "param", "code"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": 3}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"messages": []}, openai.BadRequestError, "messages", "invalid_value"),
        ({"extra_body": {"top_k": 3}}, openai.BadRequestError, "top_k", "unknown_parameter"),
        ({"tools": [{"type": "x"}]}, openai.BadRequestError, "tools", "unsupported_parameter"),
        ({"stream": True, "n": 9}, openai.BadRequestError, "n", "invalid_value"),
    ],
)
def test_errors(client: openai.OpenAI, options: Any, kind: Any, param: str, code: Any) -> None:
    with pytest.raises(kind) as caught:
        chat(client, **options)
    error = caught.value
    assert (error.param, error.code) == (param, code)
    assert error.request_id.startswith("req_")
    assert set(error.body) == {"message", "type", "param", "code"}


def test_answers_do_not_leak_into_one_another(
    client: openai.OpenAI,
) -> None:
    """Dense, pruned and dense again: each as if it were alone."""
    bodies = [DENSE, GRIFFIN, {"dart": {"method": "griffin", "sparsity": 0.7}}, DENSE, GRIFFIN]
    found = [chat(client, extra_body=body).choices[0].message.content for body in bodies]
    assert found[0] == found[3]
    assert found[1] == found[4]
    assert found[0] != found[2]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server: Running) -> None:
    def curl(*arguments: str, body: Any = None) -> str:
        data = [] if body is None else ["-H", "Content-Type: application/json", "-d", "@-"]
        done = subprocess.run(
            ["curl", "-sN", "--noproxy", "*", "--max-time", "30", *data, *arguments],
            input=None if body is None else json.dumps(body),
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    asked = {"messages": QUESTION, "max_tokens": 4, "temperature": 0}
    whole = json.loads(curl(f"{server.url}/v1/chat/completions", body=asked))
    stream = curl(f"{server.url}/v1/chat/completions", body={**asked, "stream": True})
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert lines[-1] == "[DONE]"
    texts = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
    assert "".join(texts) == whole["choices"][0]["message"]["content"]
    status = curl("-o", "/dev/null", "-w", "%{http_code}", f"{server.url}/v1/models/x")
    assert status == "404"
