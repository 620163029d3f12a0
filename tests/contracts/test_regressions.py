"""A run whose prompt file has changed is another run."""

import pytest

from dart_llm.reporting.console import Ui
from dart_llm.studies.generate import study
from dart_llm.studies.generate.settings import RunSettings
from tiny_gpt2 import write_gpt2


def test_a_run_with_another_prompt_in_the_same_file_is_not_resumed(tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("hello")
    settings = {"prompt_file": str(file), "generation": 6, "method": "griffin", "sparsity": 0.5}
    settings |= {"model": str(write_gpt2(tmp_path / "gpt2")), "experiment_name": "x"}
    wanted = RunSettings(**settings, results_dir=str(tmp_path / "results"))
    with monkeypatch.context() as patch:
        patch.setattr(study, "write_masks", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            study.run_job(wanted, Ui(quiet=True))
    for prompt, resumed in (("goodbye", False), ("hello", True)):
        file.write_text(prompt)
        job = study.run_job(wanted, Ui(quiet=True))
        assert job.folder.resumed == resumed
        assert [g["prompt"] for g in job.generations.values()] == [prompt, prompt]
