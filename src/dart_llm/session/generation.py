"""Generates text token by token, with the model's ``generate`` method."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from dart_llm.errors import DartError
from dart_llm.session.run import Run


class FiniteLogits(LogitsProcessor):
    """Raises ``DartError`` if a logit is NaN or +infinity, which argmax would hide.

    ``what``: where the logits come from, for the message, e.g. ``document 3``.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if bool((scores.isnan() | scores.isposinf()).any()):
            raise DartError(
                f"a logit of {self.what} is not finite: the model overflows; try dtype float32"
            )
        return scores


class CheckedModel:
    """Wraps a model for ``generate`` below, which then checks logits and stops at ``ends``."""

    def __init__(self, model: Any, ends: frozenset[int], what: str) -> None:
        self.model, self.device = model, model.device
        checks = LogitsProcessorList([FiniteLogits(what)])
        self._settings = {"logits_processor": checks, "eos_token_id": sorted(ends) or None}

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's ``generate`` with the checks and the end tokens."""
        return self.model.generate(*args, **self._settings, **kwargs)


def text_ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the end-of-sequence tokens of the generation settings and of the tokenizer."""
    ends = model.generation_config.eos_token_id
    ids = [*(ends if isinstance(ends, list | tuple) else [ends]), tokenizer.eos_token_id]
    return frozenset(int(token) for token in ids if token is not None)


@dataclass(frozen=True)
class Step:
    """One generated token, for programs that show text as it is generated.

    ``phase``: see ``Run.phase``; ``seconds``: time since the previous token.
    """

    index: int
    token_id: int
    text: str
    phase: str
    seconds: float


OnStep = Callable[[Step], None]


@dataclass
class Generation:
    """The tokens of a generated text; all lists have one entry per token, as in ``Step``."""

    token_ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.tokens)


HALF = "\ufffd"
"""Replacement character, which tokenizers return for an incomplete character."""

CONTEXT = 4
"""Number of earlier tokens that are decoded with new tokens, because some tokenizers decode the
first token of a text differently."""


def decode_ids(tokenizer: Any, ids: Sequence[int], special: bool = False) -> str:
    """Return the text of ``ids``, without clean-up; ``special``: special tokens appear by name."""
    text: str = tokenizer.decode(
        ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )
    return text


class TextStream:
    """Decodes one answer token by token, without special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """Add a token; return the text that it completes, or "" if a character is incomplete."""
        self._pending.append(token)
        text = decode_ids(self._tokenizer, self._context + self._pending)
        return "" if text.endswith(HALF) else self._complete(text)

    def end(self) -> str:
        """Return the remaining text after the last token, including an incomplete character."""
        rest = self._context + self._pending
        return self._complete(decode_ids(self._tokenizer, rest)) if self._pending else ""

    def _complete(self, text: str) -> str:
        """Return the new part of ``text``; the pending tokens become context."""
        new = text[len(self._context_text) :]
        self._context = (self._context + self._pending)[-CONTEXT:]
        self._context_text = decode_ids(self._tokenizer, self._context)
        self._pending = []
        return new


class _Collector(BaseStreamer):
    """A streamer: receives the prompt and then each token from ``generate``."""

    def __init__(self, tokenizer: Any, run: Run | None, on_step: OnStep | None) -> None:
        self.run, self.on_step = run, on_step
        self.result = Generation()
        self._prompt_seen = False
        self._stream = TextStream(tokenizer)
        self._clock = time.perf_counter()

    def put(self, value: Tensor) -> None:
        for token in value.flatten().tolist() if self._prompt_seen else ():
            self._add(int(token))
        self._prompt_seen = True

    def _add(self, token: int) -> None:
        now, result = time.perf_counter(), self.result
        index, phase = len(result.token_ids), self.run.phase if self.run else "dense"
        text, phase = self._stream.add(token), phase if index else "prefill"
        step = Step(index, token, text, phase, now - self._clock)
        self._clock = now
        result.token_ids.append(token)
        result.tokens.append(step.text)
        result.phases.append(step.phase)
        result.seconds.append(step.seconds)
        if self.on_step is not None:
            self.on_step(step)

    def end(self) -> None:
        return


class _Stop(StoppingCriteria):
    """Stops ``generate`` as soon as ``stops`` returns True."""

    def __init__(self, stops: Callable[[], bool]) -> None:
        self.stops = stops

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.stops(), device=input_ids.device)


def generate(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    tokens: int,
    *,
    run: Run | None = None,
    on_step: OnStep | None = None,
    temperature: float | None = None,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
) -> Generation:
    """Generate tokens after ``ids`` [1, T], at most ``tokens``; greedy without a ``temperature``.

    ``run``: the attached run, which gives the phase of each token.  ``on_step`` and ``stop`` are
    called after every token; generation ends when ``stop`` returns True.
    """
    collector = _Collector(tokenizer, run, on_step)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    pad = tokenizer.pad_token_id
    model.generate(
        ids.to(model.device),
        attention_mask=torch.ones_like(ids, device=model.device),
        max_new_tokens=tokens,
        streamer=collector,
        stopping_criteria=StoppingCriteriaList([_Stop(stop)] if stop else []),
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        **{"do_sample": False, **sampling},
    )
    return collector.result
