"""``dart-llm bench speed`` on tiny models: rows, files, order, resuming, llama.cpp, the command."""

import csv
import json
from pathlib import Path

import pytest

from checkpoints import write_bench, write_gguf
from dart_llm.errors import ConfigError, DartError
from dart_llm.experiments.timing import VARIABLE, WARM, ReferenceFile, require_bench, shuffled
from dart_llm.experiments.timing import reference_repetition as ask_bench
from dart_llm.native import build
from dart_llm.patching import executors
from dart_llm.studies.bench import report, study
from lm_cases import call
from speed_cases import FFN, NORMS, PROMPT, REST, TOKENS, job, steady, write_broken_bench
from written import lines, read

pytestmark = pytest.mark.usefixtures("native")


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
    for order, line in zip(document["orders"], lines(whole.path / "results.jsonl"), strict=True):
        assert order == line["order"] == list(line["samples"])
        assert {len(s["steps_s"]) for s in line["samples"].values()} == {TOKENS}


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
    with pytest.raises(
        ConfigError, match=r"need a context of 514 tokens, but that of llama is 512"
    ):
        job(tmp_path, prompt_tokens=500, tokens=12)


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
    ways, names = ("dense", "griffin 50 %"), ("file", "q8_0", "other")
    labels = [f"{way}, native, {name}" for name in names for way in ways]
    theirs = [f"llama.cpp {name}{end}" for name in ("tiny", "other") for end in ("", ", -fa 0")]
    labels = ["transformers", *labels, *theirs]
    assert list(rows) == labels and sorted(document["orders"][0]) == sorted(labels)
    formats = {name: weights["stored_as"] for name, weights in document["formats"].items()}
    file = "Q4_1 as in the file"
    assert formats == {"file": file, "q8_0": "rounded to Q8_0", "other": file, "dense": "bfloat16"}
    # bytes as they are stored: of a token, with the cache at a mean context
    cache = document["mean_context"] * 2 * 2 * 64 * 2
    stored = {n: sum(p.nbytes for p in m.model.parameters()) for n, m in whole.models.items()}
    assert stored["file"] == pytest.approx(FFN + REST, rel=0.15)  # rows are padded
    assert rows["transformers"]["bytes_per_token"] == stored["dense"] + cache
    for name in names:  # a method beside dense with our kernels on its weights
        dense, method = rows[f"dense, native, {name}"], rows[f"griffin 50 %, native, {name}"]
        assert dense["bytes_per_token"] == stored[name] + cache
        ffn = document["formats"][name]["weights"]["ffn_bytes"]
        assert dense["bytes_per_token"] - method["bytes_per_token"] == pytest.approx(ffn / 2)
        limit = 1 / (1 - ffn / (stored[name] + cache) / 2)
        assert method["bandwidth_limit"] == pytest.approx(limit)
        assert method["times_dense"] == pytest.approx(dense["ms"] / method["ms"])
    # llama.cpp: what it says of itself, on the model's own file, whose norms are float32
    files = {label: file["format"] for label, file in document["reference"].items()}
    assert files == dict(zip(theirs, ("file", "file", "other", "other"), strict=True))
    other, ours = rows["llama.cpp tiny"], rows["dense, native, file"]
    assert (other["ms"], other["first_token_ms"], other["method"]) == (2, 24, None)
    assert other["bytes_per_token"] == FFN + REST + 4 * NORMS + cache
    assert other["times_dense"] == pytest.approx(ours["ms"] / 2)
    _, beside, without, *_ = report.speed_sentences(document)
    assert beside.startswith("dense, native, file: ") and beside.endswith(
        "as fast as llama.cpp tiny"
    )
    assert without.startswith("dense, native, file: ") and without.endswith("llama.cpp tiny, -fa 0")
    weights = {line["label"]: line["weights"] for line in lines(whole.path / "rows.jsonl")}
    assert (weights["dense, native, file"], weights["llama.cpp tiny"]) == ("q4_1", "Q4_1")
    # it computes the same tokens, without the variables of PyTorch's threads
    logged = lines(bench[1])
    common = {"-t": str(document["machine"]["threads"]), "-r": "1", "-o": "json"}
    asked = [{k: v for k, v in flags.items() if k != "-m"} for flags, _ in logged]
    for further in ({}, {"-fa": "0"}):
        prompt = {**common, "-p": str(PROMPT), "-n": "0", **further}
        generated = {**common, "-p": "0", "-n": "4", "-d": str(PROMPT + WARM), **further}
        assert asked.count(prompt) == asked.count(generated) == 2
    for flags, variables in logged:
        assert variables == [] and Path(flags["-m"]).stem in ("tiny", "other")


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
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    broken, words = write_broken_bench(tmp_path), r"x\.gguf \(exit code 3\): no such model"
    with pytest.raises(DartError, match=f"llama-bench failed on {words}"):
        ask_bench(str(broken), ReferenceFile(tmp_path / "x.gguf", "", 0), 1, PROMPT, TOKENS)
