"""What is kept of named conversations between their turns."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dart_llm.engine_host import Ready
from dart_llm.tracer import Tracer


@dataclass
class Conversation:
    """A cache, the tokens in it, and the tracer that saw them.

    ``answer``: where the last answer begins in ``ids``; what lies before is never rolled back.
    """

    ready: Ready
    tracer: Tracer
    cache: Any
    ids: list[int]
    answer: int

    def shared(self, ids: Sequence[int]) -> int:
        """Leading tokens of ``ids`` that need not be read again; 0 where this cannot go on.

        A prompt may leave out the end of the last answer (a stop string), or spell it otherwise.
        """
        same = 0
        for old, new in zip(self.ids, ids, strict=False):
            if old != new:
                break
            same += 1
        same = min(same, len(ids) - 1)  # the last token's logits are wanted
        if same < self.answer or (same < len(self.ids) and not _can_crop(self.cache)):
            return 0
        return same

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        if gone := len(self.ids) - length:
            self.cache.crop(-gone)
            self.ids = self.ids[:length]

    def forget_accounts(self) -> None:
        """The next turn is counted for itself."""
        tracer = self.tracer
        tracer.branch()
        tracer.finished, tracer.checks = [], []
        for life in tracer.lives:
            life.periods, life.remasks, life.prompt_tokens = [], [], 0.0


def _can_crop(cache: Any) -> bool:
    return all(getattr(layer, "is_croppable", False) for layer in cache.layers)


class Kept:
    """At most ``limit`` conversations, those used last.

    Who has the most of them loses one first: nobody who comes with many drops those of others.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[str, tuple[str, Conversation]] = OrderedDict()

    def take(self, name: str | None) -> Conversation | None:
        """What is kept under ``name``, which is then held no more."""
        return None if name is None else self._held.pop(name, ("", None))[1]

    def put(self, name: str, conversation: Conversation, owner: str = "") -> None:
        """Keep it as the one used last."""
        self._held[name] = (owner, conversation)
        while len(self._held) > self._limit:
            counts = Counter(owner for owner, _ in self._held.values())
            most = max(counts.values())
            del self._held[next(n for n, (own, _) in self._held.items() if counts[own] == most)]

    def clear(self) -> None:
        self._held.clear()

    def __len__(self) -> int:
        return len(self._held)
