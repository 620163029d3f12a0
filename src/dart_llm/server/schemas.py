"""Bodies of requests, in OpenAI's names, and what the engine gets for them; limits on tokens.

A field that OpenAI does not know is refused, as OpenAI does.  A known one that this server does not
support is refused unless it asks for nothing; those that cannot change an answer are ignored.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dart_llm.data.texts import chat_text
from dart_llm.engine.requests import GenerationRequest, Sampling
from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import METHODS
from dart_llm.server.responses import APIError
from dart_llm.server.settings import ServeSettings, removes_neurons

Stop = Annotated[str, Field(min_length=1, max_length=1000)]

Stops = Annotated[list[Stop], Field(max_length=4)]

Name = Annotated[str, Field(max_length=256)]

Ids = Annotated[list[int], Field(fail_fast=True)]

Texts = Annotated[list[str], Field(fail_fast=True)]
"""Long lists: only the first error is reported."""


def _not_zero(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("tokens", "input should be 1 or more, or -1 for what fits")
    return value


TokensOrNone = Annotated[int, Field(ge=-1)]

Tokens = Annotated[TokensOrNone, AfterValidator(_not_zero)]
"""A number of tokens; -1 means "as many as fit" to clients of llama.cpp."""


def _not_percent(value: Any) -> Any:
    if isinstance(value, int | float) and value >= 1:
        raise PydanticCustomError(
            "sparsity", "input should be less than 1: the fraction removed, 0.5 for 50 %"
        )
    return value


Sparsity = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_not_percent)]

IGNORED = (
    "metadata parallel_tool_calls prompt_cache_key prompt_cache_retention reasoning_effort "
    "safety_identifier service_tier store verbosity"
).split()
"""Fields of OpenAI that cannot change what this server answers."""

UNSUPPORTED = (
    "audio best_of frequency_penalty function_call functions logit_bias modalities prediction "
    "presence_penalty response_format suffix tool_choice tools web_search_options"
).split()
"""Fields of OpenAI that are refused unless their value has no effect."""

NEUTRAL: tuple[Any, ...] = (None, 0, "", [], {}, "none", "auto", ["text"], {"type": "text"})
"""Values without effect."""


class Body(BaseModel):
    """Strict: no text for a number, no unknown field, only finite numbers."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class Dart(Body):
    """How this request is pruned; fields left out are the server's own settings."""

    method: Name | None = None
    sparsity: Sparsity | None = None
    masking_step: Annotated[int, Field(ge=0, le=100_000)] | None = None
    drift: Name | None = None
    conversation: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


Nothing = Annotated[None, BeforeValidator(lambda value: None if value == [] else value)]
"""null, or an empty list, which asks for nothing either."""


