"""scripts/front_table.py on small made-up results: how quality and speed meet in a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from published import ROOT, scripts

with scripts():
    from front_table import PACKED, PRUNED, SPARSITIES, front, tables

PROXIES = {"error": 0.1004, "gaussian": 0.0966}
CHECKPOINT = {"name": "M", "file_quantisation": "Q4_1", "dtype": "bfloat16", "sha256": "ab" * 32}


def quality_rows() -> list[dict[str, Any]]:
    """Perplexities 20, 21, 22, ..., each times 0.05 over dense, and accuracies of a half."""
    methods = [("dense", 0.0), ("dense-8bit", 0.0)]
    methods += [(name, sparsity) for name in PRUNED for sparsity in SPARSITIES]
    rows = []
    for number, (method, asked) in enumerate(methods):
        ratio = {"estimate": 1 + number / 20, "low": 1.0, "high": 1.5}
        own = {"method": method, "asked": asked, "achieved": asked, "status": "done", "remasks": 3}
        own |= {"items": 32, "weight_bytes": 160 if method == "dense-8bit" else 260}
        own |= {"dense_share": 0.0 if asked else 1.0}
        task = {
            "task": "perplexity:w.txt",
            "value": 20 + number,
            "to_dense": ratio if number else None,
        }
        rows.append({**own, **task, "interval": None})
        interval = {"low": 0.4, "high": 0.6}
        share = 0.12 if number % 2 else 0.14
        task = {"task": "arc_easy_local", "value": 0.5, "interval": interval, "dense_share": share}
        rows.append({**own, **task, "items": 300})
    return rows


def speed_run() -> dict[str, Any]:
    names = ["transformers", "dense, slim"]
    names += [f"{name} {100 * s:g} %, slim" for name in PRUNED for s in SPARSITIES]
    asked = [0.0, 0.0, *(s for _ in PRUNED for s in SPARSITIES)]
    rows = []
    for number, (name, share) in enumerate(zip(names, asked, strict=True)):
        ms = 20 - number
        dense = 0.25 if name == "dart 70 %, slim" else 0.0
        times = {"times_transformers": 20 / ms, "times_own_dense": 19 / ms}
        masks = {"asked": share, "achieved_sparsity": share * (1 - dense)}
        masks |= {"dense_token_share": dense, "first_token_ms": 60.4 + number // 3}
        rows.append({"row": name, "tg_ms": ms, **times, **masks, "limit": 1 + number / 10})
    facts = {"prompt_tokens": 128, "tokens": 64, "repeats": 5, "bytes_per_dense_token": 300}
    machine = {"threads": 2, "processor": "P"}
    own = {"own_dense": "dense, slim", "rows": rows, "machine": machine, "checkpoint": CHECKPOINT}
    return {**facts, **own}


def lines() -> list[str]:
    return front({"rows": quality_rows()}, {"runs": [speed_run()]}, PROXIES).splitlines()


def test_a_row_joins_quality_and_speed() -> None:
    shown = lines()
    assert len(shown) == 2 + 2 + 12 + 6
    assert shown[2] == (
        "| dense | 0.0% | 100% | 3 | 20.0 | 1 | 0.50 | 19.00 | 1.05 | 1.00 | 1.10 |"
    )
    assert shown[4] == (
        "| griffin 30% | 30.0% | 0.0% | 3 | 22.0 | 1.10 (1.00 to 1.50) "
        "| 0.50 | 18.00 | 1.11 | 1.06 | 1.20 |"
    )
    assert [line.split(" | ")[0] for line in shown[13:16]] == [
        "| dart-token 30%",
        "| dart-token 50%",
        "| dart-token 70%",
    ]


def test_rounded_weights_have_no_time_and_a_limit_by_their_bytes() -> None:
    assert lines()[3].endswith(
        f"| {PACKED} | {PACKED} | {PACKED} | 1.50 |"
    )  # 300 / (300 - 260 + 160)


def test_the_note_says_what_was_measured_and_what_is_left_out() -> None:
    note = " ".join(lines()[-5:])
    assert "32 slices" in note
    assert "300 questions, each within 0.10 (95 %); 12% to 14% of its tokens ran dense" in note
    assert (
        "over plain transformers, 20.0 ms, *x own dense* over our own dense path, 19.00 ms" in note
    )
    assert "dart 70 % achieved 52.5% there, 25% of its tokens dense. All read" in note
    assert "dart 50 % achieved" not in note
    assert (
        "until the first token plain transformers 60, our dense path 60, griffin 60 to 61, "
        "published 61 to 62, dart 62 to 63, dart-token 63 to 64 ms. dense-8bit"
    ) in note
    assert "dense-4bit is left out: the file was 4-bit before" in note


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with both files and the registry."""
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)
    (tmp_path / "benchmarks/tables.yaml").write_bytes(
        (ROOT / "benchmarks/tables.yaml").read_bytes()
    )
    write(tmp_path, {"rows": quality_rows(), "checkpoint_of_the_cells": CHECKPOINT})
    accounting = {"proxy_error": PROXIES["error"], "proxy_error_gaussian": PROXIES["gaussian"]}
    items = [{"measurement": None}, {"measurement": {"accounting": accounting}}]
    lines = "".join(f"{json.dumps(item)}\n" for item in items)
    (results / "evaluation-smollm2.jsonl").write_text(lines)
    (results / "speed-smollm2-methods.json").write_text(json.dumps({"runs": [speed_run()]}))
    return tmp_path


def write(root: Path, quality: dict[str, Any]) -> None:
    path = root / "benchmarks/results/evaluation-smollm2.json"
    path.write_text(json.dumps(quality))


def test_the_block_has_both_commands_and_both_files(project: Path) -> None:
    page, text = tables(project)["front"]
    assert page == project / "README.md"
    head = text.partition("\n\n| method")[0]
    assert "dart-llm sweep benchmarks/evaluation_smollm2.yaml\ndart-llm bench speed " in head
    assert head.count("](benchmarks/results/") == 2
    assert head.count("M (file quantisation Q4_1, bfloat16, sha256 abababababab)") == 1


def test_there_is_no_block_without_the_speed(project: Path) -> None:
    (project / "benchmarks/results/speed-smollm2-methods.json").unlink()
    assert tables(project) == {}


def test_there_is_no_block_of_the_methods_of_before(project: Path) -> None:
    write(project, {"rows": quality_rows(), "renamed": {"dart": "dart-prompt"}})
    assert tables(project) == {}


def test_there_is_no_block_while_a_row_lacks(project: Path) -> None:
    rows = [row for row in quality_rows() if row["method"] != "dart-token"]
    write(project, {"rows": rows, "checkpoint_of_the_cells": CHECKPOINT})
    assert tables(project) == {}
