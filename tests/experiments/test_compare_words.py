"""What comparisons say: tables, conclusions, notes, leaks, and their files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dart_llm.evaluation.measurement import LEAK
from dart_llm.experiments import comparison, comparison_report
from dart_llm.experiments.comparison_report import conclusion, conclusions, footnotes
from fake_cells import (
    ACC,
    PPL,
    ROUGE,
    accuracy,
    cell,
    failed,
    flags,
    grid,
    layer_curve,
    measured,
    measurement,
    one,
    report,
)


def said(*cells: Any) -> str:
    return conclusion(comparison.rows(cells))


def test_the_whole_document(snapshot: Any) -> None:
    cells = grid(methods=("static", "griffin", "dart"), sparsities=(0.5, 0.7))
    assert comparison_report.markdown(comparison.rows(cells)) == snapshot


def test_a_layer_sweep_and_a_failed_cell(snapshot: Any) -> None:
    lost = failed("wanda", 0.5, ACC, "the calibration text is too short")
    cells = [*layer_curve(count=3), one("dense", 0.0, flags(20)), lost]
    assert comparison_report.markdown(comparison.rows(cells)) == snapshot


def test_terminal_tables_fit_a_log(snapshot: Any) -> None:
    console = Console(width=100, no_color=True)
    rows = comparison.rows(grid(tasks=(ACC, PPL), methods=("griffin", "dart")))
    with console.capture() as capture:
        for table in comparison_report.tables(rows):
            console.print(table.rich())
    assert "…" not in capture.get() and capture.get() == snapshot


def test_verdicts_are_counted_by_task() -> None:
    cells = []
    for task, dart in (("a", 30), ("b", 30), ("c", 20)):
        for method, good in (("griffin", 20), ("dart", dart)):
            result = accuracy(task, flags(good), report=report(method, 0.5))
            cells.append(cell(method, 0.5, task, result))
    noise = "within noise on c (0.000 to 0.000)"
    assert said(*cells) == f"dart at 50 % beats griffin on 2 of 3 tasks; {noise}."
    swapped = [{**c, "measurement": {**c["measurement"], "higher_is_better": False}} for c in cells]
    lost = "dart at 50 % beats griffin on 0 of 3 tasks; loses on a, b"
    assert said(*swapped) == f"{lost}; {noise}."


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ([], "Nothing was measured."),
        (
            [one("griffin", 0.5, flags(20)), one("dart", 0.5, flags(40), 0.3)],
            "dart at 50 % beats griffin on 0 of 1 task; no comparison at equal sparsity on "
            "arc_easy_local.",
        ),
        (
            [one("griffin", 0.5, flags(20)), one("dart", 0.5, flags(25))],
            "dart at 50 % beats griffin on 0 of 1 task; too few items differ on arc_easy_local "
            "(+0.050 to +0.275).",
        ),
        (
            [one("dart", 0.5, flags(20))],
            "dart at 50 % has acc 0.500 on arc_easy_local; nothing to compare it with, or one "
            "item alone.",
        ),
        (
            [one("dense", 0, [1.0]), one("dart", 0.5, [1.0])],
            "dart at 50 % has acc 1.000 on arc_easy_local; nothing to compare it with, or one "
            "item alone.",
        ),
        (
            [one("dense", 0, flags(30)), one("griffin", 0.5, flags(10))],
            "griffin at 50 % beats dense on 0 of 1 task; loses on arc_easy_local.",
        ),
        (
            [cell("dense", 0.0, PPL, measured(PPL, "dense", 0.0))],
            "dense has perplexity 19.2 on perplexity:wikitext2; no pruned model.",
        ),
    ],
)
def test_conclusions(cells: list[Any], sentence: str) -> None:
    assert said(*cells) == sentence


def test_models_and_protocols_are_named_where_there_are_several() -> None:
    cells = []
    for model in ("gemma-3-270m", "Qwen2.5-0.5B"):
        for method, good in (("griffin", 20), ("dart", 30)):
            made = one(method, 0.5, flags(good))
            made["checkpoint"]["name"] = model
            cells.append(made)
    won = "dart at 50 % beats griffin on 1 of 1 task"
    assert said(*cells) == f"gemma-3-270m: {won}; Qwen2.5-0.5B: {won}."


@pytest.mark.contract("defects of the published scripts stay fixed")
def test_what_leaks_is_named_and_no_headline() -> None:
    cells = []
    for protocol in ("decode", "published"):
        for method, good in (("griffin", 20), ("dart", 30)):
            made = one(method, 0.5, flags(good))
            made["cell"]["protocol"] = made["measurement"]["protocol"] = protocol
            cells.append(made)
    won = "dart at 50 % beats griffin on 1 of 1 task."
    assert conclusions(comparison.rows(cells)) == [
        f"protocol decode: {won}",
        f"protocol published LEAK: {won}",
    ]
    assert conclusions(comparison.rows(cells[2:])) == [f"LEAK: {won}"]


def test_the_leak_is_measured_on_the_same_items() -> None:
    cells = []
    for protocol, good in (("full", 20), ("published", 32)):
        made = one("published", 0.5, flags(good))
        made["cell"]["protocol"] = made["measurement"]["protocol"] = protocol
        made["measurement"]["notes"] = [LEAK] if protocol == "published" else []
        cells.append(made)
    rows = comparison.rows(cells)
    (leak,) = comparison_report.leaks(rows)
    assert leak.interval is not None and leak.interval.estimate == pytest.approx(0.3)
    assert leak.sentence.startswith("published@0.5 on arc_easy_local: published against full +0.3")
    assert leak.sentence.endswith("), flattered by the leak.")
    assert footnotes(rows)[0] == comparison_report.LEAK_NOTE
    captions = [table.caption for table in comparison_report.tables(rows)]
    assert [caption.startswith("LEAK, ") for caption in captions] == [False, True]
    assert "What the published protocol leaks" in comparison_report.markdown(rows)
    assert [row["leaks"] for row in comparison_report.document(rows)["rows"]] == [False, True]


def test_notes_say_what_applies() -> None:
    cells = [one("griffin", s, flags(20)) for s in (0.3, 0.4, 0.5, 0.6, 0.7)]
    for made in cells:
        made["measurement"]["notes"] = ["2 contexts were short"]
    assert footnotes(comparison.rows(cells))[-1] == (
        "2 contexts were short (griffin@0.3 on arc_easy_local, griffin@0.4 on arc_easy_local, "
        "griffin@0.5 on arc_easy_local, griffin@0.6 on arc_easy_local and 1 more)"
    )
    items = [{"id": str(i), "f1": float(i % 2)} for i in range(10)]
    rows = comparison.rows([cell("dense", 0.0, ACC, measurement(ACC, "f1", items, 0.61, None))])
    assert comparison_report.tables(rows)[0].cells()[0][5].endswith(" §")
    assert any(note.startswith("§ the task's own aggregate") for note in footnotes(rows))
    alone = footnotes(comparison.rows([one("dart", 0.5, flags(20))]))
    assert "dense was not measured: its columns are empty." in alone


def test_seeds_are_named_in_tables_and_failures_counted() -> None:
    cells = [one("dart", 0.5, flags(20)), one("dart", 0.5, flags(22))]
    cells[1]["cell"]["seed"] = 1
    rows = comparison.rows([*cells, failed("flap", 0.5, ACC, "no memory")])
    assert [row[0] for row in comparison_report.tables(rows)[0].cells()] == [
        "dart@0.5, seed 0",
        "dart@0.5, seed 1",
        "flap@0.5, seed 0",
    ]
    assert comparison_report.summary(rows).endswith("1 cell failed.")
    assert comparison_report.failures(rows)[0].endswith("failed: no memory")


def test_files(tmp_path: Path) -> None:
    cells = grid(tasks=(ACC, ROUGE), methods=("griffin", "dart"))
    paths = comparison_report.write_all(tmp_path, comparison.rows(cells))
    assert [path.name for path in paths] == ["compare.md", "compare.csv", "compare.json"]
    with paths[1].open(encoding="utf-8") as file:
        table = {(row["label"], row["task"]): row for row in csv.DictReader(file)}
    line = table["dart@0.5", ROUGE]
    assert float(line["achieved"]) == 0.4375 and line["unequal"] == "True"
    assert line["equal_sparsity.between"] == "" and line["to_griffin.n"] == "10"
    assert table["dart@0.5", ACC]["equal_sparsity.between"] == "0.5"
    data = json.loads(paths[2].read_text(encoding="utf-8"))
    record = next(r for r in data["rows"] if (r["label"], r["task"]) == ("dart@0.5", ACC))
    assert record["equal_sparsity"]["between"] == [0.5]
    assert record["to_dense"]["n"] == 150 and record["checkpoint"]["file_quantisation"] == "Q4_K_M"
    first = [path.read_bytes() for path in paths]
    again = comparison.rows(json.loads(json.dumps(cells)))
    assert [path.read_bytes() for path in comparison_report.write_all(tmp_path, again)] == first
    comparison_report.write_all(tmp_path, [])
    assert json.loads((tmp_path / "compare.json").read_text())["rows"] == []


def test_markdown_is_not_broken_by_names() -> None:
    made = one("dart", 0.5, flags(20))
    made["measurement"]["task"] = "a|b <img>\nc"
    text = comparison_report.markdown(comparison.rows([made]))
    assert "a\\|b \\<img>\\nc" in text and "<img>\nc" not in text
