"""From the engine's records to OpenAI's answers, whole ones and chunks; and why none is given."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from pydantic import BaseModel

from dart_llm.engine.events import Done, Likely, Record, Scores, Start, Token
from dart_llm.engine.requests import Sampling
from dart_llm.files import finite

# errors, in the shape that OpenAI's clients read

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}
"""``error.type`` of each status that the server answers with."""


REFUSED = {status: kind for status, kind in TYPES.items() if status not in (405, 500)}
"""What the description of every route tells of its errors."""


class ErrorFacts(BaseModel):
    """What is wrong with a request; ``param``: the field; ``code``: a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorFacts


class APIError(Exception):
    """A request that gets no answer: an HTTP status and one sentence for the client.

    ``param``: the field that is wrong; ``code``: a word for programs, of a 400 ``invalid_value``
    unless another is given; ``retry_after``: seconds; ``allow``: the methods that an address takes.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        allow: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or ("invalid_value" if status == 400 else None)
        self.retry_after = retry_after
        self.allow = allow

    def to_dict(self) -> dict[str, Any]:
        """``{"error": {message, type, param, code}}``."""
        kind = TYPES[self.status]
        facts = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": facts}

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the answer carries beside its body's type and length."""
        headers = {
            "retry-after": "" if self.retry_after is None else str(self.retry_after),
            "allow": ", ".join(self.allow),
            "www-authenticate": "Bearer" if self.status == 401 else "",
            # the rest of the body is not read
            "connection": "close" if self.status in (408, 413) else "",
        }
        return [(name.encode(), value.encode()) for name, value in headers.items() if value]


def internal(request_id: str) -> APIError:
    """What a client is told of a fault of ours: the number under which the log has it."""
    said = f"the server failed on this request; its log says more under {request_id}"
    return APIError(500, said, code="internal_error")


# log-probabilities of tokens, in the two shapes that OpenAI has for them


@dataclass(frozen=True)
class Scored:
    """One token with its log-probability and the best of the model's own choice.

    ``piece``: the token's text alone.  ``logprob``: None for a prompt's first token, which nothing
    predicts.  ``top``: the best first.
    """

    piece: str
    logprob: float | None
    top: Sequence[Likely]


