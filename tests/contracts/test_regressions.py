"""Defects that were found by trying to break the package, each with its smallest case."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dart_llm.errors import AttachError, ConfigError, ResultsError, UnsupportedModel
from dart_llm.experiments.store import open_folder
from dart_llm.pruning.layer_table import write_table
from dart_llm.reporting.console import Ui
from dart_llm.session.run import prune
from dart_llm.studies.generate import study as job_generate
from dart_llm.studies.generate.settings import RunSettings, collect
from dart_llm.studies.generate.study import run_job
from tiny import LAYERS, WIDTH, tiny, tokens
from tiny_gpt2 import write_gpt2


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def texts(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 12)
    (tmp_path / "prompt.txt").write_text("hello")
    return tmp_path


def settings(gpt2: Path, folder: Path, **more: object) -> RunSettings:
    given = {"prompt_file": str(folder / "prompt.txt"), "generation": 6, "method": "griffin"}
    given |= {"model": str(gpt2), "results_dir": str(folder / "results"), "sparsity": 0.5}
    given |= {"ppl_datasets": str(folder / "text.txt"), "experiment_name": "x"}
    return RunSettings(**{**given, **more})


def dart(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "dart_llm", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )


def test_a_perplexity_whose_tokens_all_ran_dense_fails_the_run(gpt2, texts):
    few = {"eval_perplexity": True, "generation": 0, "method": "dart-prompt"}
    few |= {"ppl_prompt_tokens": 16, "ppl_scored_tokens": 32}
    with pytest.raises(ConfigError, match="all 32 scored tokens of a slice ran dense"):
        run_job(settings(gpt2, texts, **few), Ui(quiet=True))
    nothing_asked = settings(gpt2, texts, **few | {"sparsity": 0.0})
    rows = run_job(nothing_asked, Ui(quiet=True)).perplexity[0]["rows"]
    assert rows[1]["perplexity"] == rows[0]["perplexity"]


def test_a_slice_longer_than_the_context_is_refused(gpt2, texts):
    (texts / "text.txt").write_text("abcdefgh " * 300)
    long = settings(gpt2, texts, eval_perplexity=True, ppl_prompt_tokens=2000, ppl_scored_tokens=8)
    with pytest.raises(ConfigError, match="longer than the model's context of 1024"):
        run_job(long, Ui(quiet=True))


def test_a_run_with_another_prompt_in_the_same_file_is_not_resumed(gpt2, texts, monkeypatch):
    wanted = settings(gpt2, texts)
    with monkeypatch.context() as patch:
        patch.setattr(job_generate, "write_masks", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_job(wanted, Ui(quiet=True))
    (texts / "prompt.txt").write_text("goodbye")
    other = run_job(wanted, Ui(quiet=True))
    assert not other.folder.resumed
    assert [g["prompt"] for g in other.generations.values()] == ["goodbye", "goodbye"]
    (texts / "prompt.txt").write_text("hello")
    same = run_job(wanted, Ui(quiet=True))
    assert same.folder.resumed
    assert [g["prompt"] for g in same.generations.values()] == ["hello", "hello"]


def test_given_masks_and_tables_are_not_called_dart_at_its_default(gpt2, texts):
    made = run_job(settings(gpt2, texts), Ui(quiet=True))
    own = {"masks": str(made.path / "masks.safetensors"), "sparsity": None, "method": "dart"}
    own |= {"eval_perplexity": True, "ppl_prompt_tokens": 32, "ppl_scored_tokens": 16}
    job = run_job(settings(gpt2, texts, **own), Ui(quiet=True))
    pruned, row = job.generations["pruned"], job.perplexity[0]["rows"][1]
    assert (pruned["method"], pruned["sparsity"]) == ("given masks", None)
    assert (row["method"], row["label"], row["sparsity"]) == ("given masks", "given masks", None)
    table = run_job(settings(gpt2, texts, sparsity=None, layer_topk="all:0.5"), Ui(quiet=True))
    assert table.generations["pruned"]["sparsity"] is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": -1.0}, "--temperature -1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"seed": 2**70}, "--seed"),
        ({"prompt": "\udcff\udcfe"}, "not valid UTF-8"),
        ({"masks": "m.safetensors", "sparsity": 0.2}, "drop the sparsity"),
    ],
)
def test_settings_that_ended_in_a_traceback_or_were_dropped(given, words):
    with pytest.raises(ConfigError, match=words):
        collect(given, None, {})


def test_a_chat_prompt_without_a_template_is_refused(gpt2, texts):
    with pytest.raises(ConfigError, match="no chat template"):
        run_job(settings(gpt2, texts, chat=True), Ui(quiet=True))


def test_files_that_cannot_be_written_are_one_sentence(gpt2, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cannot write the layer table"):
        write_table(tmp_path / "none" / "t", [1], "note")
    done = dart("run", "--prompt", "hi", "--save-config", "none/x.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.decode().startswith("ConfigError: cannot write the settings file")
    folder = open_folder(tmp_path, "x", {})
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(ResultsError, match="No space left"):
        folder.save_part("a", 1)


def _full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_terminal_that_cannot_show_a_character_does_not_end_the_run(tmp_path):
    code = "import sys; from dart_llm.cli import app as cli; "
    code += "cli.app = lambda: sys.stdout.write('a\\u2192')\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}cli.run()"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"a?")


@pytest.mark.parametrize(
    ("name", "said"),
    [("demo", b"interrupted; the same command resumes\n"), ("wait", b"interrupted\n")],
)
def test_an_interrupted_command_says_whether_it_can_be_resumed(name, said):
    code = (
        "import time, typer; from dart_llm.cli import app as cli\n"
        f"@cli.app.command('{name}')\ndef wait(): print('ready', flush=True); time.sleep(60)\n"
        f"import sys; sys.argv = ['dart-llm', '{name}']; cli.run()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == said


@pytest.mark.parametrize("part", ["whole", "decoder", "ffn"])
def test_an_attached_model_cannot_be_copied_or_pickled(part):
    model = tiny()
    module = {"whole": model, "decoder": model.model, "ffn": model.model.layers[0].mlp}[part]
    with prune(model, "griffin", sparsity=0.5):
        for copies in (copy.deepcopy, pickle.dumps):
            with pytest.raises(AttachError, match="cannot be copied or pickled"):
                copies(module)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(tokens()).logits, model(tokens()).logits)


def test_a_compiled_wrapper_is_refused_for_its_generate_would_run_dense():
    with pytest.raises(UnsupportedModel, match="wraps a compiled model"):
        prune(torch.compile(tiny(), backend="eager"), sparsity=0.5)


def test_the_decoder_alone_runs_dense_after_a_generation_that_failed():
    model, ids = tiny(), tokens()
    with torch.no_grad(), prune(model, "griffin", sparsity=0.5):
        expected = model.model(ids).last_hidden_state
        calls = []

        def fails(*arguments: object) -> None:
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("stop")

        handle = model.model.layers[-1].register_forward_hook(fails)
        with pytest.raises(RuntimeError, match="stop"):
            model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
        handle.remove()
        assert torch.equal(model.model(ids).last_hidden_state, expected)


def test_layers_that_stay_dense_are_not_counted_as_copied():
    model = tiny()
    with prune(model, masks={}) as run:
        model.generate(tokens(), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert run.report().ffn_bytes_share == 1.0
    with prune(model, masks={0: range(WIDTH // 2)}) as run:
        model.generate(tokens(), max_new_tokens=9, do_sample=False, eos_token_id=None)
    pruned = 1 - 0.5 / LAYERS
    copied = 2 * 0.5 / LAYERS / 8  # one layer's half, read and written once in 8 tokens
    assert run.report().ffn_bytes_share == pytest.approx(pruned + copied)


def test_an_export_draws_no_random_numbers(tmp_path):
    model = tiny()
    with prune(model, "griffin", sparsity=0.5) as run:
        model.generate(tokens(), max_new_tokens=3, do_sample=False, eos_token_id=None)
        before = torch.random.get_rng_state()
        run.export(tmp_path)
        assert torch.equal(torch.random.get_rng_state(), before)
