"""Request bodies and answers in OpenAI's format, and limits on the tokens of prompts and answers.

Like OpenAI, the server refuses unknown fields.  It also refuses OpenAI fields that it does not
support, unless their value has no effect.  It ignores OpenAI fields that cannot change an answer.
"""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from secrets import token_hex
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dart_llm.data.texts import chat_text, is_text
from dart_llm.engine.requests import (
    Done,
    GenerationRequest,
    Likely,
    Record,
    Sampling,
    Scores,
    Start,
    Token,
)
from dart_llm.errors import ConfigError
from dart_llm.files import finite
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import METHODS
from dart_llm.server.settings import ServeSettings, removes_neurons

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}
"""Maps an HTTP status to ``error.type``; the default is ``invalid_request_error``."""


class APIError(Exception):
    """An error that ends a request with an HTTP status and one sentence for the client.

    ``param`` names the invalid field.  ``code`` names the error for programs; for status 400, it is
    ``invalid_value`` by default.  ``headers`` are added to the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or ("invalid_value" if status == 400 else None)
        self.headers = dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """The error in OpenAI's format: ``{"error": {message, type, param, code}}``."""
        kind = TYPES.get(self.status, "invalid_request_error")
        details = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": details}


# Request bodies.

Stop = Annotated[str, Field(min_length=1, max_length=1000)]

Name = Annotated[str, Field(max_length=256)]

Ids = Annotated[list[int], Field(fail_fast=True)]

Texts = Annotated[list[str], Field(fail_fast=True)]
"""Text prompts.  Validation stops at the first error, because lists of prompts can be long."""

Tokens = Annotated[int, Field(ge=-1)]
"""A number of tokens; clients of llama.cpp send -1, which means "as many as fit"."""

IGNORED = (
    "metadata parallel_tool_calls prompt_cache_key prompt_cache_retention reasoning_effort "
    "safety_identifier service_tier store verbosity"
).split()
"""OpenAI fields that are ignored, because they cannot change an answer of this server."""

UNSUPPORTED = (
    "audio best_of frequency_penalty function_call functions logit_bias modalities prediction "
    "presence_penalty response_format suffix tool_choice tools web_search_options"
).split()
"""OpenAI fields that are refused unless their value is in ``NEUTRAL``."""

NEUTRAL: tuple[Any, ...] = (None, 0, "", [], {}, "none", "auto", ["text"], {"type": "text"})
"""Values that turn an unsupported feature off or request its default, and are thus accepted."""


class Body(BaseModel):
    """Base of request bodies: refuses unknown fields, inf, NaN, and strings in place of numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Dart(Body):
    """How the answer to this request is pruned; missing fields take the server's settings."""

    method: Name | None = None
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    masking_step: Annotated[int, Field(ge=0, le=100_000)] | None = None
    drift: Name | None = None
    conversation: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """A message; only an assistant's may lack ``content``.  ``reasoning_content`` is ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: Name | None = None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "role {role} needs content", {"role": self.role})
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Common(Body):
    """Fields that chat completions and text completions share."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    user: Name | None = None
    dart: Dart | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported_fields(cls, data: Any) -> Any:
        """Return the supported fields; raise ``APIError`` for an unknown or unsupported field."""
        if not isinstance(data, dict):
            return data
        for name, value in data.items():
            neutral = value in NEUTRAL or (name, value) == ("best_of", 1)
            if name in UNSUPPORTED and not neutral:
                text = f"this server does not support {name}: leave it out"
                raise APIError(400, text, name, "unsupported_parameter")
            if name not in (*cls.model_fields, *IGNORED, *UNSUPPORTED):
                hint = _hint(name, cls.model_fields)
                text = f"unrecognized request argument supplied: {name[:100]}{hint}"
                raise APIError(400, text, name[:100], "unknown_parameter")
        return {name: value for name, value in data.items() if name in cls.model_fields}