def chat_logprobs(tokens: Sequence[Scored]) -> dict[str, Any]:
    """``logprobs`` of a choice of a chat completion."""
    return {
        "content": [
            {
                **_entry(token.piece, token.logprob),
                "top_logprobs": [_entry(one.text, one.logprob) for one in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _entry(text: str, logprob: float | None) -> dict[str, Any]:
    whole = "\ufffd" not in text  # half of a character has no text, and its bytes are not known
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def text_logprobs(tokens: Sequence[Scored], offset: int) -> dict[str, Any]:
    """``logprobs`` of a choice of a completion; ``offset``: characters before the first token."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.piece)
    # of two tokens with one text, such as halves of characters, the likelier one stays
    tops = [
        None if one.logprob is None else {top.text: top.logprob for top in reversed(one.top)}
        for one in tokens
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
    """One of the texts: what of it was said, and the tokens whose text is still held back.

    ``echo``: the prompt, where it stands before the answer.
    """

    echo: str = ""
    said: str = ""
    scored: list[Scored] = field(default_factory=list)
    """Tokens since the text was last said."""
    every: list[Scored] = field(default_factory=list)


class RecordFormat:
    """Every record of the request, as the library has it: ``POST /api/events``.

    ``take``: what is sent for a record, maybe nothing; ``end``: after the last one; ``error``: what
    ends an answer that has begun and cannot go on.
    """

    streams = True

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id

    def take(self, record: Record) -> bytes:
        return sse(record.to_dict())

    def end(self) -> bytes:
        return b""

    def error(self, refusal: APIError) -> bytes:
        return sse({"kind": "error", "message": refusal.message, "request": self.request_id})


class Format:
    """One answer of OpenAI's in the making, whole or as a stream of chunks.

    ``model``: what answers.  With several ``prompts`` the choices of one come after those of the
    other.  ``echo``: whether the prompt stands before the answer.
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
        usage_wanted: bool = False,
        echo: bool = False,
    ) -> None:
        self.streams, self.usage_wanted, self.echo = streams, usage_wanted, echo
        self.scored = sampling.logprobs is not None
        self.each, self.prompts = sampling.n, prompts
        self.choices = [Choice() for _ in range(self.each * prompts)]
        self.done: list[Done] = []
        """Of each prompt that was answered."""
        self._prompt: list[str] = []
        made = f"{self.prefix}-{token_hex(12)}"
        self._head = {"id": made, "created": int(time.time()), "model": model}

    def take(self, record: Record) -> bytes:
        return self._chunks(record) if self.streams else self._keep(record)

    def end(self) -> bytes:
        return b"" if self.streams else self._whole()

    def error(self, refusal: APIError) -> bytes:
        """OpenAI's clients raise it."""
        return sse(refusal.to_dict()) if self.streams else b""

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

    def _own(self) -> range:
        """The choices of the prompt that is being answered."""
        first = self.each * len(self.done)
        return range(first, first + self.each)

    def _heard(self, record: Record) -> list[tuple[int, str]]:
        """Take in a record; which choices have something to say now, and what."""
        if isinstance(record, Token):
            place = self._own()[record.choice]
            if self.scored:
                scored = Scored(record.piece, record.logprob, record.top or ())
                self.choices[place].scored.append(scored)
            return [(place, record.text)] if record.text else []
        if isinstance(record, Start):
            self._prompt = [one.text for one in record.prompt]
            return [] if self.scored else self._echoed([])
        if isinstance(record, Scores):
            places = zip(self._prompt, record.logprobs, record.top, strict=True)
            return self._echoed([Scored(*place) for place in places])
        if isinstance(record, Done):
            rests = []
            for place, text in zip(self._own(), record.texts, strict=True):
                choice = self.choices[place]
                rest = (choice.echo + text)[len(choice.said) :]
                # who asked for the prompt's scores counts tokens: the one that ends a text too
                if rest or (self.echo and choice.scored):
                    rests.append((place, rest))
            return rests
        return []

    def _echoed(self, scored: list[Scored]) -> list[tuple[int, str]]:
        """The prompt is said by each of its choices, if that is wanted."""
        if not self.echo:
            return []
        for place in self._own():
            self.choices[place].echo = "".join(self._prompt)
            self.choices[place].scored += scored
        return [(place, self.choices[place].echo) for place in self._own()]

    def _say(self, choice: Choice, text: str) -> tuple[list[Scored], int]:
        """``text`` is said: the tokens behind it, and the characters before it."""
        before, tokens = len(choice.said), choice.scored
        choice.said += text
        choice.scored = []
        choice.every += tokens
        return tokens, before

    # a stream

    def _chunks(self, record: Record) -> bytes:
        found = []
        if isinstance(record, Start) and (opening := self._opening()) is not None:
            found += [self._chunk(place, opening) for place in self._own()]
        found += [self._said(place, text) for place, text in self._heard(record)]
        if isinstance(record, Done):
            found += self._last(record)
        return b"".join(found)

    def _said(self, place: int, text: str) -> bytes:
        tokens, before = self._say(self.choices[place], text)
        logprobs = self._logprobs(tokens, before) if self.scored else None
        return self._chunk(place, self._text(text, True), logprobs)

    def _last(self, record: Done) -> list[bytes]:
        """What ends the choices of a prompt, and after the last prompt the stream."""
        found, own = [], self._own()
        self.done.append(record)
        ended = len(self.done) == self.prompts
        for place, reason in zip(own, record.finish, strict=True):
            more = self._extras() if ended and place == own[-1] else {}
            found.append(self._chunk(place, self._closing(), None, reason, more))
        if ended and self.usage_wanted:
            whole = {**self._envelope(self.chunk_kind), "choices": []}
            found.append(sse({**whole, "usage": usage(self.done), **self._extras()}))
        return [*found, b"data: [DONE]\n\n"] if ended else found

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

    def _keep(self, record: Record) -> bytes:
        for place, text in self._heard(record):
            self._say(self.choices[place], text)
        if isinstance(record, Done):
            self.done.append(record)
        return b""

    def _whole(self) -> bytes:
        if len(self.done) != self.prompts:
            raise RuntimeError("the engine ended an answer without saying so")
        finish = [reason for done in self.done for reason in done.finish]
        choices = [
            {
                "index": index,
                **self._text(choice.said, False),
                "logprobs": self._logprobs(choice.every, 0) if self.scored else None,
                "finish_reason": finish[index],
            }
            for index, choice in enumerate(self.choices)
        ]
        answer = {**self._envelope(self.kind), "choices": choices, "usage": usage(self.done)}
        return json_bytes({**answer, **self._extras()})

    def _envelope(self, kind: str) -> Json:
        return {**self._head, "object": kind}

    def _extras(self) -> Json:
        """Of one prompt as it is; of several a list, one for each."""
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


Shape = Format | RecordFormat  # what turns records into bytes
