"""Bodies from strangers: what is no JSON, or no request, is refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dart_llm.server.responses import APIError as Refusal
from dart_llm.server.schemas import IGNORED, NEUTRAL, ChatBody, CompletionBody, read
from dart_llm.server.security import DEEPEST, parse

MESSAGES = [{"role": "user", "content": "hi"}]
ASSISTANT = {"role": "assistant", "content": "yes"}


def nested(depth: int) -> bytes:
    """An object with lists inside one another, ``depth`` in all."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "line 1, column 2"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too long"),
        (b'{"a": 0.' + b"9" * 5000 + b"}", "too long"),
        (b'{"a": 1, "a": 2}', 'the key "a" stands twice'),
        (b'{"x": {"a": 1, "b": 2, "a": 2}}', 'the key "a" stands twice'),
        (b'{"a": "\xff"}', "not UTF-8 (byte 7)"),
        (b'{"a": "\\ud800"}', "half of a character"),
        (b'{"\\udfff": 1}', "half of a character"),
        (nested(DEEPEST + 1), "nests more than 32"),
        (nested(100_000), "nests more than 32"),
        (b'{"a": 1} {"b": 2}', "Extra data"),
    ],
)
def test_what_is_not_json_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(Refusal) as caught:
        parse(body)
    assert caught.value.status == 400
    assert caught.value.code == "invalid_json"
    assert said in caught.value.message


def test_json_is_read_as_it_is() -> None:
    data = {"a": [1, 2.5, None, True, "\u00e9\U0001f600"], "b": {"c": -(2**62)}}
    assert parse(json.dumps(data).encode()) == data
    assert parse(nested(DEEPEST))["a"] == json.loads(nested(DEEPEST))["a"]


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"messages": None}, "messages", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "missing_required_parameter"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({"max_tokens": 2.5}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"top_p": 1.5}, "top_p", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"dart": {"sparsity": 1}}, "dart.sparsity", "invalid_value"),
        ({"dart": {"sparsty": 0.5}}, "dart.sparsty", "unknown_parameter"),
        ({"dart": "dense"}, "dart", "invalid_value"),
        ({"max_token": 5}, "max_token", "unknown_parameter"),
        ({"top_k": 5}, "top_k", "unknown_parameter"),
        ({"tools": [{}]}, "tools", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"logit_bias": {"1": 1}}, "logit_bias", "unsupported_parameter"),
        ({"max_completion_tokens": -2}, "max_completion_tokens", "invalid_value"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"best_of": True}, "best_of", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0", "missing_required_parameter"),
        (
            {"messages": [{"role": "system", "content": None}]},
            "messages.0",
            "missing_required_parameter",
        ),
        (
            {"messages": [{**ASSISTANT, "tool_calls": [{}]}]},
            "messages.0.tool_calls",
            "invalid_value",
        ),
    ],
)
def test_wrong_fields_are_named(change: dict[str, Any], param: str, code: str | None) -> None:
    with pytest.raises(Refusal) as caught:
        read(ChatBody, {"messages": MESSAGES, **change})
    assert caught.value.status == 400
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_token": 5}, "supplied: max_token; did you mean max_tokens"),
        ({"dart": {"sparcity": 0.5}}, r"^dart\.sparcity: is not a known field; .* mean sparsity\?"),
        ({"dart": {"masking-step": 1}}, r"^dart\.masking-step: .* mean masking_step\?"),
        ({"dart": {"x" * 5000: 1}}, r"^dart\.x{100}: is not a known field$"),
        ({"stop": ["a"] * 5}, "^stop: list should have at most 4 items"),
        ({"stop": ["a", 1]}, r"^stop\.1: input should be a valid string"),
        ({"stop": 1}, "^stop: input should be a valid string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"^messages\.0\.content\.0\.type: input should be 'text'",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, r"^messages\.0\.content: .* valid string"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        read(ChatBody, {"messages": MESSAGES, **change})


def test_what_cannot_change_an_answer_is_ignored() -> None:
    given: dict[str, Any] = {name: {"any": "thing"} for name in IGNORED}
    given |= {name: values[0] if values else None for name, values in NEUTRAL.items()}
    body = read(
        ChatBody, {"messages": MESSAGES, **given, "presence_penalty": 0.0, "temperature": 1}
    )
    assert body == read(ChatBody, {"messages": MESSAGES, "temperature": 1})


def test_what_asks_for_nothing_is_taken() -> None:
    spoken = {**ASSISTANT, "tool_calls": [], "reasoning_content": "so I think", "refusal": None}
    messages = [*MESSAGES, spoken, {"role": "assistant"}]
    body = read(ChatBody, {"messages": messages, "tools": [], "top_logprobs": 0})
    assert [one.text for one in body.messages[1:]] == ["yes", ""]


def test_texts_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    body = read(ChatBody, {"messages": messages})
    assert [message.text for message in body.messages] == ["one two", ""]


def test_stops_are_one_or_several() -> None:
    assert read(CompletionBody, {"prompt": "x", "stop": "a"}).stops == ("a",)
    assert read(CompletionBody, {"prompt": "x", "stop": ["a", "b"]}).stops == ("a", "b")
    assert read(CompletionBody, {"prompt": "x", "stop": None}).stops == ()
