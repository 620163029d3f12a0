"""``dart-llm bench speed`` on tiny models: rows, files, order, resuming, llama.cpp, the command."""

import contextlib
import csv
import json
from pathlib import Path

import pytest
import torch

from checkpoints import write_bench, write_gguf
from dart_llm.errors import ConfigError, DartError
from dart_llm.experiments.timing import (
    VARIABLE,
    WARM,
    reference_repetition,
    require_bench,
    shuffled,
)
from dart_llm.native import build
from dart_llm.patching import executors
from dart_llm.reporting.console import Ui
from dart_llm.studies.bench import report, study
from lm_cases import call
from speed_cases import PROMPT, TOKENS, checkpoint, job, steady
from written import lines, read

pytestmark = pytest.mark.usefixtures("native")

# of a layer's 12 matrices of 64 x 64 and 64 x 96: 5 bytes hold 8 weights of Q4_1
FFN = 2 * 3 * 64 * 96 * 20 // 32
REST = 2 * 4 * 64 * 64 * 20 // 32 + 300 * 64 * 34 // 32
NORMS = 5 * 64


@pytest.fixture(scope="module")
def whole(native, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "repetition", steady)
        return job(tmp_path_factory.mktemp("whole"))


def test_rows_of_methods_beside_dense(whole):
    document = read(whole.path / "speed.json")
    labels = [row["row"] for row in document["rows"]]
    methods = [f"griffin 50 %, {executor}" for executor in ("compact", "native")]
    assert labels == ["transformers", "dense, native", *methods]
    assert document["base"] == "dense, native" and document["left_out"] == {}
    # masks of 24 of 48 neurons in 4 layers of width 32; every timed token is pruned
    sizes = document["formats"]["dense"]["weights"]
    for row in document["rows"][2:]:
        assert row["achieved_sparsity"] == pytest.approx(0.5)
        assert row["dense_token_share"] == 0 and row["remasks"] == 0
        saved = document["bytes_per_dense_token"] - row["bytes_per_token"]
        assert saved == pytest.approx(sizes["ffn_bytes"] / 2)
    # a key and a value of 2 heads of size 8 in 4 layers, float32
    assert sizes["cache_bytes_per_position"] == 4 * 2 * 2 * 8 * 4
    assert sizes["ffn_bytes"] == pytest.approx(4 * 3 * 48 * 32 * 4)
    assert document["mean_context"] == PROMPT + 2 + (TOKENS + 1) / 2
    # repetitions are interleaved, each in an order of its own
    assert document["orders"] == [shuffled(labels, 0, 0), shuffled(labels, 0, 1)]
    for order, one in zip(document["orders"], lines(whole.path / "results.jsonl"), strict=True):
        assert order == one["order"] == list(one["samples"])
        assert {len(s["steps_s"]) for s in one["samples"].values()} == {TOKENS}


def test_files_of_a_run(whole):
    document = read(whole.path / "speed.json")
    text = (whole.path / "speed.md").read_text(encoding="utf-8")
    assert all(f"| {row['row']} |" in text for row in document["rows"])
    table = list(csv.DictReader((whole.path / "speed.csv").read_text("utf-8").splitlines()))
    assert [line["row"] for line in table] == [row["row"] for row in document["rows"]]
    assert float(table[1]["ms"]) == pytest.approx(document["rows"][1]["ms"])
    assert str(whole.path.parents[2]) not in json.dumps(document)
    measured = [line for line in lines(whole.path / "rows.jsonl") if line["metric"] == "speed_up"]
    speed_ups = {line["label"]: line["value"] for line in measured}
    assert speed_ups == {row["row"]: row["times_dense"] for row in document["rows"]}
    last = measured[-1]
    assert (last["method"], last["task"], last["requested"]) == ("griffin", "speed", 0.5)
    assert (last["dtype"], last["weights"], last["dense_share"]) == ("float32", None, 0)
    sentence = whole.sentences()[0]  # of what ``steady`` takes, 1.8 and 2 ms
    assert "2.22 x as fast as transformers, 1.11 x as fast as dense, native" in sentence


