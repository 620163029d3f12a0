"""The Python blocks of the README and of the pages run as they stand, on a small model."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shells import ROOT
from stand_in import write_model

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(block, id=f"{path.stem}-{number}")
    for path in PAGES
    for number, block in enumerate(BLOCK.findall(path.read_text(encoding="utf-8")), 1)
    if "from openai" not in block  # tests/server asks a server by that client
]
SHORTER = {
    "layers=(0, 7)": "layers=(0, 3)",  # of four layers
    "layer7": "layer3",
    "max_loss=0.02": "max_loss=0.02, methods='griffin', slices=2, prompt_tokens=32, tokens=16",
}
"""What is swapped in a block, for the small model and to keep it short."""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model") / "small")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("block", BLOCKS)
def test_runs(block, small, monkeypatch, tmp_path):
    from dart_llm import prune

    model, tokenizer = small
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dart_llm.models.loading.load", lambda *given: small)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "PASSIVE")  # put back after a block that sets it
    inputs = tokenizer("The sky is blue because " * 10, return_tensors="pt")
    names = {"prune": prune, "model": model, "tokenizer": tokenizer, "inputs": inputs}
    for text, other in SHORTER.items():
        block = block.replace(text, other)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exec(compile(block, "a page", "exec"), names)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if "run" in names:
        assert names["run"].config.method in ("dart", "dart-token", "griffin", "dense")
