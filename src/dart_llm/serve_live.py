"""The records of all requests for who watches, without any text or token."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from dart_llm.engine_records import Record
from dart_llm.serve_errors import Refusal
from dart_llm.serve_fair import largest_share
from dart_llm.serve_format import sse
from dart_llm.serve_turn import Mailbox, Turn

SHOWN: Mapping[str, tuple[str, ...]] = {
    "start": ("id", "model", "method", "sparsity", "config", "executor", "layers", "neurons"),
    "token": ("choice", "index", "phase", "logprob", "seconds"),
    "check": (
        "sequence",
        "row",
        "step",
        "layer",
        "window",
        "similarity",
        "threshold",
        "counter",
        "trigger",
        "state",
    ),
    "remask": ("sequence", "row", "step", "cause", "evidence_tokens", "kept", "overlap"),
    "mask": ("number", "token", "kept_share", "raster"),
    "done": ("finish", "usage", "timings", "report"),
    "error": (),
}
"""Fields of each kind of record that everybody may see; all others stay with their request."""

WATCHERS = 16
"""At most; of one client at most three quarters of them."""
BEHIND = 2000
"""Records that a watcher may lag behind; the ones after that are left out for it."""


def public(record: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    """``record`` without what a user wrote or was answered."""
    kind = str(record["kind"])
    shown = {name: record[name] for name in SHOWN.get(kind, ()) if name in record}
    return {"kind": kind, "request": request_id, **shown}


class Live:
    """Hands the records of running requests to those who watch ``/api/events``.

    ``private``: everybody sees the requests of their own client alone.  What a mask keeps and how
    a text drifts tells much of the text: who can guess a prompt can find out that it was asked.
    """

    def __init__(self, private: bool) -> None:
        self.private = private
        self._boxes: list[tuple[str, Mailbox]] = []

    def __len__(self) -> int:
        return len(self._boxes)

    def publish(self, turn: Turn, record: Record) -> None:
        """From the model's thread; costs nothing while nobody watches."""
        boxes = [
            box
            for client, box in self._boxes
            if len(box) < BEHIND and (client == turn.client or not self.private)
        ]
        if boxes and record.kind in SHOWN:
            line = sse(public(record.to_dict(), turn.request_id))
            for box in boxes:
                box.put(line)

    def watch(self, client: str) -> Mailbox:
        """A box that every further record is put into; raises ``Refusal`` when too many watch."""
        own = sum(one == client for one, _ in self._boxes)
        if len(self._boxes) >= WATCHERS or own >= largest_share(WATCHERS):
            whose = "of yours " if len(self._boxes) < WATCHERS else ""
            raise Refusal(
                429,
                f"too many {whose}watch already: end one, or try again later",
                code="rate_limit_exceeded",
                retry_after=10,
            )
        box = Mailbox(asyncio.get_running_loop())
        # a new list: the model's thread may be at the old one
        self._boxes = [*self._boxes, (client, box)]
        return box

    def leave(self, box: Mailbox) -> None:
        """``box`` gets no more records."""
        self._boxes = [one for one in self._boxes if one[1] is not box]

    def close(self, end: Any) -> None:
        """Tell everybody who watches that this is the end."""
        for _, box in self._boxes:
            box.put(end)
