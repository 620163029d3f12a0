"""Who is next: round robin over clients, and over the users of each client.

No threads and no clock in here; ``serve_worker`` adds them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any, Generic, TypeVar

T = TypeVar("T")

LARGEST_SHARE = 0.75
"""Of some places one client may take at most this share, so that others find one."""


def largest_share(places: int) -> int:
    """How many of ``places`` one client may take."""
    return max(1, int(places * LARGEST_SHARE))


class Full(Exception):
    """No place is left; ``waiting``: how many wait already (all, or those of this client)."""

    def __init__(self, waiting: int, own: bool) -> None:
        super().__init__(waiting)
        self.waiting = waiting
        self.own = own


class FairQueue(Generic[T]):
    """At most ``places`` items wait.  One client's many items do not delay another's first."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.own_places = largest_share(places)
        self._clients: OrderedDict[str, OrderedDict[str, deque[T]]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def put(self, client: str, user: str, item: T, again: bool = False) -> None:
        """Add ``item`` behind those of the same client and user; raises ``Full``.

        ``again``: it has had a turn and is not done; it keeps a place whoever waits.
        """
        users = self._clients.get(client, OrderedDict())
        own = sum(map(len, users.values()))
        if not again and (self._length >= self.places or own >= self.own_places):
            raise Full(self._length, self._length < self.places)
        self._clients.setdefault(client, users).setdefault(user, deque()).append(item)
        self._length += 1

    def take(self) -> T | None:
        """The next item, or None: the longest not served client's longest not served user's."""
        if not self._clients:
            return None
        client, users = next(iter(self._clients.items()))
        user, items = next(iter(users.items()))
        item = items.popleft()
        self._length -= 1
        self._turned(users, user, bool(items))
        self._turned(self._clients, client, bool(users))
        return item

    @staticmethod
    def _turned(ring: OrderedDict[str, Any], key: str, stays: bool) -> None:
        """Who was served goes to the end, and leaves when nothing of it waits."""
        if stays:
            ring.move_to_end(key)
        else:
            del ring[key]

    def remove(self, item: T) -> bool:
        """Take ``item`` out, whose client went away; False when it does not wait (any more)."""
        for client, users in self._clients.items():
            for user, items in users.items():
                if item in items:
                    items.remove(item)
                    self._length -= 1
                    if not items:
                        del users[user]
                    if not users:
                        del self._clients[client]
                    return True
        return False

    def clear(self) -> list[T]:
        """Take everything out."""
        found = []
        while (item := self.take()) is not None:
            found.append(item)
        return found
