"""docs/claims.md: every claim has its four parts, numbers are made from files, words fit them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/claims.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
CLAIMS = [name for name in SECTIONS if name != "Also in the abstract"]
CLAIMED = {"14.5", "70", "8", "3", "10", "0.1", "16"}
"""Numbers of the abstract: 14.5 %, 70 %, 8B, 3 times, 10 MB, 0.1 %, 16 GB."""
OTHERS = {"135", "630", "95", "1", "0"}
"""Parameters (tested below), intervals, and small numbers that are no results."""


@pytest.fixture(scope="module")
def measured() -> Any:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import claims_measured
    finally:
        sys.path.pop(0)
    return claims_measured


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))


def test_there_is_a_section_for_each_of_five_claims() -> None:
    assert [re.sub(r"[^\d.%]+", " ", name).strip() for name in CLAIMS] == [
        "14.5 % 70 %",
        "3",
        "10",
        "0.1 %",
        "",
    ]


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_has_its_parts(name: str) -> None:
    parts = re.findall(r"^\*\*(\w[\w ]*)\.\*\*", SECTIONS[name], re.MULTILINE)
    assert parts == ["Says", "Command", "Here", "The published code"]
    assert "<!-- generated: claims-" in SECTIONS[name]


def test_every_table_of_results_is_generated(measured: Any) -> None:
    blocks = re.findall(r"<!-- generated: (\S+) -->", PAGE)
    assert sorted(blocks) == sorted(measured.tables(ROOT))


def test_no_number_stands_in_the_text_alone() -> None:
    text = re.sub(r"<!-- generated: .*?<!-- end of generated: \S+ -->", "", PAGE, flags=re.DOTALL)
    text = re.sub(
        r"```.*?```|`[^`\n]*`|\]\([^)]*\)|arXiv \d+\.\d+|Llama-3\.1", "", text, flags=re.DOTALL
    )
    assert set(re.findall(r"\d+(?:\.\d+)?", text)) <= CLAIMED | OTHERS


def test_the_models_are_as_large_as_it_says() -> None:
    sizes = [f["parameters"] / 1e6 for f in results("quality-continuation")["checkpoints"].values()]
    assert [round(size) for size in sizes] == [135, 630]


def test_accuracies_on_arc_are_open_but_of_token_level_tracing() -> None:
    found = {
        (name, row["method"]): row["to_griffin"]
        for name in ("smollm2", "qwen")
        for row in results(f"evaluation-{name}")["rows"]
        if row["task"] == "arc_easy_local" and row["asked"] == 0.7
    }
    assert not found["smollm2", "dart"]["significant"]
    assert not found["qwen", "dart"]["significant"]
    assert found["smollm2", "dart-token"]["significant"]
    assert found["smollm2", "dart-token"]["low"] > 0


def test_perplexities_are_clearly_better() -> None:
    rows = [r for r in results("quality-continuation")["cells"] if r["sparsity"] == 0.7]
    lows = [row["equal_sparsity"]["interval"][0] for row in rows if row["equal_sparsity"]]
    assert len(lows) == 4 and min(lows) > 0


def test_rouge_is_nearly_three_times_that_of_the_weaker_static_method() -> None:
    best = {"static": 0.0, "flap": 0.0}
    better = []
    for name in ("smollm2", "qwen"):
        rows = [r for r in results(f"evaluation-{name}")["rows"] if r["metric"] == "rougeL"]
        value = {(row["method"], row["asked"]): row["value"] for row in rows}
        for asked in (0.5, 0.7):
            statics = {other: value[other, asked] for other in best}
            best = {o: max(best[o], value["dart", asked] / v) for o, v in statics.items()}
            better.append(value["dart", asked] / max(statics.values()))
    assert 2.7 < max(best.values()) < 3
    assert 2 < max(better) < 2.5


def test_masks_were_renewed_in_few_free_texts() -> None:
    rows = {row["label"]: row for row in results("drift-free-smollm2")["rows"]}
    assert 0 < rows["dart@0.5"]["remasks"] < 40 / 4
    never, dart = (rows[name]["metrics"]["rougeL"] for name in ("never@0.5", "dart@0.5"))
    assert never["low"] < dart["mean"] < never["high"]


def test_memory_and_flops_hold_for_two_methods_of_three(measured: Any) -> None:
    for name in ("published", "dart-prompt"):
        cost = results(f"tracer-cost-{name}")
        assert cost["shapes"] == {"layers": 32, "hidden": 4096, "width": 14336}
        assert max(cost["bytes_while_observing"], cost["bytes_while_pruned"]) < 10e6
        assert cost["share_per_256_tokens_with_one_remask_of_32"] < 0.001
    assert "| dart | over 117 |" in measured.memory(ROOT)
    rows = [r for r in results("quality-continuation")["cells"] if r["variant"] == "dart"]
    assert min(r["ffn_flops_share"] - 1 + r["achieved_sparsity"] for r in rows) > 0.001
