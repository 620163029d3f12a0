"""Forced mode: a passage is read with its first tokens as the prompt; every next token's loss.

The first P tokens are prefilled dense and observed; the others run as decode tokens through the
live tracer (perplexity.py steps through them).  Token k after the prompt is fed in decode step k,
so the loss of token k + 1 is the first that step k decides: token 0, which the dense prompt
predicts, has none, and the last token is never fed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dart_llm.config import PruneConfig
from dart_llm.drift_grid import Source, shortened
from dart_llm.errors import ConfigError, DartError
from dart_llm.life import Phase
from dart_llm.perplexity import score_window
from dart_llm.ppl_parts import DIGITS
from dart_llm.ppl_windows import Window
from dart_llm.session import Run
from dart_llm.token_ends import encode, first_tokens

FORCED_REMASK = "forced"
"""Cause of a re-mask at a known moment."""


@dataclass(frozen=True, eq=False)
class Reading:
    """A passage as tokens ``ids`` [n], of which the first ``prompt`` are the prompt.

    ``starts``: index, counted after the prompt, of the first token of every topic; 0 for the first
    topic.  ``pieces``: the text of every token after the prompt.  ``cut``: whether the context
    ended before the passage did.
    """

    source: Source
    ids: Tensor
    prompt: int
    starts: tuple[int, ...]
    pieces: tuple[str, ...]
    cut: bool

    @property
    def decoded(self) -> int:
        """Tokens after the prompt."""
        return len(self.ids) - self.prompt


def read(source: Source, tokenizer: Any, prompt: int, longest: int | None) -> Reading:
    """Tokenise a passage; ``longest``: tokens of the model's context.

    Raises ``ConfigError`` when the first topic is too short for a prompt of ``prompt`` tokens, or
    the context for the first change.
    """
    ids, ends = encode(tokenizer, source.text)
    count = min(len(ids), longest or len(ids))
    cut = count < len(ids)
    kept = shortened(source, ends[count - 1]) if cut else source
    if not kept.changes:
        raise ConfigError(
            f'the passage "{source.id}" changes its topic after the {longest} tokens of the '
            "model's context: give a model with a longer one, or shorter passages"
        )
    firsts = first_tokens(ends, kept.changes)
    if firsts[0] < prompt + 2:
        raise ConfigError(
            f'the passage "{source.id}" has {firsts[0]} tokens before its first change of topic, '
            f"too few for a prompt of {prompt} and a token after it: give a smaller "
            "--prompt-tokens, or a longer passage"
        )
    bounds = [ends[prompt - 1], *ends[prompt:count]]
    pieces = [kept.text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    starts = (0, *(first - prompt for first in firsts))
    return Reading(kept, torch.tensor(ids[:count]), prompt, starts, tuple(pieces), cut)


class TimedRun(Run):
    """A run that makes new masks at known moments, in addition to its drift rule's.

    ``triggers``: decode steps before which all layers leave PRUNED and are observed anew.  The
    other arguments are those of ``Run``.
    """

    def __init__(
        self, model: Any, config: PruneConfig, triggers: Sequence[int], **settings: Any
    ) -> None:
        super().__init__(model, config, **settings)
        self._due = sorted(triggers)

    def tokens_until_change(self) -> int | None:
        """As of a run; acts on a moment that is due, and no forward goes past one."""
        self._force()
        bound = super().tokens_until_change()
        if not self._due or not self._tracer.lives:
            return bound
        left = self._due[0] - self._tracer.lives[-1].decoded
        return left if bound is None else min(bound, left)

    def _force(self) -> None:
        """Trigger when it is time; a sequence that has no masks yet goes on observing."""
        self._tracer.flush()
        for life in self._tracer.lives[-1:]:
            while self._due and life.decoded >= self._due[0]:
                self._due.pop(0)
                if life.phase is Phase.PRUNED:
                    with torch.inference_mode(False):  # the evidence outlives this forward
                        life.trigger(FORCED_REMASK)


def triggers(reading: Reading, observed: int, moment: int) -> list[int]:
    """Decode steps at which a timed method starts to observe, so that its masks hold in time.

    ``moment`` tokens after each change, of which the last ``observed`` ran dense.  A change whose
    topic is shorter than that has none.
    """
    ends = [*reading.starts[2:], reading.decoded]
    return [
        start + moment - observed
        for start, end in zip(reading.starts[1:], ends, strict=True)
        if start + moment < end
    ]


def losses(model: Any, run: Run | None, reading: Reading) -> list[float | None]:
    """The loss in nats of every token after the prompt; None for the first of them.

    ``run``: an attached run, or None for the untouched model.  Raises ``DartError`` when a loss is
    not finite.
    """
    try:
        found = score_window(model, run, Window(reading.ids, reading.prompt + 1))
    except DartError as error:
        if type(error) is not DartError:
            raise
        words = str(error).removeprefix("slice 0: ")
        raise DartError(f"the passage {reading.source.id}: {words}") from None
    return [None, *(round(loss, DIGITS) for loss in found.losses)]
