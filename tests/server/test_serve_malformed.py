"""Malformed requests never make the server fail or hang; the benchmark has a thousand of them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from serve_cases import Running, benchmark, running

malformed = benchmark("serve_malformed")
FROM_SCHEMA = 90
WHOLE_SECONDS = 120.0


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_body_kib=512, max_tokens=8) as found:
        yield found


@pytest.mark.contract("server never answers 5xx to malformed input")
def test_what_is_written_by_hand(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    found = malformed.summary(list(malformed.hand_written(server.url)))
    assert found["bad"] == []
    assert found["requests"] > 250
    assert found["statuses"]["400"] > 200
    assert time.monotonic() - began < WHOLE_SECONDS
    assert not [record for record in caplog.records if record.name == "dart_llm.serve"]


@pytest.mark.contract("server never answers 5xx to malformed input")
def test_what_breaks_the_description(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    outcomes = malformed.from_schema(server.url, FROM_SCHEMA)
    found = malformed.summary(outcomes)
    assert found["bad"] == []
    assert found["requests"] >= FROM_SCHEMA * 0.9
    assert {one.what.split(" ")[1] for one in outcomes} >= set(malformed.POSTS)
    assert time.monotonic() - began < WHOLE_SECONDS
    assert not [record for record in caplog.records if record.name == "dart_llm.serve"]
