"""What an engine tells of a request while it runs, one frozen record at a time.

Every request gives one ``start``, then ``scores``, ``token``, ``check``, ``remask`` and ``mask``
records as things happen, and one ``done`` or ``error``.  ``to_dict`` gives JSON-able data with a
``kind``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from dart_llm.pruning.records import DriftCheck, Remask, RunReport

BINS = 96
"""Groups of neighbouring neurons per layer in a mask's raster, where a layer has so many."""


def _flat(record: Any) -> dict[str, Any]:
    """The fields by name; what they hold is left as it is."""
    return {"kind": record.kind, **{f.name: getattr(record, f.name) for f in fields(record)}}


@dataclass(frozen=True)
class PromptToken:
    """One token of the prompt; special tokens by their names."""

    id: int
    text: str


@dataclass(frozen=True)
class Start:
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        prompt = [{"id": one.id, "text": one.text} for one in self.prompt]
        return {**_flat(self), "neurons": list(self.neurons), "prompt": prompt}


@dataclass(frozen=True)
class Likely:
    """One of the likeliest tokens at a place; ``logprob`` in nats."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Token:
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        if self.top is None:
            return _flat(self)
        top = [{"id": one.id, "text": one.text, "logprob": one.logprob} for one in self.top]
        return {**_flat(self), "top": top}


@dataclass(frozen=True)
class Scores:
    """What the model gave each token of the prompt, where that was asked for.

    ``logprobs``: nats, given all tokens before it; None for the first one.  ``top``: the likeliest
    tokens at its place; nothing for the first one.
    """

    kind: ClassVar[str] = "scores"
    logprobs: tuple[float | None, ...]
    top: tuple[tuple[Likely, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        top = [[asdict(one) for one in place] for place in self.top]
        return {**_flat(self), "logprobs": list(self.logprobs), "top": top}


@dataclass(frozen=True)
class Check:
    """The drift detector completed a window.

    The first window of a rule that is arming has nothing to compare with: ``similarity`` is None.
    """

    kind: ClassVar[str] = "check"
    check: DriftCheck

    def to_dict(self) -> dict[str, Any]:
        """The fields of ``DriftCheck``."""
        found = {"kind": self.kind, **asdict(self.check)}
        alone = self.check.state == "arming" and self.check.similarity == 0
        return {**found, "similarity": None} if alone else found


@dataclass(frozen=True)
class Masked:
    """Masks were built."""

    kind: ClassVar[str] = "remask"
    remask: Remask

    def to_dict(self) -> dict[str, Any]:
        """The fields of ``Remask``."""
        return {"kind": self.kind, **asdict(self.remask), "kept": list(self.remask.kept)}


@dataclass(frozen=True)
class Mask:
    """The mask that came into force with token ``token``; ``number`` counts from 1.

    ``raster``: per layer one byte for each group of neighbouring neurons, the share of them that
    is kept, 0 to 255; the same everywhere where every token chooses its own neurons.
    """

    kind: ClassVar[str] = "mask"
    number: int
    token: int
    kept_share: tuple[float, ...]
    raster: tuple[bytes, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        raster = [list(row) for row in self.raster]
        return {**_flat(self), "kept_share": list(self.kept_share), "raster": raster}


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
class Done:
    """A request ended; the last record of it."""

    kind: ClassVar[str] = "done"
    id: str
    finish: tuple[str, ...]
    texts: tuple[str, ...]
    usage: Usage
    timings: Timings
    report: RunReport

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "kind": self.kind,
            "id": self.id,
            "finish": list(self.finish),
            "texts": list(self.texts),
            "usage": asdict(self.usage),
            "timings": self.timings.to_dict(),
            "report": self.report.to_dict(),
        }


@dataclass(frozen=True)
class Failed:
    """A request failed; the last record of it."""

    kind: ClassVar[str] = "error"
    id: str
    message: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return _flat(self)


Record = Start | Scores | Token | Check | Masked | Mask | Done | Failed
"""What ``Engine.run`` hands to ``emit``."""
