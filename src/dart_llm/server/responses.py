"""From the engine's records to OpenAI's answers, whole ones and chunks; errors in OpenAI's form."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from dart_llm.engine.requests import Done, Likely, Record, Sampling, Scores, Start, Token
from dart_llm.files import finite

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}
"""``error.type`` by status; of all others ``invalid_request_error``."""


class APIError(Exception):
    """Ends a request: an HTTP status and one sentence for the client.

    ``param``: the field that is wrong; ``code``: a word for programs, ``invalid_value`` by default
    for a 400; ``retry_after``: seconds; ``allow``: the methods of an address.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or ("invalid_value" if status == 400 else None)
        self.retry_after, self.allow = retry_after, allow

    def to_dict(self) -> dict[str, Any]:
        """``{"error": {message, type, param, code}}``."""
        kind = TYPES.get(self.status, "invalid_request_error")
        details = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": details}

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of the response beside the body's type and length."""
        headers = {
            "retry-after": self.retry_after and str(self.retry_after),
            "allow": self.allow,
            "www-authenticate": "Bearer" if self.status == 401 else None,
            # the rest of the body is not read
            "connection": "close" if self.status in (408, 413) else None,
        }
        return [(name.encode(), value.encode()) for name, value in headers.items() if value]


def internal(request_id: str) -> APIError:
    """The error of a fault in the server, with the number under which the log has the details."""
    message = f"the server failed on this request; its log has the details under {request_id}"
    return APIError(500, message, code="internal_error")


# log-probabilities of tokens, in OpenAI's two forms


@dataclass(frozen=True)
class Scored:
    """One token with its log-probability and the likeliest tokens in its place, the best first.

    ``piece``: the token's text.  ``logprob``: None for a prompt's first token, which nothing
    predicts.
    """

    piece: str
    logprob: float | None
    top: Sequence[Likely]


