"""benchmarks/packed_quality.py and random_gguf.py, by hand."""

import importlib
import json
import sys
from argparse import Namespace

import pytest
import torch

from dart_llm.models.packed_loading import read_tensors
from dart_llm.studies.speed.reference import ReferenceFile
from lm_cases import loaded
from shells import ROOT
from tiny import tiny, tokens


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_a_shape_becomes_a_file(script, tmp_path, monkeypatch):
    sizes = {"model_type": "qwen2", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config, out = tmp_path / "config.json", tmp_path / "shape.gguf"
    for tied in (True, False):
        about = {**sizes, "max_position_embeddings": 128, "tie_word_embeddings": tied}
        config.write_text(json.dumps(about), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["random_gguf.py", str(config), str(out)])
        script("random_gguf").main()
        architecture, found = read_tensors(out)
        assert architecture == "qwen2" and found["blk.1.ffn_down.weight"].shape == (64, 32)
        assert found["blk.0.attn_k.weight"].shape == (32, 64)
        assert len(found) == 1 + (0 if tied else 1) + 1 + 2 * (7 + 5)
        matrices = 96 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 32)
        vectors = 64 + 2 * (64 + 64 + 64 + 32 + 32)
        # a head of its own is read, and then the embedding is only looked up
        known = ReferenceFile.of(out)
        assert (known.kind, known.bytes) == ("BF16", 2 * matrices + 4 * vectors)


def test_quality_is_that_of_the_second_half(script):
    quality = script("packed_quality")
    model, ids = tiny("llama"), tokens(1, 16, seed=1)
    read = quality.log_probabilities(model, ids, decode=False)
    decoded = quality.log_probabilities(model, ids, decode=True)
    assert read.shape == (16 - 1 - 8, 96) and torch.allclose(read, decoded, atol=1e-4)
    rows = quality.ours({"a": model, "b": tiny("llama", seed=1)}, Namespace(decode=False), [ids])
    loss = -read.gather(1, ids[0, 9:, None]).mean()
    assert rows[0]["perplexity"] == pytest.approx(float(loss.exp()))
    assert (rows[0]["kl"], rows[0]["tokens"]) == (pytest.approx(0, abs=1e-6), 7)
    assert rows[1]["kl"] > 0.01
    _, tokenizer = loaded()
    whole = tokenizer("word " * 100, return_tensors="pt").input_ids
    cut = quality.chunks_of("word " * 100 + "\n", tokenizer, 32, 2)
    assert [one.shape for one in cut] == [(1, 32)] * 2 and torch.equal(cut[0], whole[:, :32])
    with pytest.raises(SystemExit, match="give more than 512"):
        quality.chunks_of("word", tokenizer, 512, None)


def test_what_llama_perplexity_says(script, tmp_path):
    quality = script("packed_quality")
    tool = tmp_path / "tool"
    tool.write_text(
        "#!/bin/sh\necho 'Final estimate: PPL = 25.6650 +/- 1.5'\n"
        "echo 'Mean    KLD:   0.003943 ±   0.000181'\n",
        encoding="utf-8",
    )
    tool.chmod(0o755)
    args = Namespace(text="t.txt", context=512, threads=1, chunks=3)
    row = quality.theirs(str(tool), tmp_path / "f.gguf", args, tmp_path / "base")
    assert (row["row"], row["perplexity"], row["spread"], row["kl"]) == ("f", 25.665, 1.5, 0.003943)
    tool.write_text("#!/bin/sh\necho no >&2; exit 1\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="tool failed: no"):
        quality.theirs(str(tool), tmp_path / "f.gguf", args, None)
