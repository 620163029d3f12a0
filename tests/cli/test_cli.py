"""The command line: exit codes, one-sentence errors, JSON, layered settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dart_llm.errors import ConfigError
from dart_llm.studies.generate.settings import RunSettings, collect
from tiny_gpt2 import write_gpt2


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


def dart(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dart_llm", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )


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
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words, tmp_path):
    if "--prompt" not in arguments and "--prompt-file" not in arguments:
        arguments = ["--prompt", "hello", *arguments]
    done = dart("run", "--model", "no-such-model-is-loaded", *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_no_prompt_and_nothing_piped_says_how_to_give_one(tmp_path):
    done = dart("run", "--model", "no-such-model-is-loaded", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: no prompt: give --prompt TEXT, --prompt-file FILE")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_leaves_no_folder(tmp_path):
    done = dart("run", "--prompt", "hi", "--model", "nosuch", folder=tmp_path)
    assert done.returncode == 2 and "unknown model 'nosuch'" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["results"]


def test_run_writes_everything_and_prints_one_json_document(gpt2, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12, encoding="utf-8")
    arguments = ["run", "--model", str(gpt2), "--prompt", "hello world", "--generation", "12"]
    arguments += ["--sparsity", "0.5", "--method", "griffin", "--masking-step", "3"]
    arguments += ["--perplexity", "--ppl-datasets", str(text), "--ppl-prompt-tokens", "64"]
    arguments += ["--ppl-scored-tokens", "64", "--save-layer-topk", "table.txt", "--json"]
    done = dart(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
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
    assert "4 layers" not in done.stderr
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
    table = dart(*again, "--layer-topk", "@table.txt", folder=tmp_path)
    assert table.returncode == 0, table.stderr
    kept = [
        layer["kept"] for layer in json.loads(table.stdout)["generation"][1]["accounting"]["layers"]
    ]
    assert kept == [layer["kept"] for layer in accounting["layers"]]
    masks = dart(*again, "--masks", str(folder / "masks.safetensors"), folder=tmp_path)
    assert masks.returncode == 0, masks.stderr
    report = json.loads(masks.stdout)["generation"][1]["accounting"]
    assert report["remask_causes"] == {"given": 1}
    assert report["achieved_sparsity"] == pytest.approx(0.5)


def test_a_prompt_longer_than_the_context_is_said_and_cut_only_when_asked(gpt2, tmp_path):
    (tmp_path / "long.txt").write_text("a" * 1100, encoding="utf-8")
    arguments = ["run", "--model", str(gpt2), "--prompt-file", "long.txt", "--generation", "4"]
    done = dart(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert "1100 tokens" in done.stderr
    assert "--prompt-length 1020" in done.stderr
    cut = dart(*arguments, "--prompt-length", "1020", "--json", folder=tmp_path)
    assert cut.returncode == 0, cut.stderr
    assert json.loads(cut.stdout)["generation"][1]["accounting"]["prompt_tokens"] == 1020


def test_results_folder_that_cannot_be_written_is_said_before_loading(tmp_path):
    (tmp_path / "results").write_text("a file", encoding="utf-8")
    done = dart("run", "--model", "never-loaded/x", "--prompt", "hi", folder=tmp_path)
    assert done.returncode == 2
    assert "--results-dir" in done.stderr


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


def test_methods_and_doctor_speak_json(tmp_path):
    methods = json.loads(dart("methods", "--json", folder=tmp_path).stdout)
    assert {"dart", "dense", "griffin", "published", "static"} <= {
        entry["name"] for entry in methods["methods"]
    }
    assert all(entry["summary"] for entries in methods.values() for entry in entries)
    found = json.loads(dart("doctor", "--json", folder=tmp_path, HF_TOKEN="hf_secret").stdout)
    assert found["native_kernels"] == "off (DART_NATIVE=0)"
    assert found["hub_token"] is True
    assert "hf_secret" not in json.dumps(found)
    assert found["machine"]["omp_wait_policy"] == "PASSIVE"


def test_a_piped_prompt_is_read(gpt2, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dart_llm", "run", "--model", str(gpt2), "--json"],
        cwd=tmp_path,
        input="a piped 'prompt' with $HOME",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["generation"][0]["prompt"] == "a piped 'prompt' with $HOME"


def test_all_samples_is_a_word(tmp_path):
    assert collect({}, None, {"DART_PPL_MAX_SAMPLES": "all"}).ppl_max_samples is None


def test_a_polite_end_is_an_interruption(gpt2: Path, tmp_path: Path) -> None:
    asked = ["--model", str(gpt2), "--method", "griffin", "--data", "embedded"]
    slices = ["--prompt-tokens", "8", "--scored-tokens", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dart_llm", "perplexity", *asked, *slices],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
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
