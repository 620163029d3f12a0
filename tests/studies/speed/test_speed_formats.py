"""``dart-llm bench speed`` on weights in several formats, with a stand-in for llama-bench."""

import json
from pathlib import Path

import pytest

from checkpoints import write_gguf
from dart_llm.errors import ConfigError, DartError, UnknownName
from dart_llm.experiments.llama_bench import VARIABLE
from dart_llm.experiments.timing import WARM, reference_turn
from dart_llm.reporting import figures
from dart_llm.settings import merge
from dart_llm.studies.speed import reference, study, summary
from dart_llm.studies.speed.settings import SpeedSettings
from llama_bench import write_bench
from lm_cases import call
from speed_cases import job, settings, steady

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
    return {**given, "executors": "slim", "repeats": 1}


def test_one_table_holds_all(whole):
    found = json.loads((whole.path / "speed.json").read_text(encoding="utf-8"))
    rows = {row["row"]: row for row in found["rows"]}
    own = [f"{way}, slim, {form}" for form in ("file", "q8_0", "bfloat16")
           for way in ("dense", "griffin 50 %")]  # fmt: skip
    assert list(rows) == ["transformers", *own, "llama.cpp Q4_1"]
    assert found["own_dense"] == "dense, slim, bfloat16" and found["kernels"]
    said = {name: one["held"] for name, one in found["formats"].items()}
    assert said == {"file": "Q4_1 as in the file", "q8_0": "rounded to Q8_0", "dense": "bfloat16"}
    assert sorted(found["orders"][0]) == sorted(rows)
    # bytes as they are stored: of a token, with the cache at a mean context of 16.5 tokens
    cache = found["mean_context"] * 2 * 2 * 64 * 2
    assert found["mean_context"] == PROMPT + 2 + (TOKENS + 1) / 2
    held = {name: sum(p.nbytes for p in one.model.parameters()) for name, one in whole.held.items()}
    assert held["file"] == pytest.approx(FFN + ATTENTION + HEAD, rel=0.1)  # rows are padded
    for name in held:
        label = "bfloat16" if name == "dense" else name
        assert rows[f"dense, slim, {label}"]["bytes_per_token"] == held[name] + cache
    sizes = found["formats"]["file"]["weights"]
    saved = held["file"] + cache - rows["griffin 50 %, slim, file"]["bytes_per_token"]
    assert saved == pytest.approx(sizes["ffn_bytes"] / 2)
    assert sizes["ffn_bytes"] == pytest.approx(FFN, rel=0.2)
    weights = 2 * 3 * 64 * 96 + 2 * 4 * 64 * 64 + 300 * 64
    dense = 2 * (weights + NORMS) + cache
    assert rows["transformers"]["bytes_per_token"] == dense
    allowed = dense / (held["q8_0"] + cache)
    assert rows["dense, slim, q8_0"]["bytes_allow"] == pytest.approx(allowed)
    assert rows["dense, slim, bfloat16"]["times_main"] == 1.0
    # a method beside our own dense path on the same weights
    slim, own = rows["griffin 50 %, slim, q8_0"], rows["dense, slim, q8_0"]
    assert slim["times_own_dense"] == pytest.approx(own["tg_ms"] / slim["tg_ms"])
    assert slim["limit"] == pytest.approx(1 / (1 - weights_share(found, "q8_0") / 2))
    # llama.cpp: what it says of itself, on the model's own file, whose norms are float32
    other, own = rows["llama.cpp Q4_1"], rows["dense, slim, file"]
    assert (other["tg_ms"], other["first_token_ms"], other["prefill_ms"]) == (2, 24, 48)
    assert other["bytes_per_token"] == FFN + ATTENTION + HEAD + 4 * NORMS + cache
    assert other["times_own_dense"] == pytest.approx(own["tg_ms"] / 2)
    assert other["bytes_per_second"] == pytest.approx(other["bytes_per_token"] / 0.002)
    assert (other["achieved_sparsity"], other["variant"]) == (None, None)
    assert [name for name, row in rows.items() if row["prefill_ms"] is None] == [
        name for name in rows if name.startswith("griffin")
    ]
    assert found["reference"]["llama.cpp Q4_1"]["form"] == "file"


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


