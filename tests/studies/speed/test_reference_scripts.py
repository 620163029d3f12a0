"""benchmarks/packed_quality.py, packed_memory.py, random_gguf.py, gpu_evidence.py, by hand."""

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from checkpoints import write_gguf
from dart_llm.cli.app import app
from dart_llm.errors import MissingExtra
from dart_llm.experiments.llama_bench import ReferenceFile
from dart_llm.models.gguf_file import read_gguf
from dart_llm.patching.executors import triton_ffn
from dart_llm.settings import merge
from dart_llm.studies.speed.settings import SpeedSettings
from lm_cases import loaded
from shells import ROOT
from speed_cases import shape
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_a_shape(script, tmp_path, monkeypatch, native):
    memory, common = script("packed_memory"), script("common")
    sizes = {"model_type": "llama", "vocab_size": 32_000, "hidden_size": 256}
    sizes |= {"intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    monkeypatch.setattr(memory, "SHAPES", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "kept")
    monkeypatch.setattr(sys, "argv", ["packed_memory.py", "--tokens", "4"])
    monkeypatch.setattr(memory, "BARS", {"tiny": 2_000_000_000})
    memory.main()
    found = json.loads((tmp_path / "kept" / "packed-memory.json").read_text("utf-8"))
    (shape,) = found["shapes"]
    matrices = 2 * 32_000 * 256 + 2 * (4 * 256 * 256 + 3 * 256 * 512)
    assert shape["parameters"] == matrices + 5 * 256 and found["passed"] is shape["passed"] is True
    assert shape["weight_bytes"] == pytest.approx(matrices * 18 / 32, rel=0.05)
    assert shape["made"]["now"] - shape["start"]["now"] > shape["weight_bytes"]
    rows = {(row["method"], row["asked"]): row for row in shape["rows"]}
    assert list(rows) == [("dense", 0), ("griffin", 0.5), ("griffin", 0.7)]
    for (method, asked), row in rows.items():
        assert row["tokens"] == 4 and row["achieved_sparsity"] == pytest.approx(asked, abs=0.01)
        assert row["dense_token_share"] == (method == "dense")
        assert shape["start"]["now"] < row["now"] <= row["most"]
        if method == "dense":
            assert row["most"] == shape["most"]
    monkeypatch.setattr(memory, "BARS", {"tiny": shape["weight_bytes"]})
    with pytest.raises(SystemExit, match="more memory than its bar"):
        memory.main()
    monkeypatch.setattr(sys, "argv", ["packed_memory.py", "--weights", "q9"])
    with pytest.raises(SystemExit, match="tiny failed with exit code 1"):
        memory.main()


def test_the_gpu_kit_goes_through_its_steps_without_a_card(script, tmp_path, monkeypatch, capsys):
    """Commands of ``bench speed`` on the CPU, one of which fails, become one file and tables."""
    kit, common = script("gpu_evidence"), script("common")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "kept")
    asked = []

    def bench(words):
        asked.append(words)
        if "--variants" in words:
            return "CUDA out of memory"
        done = CliRunner().invoke(app, list(words))
        return done.output if done.exit_code else ""

    monkeypatch.setattr(kit, "bench", bench)
    small = ["--prompt-tokens", "8", "--tokens", "4", "--repeats", "1", "--sparsities", "0.5"]
    model = ["--models", str(shape(tmp_path)), "--executors", "compact,triton"]
    monkeypatch.setattr(triton_ffn, "kernels", _no_triton)
    kit.main(["--device", "cpu", "--no-tests", *model, *small])
    (path,) = (tmp_path / "kept").glob("*.json")
    assert path.name == "gpu-none.json" and str(path) in capsys.readouterr().out
    found = json.loads(path.read_text(encoding="utf-8"))
    (run,) = found["runs"]
    assert [row["row"] for row in run["rows"]][-1] == "griffin 50 %, compact"
    assert run["rows"][-1]["limit"] > 1 and run["model"] == "llama"
    assert any("pip install 'dart-llm[gpu]'" in note for note in run["notes"])
    assert found["failed"] == {f"{shape(tmp_path)}, tokens that choose": "CUDA out of memory"}
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| griffin 50 %, compact |" in text and "CUDA out of memory" in text
    (masks, tokens_choose) = asked
    assert "bfloat16" in masks and masks[masks.index("--executors") + 1] == "compact,triton"
    assert tokens_choose[tokens_choose.index("--methods") + 1] == ""


def _no_triton():
    raise MissingExtra("triton", "gpu")


def test_the_gpu_kit_asks_for_a_gpu_and_for_tokens_that_choose(script, tmp_path, monkeypatch):
    kit = script("gpu_evidence")
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="PyTorch finds none"):
            kit.main([])
    words = [words for about, words in kit.commands(kit.options().parse_args([]), tmp_path)]
    assert len(words) == 2 * len(kit.MODELS) == 6
    for one in words:
        if "--model-config" in one:
            assert json.loads(Path(one[one.index("--model-config") + 1]).read_text())["vocab_size"]
    given = dict(zip(words[1][2::2], words[1][3::2], strict=True))
    asked = merge(SpeedSettings, {k[2:].replace("-", "_"): v for k, v in given.items()}, {})
    cases = asked.case_list()
    assert [case.label for case in cases] == ["each token 50 %, triton", "each token 70 %, triton"]
    assert cases[0].config.token.bits == 4 and cases[0].config.prior is None


def test_the_gpu_kit_reads_what_pytest_says(script):
    kit = script("gpu_evidence")
    said = "FAILED tests/a.py::b - E\n1 failed, 12 passed, 2 skipped, 3 deselected in 4s\n"
    wanted = {"failed": 1, "passed": 12, "skipped": 2, "not_passed": ["tests/a.py::b"]}
    assert (
        kit.tests_of(said) == wanted
        and kit.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    )