class ChatBody(Common):
    """Body of ``POST /v1/chat/completions`` and ``POST /api/events``."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionBody(Common):
    """Body of ``POST /v1/completions``.

    ``prompt`` is a text, a list of token IDs, or a list of either.  If ``echo`` is true, the answer
    begins with the prompt, and ``logprobs`` cover the prompt too.
    """

    prompt: str | Ids | Texts | Annotated[list[Ids], Field(fail_fast=True)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


def _hint(name: str, names: Iterable[str]) -> str:
    """A hint such as "; did you mean top_p?", or "" if no name in ``names`` is similar.

    Only the first 100 characters of ``name`` are compared.
    """
    similar = difflib.get_close_matches(name[:100], names, n=1, cutoff=0.6)
    return f"; did you mean {similar[0]}?" if similar else ""


BRANCHES = ("body", "str", "int", "constrained-str")
"""Parts of pydantic's error locations that are not fields: the body and branches of unions."""


def refusal(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """Return the most helpful of a body's validation errors as an ``APIError``.

    It names the field and says what is wrong.  If a field allows several types (a union), the most
    helpful error is that of the type that matched most of the value.
    """
    if errors[0]["type"] == "json_invalid":
        return APIError(400, "the body is not valid JSON in UTF-8", code="invalid_json")
    error = max(errors, key=lambda item: (not item["type"].endswith("_type"), len(item["loc"])))
    fields = (str(part) for part in error["loc"] if part not in BRANCHES)
    path = [part[:100] for part in fields if "[" not in part]
    where, hint, code = ".".join(path), "", "invalid_value"
    if error["type"] == "missing":
        code = "missing_required_parameter"
    elif error["type"] == "extra_forbidden":  # an unknown name
        code, hint = "unknown_parameter", _hint(path[-1], Dart.model_fields)
    what = error["msg"][:1].lower() + error["msg"][1:]
    return APIError(400, f"{where or 'body'}: {what}{hint}", where or None, code)


# From request bodies to requests to the engine.

COMPLETION_TOKENS = 16  # default max_tokens of /v1/completions, as in OpenAI's API
SMALLEST_TOP_P = 1e-6  # replaces top_p 0, so that only the likeliest token can be sampled
CHARACTERS = 4  # rough number per token; decides how much of a long text is tokenised first
CUT_TOKENS = 64  # margin in tokens, because cutting a text can change and add tokens at the cut


class RequestReader:
    """Turns request bodies into requests to the engine, within the limits of model and server.

    ``names``: the model's ID, then its aliases.  ``context``: the model's context length in tokens;
    None means unknown.  ``vocabulary``: number of token IDs that the model has.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: ServeSettings,
        names: tuple[str, ...],
        context: int | None,
        vocabulary: int,
    ) -> None:
        self.tokenizer, self.settings, self.names = tokenizer, settings, names
        self.context, self.vocabulary = context, vocabulary
        limits = (settings.max_prompt_tokens, context)
        self.longest = min((limit for limit in limits if limit is not None), default=None)
        """Maximum number of tokens in a prompt; None means that there is no known limit."""
        self._default = settings.prune_config()

    def requests(self, body: Common, request_id: str, client: str) -> list[GenerationRequest]:
        """Return one request to the engine per prompt; raises ``APIError`` for an invalid body."""
        if body.model is not None and body.model not in self.names:
            text = f"the model {body.model!r} is not served here: use {self.names[0]!r}"
            raise APIError(404, text, "model", "model_not_found")
        config = self.config(body.dart)
        if isinstance(body, ChatBody):
            prompts, scored = [self._chat_ids(body.messages)], False
            newer_field = body.max_completion_tokens
            max_tokens = body.max_tokens if newer_field is None else newer_field
            if body.top_logprobs and not body.logprobs:
                raise APIError(400, "top_logprobs requires logprobs: true", "top_logprobs")
            logprobs = (body.top_logprobs or 0) if body.logprobs else None
        else:
            assert isinstance(body, CompletionBody)
            prompts = self._completion_ids(body)
            max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
            logprobs, scored = body.logprobs, bool(body.echo) and body.logprobs is not None
        conversation = _conversation(body, client, config)
        try:
            return [
                GenerationRequest(
                    ids,
                    self._sampling(body, len(ids), max_tokens, logprobs, scored),
                    config,
                    conversation,
                    request_id,
                )
                for ids in prompts
            ]
        except ConfigError as error:
            raise APIError(400, str(error)) from None

    def _chat_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token IDs of a conversation, formatted by the model's chat template."""
        code = None if getattr(self.tokenizer, "chat_template", None) else "no_template"
        roles = {"developer": "system"}
        plain = [{"role": roles.get(m.role, m.role), "content": m.text} for m in messages]
        try:
            text = chat_text(self.tokenizer, plain, "use /v1/completions")
        except ConfigError as error:
            raise APIError(400, str(error), "messages", code) from None
        except (ValueError, TypeError):  # raised by the template
            reason = "the model's chat template does not accept these messages"
            raise APIError(400, reason, "messages") from None
        return self._ids(text, add_special_tokens=False)

    def _completion_ids(self, body: CompletionBody) -> list[tuple[int, ...]]:
        """Token IDs of every prompt in the body."""
        prompts: Any = body.prompt
        limit = self.settings.max_prompts
        if isinstance(prompts, str) or all(isinstance(part, int) for part in prompts):
            prompts = [prompts]
        if len(prompts) > limit:
            raise APIError(400, f"{len(prompts)} prompts are too many: at most {limit}", "prompt")
        if len(prompts) > 1 and body.dart and body.dart.conversation:
            text = "a conversation continues a single prompt: give only one prompt"
            raise APIError(400, text, "dart.conversation")
        for ids in prompts:
            if not isinstance(ids, str) and any(not 0 <= id < self.vocabulary for id in ids):
                raise APIError(400, f"token ids must be 0 to {self.vocabulary - 1}", "prompt")
        return [self._ids(ids) if isinstance(ids, str) else tuple(ids) for ids in prompts]

    def _ids(self, text: str, **options: Any) -> tuple[int, ...]:
        """Token IDs of ``text``.

        Raises ``APIError`` as soon as the beginning of ``text`` is too long.  A very long text thus
        takes hardly more work than the longest allowed prompt.
        """
        if not is_text(text):
            raise APIError(400, "a text contains half a character (a lone surrogate): remove it")
        longest = self.longest
        if longest is not None:
            limit = longest + CUT_TOKENS
            length = CHARACTERS * limit
            while length < len(text):
                if len(self.tokenizer(text[:length], verbose=False, **options).input_ids) > limit:
                    raise _too_long(longest, f"more than {longest}")
                length *= 2
        return tuple(self.tokenizer(text, verbose=False, **options).input_ids)

    def _sampling(
        self, body: Common, length: int, requested: int | None, logprobs: int | None, scored: bool
    ) -> Sampling:
        """Return the sampling settings for a prompt of ``length`` tokens.

        ``requested``: the body's max_tokens.  ``logprobs``: as in ``Sampling``.  ``scored``: True
        if the answer contains log probabilities of the prompt's tokens.
        """
        settings, n = self.settings, body.n or 1
        if n > settings.max_choices:
            raise APIError(400, f"n {n} is too large: at most {settings.max_choices}", "n")
        tokens = self._max_tokens(length, requested, scored)
        temperature = settings.temperature if body.temperature is None else body.temperature
        top_p = 1.0 if body.top_p is None else max(SMALLEST_TOP_P, body.top_p)
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or ()
        return Sampling(tokens, temperature, top_p, body.seed, n, tuple(stops), logprobs, scored)

    def _max_tokens(self, length: int, requested: int | None, scored: bool) -> int:
        """Maximum number of answer tokens after ``length`` prompt tokens."""
        if not length:
            raise APIError(400, "the prompt is empty: give at least one word", "prompt")
        if self.longest is not None and length > self.longest:
            raise _too_long(self.longest, str(length))
        if requested == 0 and scored:
            return 0
        if requested == 0:
            text = "max_tokens 0 asks for no answer: give 1 or more, or echo with logprobs"
            raise APIError(400, text, "max_tokens")
        room = self.settings.max_tokens
        if self.context is not None:
            room = min(room, self.context - length)
        if not room:
            raise _too_long(self.context, f"{length}, which leaves no room for an answer,")
        return room if requested in (None, -1) else min(room, requested)

    def config(self, dart: Dart | None) -> PruneConfig | None:
        """Return the pruning configuration of a request, or None for the dense model.

        A request with sparsity 0 also gets None.  Raises ``APIError`` for invalid values, and for a
        method that would first have to calibrate.
        """
        dart = dart or Dart()
        config, param = self._default, "dart.method"
        changes: dict[str, Any] = dart.model_dump(
            include={"sparsity", "masking_step"}, exclude_none=True
        )
        if dart.drift is not None:
            changes["drift"] = {"rule": dart.drift}
        try:
            if dart.method not in (None, config.method):
                preset = METHODS.get_listed(str(dart.method))
                if config.sparsity and "sparsity" not in changes and removes_neurons(preset.method):
                    changes["sparsity"] = config.sparsity
                config = preset
            param = "dart"
            config = config.replace(changes)
        except ConfigError as error:
            raise APIError(400, str(error), param) from None
        if config.method == "dense" and config.target > 0:
            text = "method dense removes nothing: drop the sparsity, or give 0"
            raise APIError(400, text, "dart.sparsity")
        if config.target == 0 and (dart.sparsity == 0 or not config.screens):
            return None
        if not is_ready(config.method, self.settings):
            ready = self.settings.ready
            text = (
                f"method {config.method} was not prepared when the server started: start the "
                f"server with --methods {','.join((*ready, config.method))}, or use method "
                f"{' or '.join(ready)} (GET /api/methods lists the methods that are ready)"
            )
            raise APIError(400, text, "dart.method", "method_not_ready")
        return config


def is_ready(method: str, settings: ServeSettings) -> bool:
    """True if requests with ``method`` can start at once, without calibration."""
    config = METHODS.get(method)
    learns = config.self_stats is not None or config.calibration is not None
    return not learns or method in settings.ready


def _too_long(limit: int | None, tokens: str) -> APIError:
    """The error for a prompt that is too long, in OpenAI's words, which clients recognise.

    ``tokens``: the prompt's number of tokens, as text.
    """
    text = f"This model's maximum context length is {limit} tokens, but the prompt has {tokens} "
    return APIError(400, text + "tokens: shorten it", code="context_length_exceeded")


def _conversation(body: Common, client: str, config: PruneConfig | None) -> str | None:
    """Return the conversation's name in the engine; None if the request names no conversation.

    The name includes client and user, so that nobody else can continue or overwrite the
    conversation.  Dense and pruned answers have separate conversations, so that a client that
    compares dense and pruned answers can continue both.
    """
    name = body.dart.conversation if body.dart else None
    side = "dense" if config is None else "pruned"
    return None if name is None else json.dumps([client, body.user, side, name])


# From the engine's records (events, such as a token or a new mask) to answers.

Json = dict[str, Any]

ACCOUNTING = (
    "method requested_sparsity achieved_sparsity sparsity_while_pruned dense_token_share "
    "decoded_tokens remasks remask_causes executor ffn_bytes_share bytes_limit extra_memory_bytes"
).split()
"""Fields of the engine's report in an answer's object ``dart``; ``/api/events`` sends all."""


def json_bytes(data: Any) -> bytes:
    """``data`` as compact JSON; inf and NaN become null."""
    return json.dumps(finite(data), separators=(",", ":"), allow_nan=False).encode()


def sse(data: Any) -> bytes:
    """``data`` as one server-sent event."""
    return b"data: " + json_bytes(data) + b"\n\n"


class RecordFormat:
    """The format of ``POST /api/events``: every record, as the engine emits it.

    ``on_record`` returns the bytes to send for a record, possibly none.  ``end`` returns the bytes
    after the last record, and ``error`` the last bytes of an answer that failed after it began.
    """

    streams = True

    def on_record(self, record: Record) -> bytes:
        return sse(record.to_dict())

    def end(self) -> bytes:
        return b""

    def error(self, error: APIError) -> bytes:
        return sse({"kind": "error", "message": error.message})


class PromptScore(NamedTuple):
    """A prompt token's log probability (None for the first token); fields as in ``Token``."""

    piece: str
    logprob: float | None
    top: tuple[Likely, ...]


def _chat_logprobs(tokens: Sequence[Token | PromptScore]) -> Json:
    """The field ``logprobs`` of one choice in a chat completion."""

    def entry(text: str, logprob: float | None) -> Json:
        # the bytes of an incomplete character are unknown
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": data}

    content = [
        {
            **entry(token.piece, token.logprob),
            "top_logprobs": [entry(likely.text, likely.logprob) for likely in token.top or ()],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(tokens: Sequence[Token | PromptScore], offset: int) -> Json:
    """The field ``logprobs`` of one choice in a completion.

    ``offset``: number of characters of the choice before the first of ``tokens``.
    """
    lengths = (len(token.piece) for token in tokens)
    # of two tokens with the same text, such as parts of characters, the likelier is kept
    tops = [
        None if t.logprob is None else {top.text: top.logprob for top in reversed(t.top or ())}
        for t in tokens
    ]
    return {
        "tokens": [token.piece for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops,
        "text_offset": list(accumulate(lengths, initial=offset))[:-1],
    }


@dataclass
class Choice:
    """One of the answers: its text and tokens so far.

    ``echo``: the prompt's text if the answer repeats it, else "".  ``sent``: number of ``tokens``
    whose text ``text`` already contains.
    """

    echo: str = ""
    text: str = ""
    sent: int = 0
    tokens: list[Token | PromptScore] = field(default_factory=list)


class Format:
    """OpenAI's format: builds an answer from records, complete or as a stream of chunks.

    ``prompts``: number of prompts.  The choices of the first prompt come first.
    """

    def __init__(self, body: Common, model: str, sampling: Sampling, prompts: int = 1) -> None:
        self.chat = isinstance(body, ChatBody)
        self.streams = bool(body.stream)
        self.with_usage = (body.stream_options or {}).get("include_usage", False)
        self.scored = sampling.logprobs is not None
        self.echo = isinstance(body, CompletionBody) and bool(body.echo)
        self.n, self.prompts = sampling.n, prompts
        self.choices = [Choice() for _ in range(sampling.n * prompts)]
        self.done: list[Done] = []
        """The last record of every answered prompt."""
        self._prompt: list[str] = []
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{token_hex(12)}"
        kind = "chat.completion" if self.chat else "text_completion"
        kind += ".chunk" if self.chat and self.streams else ""
        self._head = {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def on_record(self, record: Record) -> bytes:
        """Return the chunks to send for a record; empty if the answer is not streamed."""
        chunks = []
        if isinstance(record, Start) and self.chat:
            opening = {"delta": {"role": "assistant", "content": ""}}
            chunks += [self._chunk(index, opening) for index in self._current()]
        for index, text in self._new_texts(record):
            choice = self.choices[index]
            logprobs = self._logprobs(choice.tokens[choice.sent :], len(choice.text))
            chunks.append(self._chunk(index, self._content(text), logprobs))
            choice.text += text
            choice.sent = len(choice.tokens)
        if isinstance(record, Done):
            current = self._current()
            self.done.append(record)
            chunks += self._last_chunks(current, record)
        return b"".join(chunks) if self.streams else b""

    def end(self) -> bytes:
        """Return the complete answer; empty if the answer was streamed."""
        if self.streams:
            return b""
        if len(self.done) != self.prompts:
            raise RuntimeError("the engine ended an answer without a done record")
        reasons = [reason for done in self.done for reason in done.finish]
        choices = [
            {
                "index": index,
                **self._content(choice.text, complete=True),
                "logprobs": self._logprobs(choice.tokens[: choice.sent], 0),
                "finish_reason": reasons[index],
            }
            for index, choice in enumerate(self.choices)
        ]
        return json_bytes({**self._head, "choices": choices, **_accounting(self.done)})

    def error(self, error: APIError) -> bytes:
        """The last event of a failed stream; OpenAI's clients raise it as an exception."""
        return sse(error.to_dict()) if self.streams else b""

    def _content(self, text: str, complete: bool = False) -> Json:
        if not self.chat:
            return {"text": text}
        if complete:
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"delta": {"content": text}}

    def _logprobs(self, tokens: Sequence[Token | PromptScore], offset: int) -> Json | None:
        if not self.scored:
            return None
        return _chat_logprobs(tokens) if self.chat else _text_logprobs(tokens, offset)

    def _current(self) -> range:
        """The indices of the current prompt's choices."""
        first = self.n * len(self.done)
        return range(first, first + self.n)

    def _new_texts(self, record: Record) -> list[tuple[int, str]]:
        """Return a pair (index, new text) for every choice to which this record adds text."""
        if isinstance(record, Token):
            index = self._current()[record.choice]
            self.choices[index].tokens.append(record)
            return [(index, record.text)] if record.text else []
        if isinstance(record, Start) and self.echo:
            self._prompt = [token.text for token in record.prompt]
            return [] if self.scored else self._echoed([])
        if isinstance(record, Scores):
            scores = zip(self._prompt, record.logprobs, record.top, strict=True)
            return self._echoed([PromptScore(*score) for score in scores])
        if not isinstance(record, Done):
            return []
        rests = []
        for index, text in zip(self._current(), record.texts, strict=True):
            choice = self.choices[index]
            rest = (choice.echo + text)[len(choice.text) :]
            # with ``echo``, scores also cover the end token, which has no text
            if rest or (self.echo and choice.sent < len(choice.tokens)):
                rests.append((index, rest))
        return rests

    def _echoed(self, scores: list[PromptScore]) -> list[tuple[int, str]]:
        """Begin each choice with the prompt and its scores; return pairs (index, prompt's text)."""
        text = "".join(self._prompt)
        for index in self._current():
            self.choices[index].echo = text
            self.choices[index].tokens += scores
        return [(index, text) for index in self._current()]

    def _last_chunks(self, current: range, record: Done) -> list[bytes]:
        """The last chunks of a prompt's choices and, after the last prompt, the stream's end."""
        is_last, chunks, extras = len(self.done) == self.prompts, [], _accounting(self.done)
        usage = extras.pop("usage")
        closing: Json = {"delta": {}} if self.chat else {"text": ""}
        for index, reason in zip(current, record.finish, strict=True):
            added = extras if is_last and index == current[-1] else {}
            chunks.append(self._chunk(index, closing, None, reason, added))
        if is_last and self.with_usage:
            chunks.append(sse({**self._head, "choices": [], **extras, "usage": usage}))
        return [*chunks, b"data: [DONE]\n\n"] if is_last else chunks

    def _chunk(
        self,
        index: int,
        content: Json,
        logprobs: Json | None = None,
        reason: str | None = None,
        extras: Json | None = None,
    ) -> bytes:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self.with_usage else {}
        return sse({**self._head, "choices": [choice], **(extras or {}), **usage})


def _accounting(answered: Sequence[Done]) -> Json:
    """The entries ``usage``, ``timings`` and ``dart`` of an answer.

    ``usage`` is the sum over all prompts, with OpenAI's names.  ``timings`` has llama.cpp's names.
    If there are several prompts, ``timings`` and ``dart`` are lists with one entry per prompt.
    """
    prompt = sum(done.usage.prompt_tokens for done in answered)
    completion = sum(done.usage.completion_tokens for done in answered)
    cached = sum(done.usage.cached_tokens for done in answered)
    timings = [done.timings.to_dict() for done in answered]
    accounts = [{name: getattr(done.report, name) for name in ACCOUNTING} for done in answered]
    single = len(answered) == 1
    return {
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
        "timings": timings[0] if single else timings,
        "dart": accounts[0] if single else accounts,
    }
