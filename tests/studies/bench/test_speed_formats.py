"""``dart-llm bench speed`` on weights in several formats, with a stand-in for llama-bench."""

import json
from pathlib import Path

import pytest

import written
from checkpoints import write_gguf
from dart_llm.errors import ConfigError, DartError
from dart_llm.experiments.llama_bench import VARIABLE, reference_repetition, require_bench
from dart_llm.experiments.timing import WARM
from dart_llm.reporting import figures
from dart_llm.studies.bench import report, study
from llama_bench import write_bench
from lm_cases import call
from speed_cases import job, steady

pytestmark = pytest.mark.usefixtures("native")

PROMPT, TOKENS, PREFILL = 12, 4, 24

# of a layer's 12 matrices of 64 x 64 and 64 x 96: 5 bytes hold 8 weights of Q4_1
FFN = 2 * 3 * 64 * 96 * 20 // 32
ATTENTION = 2 * 4 * 64 * 64 * 20 // 32
HEAD = 300 * 64 * 34 // 32
NORMS = 5 * 64


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A program that says 2 ms per token, and the log of what it was asked."""
    return write_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def whole(native, bench, tmp_path_factory):
    root = tmp_path_factory.mktemp("formats")
    gguf = write_gguf(root / "tiny.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(bench[0]))
        patch.setattr(study, "repetition", steady)
        return job(root, **asked(gguf), weights="file,q8_0,dense", reference="llama.cpp")


def asked(gguf):
    root = gguf.parent
    given = {"shape": None, "model": str(gguf), "cache_dir": str(root / "cache"), "dtype": None}
    given |= {"prompt_tokens": PROMPT, "tokens": TOKENS, "prefill_tokens": PREFILL}
    return {**given, "executors": "native", "repeats": 1}


def test_one_table_holds_all(whole):
    found = json.loads((whole.path / "speed.json").read_text(encoding="utf-8"))
    rows = {row["row"]: row for row in found["rows"]}
    own = [f"{way}, native, {form}" for form in ("file", "q8_0", "bfloat16")
           for way in ("dense", "griffin 50 %")]  # fmt: skip
    assert list(rows) == ["transformers", *own, "llama.cpp Q4_1"]
    assert found["base"] == "dense, native, bfloat16" and found["kernels"]
    said = {name: one["stored_as"] for name, one in found["formats"].items()}
    assert said == {"file": "Q4_1 as in the file", "q8_0": "rounded to Q8_0", "dense": "bfloat16"}
    assert sorted(found["orders"][0]) == sorted(rows)
    # bytes as they are stored: of a token, with the cache at a mean context of 16.5 tokens
    cache = found["mean_context"] * 2 * 2 * 64 * 2
    assert found["mean_context"] == PROMPT + 2 + (TOKENS + 1) / 2
    held = {
        name: sum(p.nbytes for p in one.model.parameters()) for name, one in whole.models.items()
    }
    assert held["file"] == pytest.approx(FFN + ATTENTION + HEAD, rel=0.1)  # rows are padded
    for name in held:
        label = "bfloat16" if name == "dense" else name
        assert rows[f"dense, native, {label}"]["bytes_per_token"] == held[name] + cache
    sizes = found["formats"]["file"]["weights"]
    saved = held["file"] + cache - rows["griffin 50 %, native, file"]["bytes_per_token"]
    assert saved == pytest.approx(sizes["ffn_bytes"] / 2)
    assert sizes["ffn_bytes"] == pytest.approx(FFN, rel=0.2)
    weights = 2 * 3 * 64 * 96 + 2 * 4 * 64 * 64 + 300 * 64
    dense = 2 * (weights + NORMS) + cache
    assert rows["transformers"]["bytes_per_token"] == dense
    allowed = dense / (held["q8_0"] + cache)
    assert rows["dense, native, q8_0"]["base_limit"] == pytest.approx(allowed)
    assert rows["dense, native, bfloat16"]["times_base"] == 1.0
    # a method beside our own dense path on the same weights
    slim, own = rows["griffin 50 %, native, q8_0"], rows["dense, native, q8_0"]
    assert slim["times_dense"] == pytest.approx(own["ms"] / slim["ms"])
    assert slim["bandwidth_limit"] == pytest.approx(1 / (1 - weights_share(found, "q8_0") / 2))
    # llama.cpp: what it says of itself, on the model's own file, whose norms are float32
    other, own = rows["llama.cpp Q4_1"], rows["dense, native, file"]
    assert (other["ms"], other["first_token_ms"], other["prefill_ms"]) == (2, 24, 48)
    assert other["bytes_per_token"] == FFN + ATTENTION + HEAD + 4 * NORMS + cache
    assert other["times_dense"] == pytest.approx(own["ms"] / 2)
    assert other["bytes_per_second"] == pytest.approx(other["bytes_per_token"] / 0.002)
    assert (other.get("achieved_sparsity"), other["method"]) == (None, None)
    assert [name for name, row in rows.items() if row["prefill_ms"] is None] == [
        name for name in rows if name.startswith("griffin")
    ]
    assert found["reference"]["llama.cpp Q4_1"]["format"] == "file"


def weights_share(found, form):
    sizes = found["formats"][form]["weights"]
    total = sizes["weight_bytes"] + found["mean_context"] * sizes["cache_bytes_per_position"]
    return sizes["ffn_bytes"] / total


def test_it_is_asked_for_the_same_tokens(whole, bench):
    lines = [json.loads(line) for line in bench[1].read_text().splitlines()]
    threads = str(whole.summary["machine"]["threads"])
    common = {"-t": threads, "-r": "1", "-o": "json"}
    read, generated = ({k: v for k, v in one.items() if k != "-m"} for one, _ in lines[:2])
    assert read == {**common, "-p": f"{PROMPT},{PREFILL}", "-n": "0"}
    depth = str(PROMPT + WARM)
    assert generated == {**common, "-p": "0", "-n": str(TOKENS), "-d": depth}
    # what is set for PyTorch's threads is not handed on
    assert all(seen == [] and Path(one["-m"]).name == "tiny.gguf" for one, seen in lines)


def test_words(whole):
    text = (whole.path / "speed.md").read_text(encoding="utf-8")
    assert "file: Q4_1 as in the file, q8_0: rounded to Q8_0, dense: bfloat16" in text
    assert "x dense over dense, native, bfloat16" in text and "| llama.cpp Q4_1 | Q4_1 |" in text
    method, beside = report.speed_sentences(whole.summary)
    assert beside.startswith("dense, native, file: ") and "as fast as llama.cpp Q4_1" in beside
    assert method.startswith("griffin 50 %, native, ") and "as fast as dense, native, " in method
    assert str(whole.path.parents[2]) not in json.dumps(whole.summary)
    lines = written.lines(whole.path / "rows.jsonl")
    weights = {line["label"]: (line["method"], line["weights"]) for line in lines}
    assert weights["griffin 50 %, native, q8_0"] == ("griffin", "q8_0")
    assert weights["dense, native, file"] == ("dense", "q4_1")
    assert weights["llama.cpp Q4_1"] == ("llama.cpp", "Q4_1")


def test_random_weights_are_rounded_beside_dense_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda folder, wanted, style: [])
    file = tmp_path / "config.json"
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    file.write_text(json.dumps({"model_type": "llama", **sizes}), encoding="utf-8")
    more = {"shape": str(file), "dtype": "bfloat16", "executors": "native", "repeats": 1}
    found = job(tmp_path, **more, weights="q4_0,q4_1", prefill_tokens=None).summary
    sizes = [found["formats"][name]["weights"]["ffn_bytes"] for name in ("q4_0", "q4_1", "dense")]
    assert sizes == pytest.approx([2 * 3 * 64 * 64 * bits / 8 for bits in (4.5, 5, 16)], rel=0.15)
    plain, native = found["rows"][:2]  # plain transformers runs on dense weights beside them
    assert (plain["row"], plain["weights"]) == ("transformers", "dense")
    assert native["row"] == found["base"] == "dense, native, q4_0" and plain["base_limit"] < 0.5
    assert found["formats"]["dense"]["base"] is None and found["prefill_tokens"] is None


def test_a_missing_llama_bench_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    done = call("bench", "speed", "--reference", "llama.cpp", "--results-dir", tmp_path / "r")
    assert (done.code, done.out) == (2, "") and not (tmp_path / "r").exists()
    assert done.err == (
        "ConfigError: --reference llama.cpp needs llama.cpp's own benchmark, and LLAMA_BENCH="
        f"{tmp_path}/none is not a program: build llama.cpp and name its llama-bench in "
        "LLAMA_BENCH\n"
    )
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="llama-bench is not on PATH"):
        require_bench()


def test_what_it_cannot_do_is_said(tmp_path, monkeypatch, bench):
    monkeypatch.setenv(VARIABLE, str(bench[0]))
    with pytest.raises(ConfigError, match=r"llama is not a GGUF file, which llama\.cpp needs"):
        job(tmp_path, reference="llama.cpp", executors="compact")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such model >&2; exit 3\n", encoding="utf-8")
    broken.chmod(0o755)
    sentence = r"llama-bench failed on x\.gguf \(exit code 3\): no such model"
    with pytest.raises(DartError, match=sentence):
        reference_repetition(str(broken), tmp_path / "x.gguf", 1, PROMPT, TOKENS)