def test_words_and_pictures(whole, monkeypatch):
    text = (whole.path / "speed.md").read_text(encoding="utf-8")
    assert "weights file: Q4_1 as in the file, q8_0: rounded to Q8_0, dense: bfloat16" in text
    assert "main: dense, slim, bfloat16; llama.cpp Q4_1: tiny.gguf" in text
    assert "| llama.cpp Q4_1 | Q4_1 |" in text and "- `bytes allow`: bytes per token" in text
    first, *methods = summary.sentences(whole.summary)
    assert (
        first.startswith("dense, slim, file: ") and "as fast as llama.cpp Q4_1 (2.00 ms)" in first
    )
    assert "as fast as dense, slim, q8_0, " in methods[1]
    assert str(whole.path.parents[2]) not in json.dumps(whole.summary)
    from matplotlib.figure import Figure

    names = [plot.name for plot in summary.make(whole.summary)]
    assert names == ["speed", "speed-rows"]
    figure = Figure()
    with figures._style() as palette:
        summary.make(whole.summary)[1].draw(figure, palette, False)
    (axes,) = figure.axes
    slowest_first = sorted(whole.summary["rows"], key=lambda row: -row["tg_ms"])
    assert [bar.get_width() for bar in axes.patches] == [row["tg_ms"] for row in slowest_first]
    assert [one.get_text() for one in axes.get_yticklabels()] == [r["row"] for r in slowest_first]


def test_plain_transformers_runs_dense_beside_packed_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda folder, wanted, style: [])
    gguf = write_gguf(tmp_path / "tiny.gguf")
    found = job(tmp_path, **asked(gguf) | {"prefill_tokens": None}).summary
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == ["transformers", "dense, slim", "griffin 50 %, slim"]
    assert [row["weights"] for row in rows.values()] == ["dense", "file", "file"]
    assert found["formats"]["dense"]["own_dense"] is None and found["own_dense"] == "dense, slim"
    assert rows["transformers"]["bytes_allow"] < 0.5 and found["prefill_tokens"] is None
    plain = job(tmp_path, **asked(gguf) | {"dtype": "bfloat16", "prefill_tokens": None}).summary
    assert "formats" not in plain and "weights" not in plain["rows"][0]


def test_random_weights_are_rounded(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda folder, wanted, style: [])
    file = tmp_path / "config.json"
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    file.write_text(json.dumps({"model_type": "llama", **sizes}), encoding="utf-8")
    more = {"shape": str(file), "dtype": "bfloat16", "executors": "slim", "repeats": 1}
    found = job(tmp_path, **more, weights="q4_0,q4_1").summary
    sizes = [found["formats"][name]["weights"]["ffn_bytes"] for name in ("q4_0", "q4_1", "dense")]
    assert sizes == pytest.approx([2 * 3 * 64 * 64 * bits / 8 for bits in (4.5, 5, 16)], rel=0.15)
    assert [row["row"] for row in found["rows"]][:2] == ["transformers", "dense, slim, q4_0"]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"weights": "q9"}, "unknown weights 'q9'; known: FILE.gguf, auto, dense, file, q4_0"),
        ({"weights": "none.gguf"}, "--weights none.gguf is no file: give one, or some of auto"),
        ({"weights": "file"}, "random weights are in no file: give --weights q8_0, or a model"),
        ({"reference": "llama"}, "unknown reference 'llama'; did you mean llama.cpp?"),
        ({"reference_file": ["a.gguf"]}, "--reference-file has no effect without --reference"),
        (
            {"reference": "llama.cpp", "reference_file": ["a.gguf"]},
            "--reference-file a.gguf is no file: give a GGUF file",
        ),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path, given, error):
    with pytest.raises((ConfigError, UnknownName)) as caught:
        settings(tmp_path, **given)
    assert str(caught.value).startswith(error) and "\n" not in str(caught.value)


def test_later_settings_do_not_change_what_resumes(tmp_path):
    study = job.__globals__["SpeedStudy"]
    before = study(settings(tmp_path), None).asked()
    assert not {"weights", "prefill_tokens", "reference", "reference_file"} & before.keys()
    assert study(settings(tmp_path, weights="q8_0"), None).asked()["weights"] == "q8_0"
    listed = merge(SpeedSettings, {"weights": ["q8_0", "dense"]}, environment={})
    assert listed.weights == "q8_0,dense"


def test_a_missing_llama_bench_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    done = call("bench", "speed", "--reference", "llama.cpp", "--results-dir", tmp_path / "r")
    assert (done.code, done.out) == (2, "") and not (tmp_path / "r").exists()
    assert done.err == (
        "ConfigError: --reference llama.cpp needs llama.cpp's own benchmark, and LLAMA_BENCH="
        f"{tmp_path}/none is no program: build llama.cpp and name its llama-bench in LLAMA_BENCH\n"
    )
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="llama-bench is not on PATH"):
        reference.require_bench()


def test_what_it_cannot_do_is_said(tmp_path, monkeypatch, bench):
    monkeypatch.setenv(VARIABLE, str(bench[0]))
    with pytest.raises(ConfigError, match=r"llama is no GGUF file, which llama\.cpp reads: give"):
        job(tmp_path, reference="llama.cpp", executors="compact")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such model >&2; exit 3\n", encoding="utf-8")
    broken.chmod(0o755)
    sentence = r"llama-bench failed on x\.gguf \(exit code 3\): no such model"
    with pytest.raises(DartError, match=sentence):
        reference_turn(str(broken), tmp_path / "x.gguf", 1, PROMPT, TOKENS)
