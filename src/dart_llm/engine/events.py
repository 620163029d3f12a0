"""What an engine tells of a request while it runs, one frozen record at a time.

Every request gives one ``start``, then ``scores``, ``token``, ``check``, ``remask`` and ``mask``
records as things happen, and one ``done`` or ``error``.  ``to_dict`` gives JSON-able data with a
``kind``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

from dart_llm.pruning.records import DriftCheck, Remask, RunReport

BINS = 96
"""Groups of neighbouring neurons per layer in a mask's raster, where a layer has so many."""


def _plain(value: Any) -> Any:
    """JSON-able data of a record or of what it holds."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return [_plain(one) for one in value] if isinstance(value, tuple | bytes) else value


class _Told:
    """What all records have."""

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data: the kind, then the fields."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {"kind": self.kind, **{name: _plain(value) for name, value in told.items()}}


@dataclass(frozen=True)
class PromptToken:
    """One token of the prompt; special tokens by their names."""

    id: int
    text: str


@dataclass(frozen=True)
class Start(_Told):
    """A request begins.  ``sparsity``: None where no sparsity of the whole model was asked for."""

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
    """One of the likeliest tokens at a place; ``logprob`` in nats."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Token(_Told):
    """One token of one choice.

    ``text``: what became readable with it: "" while a character is incomplete or a stop string may
    be beginning, more than its own text afterwards; an answer is all of them joined.  ``piece``:
    its own text.  A token that ends the text has a ``piece`` and no text of its own.
    ``phase``: ``prefill`` (the first, from the prompt's logits), ``observe``, ``pruned``,
    ``released`` or ``dense``.  ``logprob`` (nats) and ``top`` are None unless asked for.
    ``seconds``: since the token before, or since the request began.
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
class Scores(_Told):
    """What the model gave each token of the prompt, where that was asked for.

    ``logprobs``: nats, given all tokens before it; None for the first one.  ``top``: the likeliest
    tokens at its place; nothing for the first one.
    """

    kind: ClassVar[str] = "scores"
    logprobs: tuple[float | None, ...]
    top: tuple[tuple[Likely, ...], ...]


@dataclass(frozen=True)
class Check(_Told):
    """The drift detector completed a window.

    The first window of a rule that is arming has nothing to compare with: ``similarity`` is None.
    """

    kind: ClassVar[str] = "check"
    check: DriftCheck

    def to_dict(self) -> dict[str, Any]:
        """The fields of ``DriftCheck``."""
        alone = self.check.state == "arming" and self.check.similarity == 0
        found = {"kind": self.kind, **_plain(self.check)}
        return {**found, "similarity": None} if alone else found


@dataclass(frozen=True)
class Masked(_Told):
    """Masks were built."""

    kind: ClassVar[str] = "remask"
    remask: Remask

    def to_dict(self) -> dict[str, Any]:
        """The fields of ``Remask``."""
        return {"kind": self.kind, **_plain(self.remask)}


@dataclass(frozen=True)
class Mask(_Told):
    """The mask that came into force with token ``token``; ``number`` counts from 1.

    ``raster``: per layer one byte for each group of neighbouring neurons, the share of them that
    is kept, 0 to 255; the same everywhere where every token chooses its own neurons.
    """

    kind: ClassVar[str] = "mask"
    number: int
    token: int
    kept_share: tuple[float, ...]
    raster: tuple[bytes, ...]


@dataclass(frozen=True)
class Usage:
    """Tokens of a request; ``cached_tokens`` of the prompt were known from its conversation.

    ``completion_tokens``: of all choices, tokens that end a text included.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Timings:
    """How long a request took, under llama.cpp's names; ``ms`` are milliseconds.

    ``prompt_n`` tokens were read until the first token was there, ``predicted_n`` were decoded
    after it (over all choices); rates are None where nothing was done.
    """

    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float

    def to_dict(self) -> dict[str, Any]:
        """With times per token, and tokens per second."""
        found: dict[str, Any] = {}
        for name, count, ms in (
            ("prompt", self.prompt_n, self.prompt_ms),
            ("predicted", self.predicted_n, self.predicted_ms),
        ):
            found[f"{name}_n"], found[f"{name}_ms"] = count, ms
            found[f"{name}_per_token_ms"] = ms / count if count else None
            found[f"{name}_per_second"] = 1e3 * count / ms if count and ms else None
        return found


@dataclass(frozen=True)
class Done(_Told):
    """A request ended; the last record of it."""

    kind: ClassVar[str] = "done"
    id: str
    finish: tuple[str, ...]
    texts: tuple[str, ...]
    usage: Usage
    timings: Timings
    report: RunReport


@dataclass(frozen=True)
class Failed(_Told):
    """A request failed; the last record of it."""

    kind: ClassVar[str] = "error"
    id: str
    message: str


Record = Start | Scores | Token | Check | Masked | Mask | Done | Failed
"""What ``Engine.run`` hands to ``emit``."""
