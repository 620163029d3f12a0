"""The command line: exit codes, one-sentence errors, JSON, layered settings; real processes."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dart_llm.studies.generate.study import RunStudy
from lm_cases import call, refusal
from tiny_gpt2 import write_gpt2
from written import lines, read


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path):
    for flags, words in [
        ("--sparsity 50", ["did you mean 0.5"]),
        ("--total-prune-percent 0.5", ["did you mean 50"]),
        ("--sparsity 0.5 --total-prune-percent 50", ["not both"]),
        ("--method grifin", ["unknown method", "griffin"]),
        ("--layer-topk 0:1000", ["count of neurons as #1"]),
        ("--layer-topk all:0.5 --sparsity 0.5", ["drop the sparsity"]),
        ("--masking-step -1", ["masking_step -1 must be at least 0"]),
        ("--save-activations --executor compact", ["--save-activations", "--executor masked"]),
        ("--prompt-type mmlu", ["--prompt-subject"]),
        ("--experiment-name ../x", ["../x leaves the results folder"]),
        ("--experiment-name /tmp/x", ["--results-dir"]),
        ("--generation 0", ["nothing to do", "GENERATION=N", "dart-llm perplexity"]),
        ("--prompt-file nowhere.txt", ["cannot read the prompt file nowhere.txt"]),
        ("--masks nowhere.safetensors", ["nowhere.safetensors"]),
        ("--config nowhere.yaml", ["nowhere.yaml"]),
    ]:
        prompt = [] if flags.startswith("--prompt-file") else ["--prompt", "x"]
        error = refusal("run", "--model", "no-such-model-is-loaded", *prompt, *flags.split())
        for word in words:
            assert word in error, flags
    error = refusal("run", "--model", "no-such-model-is-loaded")
    assert error.startswith("ConfigError: no prompt: give --prompt TEXT or --prompt-file")
    error = refusal("run", "--prompt", "hi", "--sparsity", "2")
    assert error.startswith("ConfigError: sparsity 2 must lie in [0, 1)")
    assert list(tmp_path.iterdir()) == []  # what fails early leaves no run
    assert "the prompt is empty" in refusal("run", "--prompt", "  ")
    done = call("run", "--prompt", "hi", "--model", "nosuch")
    assert done.code == 2 and "unknown model 'nosuch'" in done.err
    assert [path.name for path in tmp_path.rglob("*")] == ["results"]
    (tmp_path / "results").rmdir()
    (tmp_path / "results").write_text("a file", encoding="utf-8")
    done = call("run", "--model", "never-loaded/x", "--prompt", "hi")
    assert done.code == 2 and "--results-dir" in done.err


def test_run_writes_everything_and_prints_one_json_document(gpt2, tmp_path, monkeypatch):
    command = ["run", "--model", gpt2, "--prompt", "hello world", "--method", "griffin", "--json"]
    more = ["--sparsity", "0.5", "--masking-step", "3", "--generation", "12"]
    done = call(*command, *more, "--save-layer-topk", "table.txt")
    assert done.code == 0, done.err
    folder = tmp_path / done.json["folder"]
    monkeypatch.setattr(RunStudy, "figures", lambda study: [])  # drawn once
    config = read(folder / "config.json")
    assert (config["status"], config["settings"]["sparsity"]) == ("complete", 0.5)
    pruned = done.json["generation"][1]
    assert pruned["phases"][:5] == ["prefill", "observe", "observe", "observe", "pruned"]
    accounting = pruned["accounting"]
    assert accounting["decoded_tokens"] == 11
    assert accounting["achieved_sparsity"] == pytest.approx(0.5 * 8 / 11)
    assert accounting["dense_token_share"] == pytest.approx(3 / 11)
    names = "generation.jsonl rows.jsonl masks.json drift.csv masks.safetensors report.html"
    assert set(names.split()) <= {path.name for path in folder.iterdir()}
    again = [*command, "--generation", "4"]
    table = call(*again, "--layer-topk", "@table.txt").json["generation"][1]["accounting"]
    kept, table_kept = ([layer["kept"] for layer in a["layers"]] for a in (accounting, table))
    assert kept == table_kept
    masks = call(*again, "--masks", folder / "masks.safetensors")
    accounting = masks.json["generation"][1]["accounting"]
    assert accounting["remask_causes"] == {"fixed": 1}
    assert accounting["achieved_sparsity"] == pytest.approx(0.5)
    (tmp_path / "long.txt").write_text("a" * 1100, encoding="utf-8")  # the context is 1024
    long = ["run", "--model", gpt2, "--prompt-file", "long.txt", "--generation", "4"]
    done = call(*long)
    assert done.code == 2 and "1100 tokens" in done.err and "--prompt-length" in done.err
    cut = call(*long, "--prompt-length", "1020", "--json")
    assert cut.json["generation"][1]["accounting"]["prompt_tokens"] == 1020
    prompt = "a piped 'prompt' with $HOME"
    monkeypatch.setattr(sys, "stdin", io.StringIO(prompt))
    piped = call("run", "--model", gpt2, "--generation", "2", "--json")
    assert piped.json["generation"][0]["prompt"] == prompt


def test_methods_and_doctor_speak_json(monkeypatch):
    methods = call("methods", "--json").json
    names = {entry["name"] for entry in methods["methods"]}
    assert {"dart", "dense", "griffin", "published", "static"} <= names
    assert all(entry["summary"] for entries in methods.values() for entry in entries)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = call("doctor", "--json")
    assert done.json["native_kernels"] == "off (DART_NATIVE=0)"
    weights = "bfloat16, because Q4_1 weights need the native kernels"
    assert done.json["default_model_weights"] == weights
    assert done.json["hub_token"] is True and "hf_secret" not in done.out
    assert done.json["machine"]["omp_wait_policy"] == "PASSIVE"
    assert call("doctor").code == call("methods").code == 0


def start(*arguments, **options):
    """``dart-llm ARGUMENTS`` as a process."""
    command = [sys.executable, "-m", "dart_llm", *map(str, arguments)]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, **options)


def end(process, number, folder, name):
    """Send a signal when the results hold the file ``name``; returns stderr."""
    late = time.monotonic() + 60
    while not list(folder.glob(f"results/*/*/{name}")) and time.monotonic() < late:
        assert process.poll() is None, "it ended before the signal"
        time.sleep(0.005)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and error.count("resumes") == 1
    assert error.splitlines()[-1] == "interrupted"
    (config,) = folder.glob("results/*/*/config.json")
    assert read(config)["status"] == "interrupted"
    return error


def heed_interrupts():
    """What is started by a program in the background ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_help_loads_no_torch():
    script = (
        "import sys; from dart_llm.cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_readers_that_went_away_and_terminals_without_the_letters():
    reading, writing = os.pipe()
    os.close(reading)  # the process ends without a message
    process = start("methods", "--json", stdout=writing)
    os.close(writing)
    assert process.communicate(timeout=120)[1] == "" and process.returncode == 1
    code = "import sys; from dart_llm.cli import app as cli; "
    code += "cli.app = lambda: sys.stdout.write('a\\u2192')\ncli.run()\n"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"a?")


def test_ctrl_c_while_a_text_is_written_keeps_the_one_before(gpt2, tmp_path):
    command = ["run", "--model", gpt2, "--method", "griffin", "--prompt", "hello"]
    command += ["--generation", 300]
    process = start(*command, preexec_fn=heed_interrupts)
    error = end(process, signal.SIGINT, tmp_path, "generation.jsonl")  # the dense text is there
    kept, _ = error.splitlines()[-2:]
    assert kept.startswith("finished work is kept in")
    (folder,) = tmp_path.glob("results/*/*/")
    (dense,) = lines(folder / "generation.jsonl")
    assert (dense["variant"], len(dense["token_ids"])) == ("dense", 300)
    again = call(*command, "--json")
    assert again.code == 0 and Path(again.json["folder"]).resolve() == folder.resolve()
    assert again.json["generation"][0] == dense
    assert len(again.json["generation"][1]["token_ids"]) == 300


def test_a_polite_end_is_an_interruption(gpt2, tmp_path):
    command = ["perplexity", "--model", gpt2, "--method", "griffin", "--data", "embedded"]
    process = start(*command, "--prompt-tokens", 8, "--scored-tokens", 8)
    end(process, signal.SIGTERM, tmp_path, "parts.jsonl")
