"""benchmarks/packed_quality.py and random_gguf.py, by hand."""

import importlib
import json
import sys
from argparse import Namespace

import pytest
import torch

from checkpoints import write_gguf
from dart_llm.experiments.llama_bench import ReferenceFile
from dart_llm.models.gguf_file import read_gguf
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
        file = read_gguf(out)
        found = file.tensors
        assert file.architecture == "qwen2" and found["blk.1.ffn_down.weight"].shape == (64, 32)
        assert found["blk.0.attn_k.weight"].shape == (32, 64)
        assert len(found) == 1 + (0 if tied else 1) + 1 + 2 * (7 + 5)
        matrices = 96 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 32)
        vectors = 64 + 2 * (64 + 64 + 64 + 32 + 32)
        # a head of its own is read, and then the embedding is only looked up
        known = ReferenceFile.of(out)
        assert (known.kind, known.bytes) == ("BF16", 2 * matrices + 4 * vectors)


@pytest.mark.usefixtures("native")
def test_quality_is_that_of_the_second_half(script):
    quality = script("packed_quality")
    model, ids = tiny("llama"), tokens(1, 16, seed=1)
    read = quality.log_probabilities(model, ids, decode=False)
    decoded = quality.log_probabilities(model, ids, decode=True)
    assert read.shape == (16 - 1 - 8, 96) and torch.allclose(read, decoded, atol=1e-4)
    other = tokens(1, 16, seed=2)
    both = {"a": lambda: model, "b": lambda: tiny("llama", seed=1)}
    first, second = quality.ours(both, [ids, other], decoded=1)
    losses = [
        -quality.log_probabilities(model, one, decode=False).gather(1, one[0, 9:, None])
        for one in (ids, other)
    ]
    assert first["perplexity"] == pytest.approx(float(torch.cat(losses).mean().exp()))
    assert (first["kl"], first["tokens"], first["bits"]) == (pytest.approx(0, abs=1e-6), 14, 32)
    decoded = first["decoded"]
    assert decoded["perplexity"] == pytest.approx(float(losses[0].mean().exp()), rel=1e-4)
    assert (decoded["kl"], decoded["tokens"]) == (pytest.approx(0, abs=1e-5), 7)
    assert second["kl"] > 0.01 and second["decoded"]["kl"] > 0.01
    _, tokenizer = loaded()
    whole = tokenizer("word " * 100, return_tensors="pt").input_ids
    cut = quality.chunks_of("word " * 100 + "\n", tokenizer, 32, 2)
    assert [one.shape for one in cut] == [(1, 32)] * 2 and torch.equal(cut[0], whole[:, :32])
    start = tokenizer.bos_token_id
    begun = quality.chunks_of("word " * 100, Beginning(tokenizer, start), 32, 2)
    assert [int(one[0, 0]) for one in begun] == [start] * 2
    assert torch.equal(begun[1][:, 1:], whole[:, 32:63])
    with pytest.raises(SystemExit, match="give more than 512"):
        quality.chunks_of("word", tokenizer, 512, None)


class Beginning:
    """A tokenizer whose texts begin with a token of their own."""

    def __init__(self, tokenizer, start):
        self.tokenizer, self.bos_token_id = tokenizer, start

    def __call__(self, text, **how):
        found = self.tokenizer(text, **how)
        if "return_tensors" in how:
            first = torch.tensor([[self.bos_token_id]])
            return Namespace(input_ids=torch.cat([first, found.input_ids], 1))
        return Namespace(input_ids=[self.bos_token_id, *found.input_ids])


def test_the_programs_are_compared_by_file(script):
    """What was decoded is held against llama.cpp's perplexity of as many chunks."""
    compare = script("packed_quality").compare
    decoded = {"perplexity": 10.5, "kl": 0.1, "tokens": 255}
    ours = {"row": "f", "program": "dart-llm", "perplexity": 20.0, "tokens": 510}
    theirs = {"row": "f", "program": "llama.cpp", "perplexity": 20.2, "course": [10.0, 20.2]}
    dense = {"row": "bfloat16", "program": "dart-llm", "perplexity": 16.0, "tokens": 510}
    rows = [dense, {**ours, "decoded": decoded}, theirs]
    assert compare(rows) == pytest.approx(0.05) == rows[1]["decoded"]["to_llama_cpp"]
    assert rows[1]["to_llama_cpp"] == pytest.approx(20 / 20.2 - 1)
    assert [row["times_dense"] for row in rows] == [1, 1.25, 20.2 / 16]
    assert "to_llama_cpp" not in dense


def test_what_llama_perplexity_says(script, tmp_path):
    quality = script("packed_quality")
    tool = tmp_path / "tool"
    tool.write_text(
        "#!/bin/sh\necho '[1]24.5,[2]25.6650,'\necho 'Final estimate: PPL = 25.6650 +/- 1.5'\n"
        "echo 'Mean    KLD:   0.003943 ±   0.000181'\n",
        encoding="utf-8",
    )
    tool.chmod(0o755)
    args = Namespace(text="t.txt", context=512, threads=1, chunks=3)
    file = write_gguf(tmp_path / "f.gguf")
    row = quality.theirs(str(tool), file, args, tmp_path / "base")
    assert (row["row"], row["perplexity"], row["spread"], row["kl"]) == ("f", 25.665, 1.5, 0.003943)
    assert row["course"] == [24.5, 25.665] and 5 < row["bits"] < 8.5
    tool.write_text("#!/bin/sh\necho no >&2; exit 1\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="tool failed: no"):
        quality.theirs(str(tool), file, args, None)