class Message(Body):
    """Only an assistant may leave out ``content``; ``reasoning_content`` is ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: Name | None = None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: Nothing = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "role {role} needs a content", {"role": self.role})
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Common(Body):
    """Fields of both kinds of completion."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Stops | None = None
    max_tokens: TokensOrNone | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    user: Name | None = None
    dart: Dart | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        """The fields that this server supports; others are refused with the reason."""
        if not isinstance(data, dict):
            return data
        known = [*cls.model_fields, *IGNORED, *UNSUPPORTED]
        for name, value in data.items():
            if name not in known:
                text = f"unrecognized request argument supplied: {name[:100]}{_hint(name, known)}"
                raise APIError(400, text, name[:100], "unknown_parameter")
            neutral = value in NEUTRAL or (name, value) == ("best_of", 1)
            if name in UNSUPPORTED and not neutral:
                text = f"this server does not support {name}: leave it out"
                raise APIError(400, text, name, "unsupported_parameter")
        return {name: value for name, value in data.items() if name in cls.model_fields}

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "stream_options requires stream: true", "stream_options")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        """Whether the stream ends with a chunk for the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(Common):
    """Body of ``POST /v1/chat/completions`` and ``POST /api/events``."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionBody(Common):
    """Body of ``POST /v1/completions``; ``prompt``: a text or token ids, or a list of these.

    ``echo``: the answer begins with the prompt, in ``logprobs`` too.
    """

    prompt: str | Ids | Texts | Annotated[list[Ids], Field(fail_fast=True)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each of them."""
        prompt: Any = self.prompt
        single = isinstance(prompt, str) or all(isinstance(part, int) for part in prompt)
        return [prompt] if single else prompt


def _hint(name: str, known: Iterable[str]) -> str:
    """The nearest name, if one is near; of a long name the beginning is compared."""
    near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def refusal(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """Of a body's validation errors the plainest one: which field, and what is wrong with it.

    Of a union's branches the plainest is the one that got furthest into the value.
    """
    if errors[0]["type"] == "json_invalid":
        reason = errors[0]["ctx"]["error"]
        return APIError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    error = max(errors, key=lambda one: (not one["type"].endswith("_type"), len(one["loc"])))
    path = [
        str(part)
        for part in error["loc"]
        if isinstance(part, int) or (part.isidentifier() and part not in BRANCHES)
    ]
    if error["type"] == "extra_forbidden":  # a name that the client made up
        name, outer = str(error["loc"][-1])[:100], path[:-1]
        hint = _hint(name, Dart.model_fields) if outer == ["dart"] else ""
        where = ".".join([*outer, name])
        return APIError(400, f"{where}: unknown field{hint}", where, "unknown_parameter")
    where = ".".join(path)
    code = "missing_required_parameter" if error["type"] == "missing" else "invalid_value"
    what = error["msg"][:1].lower() + error["msg"][1:]
    return APIError(400, f"{where or 'body'}: {what}", where or None, code)


BRANCHES = ("body", "str", "int", "constrained-str")
"""Parts of an error's location that are not fields: the whole, and branches of unions."""

COMPLETION_TOKENS = 16  # default max_tokens of /v1/completions, as OpenAI has it
SMALLEST_TOP_P = 1e-6  # for top_p 0: the likeliest token alone
CHARACTERS = 4  # of a token, about; of a longer text a part is tokenized first

CUT_TOKENS = 64
"""A text that is cut off may have this many tokens more than the same part of the whole."""

NOT_READY = "method_not_ready"


class RequestReader:
    """Turns bodies into requests to the engine, within the model's and the server's limits.

    ``names``: the model's id and its aliases.  ``context``: its length in tokens, None: unknown.
    ``vocabulary``: the number of token ids.
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
        """Tokens of the longest prompt; None: unknown."""
        self._default = settings.prune_config()

    def requests(self, body: Common, request_id: str, client: str) -> tuple[GenerationRequest, ...]:
        """One request to the engine per prompt; raises ``APIError`` for what cannot be served."""
        if body.model is not None and body.model not in self.names:
            text = f"the model {body.model!r} is not served here: ask for {self.names[0]!r}"
            raise APIError(404, text, "model", "model_not_found")
        config = self.config(body.dart)
        if isinstance(body, ChatBody):
            prompts = [self._chat_ids(body.messages)]
            limits = (body.max_completion_tokens, body.max_tokens)
            max_tokens = next((limit for limit in limits if limit is not None), None)
            if body.top_logprobs and not body.logprobs:
                raise APIError(400, "top_logprobs requires logprobs: true", "top_logprobs")
            logprobs, scored = (body.top_logprobs or 0) if body.logprobs else None, False
        else:
            assert isinstance(body, CompletionBody)
            prompts = self._completion_ids(body)
            max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
            logprobs, scored = body.logprobs, bool(body.echo) and body.logprobs is not None
        conversation = _conversation(body, client, config)
        try:
            return tuple(
                GenerationRequest(
                    ids,
                    self._sampling(body, len(ids), max_tokens, logprobs, scored),
                    config,
                    conversation,
                    request_id,
                    client,
                )
                for ids in prompts
            )
        except ConfigError as error:
            raise APIError(400, str(error)) from None

    def _chat_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """A conversation as the model's own template writes it."""
        code = None if getattr(self.tokenizer, "chat_template", None) else "no_template"
        plain = [
            {"role": "system" if one.role == "developer" else one.role, "content": one.text}
            for one in messages
        ]
        try:
            text = chat_text(self.tokenizer, plain, "use /v1/completions")
        except ConfigError as error:
            raise APIError(400, str(error), "messages", code) from None
        except (ValueError, TypeError):  # of a template that did not expect them
            reason = "the model's chat template does not accept these messages"
            raise APIError(400, reason, "messages") from None
        return self._ids(text, add_special_tokens=False)

    def _completion_ids(self, body: CompletionBody) -> list[tuple[int, ...]]:
        prompts, limit = body.prompts, self.settings.max_prompts
        if len(prompts) > limit:
            raise APIError(400, f"{len(prompts)} prompts are too many: at most {limit}", "prompt")
        if len(prompts) > 1 and body.dart and body.dart.conversation:
            text = "a conversation continues one prompt: give one"
            raise APIError(400, text, "dart.conversation")
        for prompt in prompts:
            if isinstance(prompt, list) and any(not 0 <= id < self.vocabulary for id in prompt):
                text = f"token ids must lie in 0 to {self.vocabulary - 1}"
                raise APIError(400, text, "prompt")
        return [self._ids(one) if isinstance(one, str) else tuple(one) for one in prompts]

    def _ids(self, text: str, **options: Any) -> tuple[int, ...]:
        """Token ids of ``text``.

        Raises ``APIError`` when its beginning is too long already, so that no text costs more than
        the longest prompt.
        """
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
        self, body: Common, prompt: int, requested: int | None, logprobs: int | None, scored: bool
    ) -> Sampling:
        settings, n = self.settings, body.n or 1
        if n > settings.max_choices:
            raise APIError(400, f"n {n} is too large: at most {settings.max_choices}", "n")
        tokens = 0 if scored and requested == 0 else self._max_tokens(prompt, requested)
        temperature = settings.temperature if body.temperature is None else body.temperature
        top_p = 1.0 if body.top_p is None else max(SMALLEST_TOP_P, body.top_p)
        return Sampling(tokens, temperature, top_p, body.seed, n, body.stops, logprobs, scored)

    def _max_tokens(self, prompt: int, requested: int | None) -> int:
        """Tokens of the answer after ``prompt`` tokens: as many as requested, if they fit."""
        if not prompt:
            raise APIError(400, "the prompt is empty: give at least one word", "prompt")
        longest = self.longest
        if longest is not None and prompt > longest:
            raise _too_long(longest, str(prompt))
        if requested == 0:
            text = "max_tokens 0 asks for no answer: give 1 or more, or echo with logprobs"
            raise APIError(400, text, "max_tokens")
        room = self.settings.max_tokens
        if self.context is not None:
            room = min(room, self.context - prompt)
        if not room:
            raise _too_long(self.context, f"{prompt}, which leaves no room for an answer,")
        return room if requested in (None, -1) else min(room, requested)

    def config(self, dart: Dart | None) -> PruneConfig | None:
        """The configuration of a request; None: the dense model, also for sparsity 0.

        Raises ``APIError`` for values that do not fit, and for a method that would have to learn
        before it answers.
        """
        dart = dart or Dart()
        config, changes, field = self._default, _changes(dart), "dart.method"
        try:
            if dart.method not in (None, config.method):
                other = METHODS.get_listed(str(dart.method))
                if config.sparsity and "sparsity" not in changes and removes_neurons(other.method):
                    changes["sparsity"] = config.sparsity
                config = other
            field = ""
            config = config.replace(changes)
        except ConfigError as error:
            raise APIError(400, str(error), field or _wrong_field(config, changes)) from None
        if config.method == "dense" and config.target > 0:
            text = "method dense removes nothing: drop the sparsity, or give 0"
            raise APIError(400, text, "dart.sparsity")
        if config.target == 0 and (dart.sparsity == 0 or not config.screens):
            return None
        if not is_ready(config.method, self.settings):
            # both ways out: a server with this method, or a method of this server
            ready = self.settings.ready
            text = (
                f"method {config.method} was not prepared when the server started: start the "
                f"server with --methods {','.join((*ready, config.method))}, or ask for method "
                f"{' or '.join(ready)} (GET /api/methods lists all that are ready)"
            )
            raise APIError(400, text, "dart.method", NOT_READY)
        return config


