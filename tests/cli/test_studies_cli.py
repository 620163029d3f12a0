"""``dart-llm eval``, ``perplexity``, ``summarize``, ``compare``, ``sweep`` and ``results``."""

import copy
import csv
from pathlib import Path

import pytest
import torch

import lm_cases
from lm_cases import call, candidate, eval_command, loaded, measured, options, place
from written import lines as lines_of
from written import read

GRIFFIN = ("--method", "griffin", "--sparsity", "0.5")
TASK = "perplexity:text.txt"
SMALL = ("--prompt-tokens", 48, "--scored-tokens", 24, "--limit", 4)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a text and a model that is NaN from position 60 on."""
    folder = tmp_path_factory.mktemp("studies")
    text = "".join(f"number {n * n} comes before {n * 7}. " for n in range(60))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    model, tokenizer = copy.deepcopy(loaded()[0]), loaded()[1]
    with torch.no_grad():
        model.transformer.wpe.weight[60] = float("nan")
    model.save_pretrained(folder / "broken")
    tokenizer.save_pretrained(folder / "broken")
    return folder


@pytest.fixture(autouse=True)
def _here(desk, monkeypatch):
    monkeypatch.chdir(desk)


def lines(document, name="results.jsonl"):
    return lines_of(Path(document["folder"], name))


def test_eval_tells_results_and_accounting():
    done = call(*eval_command("--tasks", "tiny_choice,tiny_letters", *GRIFFIN, "--json"))
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)
    tasks, accounting = ("tiny_choice", "tiny_letters"), done.json["accounting"]
    expected = {name: dict(measured(candidate("griffin"), name).metrics) for name in tasks}
    assert done.json["results"] == expected
    assert accounting["decoded_tokens"] == 93 + len(lm_cases.LETTERS)
    for key in ("achieved_sparsity", "sparsity_while_pruned"):
        assert accounting[key] == pytest.approx(0.5)
    assert (accounting["dense_token_share"], accounting["remasks"]) == (0.0, 0)
    assert 0 < accounting["ffn_bytes_share"] <= 1.0 and done.json["notes"] == []
    masks = ("--method", "dart", "--sparsity", "0.5")
    done = call(*eval_command("--tasks", "tiny_short", *masks, "--dense"))
    assert (done.code, done.out) == (0, "")
    for word in ("tiny_short", "dart@0.5", "dense", "acc_norm", "35 %", "protocol decode"):
        assert word in done.err
    assert "note: tiny_short: 1 context was scored dense" in done.err
    assert "note: tiny_short: likelihood tasks: masks right" in done.err
    leak = eval_command("--tasks", "tiny_letters", *GRIFFIN, "--protocol", "published", "--json")
    assert call(*leak).json["notes"] == [
        "tiny_letters: published protocol: the masks have seen the answers (leaking, not causal)"
    ]


def test_flags_reach_the_measurement(monkeypatch):
    flags = ("--num-fewshot", 1, "--limit", 2, "--sample-seed", 1, "--json", "--fresh")
    answer = call(*eval_command("--tasks", "tiny_choice", *GRIFFIN, *flags)).json
    how = options(num_fewshot=1, limit=2, sample_seed=1)
    direct = measured(candidate("griffin"), "tiny_choice", how)
    assert answer["results"]["tiny_choice"] == direct.metrics
    context = lines(answer, "samples.jsonl")[0]["arguments"][0][0]
    assert context.startswith(f"q: {lm_cases.EXAMPLES[0]['question']}\na: ice\n\n")
    Path("s.yaml").write_text("tasks: tiny_letters\nlimit: 3\nmethod: griffin\n", "utf-8")
    monkeypatch.setenv("DART_LIMIT", "2")
    (row,) = lines(call(*eval_command("--config", "s.yaml", "--sparsity", "0.25", "--json")).json)
    assert (row["label"], len(row["measurement"]["items"])) == ("griffin@0.25", 2)


def on_grid(command, *flags, results="results"):
    head = [command, "--models", place() / "model", "--device", "cpu", "--results-dir", results]
    return [*head, "--tasks", TASK, *SMALL, *flags]


def test_compare_sweep_and_results(tmp_path):
    done = call(*on_grid("compare", "--sparsities", "0.5", "--json", results=tmp_path))
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)
    rows = {row["label"]: row for row in done.json["rows"]}
    assert list(rows) == ["dense", "griffin@0.5", "dart-token@0.5"]  # without --methods
    single = call(
        *("perplexity", "--model", place() / "model", "--device", "cpu", "--data", "text.txt"),
        *(*SMALL, *GRIFFIN, "--json", "--results-dir", tmp_path),
    ).json
    row = rows["griffin@0.5"]
    assert rows["dense"]["value"] == single["dense"][TASK]["perplexity"]
    assert row["value"] == single["results"][TASK]["perplexity"]
    assert (row["achieved"], row["items"], row["decoded"]) == (0.5, 4, 4 * 24)
    ratio = row["value"] / rows["dense"]["value"]
    assert row["to_dense"]["estimate"] == pytest.approx(ratio, rel=1e-6)
    again = call(*on_grid("compare", "--sparsities", "0.5", "--json", results=tmp_path)).json
    assert (done.json["computed"], again["computed"]) == (3, 0)
    assert again["rows"] == done.json["rows"]
    fresh = call(*on_grid("compare", "--methods", "static", "--json", "--fresh", results=tmp_path))
    assert fresh.json["computed"] == 2  # what it compares against is always measured
    assert [row["label"] for row in fresh.json["rows"]] == ["dense", "static@0.3"]
    (tmp_path / "grid.yaml").write_text(
        f"models: {place() / 'model'}\nmethods: [dense, griffin]\nsparsities: [0.25, 0.5]\n"
        f"tasks: [{TASK}]\nlimit: 2\nprompt_tokens: 48\nscored_tokens: 24\n",
        encoding="utf-8",
    )
    grid = ["sweep", tmp_path / "grid.yaml", "--device", "cpu", "--results-dir", tmp_path]
    grid += ["--limit", 3, "--sparsities", "0.5"]
    plan = call(*grid, "--dry-run")
    assert plan.out.count("to do: ") == 2 and "0 of 2 cells are finished" in plan.out
    assert not (tmp_path / "grid").exists()
    sweep = call(*grid, "--json").json
    assert Path(sweep["folder"]).parent == tmp_path / "grid"  # named after the file
    assert [len(row["measurement"]["items"]) for row in lines(sweep)] == [3, 3]
    assert lines(sweep)[0]["cell"]["options"]["prompt_tokens"] == 48
    # what is there

    def table(*flags):
        listed = csv.DictReader(call("results", tmp_path, "--csv", *flags).out.splitlines())
        return [" ".join((line["experiment"], line.get("label", ""))).strip() for line in listed]

    names = {name.split()[0] for name in table()}
    assert names == {"compare", "grid", "perplexity-model-griffin-0.5"}
    assert table("--experiment", "grid") == ["grid dense", "grid griffin@0.5"]
    assert "grid" not in table("--method", "static")
    assert TASK in call("results", sweep["folder"]).out
    done = call("results", tmp_path / "nowhere")
    assert done.code == 2 and "there is no results folder" in done.err


def test_what_was_measured_before_a_failure_is_kept(tmp_path):
    flags = ("--models", f"{place() / 'model'},broken", "--methods", "dense,griffin", "--json")
    done = call(*on_grid("compare", *flags, "--sparsities", "0.5", results=tmp_path))
    assert (done.code, done.err.count("\n"), done.out.count("\n")) == (2, 1, 1)
    assert "2 of 4 cells failed; the others are kept" in done.err and "not finite" in done.err
    assert [row["status"] for row in lines(done.json)] == ["done", "done", "failed", "failed"]
    compared = read(Path(done.json["folder"], "compare.json"))
    assert {name: done.json[name] for name in compared} == compared
    assert len(compared["failures"]) == 2 and done.json["computed"] == 2
    assert [row["value"] is None for row in compared["rows"]] == [False, False, True, True]


REFUSED = [
    ("eval", "--tasks=", "--tasks"),
    ("eval", "--tasks tiny_choice --apply-chat-template", "no chat template: drop --apply-chat"),
    ("sweep", "--limit 0", "--limit 0 must be at least 1"),
    ("sweep", "--engine rya", "ray"),
    ("sweep", "--experiment-name ../x", "../x leaves the results folder"),
    ("sweep", "--tasks arc_esy", "unknown task 'arc_esy'; did you mean arc_easy"),
]


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path):
    for command, flags, words in REFUSED:
        start = eval_command("--sparsity", "0.5") if command == "eval" else on_grid(command)
        arguments = (*start, "--results-dir", tmp_path, "--json", *flags.split())
        assert words in lm_cases.refusal(*arguments)
