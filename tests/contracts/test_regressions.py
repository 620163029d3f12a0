"""Defects that were found by trying to break the package, each with its smallest case."""

import os
import subprocess
import sys

import pytest

from dart_llm.errors import ConfigError, ResultsError
from dart_llm.pruning.layer_table import write_table
from dart_llm.reporting.console import Ui
from dart_llm.studies.generate import study as job_generate
from dart_llm.studies.generate.settings import RunSettings, collect
from dart_llm.studies.generate.study import run_job
from tiny_gpt2 import write_gpt2


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "prompt.txt").write_text("hello")
    return tmp_path


def settings(gpt2, folder, **more):
    given = {"prompt_file": str(folder / "prompt.txt"), "generation": 6, "method": "griffin"}
    given |= {"model": str(gpt2), "results_dir": str(folder / "results"), "sparsity": 0.5}
    given |= {"experiment_name": "x"}
    return RunSettings(**{**given, **more})


def test_a_run_with_another_prompt_in_the_same_file_is_not_resumed(gpt2, texts, monkeypatch):
    wanted = settings(gpt2, texts)
    with monkeypatch.context() as patch:
        patch.setattr(job_generate, "write_masks", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_job(wanted, Ui(quiet=True))
    for prompt, resumed in (("goodbye", False), ("hello", True)):
        (texts / "prompt.txt").write_text(prompt)
        job = run_job(wanted, Ui(quiet=True))
        assert job.folder.resumed == resumed
        assert [g["prompt"] for g in job.generations.values()] == [prompt, prompt]


def test_settings_that_ended_in_a_traceback_or_were_dropped():
    for given, words in (
        ({"temperature": -1.0}, "--temperature -1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"seed": 2**70}, "--seed"),
        ({"prompt": "\udcff\udcfe"}, "not valid UTF-8"),
        ({"masks": "m.safetensors", "sparsity": 0.2}, "drop the sparsity"),
    ):
        with pytest.raises(ConfigError, match=words):
            collect(given, None, {})


def test_what_cannot_be_written_or_shown_is_one_sentence(tmp_path):
    with pytest.raises(ResultsError, match=r"cannot write .*/none/t: No such file or directory"):
        write_table(tmp_path / "none" / "t", [1], "note")
    code = "import sys; from dart_llm.cli import app as cli; "
    code += "cli.app = lambda: sys.stdout.write('a\\u2192')\ncli.run()\n"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"a?")
