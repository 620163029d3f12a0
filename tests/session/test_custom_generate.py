"""``model.generate(custom_generate=FOLDER)`` and a pipeline: transformers' ways to generate."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import dynamic_module_utils

from dart_llm.errors import ConfigError
from dart_llm.session.run import prune
from tiny import tiny, tokens

FOLDER = str(Path(__file__).parents[2] / "examples" / "transformers")
IDS = tokens(1, 24)
ASKED = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Arguments that name the folder, whose copy goes elsewhere than the user's cache."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return {"custom_generate": FOLDER, "trust_remote_code": True}


def test_the_folder_generates_what_prune_does(recipe):
    model, reports = tiny(), []
    dense = model.generate(IDS, **ASKED)
    for settings in ({"method": "griffin", "sparsity": 0.5}, {"method": "dart-prompt"}):
        more = {"min_evidence": 4} if settings["method"] == "dart-prompt" else {}
        with prune(model, **settings, **more) as run:
            wanted = model.generate(IDS, **ASKED)
        result = model.generate(
            IDS, **ASKED, **recipe, **settings, dart=more, on_report=reports.append
        )
        assert torch.equal(result, wanted) and not torch.equal(result, dense)
        assert reports[-1].to_dict() == run.report().to_dict()
    assert torch.equal(model.generate(IDS, **ASKED), dense)  # nothing stays on the model
    with pytest.raises(ConfigError, match="sparsity"):
        model.generate(IDS, **ASKED, **recipe, sparsity=50)
