"""What comparisons say: conclusions, footnotes, leaks, and their files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from dart_llm.evaluation.measurement import LEAK
from dart_llm.experiments import comparison as compare
from dart_llm.experiments import comparison_report as compare_files
from dart_llm.experiments import comparison_report as compare_tables
from dart_llm.experiments import comparison_report as compare_words
from dart_llm.experiments.comparison import Row
from dart_llm.experiments.comparison_report import LEAK_NOTE, footnotes
from fake_cells import (
    ACC,
    METHODS,
    PPL,
    ROUGE,
    accuracy,
    cell,
    flags,
    grid,
    layer_curve,
    measured,
    measurement,
    one,
    report,
)

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return compare.rows(grid())


def test_an_aggregate_that_is_no_mean_is_marked() -> None:
    items = [{"id": str(i), "f1": float(i % 2)} for i in range(10)]
    made = cell("dense", 0.0, ACC, measurement(ACC, "f1", items, 0.61, None))
    found = compare.rows([made])
    assert compare_tables.tables(found)[0].rows[0][3].endswith(" §")
    assert any(note.startswith("§ the task's own aggregate") for note in footnotes(found))


def test_the_conclusion_is_computed() -> None:
    cells = []
    for task, dart in (("a", 30), ("b", 30), ("c", 20)):
        for method, good in (("griffin", 20), ("dart", dart)):
            result = accuracy(task, flags(good), report=report(method, 0.5))
            cells.append(cell(method, 0.5, task, result))
    found = compare.rows(cells)
    assert compare_words.conclusion(found) == (
        "At 50 % dart beats griffin on 2 of 3 tasks (a and b); on c (interval 0.000 to 0.000) the "
        "difference is within noise."
    )
    swapped = [{**c, "measurement": {**c["measurement"], "higher_is_better": False}} for c in cells]
    assert compare_words.conclusion(compare.rows(swapped)).startswith(
        "At 50 % dart is worse than griffin on 2 of 3 tasks (a and b); on c"
    )


def test_the_conclusion_counts_only_equal_sparsities() -> None:
    cells = [one("griffin", 0.5, flags(20)), one("dart", 0.5, flags(40), 0.3)]
    assert compare_words.conclusion(compare.rows(cells)).endswith(
        "on arc_easy_local the comparison is not at equal sparsity, or has no interval."
    )


def test_five_items_that_differ_are_not_a_win() -> None:
    cells = [one("griffin", 0.5, flags(20)), one("dart", 0.5, flags(25))]
    found = compare.rows(cells)
    assert found[1].verdict(found[1].to_griffin) == "few differ"
    told = compare_words.conclusion(found)
    assert told.startswith(
        "At 50 % dart neither beats nor loses to griffin; on arc_easy_local (interv"
    )
    assert told.endswith(", 5 differ) too few items differ to tell.")


def test_every_other_method_has_a_sentence(rows: list[Row]) -> None:
    told = compare_words.conclusions(rows)
    assert len(told) == 3 * (len(METHODS) - 1)
    assert told[0].startswith("At 50 % dart ") and told[1].startswith("At 30 % dart ")
    assert "At 50 % static is worse than griffin on 4 of 4 tasks." in told


def test_the_leak_is_measured_on_the_same_items() -> None:
    cells = []
    for protocol, good in (("full", 20), ("published", 32)):
        made = one("published", 0.5, flags(good))
        made["cell"]["protocol"] = made["measurement"]["protocol"] = protocol
        made["measurement"]["notes"] = [LEAK] if protocol == "published" else []
        cells.append(made)
    found = compare.rows(cells)
    (leak,) = compare_words.leaks(found)
    assert leak.interval is not None and leak.interval.estimate == pytest.approx(0.3)
    said = compare_words.leak_sentence(leak)
    assert said.startswith("published@0.5 on arc_easy_local: published against full +0.300 (")
    assert said.endswith("), flattered by the leak.")
    assert footnotes(found)[0] == LEAK_NOTE
    captions = [table.caption for table in compare_tables.tables(found)]
    assert [caption.startswith("LEAK, ") for caption in captions] == [False, True]
    assert "What the published protocol leaks" in compare_tables.markdown(found)
    assert [record["leaks"] for record in compare_files.document(found)["rows"]] == [False, True]


def test_what_leaks_is_no_headline() -> None:
    cells = []
    for protocol in ("decode", "published"):
        for method, good in (("griffin", 20), ("dart", 30)):
            made = one(method, 0.5, flags(good))
            made["cell"]["protocol"] = made["measurement"]["protocol"] = protocol
            cells.append(made)
    told = compare_words.conclusions(compare.rows(cells))
    won = "at 50 % dart beats griffin on 1 of 1 task."
    assert told == [f"Protocol decode: {won}", f"Protocol published (LEAK): {won}"]
    told = compare_words.conclusions(compare.rows(cells[2:]))
    assert told == [f"LEAK: {won}"]


def test_models_are_named_as_they_are() -> None:
    cells = []
    for model in ("gemma-3-270m", "Qwen2.5-0.5B"):
        for method, good in (("griffin", 20), ("dart", 30)):
            made = one(method, 0.5, flags(good))
            made["checkpoint"]["name"] = model
            cells.append(made)
    won = "at 50 % dart beats griffin on 1 of 1 task"
    assert compare_words.conclusion(compare.rows(cells)) == (
        f"gemma-3-270m: {won}; Qwen2.5-0.5B: {won}."
    )


def test_the_number_of_comparisons_is_a_note(rows: list[Row]) -> None:
    few = footnotes(compare.rows([one("griffin", 0.5, flags(20)), one("dart", 0.5, flags(30))]))
    assert few[1].startswith("1 comparison with dense and GRIFFIN: where nothing differs, each")
    assert footnotes(rows)[1] == (
        "108 comparisons with dense and GRIFFIN: where nothing differs, about 5 of them still "
        "look so."
    )


def test_notes_of_the_measurements_are_said_once() -> None:
    cells = [one("griffin", s, flags(20)) for s in (0.3, 0.4, 0.5, 0.6, 0.7)]
    for made in cells:
        made["measurement"]["notes"] = ["2 contexts were short"]
    assert footnotes(compare.rows(cells))[-1] == (
        "2 contexts were short (griffin@0.3 on arc_easy_local, griffin@0.4 on arc_easy_local, "
        "griffin@0.5 on arc_easy_local and 2 others)"
    )


def test_a_layer_sweep_is_one_table_and_two_sentences() -> None:
    found = compare.rows(layer_curve(count=4))
    (table,) = compare_tables.tables(found)
    assert table.caption.endswith("one layer pruned at a time; 16 items; weights 513.1 MiB")
    assert [row[0] for row in table.rows][:2] == ["dense", "griffin, layer 0, keep 50 %"]
    told = compare_words.conclusions(found)
    assert len(told) == 2
    assert told[0].startswith("On perplexity:wikitext2, griffin, keep 50 %: layer 0 (perplexity ")
    assert found[1].to_griffin is None and found[1].to_dense is not None


def test_files(rows: list[Row], tmp_path: Path) -> None:
    paths = compare_files.write_all(tmp_path, rows)
    assert [path.name for path in paths] == ["compare.md", "compare.csv", "compare.json"]
    with paths[1].open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) and table[0]["label"] == "dense"
    line = next(r for r in table if (r["label"], r["task"]) == ("dart@0.5", ROUGE))
    assert float(line["achieved"]) == 0.4375 and line["unequal"] == "True"
    assert line["equal_sparsity.between"] == "0.3 0.5" and line["to_griffin.n"] == "10"
    data = json.loads(paths[2].read_text(encoding="utf-8"))
    record = next(r for r in data["rows"] if (r["label"], r["task"]) == ("dart@0.5", ROUGE))
    assert record["equal_sparsity"]["between"] == [0.3, 0.5]
    assert record["to_dense"]["n"] == 10 and record["checkpoint"]["file_quantisation"] == "Q4_K_M"
    assert data["conclusion"] == compare_words.conclusion(rows)
    text = paths[0].read_text(encoding="utf-8")
    assert text.count("\n| ---") == 4 and data["conclusion"] in text


def test_the_same_cells_give_the_same_bytes(tmp_path: Path) -> None:
    cells = grid(tasks=(ACC, PPL), methods=("griffin", "dart"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        compare_files.write_all(tmp_path / name, compare.rows(json.loads(json.dumps(cells))))
    for kind in ("md", "csv", "json"):
        first, second = ((tmp_path / n / f"compare.{kind}").read_bytes() for n in ("a", "b"))
        assert first == second


def test_nothing_is_no_error(tmp_path: Path) -> None:
    assert compare.rows([]) == [] and compare_words.conclusion([]) == "Nothing was measured."
    compare_files.write_all(tmp_path, [])
    assert json.loads((tmp_path / "compare.json").read_text())["rows"] == []


def test_only_dense_is_said() -> None:
    found = compare.rows([cell("dense", 0.0, PPL, measured(PPL, "dense", 0.0))])
    assert compare_words.conclusion(found).startswith("No pruned model was measured; dense has ")


def test_markdown_is_not_broken_by_names() -> None:
    made = one("dart", 0.5, flags(20))
    made["measurement"]["task"] = "a|b <img>\nc"
    text = compare_tables.markdown(compare.rows([made]))
    assert "a\\|b \\<img> c" in text and "<img>\nc" not in text


def test_terminal_tables_fit_a_log(rows: list[Row]) -> None:
    from rich.console import Console

    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        for table in compare_tables.rich_tables(rows):
            console.print(table)
    text = capture.get()
    assert "…" not in text and "griffin@0.5" in text and "static@0.3" in text
    assert "0.407 to 0.567" in text
