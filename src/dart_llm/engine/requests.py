"""Requests to an engine, and the records that the engine emits while it answers them.

For every request the engine emits one ``start`` record, and ``scores`` if requested.  Then it emits
``token``, ``check``, ``remask`` and ``mask`` records as they occur.  The last record is ``done``,
which is also the result, or ``error``.  These names are the ``kind`` of a record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.records import DriftCheck, Remask, RunReport

MAX_CHOICES, MAX_STOPS, MAX_LOGPROBS = 128, 16, 20  # limits of n, stop and logprobs


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled, and when to stop; raises ``ConfigError`` for values out of range.

    ``temperature``: 0 is greedy.  ``top_p``: sample only from the likeliest tokens that together
    have this probability.  ``seed``: equal seeds give equal answers; None: random.  ``n``: number
    of answers, decoded as one batch that shares its masks.  ``stop``: strings that end an answer
    and are not part of it.  ``logprobs``: a number k; the log-probabilities of the sampled token
    and of the k likeliest tokens are reported, computed at temperature 1.  None: none are reported.
    ``prompt_logprobs``: if True, the log-probabilities of the prompt's tokens are reported too, and
    ``max_tokens`` may be 0.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        count, fewest = self.logprobs, 0 if self.prompt_logprobs else 1
        if self.prompt_logprobs and count is None:
            raise ConfigError("prompt_logprobs requires logprobs: give their number, 0 or more")
        valid_stop = len(self.stop) <= MAX_STOPS and all(self.stop)
        for name, valid, expected in (
            ("max_tokens", self.max_tokens >= fewest, f"{fewest} or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "an integer of 64 bits"),
            ("n", 1 <= self.n <= MAX_CHOICES, f"1 to {MAX_CHOICES}"),
            ("stop", valid_stop, f"at most {MAX_STOPS} strings, none of them empty"),
            ("logprobs", count is None or 0 <= count <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
        ):
            if not valid:
                raise ConfigError(f"{name} {getattr(self, name)} must be {expected}")


@dataclass(frozen=True)
class GenerationRequest:
    """One request.

    ``ids``: the prompt's token ids.  ``config``: how to prune; None runs the dense model.
    ``conversation``: name of a conversation.  If the prompt extends the conversation with this
    name, that conversation's cache is used.  None: the request belongs to no conversation.  ``id``:
    identifies the request in the records; "" means a random id.
    """

    ids: tuple[int, ...]
    sampling: Sampling = Sampling()
    config: PruneConfig | None = None
    conversation: str | None = None
    id: str = ""

    def __post_init__(self) -> None:
        if not self.ids:
            raise ConfigError("the prompt is empty: give at least one token")
        if self.conversation is not None and self.sampling.n > 1:
            raise ConfigError("a conversation can have only one answer: use n=1")
        if self.sampling.prompt_logprobs and self.config is not None:
            raise ConfigError(
                "prompts always run dense, so prompt_logprobs would not show the effect of "
                'pruning: use method "dense", or dart-llm eval to score pruned models'
            )
        if self.sampling.prompt_logprobs and self.conversation is not None:
            raise ConfigError("prompt_logprobs runs the whole prompt: leave the conversation out")


def _plain(value: Any) -> Any:
    """Return JSON-able data of a record or of one of its fields."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple | bytes) else value


class _Record:
    """Base of all records."""

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data: the kind, then the fields."""
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return {"kind": self.kind, **{name: _plain(getattr(self, name)) for name in names}}


@dataclass(frozen=True)
class PromptToken:
    """One token of the prompt; the text of a special token is its name."""

    id: int
    text: str


@dataclass(frozen=True)
class Start(_Record):
    """The start of a request.

    ``sparsity``: None if no overall sparsity was requested.  ``layers``: number of layers.
    ``neurons``: number of neurons in each layer.
    """

    kind: ClassVar[str] = "start"
    id: str
    model: str
    method: str
    sparsity: float | None
    config: dict[str, Any]
    executor: str
    layers: int
    neurons: tuple[int, ...]
    prompt: tuple[PromptToken, ...]


@dataclass(frozen=True)
class Likely:
    """One of the likeliest tokens at a position; ``logprob`` is in nats."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Scores(_Record):
    """Log-probabilities of the prompt's tokens, emitted if they were requested.

    ``logprobs``: one per token, in nats, given all earlier tokens; None for the first token.
    ``top``: the likeliest tokens at each position; empty for the first token.
    """

    kind: ClassVar[str] = "scores"
    logprobs: tuple[float | None, ...]
    top: tuple[tuple[Likely, ...], ...]


