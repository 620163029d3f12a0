"""What the tests of a run in process share."""

import pytest

from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.generate.study import RunStudy
from tiny_gpt2 import write_gpt2


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Folder of a tiny GPT-2."""
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def settings(gpt2, tmp_path):
    """Makes settings of short runs of the tiny GPT-2 into ``tmp_path``."""
    usual = {"model": str(gpt2), "prompt": "hello", "generation": 6, "sparsity": 0.5}
    usual |= {"method": "griffin", "results_dir": str(tmp_path / "results")}
    return lambda **changes: RunSettings(**usual | changes)


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw nothing: drawing takes longer than everything else."""
    monkeypatch.setattr(RunStudy, "figures", lambda study: [])
