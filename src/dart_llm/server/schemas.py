"""From a request's body, in OpenAI's names, to what the engine is asked; every limit on tokens.

A field that OpenAI does not know is refused, as OpenAI does.  A known one that this server cannot
honour is refused when it asks for something; the ones that cannot change an answer are ignored.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from dart_llm.data.prompts import chat_text
from dart_llm.engine.requests import GenerationRequest, Sampling
from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import METHODS
from dart_llm.server.responses import APIError
from dart_llm.server.settings import ServeSettings, prunes

Stop = Annotated[str, Field(min_length=1, max_length=1000)]

Stops = Annotated[list[Stop], Field(max_length=4)]

Name = Annotated[str, Field(max_length=256)]

Ids = Annotated[list[int], Field(fail_fast=True)]

Texts = Annotated[list[str], Field(fail_fast=True)]
"""Of a long list the first fault is told, not all."""


def _some(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("tokens", "input should be 1 or more, or -1 for what fits")
    return value


TokensOrNone = Annotated[int, Field(ge=-1)]

Tokens = Annotated[TokensOrNone, AfterValidator(_some)]
"""A number of tokens; -1 is what llama.cpp's clients call "as many as fit"."""


def _no_per_cent(value: Any) -> Any:
    if isinstance(value, int | float) and value >= 1:
        raise PydanticCustomError(
            "sparsity", "input should be less than 1: the fraction removed, 0.5 for 50 %"
        )
    return value


Sparsity = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_no_per_cent)]

IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "verbosity",
)
"""Fields of OpenAI that cannot change what this server answers."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}
"""Fields of OpenAI that only these values, or null, leave without effect."""


class Body(BaseModel):
    """Strict: no text for a number, no field that is not known."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


class Dart(Body):
    """How this request is pruned; what is left out is the server's own setting."""

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


def _nothing(value: Any) -> Any:
    """An empty list asks for nothing, as null does."""
    return None if value == [] else value


Nothing = Annotated[None, BeforeValidator(_nothing)]


class Message(Body):
    """``content`` may be left out by an assistant alone; ``reasoning_content`` is not read."""

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
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "role {role} needs a content", {"role": self.role})
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Common(Body):
    """What both kinds of completion take."""

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
    def _known(cls, data: Any) -> Any:
        """The fields that this server has; of all others it is said why they are refused."""
        if not isinstance(data, dict):  # a body already
            return data
        known = [*cls.model_fields, *IGNORED, *NEUTRAL]
        for name in data:
            if name not in known:
                said = f"unrecognized request argument supplied: {name[:100]}{_hint(name, known)}"
                raise APIError(400, said, name[:100], "unknown_parameter")
        _check_neutral(data)
        return {name: value for name, value in data.items() if name in cls.model_fields}

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "stream_options goes with stream: true alone", "stream_options")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_wanted(self) -> bool:
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

    ``echo``: the prompt stands before the answer, in ``logprobs`` too.
    """

    prompt: str | Ids | Texts | Annotated[list[Ids], Field(fail_fast=True)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each of them."""
        prompt: Any = self.prompt
        one = isinstance(prompt, str) or all(isinstance(part, int) for part in prompt)
        return [prompt] if one else prompt


B = TypeVar("B", bound=Common)


def read(kind: type[B], data: Mapping[str, Any]) -> B:
    """``data`` as a body of ``kind``; raises ``APIError`` (400) with the field that is wrong."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _refusal(error) from None


def _check_neutral(data: Mapping[str, Any]) -> None:
    for name, values in NEUTRAL.items():
        value = data.get(name)
        same = [one for one in values if one == value and (type(one) is type(value) or one == 0)]
        if value is not None and not same:
            allowed = " or ".join(["null", *(repr(one) for one in values)])
            said = f"this server has no {name}: leave it out, or give {allowed}"
            raise APIError(400, said, name, "unsupported_parameter")


def _hint(name: str, known: Iterable[str]) -> str:
    """The near name, if one is; of a long name its beginning is compared."""
    near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _refusal(error: ValidationError) -> APIError:
    """The first problem: which field, and what is wrong with it."""
    problem = _plainest(error.errors(include_input=False, include_context=False, include_url=False))
    *outer, last = problem["loc"]
    path = _names(outer)
    if problem["type"] == "extra_forbidden":  # a name of the client's own making
        name = str(last)[:100]
        hint = _hint(name, Dart.model_fields) if path == ["dart"] else ""
        where = ".".join([*path, name])
        message = f"{where}: is not a known field{hint}"
        return APIError(400, message, where, "unknown_parameter")
    where = ".".join([*path, *_names([last])])
    code = "missing_required_parameter" if problem["type"] == "missing" else "invalid_value"
    what = problem["msg"][:1].lower() + problem["msg"][1:]
    return APIError(400, f"{where}: {what}", where or None, code)


def _names(loc: Iterable[str | int]) -> list[str]:
    """Of a place in a body, without a union's branches ("str", "list[...]"): they are no names."""
    return [
        str(part)
        for part in loc
        if isinstance(part, int) or (part.isidentifier() and part not in ("str", "int"))
    ]


