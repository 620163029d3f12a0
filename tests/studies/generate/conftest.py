"""What the tests of a run in process share."""

import pytest

from dart_llm.studies.generate.study import RunStudy
from tiny_gpt2 import write_gpt2


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Folder of a tiny GPT-2."""
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw nothing: it takes longer than all the rest."""
    monkeypatch.setattr(RunStudy, "figures", lambda study: [])
