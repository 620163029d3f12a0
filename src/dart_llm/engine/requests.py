"""Requests to an engine, and their results."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dart_llm.engine.events import Timings, Usage
from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.records import RunReport

MAX_CHOICES, MAX_STOPS, MAX_LOGPROBS = 128, 16, 20
"""Bounds of ``n``, of the number of stop strings and of ``logprobs``."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled, and when to stop; raises ``ConfigError`` for values out of range.

    ``temperature``: 0 is greedy.  ``top_p``: only the likeliest tokens that together have this
    probability.  ``seed``: the same one gives the same answer; None: another at every request.
    ``n``: answers, decoded as one batch that shares its masks.  ``stop``: strings that end an
    answer, which does not include them.  ``logprobs``: k for the log-probabilities of the sampled
    token and of the k likeliest, before temperature; None for none.  ``prompt_logprobs``: those of
    the prompt's tokens too; ``max_tokens`` may then be 0.
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
        if self.prompt_logprobs and self.logprobs is None:
            raise ConfigError("prompt_logprobs requires logprobs: give their number, 0 or more")
        if self.max_tokens < (0 if self.prompt_logprobs else 1):
            raise ConfigError(f"max_tokens {self.max_tokens} must be 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature {self.temperature:g} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p:g} must lie in (0, 1]")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed} must fit into 64 bits")
        if not 1 <= self.n <= MAX_CHOICES:
            raise ConfigError(f"n {self.n} must be 1 to {MAX_CHOICES}")
        if len(self.stop) > MAX_STOPS:
            raise ConfigError(f"{len(self.stop)} stop strings are too many: give {MAX_STOPS}")
        if not all(self.stop):
            raise ConfigError("an empty stop string would end every answer at once: drop it")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ConfigError(f"logprobs {self.logprobs} must be 0 to {MAX_LOGPROBS}")


@dataclass(frozen=True)
class GenerationRequest:
    """One request.

    ``ids``: the prompt's tokens.  ``config``: None is dense.  ``conversation``: a name; a prompt
    that extends the conversation of this name continues from its cache.  ``owner``: whose it is:
    beyond the limit the owner with the most conversations loses one.  ``id``: the request's id in
    its records; "": a new one.
    """

    ids: tuple[int, ...]
    sampling: Sampling = Sampling()
    config: PruneConfig | None = None
    conversation: str | None = None
    id: str = ""
    owner: str = ""

    def __post_init__(self) -> None:
        if not self.ids:
            raise ConfigError("the prompt has no token")
        if self.conversation is not None and self.sampling.n > 1:
            raise ConfigError("a conversation continues one answer: ask for n 1")
        if self.sampling.prompt_logprobs and self.config is not None:
            raise ConfigError(
                "a prompt is read by the dense model, so its log-probabilities are those of the "
                'dense model: ask for method "dense"; dart-llm eval scores pruned models'
            )
        if self.sampling.prompt_logprobs and self.conversation is not None:
            raise ConfigError(
                "prompt_logprobs needs the whole prompt read: leave the conversation out"
            )


@dataclass(frozen=True)
class GenerationResult:
    """Per choice its text, its tokens and why it ended; usage, timings and accounting.

    ``finish``: ``stop`` (end of text or a stop string), ``length`` or ``cancelled``.
    """

    id: str
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    finish: tuple[str, ...]
    usage: Usage
    timings: Timings
    report: RunReport


Ask = GenerationRequest
Answer = GenerationResult
"""The public names of both."""
