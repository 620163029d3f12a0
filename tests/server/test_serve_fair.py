"""Whose turn it is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.server.worker import FairQueue, Full


def drain(queue: FairQueue[str]) -> list[str]:
    return queue.clear()


def test_one_alone_is_served_in_order() -> None:
    queue: FairQueue[str] = FairQueue(8)
    for item in "abc":
        queue.put("one", "", item)
    assert len(queue) == 3
    assert drain(queue) == ["a", "b", "c"]
    assert queue.take() is None


def test_clients_take_turns_whatever_they_sent_before() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for i in range(10):
        queue.put("greedy", "", f"g{i}")
    queue.put("late", "", "l0")
    queue.put("late", "", "l1")
    assert drain(queue)[:5] == ["g0", "l0", "g1", "l1", "g2"]


def test_users_of_a_client_share_its_turns() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for user in "ab":
        for i in range(2):
            queue.put("key 1", user, f"{user}{i}")
    queue.put("key 2", "", "x")
    assert drain(queue) == ["a0", "x", "b0", "a1", "b1"]


def test_one_client_leaves_places_for_others() -> None:
    queue: FairQueue[str] = FairQueue(4)
    for i in range(3):
        queue.put("greedy", str(i), str(i))
    with pytest.raises(Full) as caught:
        queue.put("greedy", "another", "3")
    assert (caught.value.waiting, caught.value.own) == (3, True)
    queue.put("other", "", "o")
    with pytest.raises(Full) as caught:
        queue.put("third", "", "t")
    assert (caught.value.waiting, caught.value.own) == (4, False)
    assert drain(queue) == ["0", "o", "1", "2"]


def test_one_place_is_for_anybody() -> None:
    queue: FairQueue[str] = FairQueue(1)
    queue.put("one", "", "a")
    with pytest.raises(Full):
        queue.put("two", "", "b")


def test_who_left_is_not_served() -> None:
    queue: FairQueue[str] = FairQueue(8)
    for item in "abc":
        queue.put(item, "", item)
    assert queue.remove("b")
    assert not queue.remove("b")
    assert drain(queue) == ["a", "c"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=40))
def test_nobody_waits_longer_than_a_round(arrivals: list[tuple[int, int]]) -> None:
    """Between two turns of one client, no other client has two."""
    queue: FairQueue[tuple[int, int, int]] = FairQueue(1000)
    for number, (client, user) in enumerate(arrivals):
        queue.put(str(client), str(user), (client, user, number))
    served = queue.clear()
    assert sorted(number for _, _, number in served) == list(range(len(arrivals)))
    for client in range(4):
        own = [i for i, one in enumerate(served) if one[0] == client]
        for first, second in zip(own, own[1:], strict=False):
            between = [one[0] for one in served[first + 1 : second]]
            assert len(between) == len(set(between))
        numbers: dict[int, int] = {}
        for one in (served[i] for i in own):
            assert numbers.get(one[1], -1) < one[2]  # a user's requests keep their order
            numbers[one[1]] = one[2]
