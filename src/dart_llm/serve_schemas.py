"""What ``/v1/chat/completions``, ``/v1/completions`` and ``/api/events`` are sent.

OpenAI's names and types.  A field that OpenAI does not know is refused, as OpenAI does.  A known
one that this server cannot honour is refused when it asks for something; the ones that cannot
change an answer are read and ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

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

from dart_llm.serve_errors import Refusal

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
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
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
    """``data`` as a body of ``kind``; raises ``Refusal`` (400) with the field that is wrong."""
    known = [*kind.model_fields, *IGNORED, *NEUTRAL]
    for name in data:
        if name not in known:
            raise Refusal(
                400,
                f"unrecognized request argument supplied: {name[:100]}{_hint(name, known)}",
                name[:100],
                "unknown_parameter",
            )
    _check_neutral(data)
    given = {name: value for name, value in data.items() if name in kind.model_fields}
    try:
        body = kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(error) from None
    if body.stream_options is not None and not body.stream:
        raise Refusal(400, "stream_options goes with stream: true alone", "stream_options")
    return body


def _check_neutral(data: Mapping[str, Any]) -> None:
    for name, values in NEUTRAL.items():
        value = data.get(name)
        same = [one for one in values if one == value and (type(one) is type(value) or one == 0)]
        if value is not None and not same:
            allowed = " or ".join(["null", *(repr(one) for one in values)])
            raise Refusal(
                400,
                f"this server has no {name}: leave it out, or give {allowed}",
                name,
                "unsupported_parameter",
            )


def _hint(name: str, known: Iterable[str]) -> str:
    """The near name, if one is; of a long name its beginning is compared."""
    near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _refusal(error: ValidationError) -> Refusal:
    """The first problem: which field, and what is wrong with it."""
    problem = _plainest(error.errors(include_input=False, include_context=False, include_url=False))
    *outer, last = problem["loc"]
    path = _names(outer)
    if problem["type"] == "extra_forbidden":  # a name of the client's own making
        name = str(last)[:100]
        hint = _hint(name, Dart.model_fields) if path == ["dart"] else ""
        where = ".".join([*path, name])
        message = f"{where}: is not a known field{hint}"
        return Refusal(400, message, where, "unknown_parameter")
    where = ".".join([*path, *_names([last])])
    code = "missing_required_parameter" if problem["type"] == "missing" else "invalid_value"
    what = problem["msg"][:1].lower() + problem["msg"][1:]
    return Refusal(400, f"{where}: {what}", where or None, code)


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
