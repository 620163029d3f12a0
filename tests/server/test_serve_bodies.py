"""What a large body costs: little memory, a short look, and nobody else's time."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.server.run import warm
from dart_llm.server.schemas import ChatBody, CompletionBody
from serve_cases import FACTS, ByteTokenizer, FakeEngine, Watched, running, until

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
CONTEXT = FACTS.context or 0


@pytest.mark.parametrize("url", [CHAT_URL, TEXT_URL])
def test_a_text_that_is_too_long_is_not_read_to_its_end(url: str) -> None:
    text = "e\u0301" * 340_000
    body = (
        {"prompt": text} if url == TEXT_URL else {"messages": [{"role": "user", "content": text}]}
    )
    data = json.dumps(body, ensure_ascii=False).encode()
    assert 1_000_000 < len(data) < 1 << 20
    words = Watched()
    with running(tokenizer=words) as server, server.client() as client:
        headers = {"Content-Type": "application/json"}
        response = client.post(url, content=data, headers=headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"] == (
        f"This model's maximum context length is {CONTEXT} tokens, but the prompt has more than "
        f"{CONTEXT} tokens: shorten it"
    )
    assert sum(words.lengths) <= 4 * (CONTEXT + 64)


@pytest.mark.parametrize(("length", "fits"), [(40 * CONTEXT - 40, True), (41 * CONTEXT, False)])
def test_long_tokens_fit_as_short_ones_do(length: int, fits: bool) -> None:
    words = Watched(width=40)
    with running(tokenizer=words) as server, server.client() as client:
        response = client.post(TEXT_URL, json={"prompt": "x" * length, "max_tokens": 1})
    assert response.status_code == (200 if fits else 400)
    assert response.json().get("usage", {}).get("prompt_tokens") == (CONTEXT - 1 if fits else None)


def test_long_bodies_are_read_one_at_a_time_beside_everything_else() -> None:
    words, statuses = Watched(held=True), []
    with running(FakeEngine(), words) as server:

        def post() -> None:
            with server.client() as client:
                body = {"prompt": "x" * 20_000}
                statuses.append(client.post(TEXT_URL, json=body).status_code)

        threads = [threading.Thread(target=post, daemon=True) for _ in range(12)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: server.service.metrics.registry.get_sample_value(
                "dart_llm_http_requests") == 12)  # fmt: skip
            until(lambda: words.inside == 1)
            with server.client() as client:
                for path in ("/healthz", "/api/runs", "/v1/models"):
                    assert client.get(path).status_code == 200
            assert not statuses
        finally:
            words.free.set()
        for thread in threads:
            thread.join(20)
    assert statuses == [400] * 12
    assert words.most == 1


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, {"prompt": [1] * 1000 + ["a"] * 1000}),
        (CompletionBody, {"prompt": [["a"] * 1000] * 1000}),
        (ChatBody, {"messages": [{}] * 1000}),
        (ChatBody, {"messages": [{"role": "user", "content": [{}] * 1000}]}),
    ],
)
def test_of_many_faults_few_are_collected(kind: Any, body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 5


@pytest.mark.parametrize(("context", "most"), [(None, 400), (128, 124), (3, 1)])
def test_the_first_texts_fit_a_short_context(context: int | None, most: int) -> None:
    asked: list[Ask] = []
    engine = SimpleNamespace(run=asked.append)
    warm(engine, ByteTokenizer(), [], context)
    assert [len(one.ids) for one in asked] == [most]
