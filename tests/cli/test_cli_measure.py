"""``dart-llm eval``, ``perplexity`` and ``summarize``: flags, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm_cases import (
    EXAMPLES,
    LETTERS,
    QUESTIONS,
    call,
    candidate,
    eval_command,
    measured,
    options,
    place,
)
from summary_cases import write_documents

GRIFFIN = ("--method", "griffin", "--sparsity", "0.5")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    place()
    monkeypatch.chdir(tmp_path)


def samples(document: dict[str, Any]) -> list[dict[str, Any]]:
    text = (Path(document["folder"]) / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    text = (Path(document["folder"]) / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def ids(document: dict[str, Any]) -> list[str]:
    return [item["id"] for item in rows(document)[-1]["measurement"]["items"]]


def test_json_is_one_document_with_results_and_accounting():
    done = call(*eval_command("--tasks", "tiny_choice,tiny_letters", *GRIFFIN, "--json"))
    assert (done.code, done.err) == (0, "")
    assert done.out.count("\n") == 1
    found = done.json
    parts = {n: measured(candidate("griffin"), n) for n in ("tiny_choice", "tiny_letters")}
    assert found["results"] == {name: dict(part.metrics) for name, part in parts.items()}
    assert found["accounting"]["decoded_tokens"] == 93 + len(LETTERS)
    for key in ("achieved_sparsity", "sparsity_while_pruned"):
        assert found["accounting"][key] == pytest.approx(0.5)
    assert (found["accounting"]["dense_token_share"], found["accounting"]["remasks"]) == (0.0, 0)
    assert 0 < found["accounting"]["ffn_bytes_share"] <= 1.0
    assert found["notes"] == []


def test_for_people_there_is_a_table_with_notes_on_stderr():
    done = call(*eval_command("--tasks", "tiny_short", "--sparsity", "0.5", "--dense"))
    assert (done.code, done.out) == (0, "")
    for word in ("tiny_short", "dart@0.5", "dense", "acc_norm", "35.0%", "protocol decode"):
        assert word in done.err
    assert "note: tiny_short: 1 context was scored dense" in done.err
    assert "note: tiny_short: likelihood tasks: masks at once" in done.err


def test_the_leak_is_said():
    done = call(
        *eval_command("--tasks", "tiny_letters", *GRIFFIN, "--protocol", "published", "--json")
    )
    assert done.json["notes"] == [
        "tiny_letters: published protocol: the masks have seen the answers (leaking, not causal)"
    ]
    plain = call(*eval_command("--tasks", "tiny_letters", *GRIFFIN, "--protocol", "published"))
    assert "note: tiny_letters: published protocol" in plain.err
    assert rows(done.json)[0]["measurement"]["protocol"] == "published"


def test_which_items_and_examples():
    def asked(*flags: object) -> Any:
        command = eval_command("--tasks", "tiny_choice", *GRIFFIN, *flags, "--json", "--fresh")
        return call(*command).json

    assert ids(asked("--limit", 2)) == ["tiny_choice/0", "tiny_choice/1"]
    drawn = [ids(asked("--limit", 2, "--sample-seed", seed)) for seed in (0, 1, 2, 3, 1)]
    assert drawn[1] == drawn[4]
    assert len({tuple(one) for one in drawn}) > 1
    assert len(ids(asked())) == len(QUESTIONS)
    found = asked("--num-fewshot", 1)
    context = samples(found)[0]["arguments"][0][0]
    assert context.startswith(f"q: {EXAMPLES[0]['question']}\na: ice\n\n")
    direct = measured(candidate("griffin"), "tiny_choice", options(num_fewshot=1))
    assert found["results"]["tiny_choice"] == direct.metrics


def test_apply_chat_template():
    command = eval_command("--tasks", "tiny_choice", *GRIFFIN, "--json", model="chatty")
    found = call(*command, "--apply-chat-template").json
    assert samples(found)[0]["arguments"][0][0].startswith("[user] q: ")
    other = call(*command, "--no-apply-chat-template").json
    assert samples(other)[0]["arguments"][0][0].startswith("q: ")


def test_log_samples_can_be_switched_off():
    command = eval_command("--tasks", "tiny_letters", *GRIFFIN, "--json")
    kept = call(*command, "--log-samples").json
    assert [sample["id"] for sample in samples(kept)] == [f"tiny_letters/{n}" for n in range(5)]
    assert [len(sample["arguments"]) for sample in samples(kept)] == [4] * 5
    without = call(*command, "--no-log-samples").json
    assert not (Path(without["folder"]) / "samples.jsonl").exists()
    assert without["results"] == kept["results"]


def test_settings_come_from_a_file_the_environment_and_flags(tmp_path, monkeypatch):
    (tmp_path / "s.yaml").write_text("tasks: tiny_letters\nlimit: 3\nmethod: griffin\n", "utf-8")
    monkeypatch.setenv("DART_LIMIT", "2")
    found = call(*eval_command("--config", "s.yaml", "--sparsity", "0.25", "--json")).json
    assert ids(found) == ["tiny_letters/0", "tiny_letters/1"]
    assert rows(found)[0]["label"] == "griffin@0.25"


def test_perplexity_has_dense_beside_pruned(tmp_path):
    text = "".join(f"number {n * n} comes before {n * 7}. " for n in range(30))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    done = call(
        *("perplexity", "--model", place() / "model", "--device", "cpu", "--data", "text.txt"),
        *("--prompt-tokens", 48, "--scored-tokens", 24, "--limit", 3, *GRIFFIN, "--json"),
    )
    assert (done.code, done.err) == (0, "")
    task = "perplexity:text.txt"
    dense, pruned = done.json["dense"][task], done.json["results"][task]
    assert 1 < dense["perplexity"] != pruned["perplexity"] > 1
    assert done.json["accounting"]["decoded_tokens"] == 3 * 24
    assert done.json["accounting"]["dense_token_share"] == 0.0
    assert [len(sample["losses"]) for sample in samples(done.json)] == [24] * 6


def test_summarize(tmp_path):
    write_documents(tmp_path / "four.jsonl")
    done = call(
        *("summarize", "--model", place() / "model", "--device", "cpu", "--data", "four.jsonl"),
        *("--limit", 2, "--max-output", 6, *GRIFFIN, "--json"),
    )
    assert (done.code, done.err) == (0, "")
    assert 0 <= done.json["results"]["summarize:four.jsonl"]["rougeL"] <= 100
    assert done.json["accounting"]["decoded_tokens"] == 2 * 5
    assert [sample["id"] for sample in samples(done.json)] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--tasks", "tiny_choice", "--apply-chat-template"],
            ["this model's tokenizer has no chat template: drop --apply-chat-template"],
        ),
        (["--tasks", "tiny_choise"], ["unknown task 'tiny_choise'", "tiny_choice"]),
        (["--tasks", "tiny_lost"], ["tiny_lost.jsonl", "correct the task file"]),
        (["--tasks", "openbookqa"], ["openbookqa", "--include-path"]),
        (["--tasks", ""], ["--tasks"]),
        (["--tasks", "tiny_choice", "--limit", "0"], ["--limit 0 must be at least 1"]),
        (["--tasks", "tiny_choice", "--protocol", "decoded"], ["did you mean decode"]),
        (["--tasks", "tiny_choice", "--method", "grifin"], ["did you mean griffin"]),
        (["--tasks", "tiny_write", "--min-evidence", "400"], ["ran dense", "--min-evidence"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(flags, words):
    done = call(*eval_command("--json", "--sparsity", "0.5", *flags))
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    for word in words:
        assert word in done.err


def test_what_was_measured_before_a_failure_is_kept(tmp_path):
    done = call(*eval_command("--tasks", "tiny_letters,tiny_lost", *GRIFFIN, "--json"))
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1 and done.err.startswith("LoadError: ")
    (folder,) = (tmp_path / "results").glob("*/*")
    assert json.loads((folder / "config.json").read_text())["status"] == "failed"
    kept = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [row["measurement"]["task"] for row in kept] == ["tiny_letters"]
