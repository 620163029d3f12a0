"""The command line: exit codes, one-sentence errors, JSON, layered settings; real processes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dart_llm.errors import ConfigError
from dart_llm.studies.drift import study as drift
from dart_llm.studies.generate.settings import RunSettings, collect
from drift_cases import TWO, draw_nothing, write_rows
from lm_cases import call, place
from tiny_gpt2 import write_gpt2


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """``dart-llm ARGUMENTS`` as a process of its own."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-m", "dart_llm", *map(str, arguments)]
    return subprocess.Popen(command, text=True, **{**pipes, **options})  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity", "1.5"], ["sparsity 1.5", "[0, 1)"]),
        (["--sparsity", "50"], ["did you mean 0.5"]),
        (["--sparsity", "50%"], ["write --sparsity 0.5: a fraction, not a percentage"]),
        (["--sparsity", "half"], ['--sparsity "half" is no number']),
        (["--total-prune-percent", "0.5"], ["did you mean 50"]),
        (["--sparsity", "0.5", "--total-prune-percent", "50"], ["not both"]),
        (["--method", "grifin"], ["unknown method", "griffin"]),
        (["--ranking-method", "magnitud"], ["unknown score", "magnitude"]),
        (["--drift", "papr"], ["unknown drift rule", "paper"]),
        (["--budget", "dept"], ["unknown budget", "depth"]),
        (["--layer-topk", "0:1000"], ["write #1000"]),
        (["--layer-topk", "0:0"], ["(0, 1]"]),
        (["--layer-topk", "all:0.5", "--sparsity", "0.5"], ["drop the sparsity"]),
        (["--masking-step", "-1"], ["masking step"]),
        (["--masking-step", "5", "--release-step", "5"], ["release step 5"]),
        (
            ["--save-activations", "--executor", "compact"],
            ["--save-activations", "--executor masked"],
        ),
        (["--activation-layers", "5-2"], ["not a layer or a range"]),
        (["--eval-mmlu", "--mmlu-datasets", "anatomi"], ["'anatomi'", "did you mean anatomy"]),
        (["--eval-mmlu", "--mmlu-shots", "6"], ["--mmlu-shots 6 must be 0 to 5"]),
        (["--prompt-type", "mmlu"], ["--prompt-subject"]),
        (["--method", "dense", "--sparsity", "0.5"], ["dense removes nothing"]),
        (["--prompt", "  "], ["the prompt is empty"]),
        (["--prompt", "x", "--experiment-name", "../x"], ["../x leaves the results folder"]),
        (["--prompt", "x", "--experiment-name", "/tmp/x"], ["--results-dir"]),
        (["--prompt", "x", "--generation", "0"], ["nothing to do", "--eval-mmlu", "EVAL_MMLU"]),
        (
            ["--prompt-file", "nowhere.txt"],
            ["there is no prompt file nowhere.txt", "or --prompt TEXT"],
        ),
        (["--masks", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--perplexity", "--ppl-datasets", "wikitxt"], ["wikitxt", "wikitext2"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words):
    if "--prompt" not in arguments and "--prompt-file" not in arguments:
        arguments = ["--prompt", "hello", *arguments]
    done = call("run", "--model", "no-such-model-is-loaded", *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    for word in words:
        assert word in done.err


def test_what_fails_before_the_work_begins_leaves_no_run(tmp_path):
    done = call("run", "--model", "no-such-model-is-loaded")
    assert done.code == 2
    assert done.err.startswith("ConfigError: no prompt: give --prompt TEXT, --prompt-file FILE")
    assert list(tmp_path.iterdir()) == []
    done = call("run", "--prompt", "hi", "--model", "nosuch")
    assert done.code == 2 and "unknown model 'nosuch'" in done.err
    assert [path.name for path in tmp_path.rglob("*")] == ["results"]
    (tmp_path / "results").rmdir()
    (tmp_path / "results").write_text("a file", encoding="utf-8")
    done = call("run", "--model", "never-loaded/x", "--prompt", "hi")
    assert done.code == 2 and "--results-dir" in done.err


def test_run_writes_everything_and_prints_one_json_document(gpt2, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12, encoding="utf-8")
    arguments = ["run", "--model", str(gpt2), "--prompt", "hello world", "--generation", "12"]
    arguments += ["--sparsity", "0.5", "--method", "griffin", "--masking-step", "3"]
    arguments += ["--perplexity", "--ppl-datasets", str(text), "--ppl-prompt-tokens", "64"]
    arguments += ["--ppl-scored-tokens", "64", "--save-layer-topk", "table.txt", "--json"]
    done = call(*arguments)
    assert done.code == 0, done.err
    document = json.loads(done.out)
    folder = tmp_path / document["folder"]
    config = json.loads((folder / "config.json").read_text())
    assert config["status"] == "complete"
    assert config["settings"]["sparsity"] == 0.5
    pruned = document["generation"][1]
    assert pruned["phases"][:5] == ["prefill", "observe", "observe", "observe", "pruned"]
    accounting = pruned["accounting"]
    assert accounting["decoded_tokens"] == 11
    assert accounting["achieved_sparsity"] == pytest.approx(0.5 * 8 / 11)
    assert accounting["dense_token_share"] == pytest.approx(3 / 11)
    rows = document["perplexity"][0]["rows"]
    assert [row["method"] for row in rows] == ["dense", "griffin"]
    assert rows[1]["perplexity"] > 1
    assert rows[1]["accounting"]["decoded_tokens"] == 64 * document["perplexity"][0]["slices"]
    assert "4 layers" not in done.err
    names = {path.name for path in folder.iterdir()}
    stamp = folder.name
    assert {
        "generation.jsonl",
        "timing.json",
        "perplexity.json",
        "masks.json",
        "drift.csv",
    } <= names
    assert {
        "masks.safetensors",
        "report.html",
        f"output_{stamp}.log",
        f"timing_{stamp}.log",
    } <= names
    assert "parts.jsonl" not in names
    again = ["run", "--model", str(gpt2), "--prompt", "hello world", "--generation", "4", "--json"]
    again += ["--method", "griffin"]
    table = call(*again, "--layer-topk", "@table.txt")
    assert table.code == 0, table.err
    kept = [
        layer["kept"] for layer in json.loads(table.out)["generation"][1]["accounting"]["layers"]
    ]
    assert kept == [layer["kept"] for layer in accounting["layers"]]
    masks = call(*again, "--masks", str(folder / "masks.safetensors"))
    assert masks.code == 0, masks.err
    report = json.loads(masks.out)["generation"][1]["accounting"]
    assert report["remask_causes"] == {"given": 1}
    assert report["achieved_sparsity"] == pytest.approx(0.5)


def test_a_prompt_longer_than_the_context_is_said_and_cut_only_when_asked(gpt2, tmp_path):
    (tmp_path / "long.txt").write_text("a" * 1100, encoding="utf-8")
    arguments = ["run", "--model", str(gpt2), "--prompt-file", "long.txt", "--generation", "4"]
    done = call(*arguments)
    assert done.code == 2
    assert "1100 tokens" in done.err
    assert "--prompt-length 1020" in done.err
    cut = call(*arguments, "--prompt-length", "1020", "--json")
    assert cut.code == 0, cut.err
    assert json.loads(cut.out)["generation"][1]["accounting"]["prompt_tokens"] == 1020


def test_defaults_file_environment_flags(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("sparsity: 0.1\nmasking-step: 2\nseed: 3\n", encoding="utf-8")
    environment = {"DART_SPARSITY": "0.2", "DART_SEED": "4", "SEED": "9", "DEVICE": "cuda"}
    settings = collect({"seed": 5, "method": None}, path, environment)
    assert (settings.masking_step, settings.sparsity, settings.seed) == (2, 0.2, 5)
    assert (settings.device, settings.method) == (None, "dart")


def test_unknown_setting_in_a_file_suggests_the_near_one(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("sparsty: 0.1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match='did you mean "sparsity"'):
        collect({}, path, {})


def test_knowledge_drift_takes_the_presets_rule_or_paper():
    def rule(**settings: object) -> str:
        return RunSettings(**settings).prune_config().drift.rule

    assert rule(method="published", knowledge_drift=True) == "published"
    assert rule(method="griffin", knowledge_drift=True) == "paper"
    assert rule(method="dart", knowledge_drift=False) == "never"


def test_methods_and_doctor_speak_json(monkeypatch):
    methods = call("methods", "--json").json
    assert {"dart", "dense", "griffin", "published", "static"} <= {
        entry["name"] for entry in methods["methods"]
    }
    assert all(entry["summary"] for entries in methods.values() for entry in entries)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = call("doctor", "--json")
    assert done.json["native_kernels"] == "off (DART_NATIVE=0)"
    assert done.json["hub_token"] is True
    assert "hf_secret" not in done.out
    assert done.json["machine"]["omp_wait_policy"] == "PASSIVE"


def test_drift_tells_one_document_also_of_what_failed(tmp_path, monkeypatch):
    file = write_rows(tmp_path / "p.jsonl", [TWO])
    asked = ["drift", "--model", place() / "model", "--passages", file, "--prompt-tokens", 64]
    draw_nothing(monkeypatch)
    done = call(*asked, "--methods", "never@0.25", "--json")
    assert (done.code, done.err) == (0, "")
    assert [line["label"] for line in done.json["rows"]] == ["dense", "never@0.25"]
    assert done.json["rows"][1]["achieved_sparsity"] == pytest.approx(0.25, abs=0.01)
    assert Path(done.json["folder"]).parent.name == "drift-forced-model"

    def broken(*args: object) -> None:
        raise ZeroDivisionError("no")

    monkeypatch.setattr(drift, "compute", broken)
    done = call(*asked, "--methods", "dense", "--json", "--fresh")
    assert done.code == 2 and "CellsFailed: 1 of 1 cells failed" in done.err
    assert done.json["rows"][0]["failed"] == 1
    (tmp_path / "s.yaml").write_text("methods: drat\n", encoding="utf-8")
    done = call(*asked, "--config", "s.yaml")
    assert (done.code, done.err) == (2, "ConfigError: unknown method 'drat'; did you mean dart?\n")


def test_all_samples_is_a_word(tmp_path):
    assert collect({}, None, {"DART_PPL_MAX_SAMPLES": "all"}).ppl_max_samples is None


# real processes


def test_the_help_loads_no_torch():
    script = (
        "import sys; from dart_llm.cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_error_of_ours_is_one_line_and_exit_code_2():
    process = start("run", "--prompt", "hi", "--sparsity", "2")
    out, error = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert error.startswith("ConfigError: sparsity 2 must lie in [0, 1)") and error.count("\n") == 1


def test_a_piped_prompt_is_read(gpt2):
    process = start("run", "--model", gpt2, "--json")
    out, error = process.communicate("a piped 'prompt' with $HOME", timeout=120)
    assert process.returncode == 0, error
    assert json.loads(out)["generation"][0]["prompt"] == "a piped 'prompt' with $HOME"


def test_a_reader_that_went_away_ends_it_without_a_word():
    reading, writing = os.pipe()
    os.close(reading)
    process = start("methods", "--json", stdout=writing)
    os.close(writing)
    assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 1


def test_a_polite_end_is_an_interruption(gpt2: Path, tmp_path: Path) -> None:
    asked = ["--model", gpt2, "--method", "griffin", "--data", "embedded"]
    process = start("perplexity", *asked, "--prompt-tokens", 8, "--scored-tokens", 8)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("results/*/*/parts.jsonl")) and time.monotonic() < end:
        assert process.poll() is None, "it ended before it was told to"
        time.sleep(0.005)
    process.terminate()
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "interrupted; the same command resumes" in told
    (config,) = tmp_path.glob("results/*/*/config.json")
    assert json.loads(config.read_text(encoding="utf-8"))["status"] == "interrupted"