def is_ready(method: str, settings: ServeSettings) -> bool:
    """Whether requests by ``method`` can start at once, without learning."""
    config = METHODS.get(method)
    learns = config.self_stats is not None or config.calibration is not None
    return not learns or method in settings.ready


def _too_long(limit: int | None, tokens: str) -> APIError:
    """In the words by which OpenAI's clients recognise this refusal."""
    text = f"This model's maximum context length is {limit} tokens, but the prompt has {tokens} "
    return APIError(400, text + "tokens: shorten it", code="context_length_exceeded")


def _conversation(body: Common, client: str, config: PruneConfig | None) -> str | None:
    """The conversation's name in the engine, if the request names one.

    It belongs to its client and user: nobody else continues or overwrites it.  The dense side of a
    conversation has another name, so that both sides of a comparison continue.
    """
    name = body.dart.conversation if body.dart else None
    side = "dense" if config is None else "pruned"
    return None if name is None else json.dumps([client, body.user, side, name])


def _wrong_field(config: PruneConfig, changes: Mapping[str, Any]) -> str:
    """The field whose value does not fit by itself; all of ``dart`` where none is alone wrong."""
    for name, value in changes.items():
        try:
            config.replace({name: value})
        except ConfigError:
            return f"dart.{name}"
    return "dart"


def _changes(dart: Dart) -> dict[str, Any]:
    changes: dict[str, Any] = {"sparsity": dart.sparsity, "masking_step": dart.masking_step}
    if dart.drift is not None:
        changes["drift"] = {"rule": dart.drift}
    return {name: value for name, value in changes.items() if value is not None}