def test_what_cannot_run_is_named(tmp_path, monkeypatch):
    for module in (executors, build):
        monkeypatch.setattr(module, "why_not", lambda: "the native kernels could not be built (x)")
    done = job(tmp_path, repeats=1)
    assert [row["executor"] for row in done.summary["rows"]] == [None, "compact"]
    assert done.summary["kernels"] is None and done.summary["base"] == "transformers"
    assert "the native kernels could not be built (x)" in done.summary["notes"][0]
    with pytest.raises(ConfigError, match=r"514 tokens are longer than the context of llama, 512"):
        job(tmp_path, prompt_tokens=500, tokens=12)


class Stopping(Ui):
    """A user who interrupts a job after some repetitions."""

    def __init__(self, after):
        super().__init__(quiet=True)
        self.left = after

    @contextlib.contextmanager
    def progress(self, text, total, told=False):
        def advance(count):
            self.left -= count
            if self.left <= 0:
                raise KeyboardInterrupt

        yield advance


def test_an_interrupted_job_keeps_whole_repetitions(tmp_path):
    given = {"executors": "compact", "repeats": 3}
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, ui=Stopping(9), **given)  # three to warm up; in the second repetition
    (left,) = (tmp_path / "results").glob("*/*")
    (kept,) = lines(left / "results.jsonl")
    again = job(tmp_path, **given)
    assert again.path == left and len(again.lines) == 3
    assert lines(left / "results.jsonl")[0] == kept
    assert job(tmp_path, **{**given, "seed": 1}).folder.resumed is False


def test_masks_that_a_variant_rebuilds(tmp_path):
    file = tmp_path / "v.yaml"
    unguarded = "min_distance: 0, max_dense_share: null, allowance: 0"
    file.write_text(
        f"rebuilt: {{method: griffin, drift: {{rule: interval 3, {unguarded}}}, "
        "remask: {observe_tokens: 1}}\n"
    )
    given = {"methods": "", "variants": str(file), "executors": "compact", "repeats": 1}
    row = job(tmp_path, **given).summary["rows"][-1]
    # tokens 0 1 2 pruned, 3 observed, ... 11 observed, 12 13 pruned; the first two are not timed
    assert row["remasks"] == 3 and row["dense_token_share"] == pytest.approx(3 / 12)
    assert row["achieved_sparsity"] == pytest.approx(0.5 * 9 / 12)


