"""Malformed requests never make the server fail or hang; the benchmark has a thousand of them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from serve_cases import CHAT, Running, benchmark, running

malformed = benchmark("serve_malformed")
FROM_SCHEMA = 90
WHOLE_SECONDS = 120.0


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_body_kib=512, max_tokens=8) as found:
        yield found


def test_what_is_written_by_hand(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    found = malformed.summary(list(malformed.hand_written(server.url)))
    assert found["bad"] == []
    assert found["requests"] > 250
    assert found["statuses"]["400"] > 200
    assert time.monotonic() - began < WHOLE_SECONDS
    assert not [record for record in caplog.records if record.name == "dart_llm.serve"]


def test_what_breaks_the_description(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    outcomes = malformed.from_schema(server.url, FROM_SCHEMA)
    found = malformed.summary(outcomes)
    assert found["bad"] == []
    assert found["requests"] >= FROM_SCHEMA * 0.9
    assert {one.what.split(" ")[1] for one in outcomes} >= set(malformed.POSTS)
    assert time.monotonic() - began < WHOLE_SECONDS
    assert not [record for record in caplog.records if record.name == "dart_llm.serve"]


def test_the_server_still_answers(server: Running) -> None:
    with server.client() as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_the_summary_tells_what_is_bad() -> None:
    good, failed = malformed.Outcome("a", 400, 0.1), malformed.Outcome("b", 500, 0.1)
    hung = malformed.Outcome("c", None, malformed.LONGEST)
    assert malformed.summary([good])["passed"]
    for bad in (failed, hung):
        found = malformed.summary([good, bad])
        assert not found["passed"]
        assert found["bad"] == [vars(bad)]