def _plainest(problems: Sequence[ErrorDetails]) -> ErrorDetails:
    """The first one; where a list was no text, what is wrong inside the list."""
    first = problems[0]
    *field, branch = first["loc"]
    if branch in ("str", "constrained-str") and first["type"] == "string_type":
        for one in problems[1:]:
            same = list(one["loc"][: len(field)]) == field
            deeper = len(one["loc"]) > len(first["loc"])
            if same and (deeper or not one["type"].endswith("_type")):
                return one
    return first


COMPLETION_TOKENS = 16  # max_tokens of /v1/completions when nothing is said, as OpenAI has it
SMALLEST_TOP_P = 1e-6  # what top_p 0 means: the likeliest token alone
CHARACTERS = 4  # of a token, about; a longer text is looked at in parts first

CUT_TOKENS = 64
"""By so many a text that is cut off may have more tokens than the same part of the whole."""

Asked = tuple[list[tuple[int, ...]], int | None, int | None, bool]
"""Prompts, tokens asked for, log-probabilities beside each token, whether prompts are scored."""


class Asker:
    """What a request is measured against.

    ``names``: by which the model may be asked for, its own first.  ``context``: tokens it can
    hold, None: unknown.  ``vocabulary``: token ids below it exist.
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
        self.longest = min((one for one in limits if one is not None), default=None)
        """Tokens of the longest prompt; None: not known."""
        self._base = settings.prune_config()

    def asks(self, body: Common, request_id: str, client: str) -> tuple[GenerationRequest, ...]:
        """What the engine is asked, once per prompt; raises ``APIError`` for what cannot be."""
        if body.model is not None and body.model not in self.names:
            said = f"the model {body.model!r} is not served here: ask for {self.names[0]!r}"
            raise APIError(404, said, "model", "model_not_found")
        if isinstance(body, ChatBody):
            prompts, asked, logprobs, scored = self._chat(body)
        else:
            assert isinstance(body, CompletionBody)
            prompts, asked, logprobs, scored = self._completion(body)
        config = self.config(body.dart)
        kept = _kept_as(body, client, config)
        try:
            return tuple(
                GenerationRequest(
                    ids,
                    self._sampling(body, len(ids), asked, logprobs, scored),
                    config,
                    kept,
                    request_id,
                    client,
                )
                for ids in prompts
            )
        except ConfigError as error:
            raise APIError(400, str(error)) from None

    def _chat(self, body: ChatBody) -> Asked:
        if body.top_logprobs and not body.logprobs:
            raise APIError(400, "top_logprobs goes with logprobs: true alone", "top_logprobs")
        ids = self._ids(_chat_text(self.tokenizer, body.messages), add_special_tokens=False)
        limits = (body.max_completion_tokens, body.max_tokens)
        asked = next((one for one in limits if one is not None), None)
        return [ids], asked, (body.top_logprobs or 0) if body.logprobs else None, False

    def _completion(self, body: CompletionBody) -> Asked:
        prompts, most = body.prompts, self.settings.max_prompts
        if len(prompts) > most:
            raise APIError(400, f"{len(prompts)} prompts are too many: at most {most}", "prompt")
        if len(prompts) > 1 and body.dart and body.dart.conversation:
            said = "a conversation goes on from one prompt: give one"
            raise APIError(400, said, "dart.conversation")
        asked = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        scored = bool(body.echo) and body.logprobs is not None
        return [self._prompt_ids(one) for one in prompts], asked, body.logprobs, scored

    def _prompt_ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return self._ids(prompt)
        if any(not 0 <= one < self.vocabulary for one in prompt):
            raise APIError(400, f"token ids lie in 0 to {self.vocabulary - 1}", "prompt")
        return tuple(prompt)

    def _ids(self, text: str, **options: Any) -> tuple[int, ...]:
        """Token ids of ``text``.

        Raises ``APIError`` when its beginning is too long already, so that no text costs more than
        the longest prompt does.
        """
        longest = self.longest
        if longest is not None:
            most = longest + CUT_TOKENS
            length = CHARACTERS * most
            while length < len(text):
                if len(self.tokenizer(text[:length], verbose=False, **options).input_ids) > most:
                    raise _too_long(longest, f"more than {longest}")
                length *= 2
        return tuple(self.tokenizer(text, verbose=False, **options).input_ids)

    def _sampling(
        self, body: Common, prompt: int, asked: int | None, logprobs: int | None, scored: bool
    ) -> Sampling:
        settings, n = self.settings, body.n or 1
        if n > settings.max_choices:
            raise APIError(400, f"n {n} is too large: at most {settings.max_choices}", "n")
        tokens = 0 if scored and asked == 0 else self._room(prompt, asked)
        temperature = settings.temperature if body.temperature is None else body.temperature
        top_p = 1.0 if body.top_p is None else max(SMALLEST_TOP_P, body.top_p)
        return Sampling(tokens, temperature, top_p, body.seed, n, body.stops, logprobs, scored)

    def _room(self, prompt: int, asked: int | None) -> int:
        """Tokens of the answer after ``prompt`` tokens: what is asked for, as far as it fits."""
        if not prompt:
            raise APIError(400, "the prompt is empty: give at least one word", "prompt")
        longest = self.longest
        if longest is not None and prompt > longest:
            raise _too_long(longest, str(prompt))
        if asked == 0:
            said = "max_tokens 0 asks for no answer: give 1 or more, or echo with logprobs too"
            raise APIError(400, said, "max_tokens")
        room = self.settings.max_tokens
        if self.context is not None:
            room = min(room, self.context - prompt)
        if not room:
            raise _too_long(self.context, f"{prompt}, which leaves no room for an answer,")
        return room if asked in (None, -1) else min(room, asked)

    def config(self, asked: Dart | None) -> PruneConfig | None:
        """The configuration of a request; None: the model as it is, which sparsity 0 asks for.

        Raises ``APIError`` for values that do not fit, and for a method that would make this
        request wait until something is learnt.
        """
        base, changes = self._base, {} if asked is None else _changes(asked)
        try:
            wrong = "dart.method"
            if asked is not None and asked.method not in (None, base.method):
                other = METHODS.named(str(asked.method))
                if base.sparsity and "sparsity" not in changes and prunes(str(asked.method)):
                    changes["sparsity"] = base.sparsity
                base = other
            wrong = ""
            config = base.replace(changes)
        except ConfigError as error:
            raise APIError(400, str(error), wrong or _wrong(base, changes)) from None
        if config.method == "dense" and config.target > 0:
            said = "method dense removes nothing: drop the sparsity, or give 0"
            raise APIError(400, said, "dart.sparsity")
        if config.weight_bits is not None:
            said = f"method {config.method} needs a copy of the model, which this server has not"
            raise APIError(400, said, "dart.method")
        plain = asked is not None and asked.sparsity == 0
        if config.target == 0 and (plain or not config.screens):
            return None
        if not is_ready(config.method, self.settings):
            raise APIError(400, _not_ready(config, self.settings), "dart.method", NOT_READY)
        return config


NOT_READY = "method_not_ready"


def is_ready(method: str, settings: ServeSettings) -> bool:
    """Whether no request by ``method`` waits until something is learned."""
    config = METHODS.get(method)
    learns = config.prior is not None or config.calibration is not None
    return config.weight_bits is None and (not learns or method in settings.ready)


def _not_ready(config: PruneConfig, settings: ServeSettings) -> str:
    """Both ways out: a server with this method, or a method of this server."""
    more, others = ",".join((*settings.ready, config.method)), " or ".join(settings.ready)
    return (
        f"method {config.method} was not made ready when the server started: start the server with "
        f"--methods {more}, or ask for method {others} (GET /api/methods lists all that are ready)"
    )


def _too_long(limit: int | None, found: str) -> APIError:
    """In the words by which OpenAI's clients know this refusal."""
    said = f"This model's maximum context length is {limit} tokens, but the prompt has {found} "
    return APIError(400, said + "tokens: shorten it", code="context_length_exceeded")


