"""Records as readers outside the library get them."""

from __future__ import annotations

import dataclasses

import pytest

from dart_llm.engine.events import Check, Likely, Scores
from dart_llm.pruning.records import DriftCheck


@pytest.mark.parametrize(
    ("state", "similarity", "told"),
    [("arming", 0.0, None), ("arming", 0.4, 0.4), ("armed", 0.0, 0.0), ("held", 0.3, 0.3)],
)
def test_a_window_without_another_has_no_similarity(
    state: str, similarity: float, told: float | None
) -> None:
    values = {field.name: 0 for field in dataclasses.fields(DriftCheck)}
    check = DriftCheck(**{**values, "state": state, "similarity": similarity})  # type: ignore[arg-type]
    found = Check(check).to_dict()
    assert (found["kind"], found["state"], found["similarity"]) == ("check", state, told)


def test_scores() -> None:
    record = Scores((None, -0.5), ((), (Likely(3, "a", -0.5),)))
    assert record.to_dict() == {
        "kind": "scores",
        "logprobs": [None, -0.5],
        "top": [[], [{"id": 3, "text": "a", "logprob": -0.5}]],
    }