# a file's own blocks, and llama.cpp on the same file


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A program that says 2 ms per token, and the log of what it was asked."""
    return write_bench(tmp_path_factory.mktemp("bench"))


def test_formats_beside_llama_cpp(native, bench, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(bench[0]))
    monkeypatch.setattr(study, "repetition", steady)
    gguf, other = (write_gguf(tmp_path / name) for name in ("tiny.gguf", "other.gguf"))
    given = {"model": str(gguf), "cache_dir": str(tmp_path / "cache"), "dtype": None}
    given |= {"tokens": 4, "executors": "native", "repeats": 1, "reference": "llama.cpp"}
    whole = job(tmp_path, **given, weights=f"file,q8_0,{other}")
    document = read(whole.path / "speed.json")
    rows = {row["row"]: row for row in document["rows"]}
    labels = [f"{way}, native, {name}" for name in ("file", "q8_0", "other")
              for way in ("dense", "griffin 50 %")]  # fmt: skip
    labels = ["transformers", *labels, "llama.cpp tiny", "llama.cpp other"]
    assert list(rows) == labels and sorted(document["orders"][0]) == sorted(labels)
    formats = {name: one["stored_as"] for name, one in document["formats"].items()}
    own = "Q4_1 as in the file"
    assert formats == {"file": own, "q8_0": "rounded to Q8_0", "other": own, "dense": "bfloat16"}
    # bytes as they are stored: of a token, with the cache at a mean context
    cache = document["mean_context"] * 2 * 2 * 64 * 2
    stored = {n: sum(p.nbytes for p in m.model.parameters()) for n, m in whole.models.items()}
    assert stored["file"] == pytest.approx(FFN + REST, rel=0.1)  # rows are padded
    assert rows["transformers"]["bytes_per_token"] == stored["dense"] + cache
    for name in ("file", "q8_0", "other"):  # a method beside our own dense path on its weights
        dense, method = rows[f"dense, native, {name}"], rows[f"griffin 50 %, native, {name}"]
        assert dense["bytes_per_token"] == stored[name] + cache
        ffn = document["formats"][name]["weights"]["ffn_bytes"]
        assert dense["bytes_per_token"] - method["bytes_per_token"] == pytest.approx(ffn / 2)
        limit = 1 / (1 - ffn / (stored[name] + cache) / 2)
        assert method["bandwidth_limit"] == pytest.approx(limit)
        assert method["times_dense"] == pytest.approx(dense["ms"] / method["ms"])
    # llama.cpp: what it says of itself, on the model's own file, whose norms are float32
    assert [f["format"] for f in document["reference"].values()] == ["file", "other"]
    other, ours = rows["llama.cpp tiny"], rows["dense, native, file"]
    assert (other["ms"], other["first_token_ms"], other["method"]) == (2, 24, None)
    assert other["bytes_per_token"] == FFN + REST + 4 * NORMS + cache
    assert other["times_dense"] == pytest.approx(ours["ms"] / 2)
    _, beside, _ = report.speed_sentences(document)
    assert beside.startswith("dense, native, file: ") and "as fast as llama.cpp tiny" in beside
    weights = {one["label"]: one["weights"] for one in lines(whole.path / "rows.jsonl")}
    assert (weights["dense, native, file"], weights["llama.cpp tiny"]) == ("q4_1", "Q4_1")
    # it is asked for the same tokens, without what is set for PyTorch's threads
    logged = [json.loads(line) for line in bench[1].read_text().splitlines()]
    common = {"-t": str(document["machine"]["threads"]), "-r": "1", "-o": "json"}
    read_, generated = ({k: v for k, v in one.items() if k != "-m"} for one, _ in logged[:2])
    assert read_ == {**common, "-p": str(PROMPT), "-n": "0"}
    assert generated == {**common, "-p": "0", "-n": "4", "-d": str(PROMPT + WARM)}
    assert all(seen == [] and Path(one["-m"]).stem in ("tiny", "other") for one, seen in logged)


def test_a_llama_bench_that_is_missing_or_fails_is_one_sentence(tmp_path, monkeypatch, bench):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    done = call("bench", "speed", "--reference", "llama.cpp", "--results-dir", tmp_path / "r")
    assert (done.code, done.out) == (2, "") and not (tmp_path / "r").exists()
    assert f"LLAMA_BENCH={tmp_path}/none is not a program" in done.err and done.err.count("\n") == 1
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="llama-bench is not on PATH"):
        require_bench()
    monkeypatch.setenv(VARIABLE, str(bench[0]))
    with pytest.raises(ConfigError, match=r"llama is not a GGUF file, which llama\.cpp needs"):
        job(tmp_path, reference="llama.cpp", executors="compact")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such model >&2; exit 3\n", encoding="utf-8")
    broken.chmod(0o755)
    sentence = r"llama-bench failed on x\.gguf \(exit code 3\): no such model"
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    with pytest.raises(DartError, match=sentence):
        reference_repetition(str(broken), tmp_path / "x.gguf", 1, PROMPT, TOKENS)


def test_the_command_answers_in_json(tmp_path):
    fixed = ["bench", "speed", "--model", checkpoint(tmp_path), "--device", "cpu", "--json"]
    fixed += ["--dtype", "float32", "--methods", "griffin", "--sparsities", "0.5"]
    fixed += ["--executors", "compact", "--prompt-tokens", PROMPT, "--tokens", 4]
    fixed += ["--repeats", 1, "--threads", 1, "--results-dir", tmp_path / "r"]
    threads = torch.get_num_threads()
    whole = call(*fixed)
    assert (whole.code, whole.err, whole.out.count("\n")) == (0, "", 1)
    assert whole.json["machine"]["threads"] == 1 and torch.get_num_threads() == threads
    kept = read(Path(whole.json["folder"], "speed.json"))
    assert {name: whole.json[name] for name in kept} == kept
    bad = call(*fixed, "--executors", "nativ")
    assert (bad.code, bad.out) == (2, "")
    assert bad.err == "UnknownName: unknown executor 'nativ'; did you mean native?\n"
