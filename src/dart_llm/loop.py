"""What a root forward is: prompt or decode (docs/method.md, "Life of a sequence")."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dart_llm.arch import ForwardArgs, GenerateArgs, PrefillArgs
from dart_llm.errors import ConfigError
from dart_llm.plan import Call, Kind


class Loop:
    """One running call of ``generate``: is it in its prompt step, and which rows have ended."""

    def __init__(self, given: GenerateArgs) -> None:
        self.given = given
        self.prefill: PrefillArgs | None = None
        self.in_prefill = False
        self.forwards = 0
        self.cache: Any = None
        """The cache of the newest forward: after the loop it says how many tokens stayed."""

    def call(self, seen: ForwardArgs) -> Call:
        """What the next forward of this loop is; raises ``ConfigError`` without a cache."""
        first, self.forwards, self.cache = self.forwards == 0, self.forwards + 1, seen.cache
        if self.in_prefill:
            return _call(Kind.PREFILL, seen, valid=self._prompt_part(seen))
        if first:  # assisted decoding has no prompt step: candidates ride along with the prompt
            prompt = self.given.prompt_tokens
            sliced = prompt > seen.tokens
            return _call(
                Kind.PREFILL, seen, seen.valid, observable=prompt - seen.cached * int(sliced)
            )
        if not seen.cached:
            raise ConfigError("this generation runs without a cache, so nothing is decoded")
        return _call(Kind.DECODE, seen, seen.valid, live=self._live(seen.input_ids))

    def _prompt_part(self, seen: ForwardArgs) -> Tensor | None:
        """The prompt's padding, also where the forward itself got a 4-D mask (static caches)."""
        mask = None if self.prefill is None else self.prefill.mask
        if seen.valid is not None or mask is None:
            return seen.valid
        part = mask[:, seen.cached : seen.cached + seen.tokens]
        return None if bool(part.all()) else part.float()

    def _live(self, ids: Tensor | None) -> Tensor | None:
        """[B] bool: rows that have not ended; None when all count."""
        ends = None if self.prefill is None else self.prefill.ends
        if ids is None or ends is None or len(ids) == 1 or self.given.beams > 1:
            return None
        return ~torch.isin(ids, ends).any(1)


class OwnLoop:
    """A token loop of this package, which says what each of its forwards is.

    ``prompt``: whether the next forward is one of the prompt; ``live``: [B] bool, rows that have
    not ended, or None when all count.
    """

    def __init__(self) -> None:
        self.prompt = True
        self.live: Tensor | None = None
        self.cache: Any = None

    def call(self, seen: ForwardArgs) -> Call:
        """What the next forward is."""
        self.cache = seen.cache
        if self.prompt:
            return _call(Kind.PREFILL, seen, seen.valid)
        return _call(Kind.DECODE, seen, seen.valid, live=self.live)


def bare_call(seen: ForwardArgs, forced_decode: bool) -> Call:
    """What a forward outside ``generate`` is."""
    decode = seen.cached and (seen.tokens == 1 or forced_decode)
    call = _call(Kind.DECODE if decode else Kind.PREFILL, seen, seen.valid)
    return replace(call, forced=forced_decode)


def _call(
    kind: Kind,
    seen: ForwardArgs,
    valid: Tensor | None,
    live: Tensor | None = None,
    observable: int | None = None,
) -> Call:
    return Call(kind, seen.cached, seen.tokens, seen.rows, valid, live, observable)
