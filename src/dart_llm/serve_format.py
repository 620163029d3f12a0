"""From the engine's records to OpenAI's answers: whole ones, and chunks of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from dart_llm.engine_records import Done, Record, Start, Token
from dart_llm.results import finite
from dart_llm.serve_errors import Refusal
from dart_llm.serve_logprobs import Scored, chat_logprobs, text_logprobs

Json = dict[str, Any]
ACCOUNTING = (
    "method",
    "requested_sparsity",
    "achieved_sparsity",
    "sparsity_while_pruned",
    "dense_token_share",
    "decoded_tokens",
    "remasks",
    "remask_causes",
    "executor",
    "ffn_bytes_share",
    "ffn_flops_share",
    "bytes_limit",
    "extra_memory_bytes",
)
"""What of the run's report stands under ``dart`` in an answer; ``/api/events`` has all of it."""


def json_bytes(data: Any) -> bytes:
    """Compact JSON; a number that is not finite becomes null."""
    try:
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(finite(data), separators=(",", ":"))
    return text.encode()


def sse(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json_bytes(data) + b"\n\n"


@dataclass
class Choice:
    """One of the n texts: what of it was said, and the tokens whose text is still held back."""

    said: str = ""
    scored: list[Scored] = field(default_factory=list)
    """Tokens since the text was last said."""
    every: list[Scored] = field(default_factory=list)


class Format:
    """One answer in the making.  ``scored``: whether log-probabilities were asked for."""

    kind = "text_completion"
    chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self,
        model: str,
        choices: int,
        scored: bool = False,
        usage_wanted: bool = False,
    ) -> None:
        self.scored = scored
        self.usage_wanted = usage_wanted
        self.choices = [Choice() for _ in range(choices)]
        self.done: Done | None = None
        self._head = {
            "id": f"{self.prefix}-{token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    # what the two kinds differ in

    def _text(self, text: str, streamed: bool) -> Json:
        return {"text": text}

    def _logprobs(self, tokens: Sequence[Scored], offset: int) -> Json:
        return text_logprobs(tokens, offset)

    def _opening(self) -> Json | None:
        return None

    def _closing(self) -> Json:
        return {"text": ""}

    # records

    def _heard(self, token: Token) -> Choice:
        """The token's choice, with the token among those whose text is to be said."""
        choice = self.choices[token.choice]
        if self.scored:
            top = tuple((one.text, one.logprob) for one in token.top or ())
            choice.scored.append(Scored(token.piece, token.logprob, top))
        return choice

    def _say(self, choice: Choice, text: str) -> tuple[list[Scored], int]:
        """``text`` is said: the tokens behind it, and the characters before it."""
        before, tokens = len(choice.said), choice.scored
        choice.said += text
        choice.scored = []
        choice.every += tokens
        return tokens, before

    # a stream

    def chunks(self, record: Record) -> bytes:
        """The events that a record gives, maybe none."""
        if isinstance(record, Token):
            choice = self._heard(record)
            return self._said(record.choice, choice, record.text) if record.text else b""
        if isinstance(record, Start) and (opening := self._opening()) is not None:
            return b"".join(self._chunk(i, opening) for i in range(len(self.choices)))
        if isinstance(record, Done):
            self.done = record
            return self._last(record)
        return b""

    def _said(self, index: int, choice: Choice, text: str) -> bytes:
        tokens, before = self._say(choice, text)
        logprobs = self._logprobs(tokens, before) if self.scored else None
        return self._chunk(index, self._text(text, True), logprobs)

    def _last(self, record: Done) -> bytes:
        found, count = [], len(self.choices)
        for index, choice in enumerate(self.choices):
            rest = record.texts[index][len(choice.said) :]
            if rest:
                found.append(self._said(index, choice, rest))
            more = self._extras(record) if index == count - 1 else {}
            reason = record.finish[index]
            found.append(self._chunk(index, self._closing(), None, reason, more))
        if self.usage_wanted:
            whole = {**self._envelope(self.chunk_kind), "choices": []}
            found.append(sse({**whole, "usage": usage(record), **self._extras(record)}))
        found.append(b"data: [DONE]\n\n")
        return b"".join(found)

    def _chunk(
        self,
        index: int,
        content: Json,
        logprobs: Json | None = None,
        reason: str | None = None,
        more: Json | None = None,
    ) -> bytes:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._envelope(self.chunk_kind), "choices": [choice], **(more or {})}
        if self.usage_wanted:
            chunk["usage"] = None
        return sse(chunk)

    # a whole answer

    def keep(self, record: Record) -> None:
        """Take in a record of an answer that is sent as a whole."""
        if isinstance(record, Token):
            choice = self._heard(record)
            if record.text:
                self._say(choice, record.text)
        elif isinstance(record, Done):
            self.done = record

    def whole(self) -> bytes:
        """The answer, once ``done`` was kept."""
        if self.done is None:
            raise RuntimeError("the engine ended an answer without saying so")
        choices = []
        for index, (choice, text) in enumerate(zip(self.choices, self.done.texts, strict=True)):
            if len(text) > len(choice.said):
                self._say(choice, text[len(choice.said) :])
            choices.append(
                {
                    "index": index,
                    **self._text(text, False),
                    "logprobs": self._logprobs(choice.every, 0) if self.scored else None,
                    "finish_reason": self.done.finish[index],
                }
            )
        answer = {**self._envelope(self.kind), "choices": choices, "usage": usage(self.done)}
        return json_bytes({**answer, **self._extras(self.done)})

    def _envelope(self, kind: str) -> Json:
        return {**self._head, "object": kind}

    @staticmethod
    def _extras(done: Done) -> Json:
        return {"timings": done.timings.to_dict(), "dart": accounting(done)}


def usage(done: Done) -> Json:
    """``usage`` in OpenAI's names."""
    prompt, completion = done.usage.prompt_tokens, done.usage.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": done.usage.cached_tokens},
    }


def accounting(done: Done) -> Json:
    """``dart`` of an answer: what was removed, and what it cost."""
    return {name: getattr(done.report, name) for name in ACCOUNTING}


class ChatFormat(Format):
    """Of ``/v1/chat/completions``."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def _text(self, text: str, streamed: bool) -> Json:
        if streamed:
            return {"delta": {"content": text}}
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, tokens: Sequence[Scored], offset: int) -> Json:
        return chat_logprobs(tokens)

    def _opening(self) -> Json | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def _closing(self) -> Json:
        return {"delta": {}}


def failed(refusal: Refusal) -> bytes:
    """What ends a stream that cannot go on; OpenAI's clients raise it."""
    return sse(refusal.to_dict())