def chat_logprobs(tokens: Sequence[Scored]) -> dict[str, Any]:
    """``logprobs`` of a choice of a chat completion."""
    content = [
        {
            **_entry(token.piece, token.logprob),
            "top_logprobs": [_entry(likely.text, likely.logprob) for likely in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(text: str, logprob: float | None) -> dict[str, Any]:
    whole = "\ufffd" not in text  # the bytes of half a character are unknown
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def text_logprobs(tokens: Sequence[Scored], offset: int) -> dict[str, Any]:
    """``logprobs`` of a choice of a completion; ``offset``: characters before the first token."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.piece)
    # of two tokens with one text, such as halves of characters, the likelier one stays
    tops = [
        None if token.logprob is None else {one.text: one.logprob for one in reversed(token.top)}
        for token in tokens
    ]
    return {
        "tokens": [token.piece for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


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
    "bytes_limit",
    "extra_memory_bytes",
)
"""Fields of the run's report under ``dart`` in an answer; ``/api/events`` has all of them."""


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


class RecordFormat:
    """Every record of the request as the engine emits it: ``POST /api/events``.

    ``on_record``: the bytes to send for a record, maybe none; ``end``: after the last record;
    ``error``: the end of an answer that has begun and cannot continue.
    """

    streams = True

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id

    def on_record(self, record: Record) -> bytes:
        return sse(record.to_dict())

    def end(self) -> bytes:
        return b""

    def error(self, error: APIError) -> bytes:
        return sse({"kind": "error", "message": error.message, "request": self.request_id})


@dataclass
class Choice:
    """One of the answers.  ``echo``: the prompt, where the answer repeats it."""

    echo: str = ""
    text: str = ""
    """Text that was sent."""
    pending: list[Scored] = field(default_factory=list)
    """Tokens whose text was not sent yet."""
    tokens: list[Scored] = field(default_factory=list)


class Format:
    """Builds one of OpenAI's answers from records, whole or as a stream of chunks.

    With several ``prompts`` the choices of one come after those of the one before.  ``echo``:
    whether the answer begins with the prompt.
    """

    kind = "text_completion"
    chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        prompts: int = 1,
        streams: bool = False,
        with_usage: bool = False,
        echo: bool = False,
    ) -> None:
        self.streams, self.with_usage, self.echo = streams, with_usage, echo
        self.scored = sampling.logprobs is not None
        self.n, self.prompts = sampling.n, prompts
        self.choices = [Choice() for _ in range(sampling.n * prompts)]
        self.done: list[Done] = []
        """Of each prompt that was answered."""
        self._prompt: list[str] = []
        name = f"{self.prefix}-{token_hex(12)}"
        self._head = {"id": name, "created": int(time.time()), "model": model}

    # the differences between the two kinds

    def _text(self, text: str) -> Json:
        return {"text": text}

    def _delta(self, text: str) -> Json:
        return {"text": text}

    def _logprobs(self, tokens: Sequence[Scored], offset: int) -> Json:
        return text_logprobs(tokens, offset)

    _opening: Json | None = None
    _closing: Json = {"text": ""}  # noqa: RUF012

    def on_record(self, record: Record) -> bytes:
        """The chunks of a record; nothing where the answer is sent whole."""
        chunks = []
        current = self._current()
        if isinstance(record, Start) and self._opening is not None:
            chunks += [self._chunk(index, self._opening) for index in current]
        for index, text in self._new_texts(record):
            choice = self.choices[index]
            logprobs = self._logprobs(choice.pending, len(choice.text)) if self.scored else None
            chunks.append(self._chunk(index, self._delta(text), logprobs))
            choice.text += text
            choice.tokens += choice.pending
            choice.pending = []
        if isinstance(record, Done):
            self.done.append(record)
            chunks += self._last_chunks(current, record)
        return b"".join(chunks) if self.streams else b""

    def end(self) -> bytes:
        """The whole answer; nothing at the end of a stream."""
        return b"" if self.streams else self._whole()

    def error(self, error: APIError) -> bytes:
        """The last event of a stream; OpenAI's clients raise it."""
        return sse(error.to_dict()) if self.streams else b""

    def _current(self) -> range:
        """The choices of the prompt that is being answered."""
        first = self.n * len(self.done)
        return range(first, first + self.n)

    def _new_texts(self, record: Record) -> list[tuple[int, str]]:
        """The choices that have new text with this record, and the text."""
        if isinstance(record, Token):
            index = self._current()[record.choice]
            if self.scored:
                scored = Scored(record.piece, record.logprob, record.top or ())
                self.choices[index].pending.append(scored)
            return [(index, record.text)] if record.text else []
        if isinstance(record, Start):
            self._prompt = [token.text for token in record.prompt]
            return [] if self.scored else self._echoed([])
        if isinstance(record, Scores):
            scores = zip(self._prompt, record.logprobs, record.top, strict=True)
            return self._echoed([Scored(*score) for score in scores])
        if isinstance(record, Done):
            rests = []
            for index, text in zip(self._current(), record.texts, strict=True):
                choice = self.choices[index]
                rest = (choice.echo + text)[len(choice.text) :]
                # with the prompt's scores every token counts, also the one that ends a text
                if rest or (self.echo and choice.pending):
                    rests.append((index, rest))
            return rests
        return []

    def _echoed(self, scored: list[Scored]) -> list[tuple[int, str]]:
        """The prompt as the beginning of each of its choices, if that is requested."""
        if not self.echo:
            return []
        for index in self._current():
            self.choices[index].echo = "".join(self._prompt)
            self.choices[index].pending += scored
        return [(index, self.choices[index].echo) for index in self._current()]

    def _last_chunks(self, current: range, record: Done) -> list[bytes]:
        """The ends of a prompt's choices, and after the last prompt the end of the stream."""
        ended, chunks = len(self.done) == self.prompts, []
        for index, reason in zip(current, record.finish, strict=True):
            extras = self._extras() if ended and index == current[-1] else {}
            chunks.append(self._chunk(index, self._closing, None, reason, extras))
        if ended and self.with_usage:
            last = {**self._head, "object": self.chunk_kind, "choices": [], **self._extras()}
            chunks.append(sse({**last, "usage": usage(self.done)}))
        return [*chunks, b"data: [DONE]\n\n"] if ended else chunks

    def _chunk(
        self,
        index: int,
        content: Json,
        logprobs: Json | None = None,
        reason: str | None = None,
        extras: Json | None = None,
    ) -> bytes:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head, "object": self.chunk_kind, "choices": [choice], **(extras or {})}
        return sse({**chunk, "usage": None} if self.with_usage else chunk)

    def _whole(self) -> bytes:
        if len(self.done) != self.prompts:
            raise RuntimeError("the engine ended an answer without a done record")
        reasons = [reason for done in self.done for reason in done.finish]
        choices = [
            {
                "index": index,
                **self._text(choice.text),
                "logprobs": self._logprobs(choice.tokens, 0) if self.scored else None,
                "finish_reason": reasons[index],
            }
            for index, choice in enumerate(self.choices)
        ]
        answer = {**self._head, "object": self.kind, "choices": choices}
        return json_bytes({**answer, "usage": usage(self.done), **self._extras()})

    def _extras(self) -> Json:
        """``timings`` and ``dart``: of several prompts a list, one for each."""
        timings = [done.timings.to_dict() for done in self.done]
        accounts = [accounting(done) for done in self.done]
        if self.prompts == 1:
            return {"timings": timings[0], "dart": accounts[0]}
        return {"timings": timings, "dart": accounts}


def usage(answered: Sequence[Done]) -> Json:
    """``usage`` of all prompts, in OpenAI's names."""
    prompt = sum(done.usage.prompt_tokens for done in answered)
    completion = sum(done.usage.completion_tokens for done in answered)
    cached = sum(done.usage.cached_tokens for done in answered)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def accounting(done: Done) -> Json:
    """``dart`` of an answer: what was removed, and what it cost."""
    return {name: getattr(done.report, name) for name in ACCOUNTING}


class ChatFormat(Format):
    """Of ``/v1/chat/completions``."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"
    _opening = {"delta": {"role": "assistant", "content": ""}}  # noqa: RUF012
    _closing = {"delta": {}}  # noqa: RUF012

    def _text(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> Json:
        return {"delta": {"content": text}}

    def _logprobs(self, tokens: Sequence[Scored], offset: int) -> Json:
        return chat_logprobs(tokens)