@dataclass(frozen=True)
class Token(_Record):
    """One token of one choice.

    ``text``: the text that this token adds to the answer.  It is "" while a character is incomplete
    or a stop string may have begun; a later ``text`` then also contains the text held back.  An
    answer is the concatenation of every ``text`` of its choice.
    ``piece``: the text of this token alone.  An end token has a ``piece`` but adds no text of its
    own.  ``phase``: ``prefill`` (the first token, from the prompt's logits), ``observe``,
    ``pruned``, ``released`` or ``dense``.  ``logprob`` (nats) and ``top`` are None unless
    requested.  ``seconds``: time since the previous token, or since the request began.
    """

    kind: ClassVar[str] = "token"
    choice: int
    index: int
    id: int
    text: str
    piece: str
    phase: str
    logprob: float | None
    top: tuple[Likely, ...] | None
    seconds: float


@dataclass(frozen=True)
class Check(_Record):
    """The drift detector completed a window of tokens.

    ``similarity`` is None if the detector has no reference yet with which to compare the window.
    """

    kind: ClassVar[str] = "check"
    check: DriftCheck

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the fields of ``DriftCheck``."""
        data = {"kind": self.kind, **_plain(self.check)}
        first = self.check.state == "arming" and self.check.similarity == 0
        return {**data, "similarity": None} if first else data


@dataclass(frozen=True)
class Masked(_Record):
    """New masks were built."""

    kind: ClassVar[str] = "remask"
    remask: Remask

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the fields of ``Remask``."""
        return {"kind": self.kind, **_plain(self.remask)}


@dataclass(frozen=True)
class Mask(_Record):
    """New masks of all layers; ``number`` numbers a request's masks from 1.

    ``token``: index of the first answer token that is predicted with these masks.
    ``kept_share``: fraction of neurons that each layer keeps.  ``raster``: for each layer, one byte
    per group of neighbouring neurons; the byte is 255 times the fraction of the group that is kept.
    With per-token selection, this fraction is the layer's ``kept_share`` in every group.
    """

    kind: ClassVar[str] = "mask"
    number: int
    token: int
    kept_share: tuple[float, ...]
    raster: tuple[bytes, ...]


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens of a request.

    ``completion_tokens`` counts the tokens of all choices.  ``cached_tokens``: prompt tokens taken
    from the conversation's cache.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Timings:
    """How long a request took, with llama.cpp's names.

    ``prompt_n``: prompt tokens that were not cached.  ``predicted_n``: answer tokens of all
    choices, without the first token of each.  ``prompt_ms`` ends at the first token;
    ``predicted_ms`` begins there.
    """

    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, with times per token and tokens per second (None for no tokens)."""
        data: dict[str, Any] = {}
        for name in ("prompt", "predicted"):
            count, ms = getattr(self, f"{name}_n"), getattr(self, f"{name}_ms")
            data[f"{name}_n"], data[f"{name}_ms"] = count, ms
            data[f"{name}_per_token_ms"] = ms / count if count else None
            data[f"{name}_per_second"] = 1e3 * count / ms if count and ms else None
        return data


@dataclass(frozen=True)
class Done(_Record):
    """The last record, which ``Engine.run`` also returns.  Tuples have one value per choice.

    ``finish``: why an answer ended: ``stop`` (an end token or a stop string), ``length`` or
    ``cancelled``.
    """

    kind: ClassVar[str] = "done"
    id: str
    finish: tuple[str, ...]
    texts: tuple[str, ...]
    usage: Usage
    timings: Timings
    report: RunReport
    tokens: tuple[tuple[int, ...], ...] = ()


GenerationResult = Done


@dataclass(frozen=True)
class Failed(_Record):
    """The last record of a request that failed."""

    kind: ClassVar[str] = "error"
    id: str
    message: str


Record = Start | Scores | Token | Check | Masked | Mask | Done | Failed
"""Any record that an engine emits."""
