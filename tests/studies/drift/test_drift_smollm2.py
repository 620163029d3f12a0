"""A drift study of the default model on a short passage."""

from __future__ import annotations

from pathlib import Path

import pytest

from dart_llm.data import passages as drift_passages
from dart_llm.studies.drift.settings import collect
from drift_cases import draw_nothing, results, study, write_rows


@pytest.mark.smollm2
def test_pruning_costs_and_decayed_evidence_helps_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    passage = drift_passages.shipped()[0].to_dict()
    parts = [passage["text"][:1400].rsplit(" ", 1)[0]]
    second = passage["text"][passage["changes"][0] :]
    parts.append(second[:1100].rsplit(" ", 1)[0])
    short = {**passage, "text": "\n\n".join(parts), "changes": [len(parts[0]) + 2]}
    short["topics"] = passage["topics"][:2]
    asked = collect(
        {
            "passages": write_rows(tmp_path / "one.jsonl", [short]),
            "results_dir": str(tmp_path / "results"),
            "methods": "never,decay:32,fresh:1",
            "prompt_tokens": 128,
            "remask_at_change": 40,
        },
        environment={},
    )
    rows = results(study(asked))
    after = {row["label"]: row["loss"]["topics"][1]["later"]["mean_loss"] for row in rows.values()}
    assert after["dense"] + 0.5 < after["never@0.5"]
    # a single fresh token beats stale masks because the prior stands behind it
    assert after["decay:32@0.5"] < after["fresh:1@0.5"] < after["never@0.5"]
    reports = {row["label"]: row["accounting"] for row in rows.values()}
    assert reports["never@0.5"]["achieved_sparsity"] == pytest.approx(0.5, abs=0.001)
    assert reports["decay:32@0.5"]["remask_causes"] == {"first": 1, "forced": 1}