def _kept_as(body: Common, client: str, config: PruneConfig | None) -> str | None:
    """The name under which the engine keeps a conversation, if it is to.

    It belongs to its client: nobody goes on with, or overwrites, another's.  The dense side of a
    conversation is kept apart, so that both sides of a comparison go on.
    """
    name = body.dart.conversation if body.dart else None
    side = "dense" if config is None else "pruned"
    return None if name is None else json.dumps([client, body.user, side, name])


def _wrong(base: PruneConfig, changes: Mapping[str, Any]) -> str:
    """The field whose value does not fit even alone; all of them where they do not fit together."""
    for name, value in changes.items():
        try:
            base.replace({name: value})
        except ConfigError:
            return f"dart.{name}"
    return "dart"


def _changes(asked: Dart) -> dict[str, Any]:
    given: dict[str, Any] = {"sparsity": asked.sparsity, "masking_step": asked.masking_step}
    if asked.drift is not None:
        given["drift"] = {"rule": asked.drift}
    return {name: value for name, value in given.items() if value is not None}


def _chat_text(tokenizer: Any, messages: Sequence[Message]) -> str:
    """A conversation as the model's own template writes it; raises ``APIError``."""
    code = None if getattr(tokenizer, "chat_template", None) else "no_template"
    turns = [
        {"role": "system" if one.role == "developer" else one.role, "content": one.text}
        for one in messages
    ]
    try:
        return chat_text(tokenizer, turns, "use /v1/completions")
    except ConfigError as error:
        raise APIError(400, str(error), "messages", code) from None
    except (ValueError, TypeError):  # of a template that did not expect them
        said = "the model's chat template does not take these messages"
        raise APIError(400, said, "messages") from None
