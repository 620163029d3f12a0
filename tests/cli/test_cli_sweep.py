"""``dart-llm compare``, ``sweep`` and ``results`` on a tiny model."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from dart_llm.reporting.words import quantity
from lm_cases import break_position, call, loaded, place
from summary_cases import write_documents

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

TASK = "perplexity:text.txt"
SMALL = ("--prompt-tokens", 48, "--scored-tokens", 24, "--limit", 4)


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with a text, four documents and a model that is NaN from position 60 on."""
    folder = tmp_path_factory.mktemp("sweeps")
    text = "".join(f"number {n * n} comes before {n * 7}. " for n in range(60))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "other.txt").write_text(text[::-1], encoding="utf-8")
    write_documents(folder / "four.jsonl")
    model, tokenizer = loaded()
    break_position(copy.deepcopy(model), 60).save_pretrained(folder / "broken")
    tokenizer.save_pretrained(folder / "broken")
    return folder


@pytest.fixture(autouse=True)
def _here(desk, monkeypatch):
    monkeypatch.chdir(desk)


def on_model(command: str, *flags: object, results: object = "results") -> list[object]:
    head = [command, "--models", place() / "model", "--device", "cpu", "--results-dir", results]
    return [*head, "--tasks", TASK, *SMALL, *flags]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def results(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def perplexity(method: str, *flags: object) -> dict[str, Any]:
    """The same numbers from the command that measures one method."""
    done = call(
        *("perplexity", "--model", place() / "model", "--device", "cpu", "--data", "text.txt"),
        *(*SMALL, "--method", method, *flags, "--results-dir", "single", "--json"),
    )
    return done.json


def test_compare_writes_tables_plots_and_a_report_with_the_right_numbers():
    done = call(*on_model("compare", "--json"))
    assert (done.code, done.err) == (0, "")
    assert done.out.count("\n") == 1
    folder = Path(done.json["folder"])
    rows = {row["label"]: row for row in done.json["rows"]}
    assert list(rows) == ["dense", "griffin@0.5", "dart@0.5"]  # without flags
    assert done.json["computed"] == 3
    single = perplexity("griffin", "--sparsity", "0.5")
    for label, value in (
        ("dense", single["dense"][TASK]["perplexity"]),
        ("griffin@0.5", single["results"][TASK]["perplexity"]),
    ):
        assert rows[label]["value"] == value
        assert (rows[label]["metric"], rows[label]["items"]) == ("perplexity", 4)
    row = rows["griffin@0.5"]
    assert (row["achieved"], row["dense_share"], row["remasks"]) == (0.5, 0.0, 0)
    assert row["decoded"] == 4 * 24 == single["accounting"]["decoded_tokens"]
    assert row["to_dense"]["n"] == 4
    ratio = row["value"] / rows["dense"]["value"]
    assert row["to_dense"]["estimate"] == pytest.approx(ratio, rel=1e-6)
    assert row["to_dense"]["low"] <= ratio <= row["to_dense"]["high"]
    assert read(folder / "compare.json")["rows"] == done.json["rows"]
    with (folder / "compare.csv").open(encoding="utf-8") as file:
        table = {line["label"]: line for line in csv.DictReader(file)}
    assert {label: float(line["value"]) for label, line in table.items()} == {
        label: pytest.approx(row["value"]) for label, row in rows.items()
    }
    text = (folder / "compare.md").read_text(encoding="utf-8")
    for label, one in rows.items():
        assert label in text and quantity(one["value"], perplexity=True) in text
    assert any((folder / "plots").glob("*.png"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "griffin@0.5" in page and quantity(row["value"], perplexity=True) in page
    config = read(folder / "config.json")
    assert (config["status"], config["kind"]) == ("complete", "compare")


def test_a_finished_comparison_is_not_computed_again():
    where = ("--methods", "dense,griffin", "--results-dir", "again", "--json")
    first = call(*on_model("compare", *where)).json
    second = call(*on_model("compare", *where)).json
    assert (first["computed"], second["computed"]) == (2, 0)
    assert second["rows"] == first["rows"]
    more = call(*on_model("compare", *where[:-1], "--sparsities", "0.25,0.5", "--json")).json
    assert more["computed"] == 1
    assert [row["label"] for row in more["rows"]] == ["dense", "griffin@0.25", "griffin@0.5"]
    assert call(*on_model("compare", *where, "--fresh")).json["computed"] == 2


def test_a_sweep_from_a_file_with_flags_on_top(tmp_path):
    (tmp_path / "grid.yaml").write_text(
        f"model: {place() / 'model'}\nmethods: [dense, griffin]\nsparsities: [0.25, 0.5]\n"
        f"tasks: [{TASK}]\noptions: {{limit: 2, prompt_tokens: 48, scored_tokens: 24}}\n",
        encoding="utf-8",
    )
    done = call(
        *("sweep", tmp_path / "grid.yaml", "--device", "cpu", "--results-dir", tmp_path / "r"),
        *("--limit", 3, "--sparsities", "0.5", "--json"),
    )
    assert (done.code, done.err) == (0, "")
    folder = Path(done.json["folder"])
    assert folder.parent == tmp_path / "r/grid"  # named after the file
    assert [row["label"] for row in results(folder)] == ["dense", "griffin@0.5"]
    assert [len(row["measurement"]["items"]) for row in results(folder)] == [3, 3]
    assert results(folder)[0]["cell"]["options"]["prompt_tokens"] == 48


def test_a_curve_over_layers(tmp_path):
    flags = ("--methods", "griffin", "--layers", "each", "--keep", "0.5", "--json")
    done = call(*on_model("sweep", *flags, results=tmp_path))
    assert (done.code, done.err) == (0, "")
    rows = results(Path(done.json["folder"]))
    assert [row["cell"]["layers"] for row in rows] == ["", "0", "1", "2", "3"]
    values = [row["measurement"]["metrics"]["perplexity"] for row in rows]
    assert len(set(values)) == 5  # the dense line and each layer
    for row in rows[1:]:
        assert row["measurement"]["accounting"]["achieved_sparsity"] == pytest.approx(0.5 / 4)


def test_a_dry_run_says_what_would_happen_and_writes_nothing(tmp_path):
    flags = ("--methods", "dense,griffin", "--sparsities", "0.3,0.5", "--dry-run")
    done = call(*on_model("sweep", *flags, results=tmp_path / "none"))
    assert (done.code, done.err) == (0, "")
    for word in ("3 cells: 0 finished, 3 to do", "download: nothing", "disk: about"):
        assert word in done.out
    plan = call(*on_model("sweep", *flags, "--json", results=tmp_path / "none")).json
    assert [row["label"] for row in plan["rows"]] == ["dense", "griffin@0.3", "griffin@0.5"]
    assert {row["status"] for row in plan["rows"]} == {"to do"}
    assert list(tmp_path.iterdir()) == []


def test_a_cell_that_fails_leaves_the_others(tmp_path):
    models = f"{place() / 'model'},broken"
    flags = ("--methods", "dense,griffin", "--sparsities", "0.5", "--json")
    done = call(*on_model("compare", "--models", models, *flags, results=tmp_path))
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "2 of 4 cells failed, the others are kept" in done.err and "not finite" in done.err
    (folder,) = tmp_path.glob("*/*")
    rows = results(folder)
    assert [row["status"] for row in rows] == ["done", "done", "failed", "failed"]
    assert all("not finite" in row["error"] for row in rows[2:])
    assert rows[2]["measurement"] is None
    json.dumps(rows, allow_nan=False)
    compared = read(folder / "compare.json")
    assert len(compared["failures"]) == 2
    assert done.out.count("\n") == 1  # what was measured is told all the same
    assert {name: done.json[name] for name in compared} == compared
    assert (done.json["folder"], done.json["computed"]) == (str(folder), 4)
    assert [row["value"] is None for row in compared["rows"]] == [False, False, True, True]
    assert "failed" in (folder / "compare.md").read_text(encoding="utf-8").lower()
    assert (folder / "report.html").is_file()
    again = call(*on_model("compare", "--models", models, *flags, results=tmp_path))
    assert again.code == 2


def test_compare_always_measures_what_it_compares_against(tmp_path):
    flags = ("--methods", "static", "--sparsities", "0.5", "--json")
    rows = call(*on_model("compare", *flags, results=tmp_path)).json["rows"]
    assert [row["label"] for row in rows] == ["dense", "static@0.5"]
    ratio = rows[1]["value"] / rows[0]["value"]
    assert rows[1]["to_dense"]["estimate"] == pytest.approx(ratio, rel=1e-6)
    swept = call(*on_model("sweep", *flags, results=tmp_path)).json["rows"]
    assert [row["label"] for row in swept] == ["static@0.5"]  # a grid is taken at its word


def test_a_calibration_text_is_never_evaluated(tmp_path):
    def compared(*flags: object, task: str = TASK) -> Any:
        command = on_model("compare", *flags, "--json", results=tmp_path)
        return call(*command, "--tasks", task, "--cache-dir", tmp_path / "cache")

    for command in (("--dry-run",), ()):
        refused = compared("--methods", "dense,wanda", "--calibration", "text.txt", *command)
        assert refused.code == 2 and refused.err.count("\n") == 1
        assert "text.txt is evaluated and cannot be the calibration text too" in refused.err
    refused = compared(
        *("--methods", "flap", "--calibration", "four.jsonl"), task="summarize:four.jsonl"
    )
    assert "four.jsonl is evaluated" in refused.err
    assert not list(tmp_path.glob("*/*/results.jsonl"))
    works = compared("--methods", "griffin", "--calibration", "text.txt")
    assert works.code == 0, works.err  # griffin reads none


def test_results_lists_filters_and_tabulates(tmp_path):
    sweep = call(
        *on_model("sweep", "--methods", "dense,griffin", "--sparsities", "0.5", "--json"),
        *("--results-dir", tmp_path, "--experiment-name", "mine"),
    ).json
    single = call(
        *("perplexity", "--model", place() / "model", "--device", "cpu", "--data", "text.txt"),
        *(*SMALL, "--method", "static", "--sparsity", "0.5", "--results-dir", tmp_path, "--json"),
    ).json
    assert list(read_table(tmp_path)) == ["mine", "perplexity-model-static-0.5"]
    long = read_table(tmp_path, "--long")
    assert [line["label"] for line in long["mine"]] == ["dense", "griffin@0.5"]
    value = long["perplexity-model-static-0.5"][-1]["value"]
    assert float(value) == pytest.approx(single["results"][TASK]["perplexity"])
    assert list(read_table(tmp_path, "--method", "griffin")) == ["mine"]
    shown = call("results", tmp_path, "--experiment", "mine", "--json")
    assert shown.code == 0 and str(Path(sweep["folder"]).name) in shown.out
    json.loads(shown.out)
    markdown = call("results", tmp_path, "--long", "--markdown").out
    assert markdown.startswith("| experiment |") and "| griffin | 50.0% |" in markdown
    plain = call("results", tmp_path)
    assert plain.code == 0 and "mine" in plain.out
    nothing = call("results", tmp_path, "--method", "flap")
    assert (nothing.code, nothing.out) == (0, "no run matches\n")
    one = call("results", sweep["folder"])
    assert one.code == 0 and "griffin" in one.out and "perplexity:text.txt" in one.out
    wrong = call("results", tmp_path / "nowhere")
    assert wrong.code == 2 and "there is no results folder" in wrong.err
    status = call("results", tmp_path, "--status", "complet")
    assert status.code == 2 and "did you mean complete" in status.err


def read_table(folder: Path, *flags: object) -> dict[str, list[dict[str, str]]]:
    """``dart-llm results --csv`` by experiment."""
    done = call("results", folder, "--csv", *flags)
    assert done.code == 0, done.err
    found: dict[str, list[dict[str, str]]] = {}
    for line in csv.DictReader(done.out.splitlines()):
        found.setdefault(line["experiment"], []).append(line)
    return found


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods", "grifin"], "did you mean griffin"),
        (["--sparsities", "1.5"], "1.5"),
        (["--protocols", "decoded"], "did you mean decode"),
        (["--keep", "0.5"], "layers"),
        (["--limit", "0"], "limit = 0 must be 1 or more"),
        (["--engine", "rya"], "ray"),
        (["--experiment-name", "../x"], "../x leaves the results folder"),
        (["--tasks", "perplexity:nowhere.txt"], "nowhere.txt"),
        (["--tasks", "perplexity:"], 'no text ""'),
        (["--tasks", "summarize:nowhere.jsonl"], 'no documents "nowhere.jsonl"'),
        (["--tasks", "arc_esy"], "unknown task 'arc_esy'; did you mean arc_easy"),
        (["--tracker", "tensorbord"], "did you mean tensorboard"),
        (["--tracker", "tensorbord", "--dry-run"], "did you mean tensorboard"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(flags, words, tmp_path):
    done = call(*on_model("sweep", *flags, "--json", results=tmp_path))
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert words in done.err
