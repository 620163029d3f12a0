"""The command line: exit codes, one-sentence errors, JSON, layered settings; real processes."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm_cases import call, refusal
from tiny_gpt2 import write_gpt2


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


WRONG = [
    ("--sparsity 50", ["did you mean 0.5"]),
    ("--total-prune-percent 0.5", ["did you mean 50"]),
    ("--sparsity 0.5 --total-prune-percent 50", ["not both"]),
    ("--method grifin", ["unknown method", "griffin"]),
    ("--layer-topk 0:1000", ["is written #1"]),
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
]


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path):
    for given, words in WRONG:
        prompt = [] if given.startswith("--prompt-file") else ["--prompt", "x"]
        said = refusal("run", "--model", "no-such-model-is-loaded", *prompt, *given.split())
        for word in words:
            assert word in said, given
    said = refusal("run", "--model", "no-such-model-is-loaded")
    assert said.startswith("ConfigError: no prompt: give --prompt TEXT or --prompt-file")
    assert list(tmp_path.iterdir()) == []  # what fails early leaves no run
    assert "the prompt is empty" in refusal("run", "--prompt", "  ")
    done = call("run", "--prompt", "hi", "--model", "nosuch")
    assert done.code == 2 and "unknown model 'nosuch'" in done.err
    assert [path.name for path in tmp_path.rglob("*")] == ["results"]
    (tmp_path / "results").rmdir()
    (tmp_path / "results").write_text("a file", encoding="utf-8")
    done = call("run", "--model", "never-loaded/x", "--prompt", "hi")
    assert done.code == 2 and "--results-dir" in done.err


def test_run_writes_everything_and_prints_one_json_document(gpt2, tmp_path):
    asked = ["run", "--model", gpt2, "--prompt", "hello world", "--method", "griffin", "--json"]
    more = ["--sparsity", "0.5", "--masking-step", "3", "--generation", "12"]
    done = call(*asked, *more, "--save-layer-topk", "table.txt")
    assert done.code == 0, done.err
    folder = tmp_path / done.json["folder"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["status"], config["settings"]["sparsity"]) == ("complete", 0.5)
    pruned = done.json["generation"][1]
    assert pruned["phases"][:5] == ["prefill", "observe", "observe", "observe", "pruned"]
    accounting = pruned["accounting"]
    assert accounting["decoded_tokens"] == 11
    assert accounting["achieved_sparsity"] == pytest.approx(0.5 * 8 / 11)
    assert accounting["dense_token_share"] == pytest.approx(3 / 11)
    names = "generation.jsonl rows.jsonl masks.json drift.csv masks.safetensors report.html"
    assert set(names.split()) <= {path.name for path in folder.iterdir()}
    again = [*asked, "--generation", "4"]
    table = call(*again, "--layer-topk", "@table.txt").json["generation"][1]["accounting"]
    for one in (table, accounting):
        one["kept"] = [layer["kept"] for layer in one["layers"]]
    assert table["kept"] == accounting["kept"]
    masks = call(*again, "--masks", folder / "masks.safetensors")
    told = masks.json["generation"][1]["accounting"]
    assert told["remask_causes"] == {"fixed": 1}
    assert told["achieved_sparsity"] == pytest.approx(0.5)
    (tmp_path / "long.txt").write_text("a" * 1100, encoding="utf-8")  # the context is 1024
    long = ["run", "--model", gpt2, "--prompt-file", "long.txt", "--generation", "4"]
    done = call(*long)
    assert done.code == 2 and "1100 tokens" in done.err and "--prompt-length" in done.err
    cut = call(*long, "--prompt-length", "1020", "--json")
    assert cut.json["generation"][1]["accounting"]["prompt_tokens"] == 1020


def test_methods_and_doctor_speak_json(monkeypatch):
    methods = call("methods", "--json").json
    names = {entry["name"] for entry in methods["methods"]}
    assert {"dart", "dense", "griffin", "published", "static"} <= names
    assert all(entry["summary"] for entries in methods.values() for entry in entries)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = call("doctor", "--json")
    assert done.json["native_kernels"] == "off (DART_NATIVE=0)"
    weights = "bfloat16: blocks need the native kernels"
    assert done.json["default_model_weights"] == weights
    assert done.json["hub_token"] is True and "hf_secret" not in done.out
    assert done.json["machine"]["omp_wait_policy"] == "PASSIVE"
    assert call("doctor").code == call("methods").code == 0


def start(*arguments, **options):
    """``dart-llm ARGUMENTS`` as a process of its own."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-m", "dart_llm", *map(str, arguments)]
    return subprocess.Popen(command, text=True, **{**pipes, **options})


def wait_for(process, folder, name):
    """Until the results hold a file."""
    end = time.monotonic() + 60
    while not list(folder.glob(f"results/*/*/{name}")) and time.monotonic() < end:
        assert process.poll() is None, "it ended before it was told to"
        time.sleep(0.005)


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


def test_errors_pipes_and_readers(gpt2):
    process = start("run", "--prompt", "hi", "--sparsity", "2")
    out, error = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert error.startswith("ConfigError: sparsity 2 must lie in [0, 1)") and error.count("\n") == 1
    process = start("run", "--model", gpt2, "--json")  # a piped prompt is read
    out, error = process.communicate("a piped 'prompt' with $HOME", timeout=120)
    assert process.returncode == 0, error
    assert json.loads(out)["generation"][0]["prompt"] == "a piped 'prompt' with $HOME"
    reading, writing = os.pipe()
    os.close(reading)  # a reader that went away ends it without a word
    process = start("methods", "--json", stdout=writing)
    os.close(writing)
    assert process.communicate(timeout=120)[1] == "" and process.returncode == 1
    code = "import sys; from dart_llm.cli import app as cli; "
    code += "cli.app = lambda: sys.stdout.write('a\\u2192')\ncli.run()\n"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"a?")


def test_ctrl_c_while_a_text_is_written_keeps_the_one_before(gpt2, tmp_path):
    asked = ["--model", gpt2, "--method", "griffin", "--prompt", "hello", "--generation", 1000]
    process = start("run", *asked, preexec_fn=heed_interrupts)
    wait_for(process, tmp_path, "generation.jsonl")  # the dense text is whole
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    kept, last = told.splitlines()[-2:]  # told once
    assert kept.startswith("what was finished is kept in") and last == "interrupted"
    assert told.count("resumes") == 1
    (folder,) = tmp_path.glob("results/*/*/")
    assert json.loads((folder / "config.json").read_text("utf-8"))["status"] == "interrupted"
    (dense,) = map(json.loads, (folder / "generation.jsonl").read_text("utf-8").splitlines())
    assert (dense["variant"], len(dense["token_ids"])) == ("dense", 1000)
    again = start("run", *asked, "--json")
    found = json.loads(again.communicate(timeout=120)[0])
    assert again.returncode == 0 and Path(found["folder"]).resolve() == folder.resolve()
    assert found["generation"][0] == dense and len(found["generation"][1]["token_ids"]) == 1000


def test_a_polite_end_is_an_interruption(gpt2, tmp_path):
    asked = ["--model", gpt2, "--method", "griffin", "--data", "embedded"]
    process = start("perplexity", *asked, "--prompt-tokens", 8, "--scored-tokens", 8)
    wait_for(process, tmp_path, "parts.jsonl")
    process.terminate()
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert told.splitlines()[-1] == "interrupted" and told.count("resumes") == 1
    (config,) = tmp_path.glob("results/*/*/config.json")
    assert json.loads(config.read_text(encoding="utf-8"))["status"] == "interrupted"
