"""``dart-llm demo``: bytes per token, and llama.cpp beside them where it is at hand."""

import json

import pytest
import torch

from checkpoints import write_folder, write_gguf
from dart_llm.experiments.llama_bench import VARIABLE
from dart_llm.reporting.console import Ui
from dart_llm.studies.generate import report
from dart_llm.studies.generate.study import RunStudy, run_demo
from html_page import Page
from llama_bench import write_bench

pytestmark = pytest.mark.usefixtures("native")

# of a layer's 12 matrices of 64 x 64 and 64 x 96: 5 bytes hold 8 weights of Q4_1
FFN = 2 * 3 * 64 * 96 * 20 // 32
REST = 2 * 4 * 64 * 64 * 20 // 32 + 300 * 64 * 34 // 32
NORMS = 5 * 64

OWN = ["dense", "pruned", "transformers bfloat16"]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(RunStudy, "figures", lambda study: [])
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")


def demo(model, folder, **more):
    given = {"model": str(model), "method": "griffin", "sparsity": 0.5, "prompt": "hi there"}
    given |= {"chat": False, "generation": 9, "eval_perplexity": False, "device": "cpu"}
    given |= {"results_dir": str(folder / "results"), "cache_dir": str(folder / "cache")}
    return run_demo(Ui(quiet=True), **given, **more)


def test_bytes_per_token_and_llama_cpp(tmp_path, monkeypatch):
    program, log = write_bench(tmp_path)
    monkeypatch.setenv(VARIABLE, str(program))
    found = demo(write_gguf(tmp_path / "tiny.gguf"), tmp_path)
    timing, accounting = found.timing, found.summary["accounting"]
    # as stored, the same weights for both; the file's norms are float32, rows of ours are padded
    sizes, seconds = timing["weight_bytes_per_token"], timing["seconds_per_token"]
    assert sizes["llama.cpp Q4_1"] == FFN + REST + 4 * NORMS
    assert sizes["dense"] == sum(one.nbytes for one in found.model.parameters())
    assert sizes["dense"] == pytest.approx(FFN + REST + 2 * NORMS, rel=0.1)
    ffn = sizes["dense"] * accounting["ffn_share_of_bytes"]
    assert ffn == pytest.approx(FFN, rel=0.2) and accounting["achieved_sparsity"] == 0.5
    assert sizes["pruned"] == round(sizes["dense"] - ffn / 2)
    assert (
        seconds["llama.cpp Q4_1"] == 0.002 and timing["tokens_per_second"]["llama.cpp Q4_1"] == 500
    )
    assert timing["speed_up"] == pytest.approx(seconds["dense"] / seconds["pruned"])
    # as many tokens behind the same prompt
    ((asked, _),) = [json.loads(line) for line in log.read_text().splitlines()]
    record = found.generations["pruned"]
    depth = record["accounting"]["prompt_tokens"]
    wanted = {"-p": "0", "-n": "8", "-d": str(depth), "-t": str(torch.get_num_threads())}
    assert wanted.items() <= asked.items() and asked["-m"].endswith("tiny.gguf")
    assert found.identity == RunStudy(found.settings, Ui(quiet=True), found.also).identify()
    texts, pace, counted = found.tables()
    table = {row["quantity"]: row["value"] for row in counted.rows}
    assert table["mean time per token, llama.cpp Q4_1"] == "2.0 ms"
    # the same weights as transformers runs them, 2 bytes each
    plain = "transformers bfloat16"
    assert sizes[plain] == 2 * (2 * 3 * 64 * 96 + 2 * 4 * 64 * 64 + 300 * 64 + NORMS)
    assert {row["name"] for row in pace.rows} == {"dense", "pruned", plain, "llama.cpp Q4_1"}
    gains = {row["name"]: row["gain"] for row in pace.rows}
    assert gains[plain] == 1 and gains["llama.cpp Q4_1"] == pytest.approx(seconds[plain] / 0.002)
    assert [row["seconds"] for row in pace.rows] == sorted(seconds.values(), reverse=True)
    assert texts.head == ("dense", "griffin 50 %")
    name = "weights read per token, as stored"
    assert table[f"{name}, pruned"] == f"{sizes['pruned'] / 1e6:.1f} MB"
    page = Page((found.path / "report.html").read_text(encoding="utf-8"))
    assert page.row("time per decoded token, mean (ms)")[5] == "2.0"
    cells = [f"{sizes[key] / 1e6:.1f}" for key in ("dense", "pruned", "llama.cpp Q4_1")]
    row = page.row(f"{name} (MB)")
    assert [row[1], row[2], row[5]] == cells and row[3] == f"{timing['bytes_limit']:.2f} x"


def test_no_line_where_llama_cpp_is_not_at_hand(tmp_path, monkeypatch):
    program, log = write_bench(tmp_path)
    gguf = write_gguf(tmp_path / "tiny.gguf")
    found = demo(gguf, tmp_path)
    assert list(found.timing["weight_bytes_per_token"]) == OWN
    assert list(found.timing["seconds_per_token"]) == OWN
    page = (found.path / "report.html").read_text(encoding="utf-8")
    assert "llama.cpp" not in "\n".join([*found.ui.log, page])
    # nor for weights that are in no file's blocks
    monkeypatch.setenv(VARIABLE, str(program))
    dense = demo(gguf, tmp_path, dtype="bfloat16").timing
    weights = 2 * 3 * 64 * 96 + 2 * 4 * 64 * 64 + 300 * 64 + NORMS
    assert dense["weight_bytes_per_token"]["dense"] == 2 * weights
    plain = demo(write_folder(tmp_path / "folder"), tmp_path, dtype="float32").timing
    assert list(dense["seconds_per_token"]) == OWN
    assert list(plain["seconds_per_token"]) == ["dense", "pruned", "transformers float32"]
    assert not log.exists()


def test_a_llama_bench_that_fails_is_a_note(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such model >&2; exit 3\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(broken))
    found = demo(write_gguf(tmp_path / "tiny.gguf"), tmp_path)
    note = "note: llama-bench failed on tiny.gguf (exit code 3): no such model"
    assert note in found.ui.log and "speed_up" in found.timing
    assert list(found.timing["seconds_per_token"]) == OWN


@pytest.mark.parametrize(
    ("dense", "pruned", "caption", "cells"),
    [
        (
            "a b c d",
            "a b x d e",
            "The same for 2 words, then they part (»)",
            ("a b »c d", "a b »x d e"),
        ),
        ("a b", "a\nb", "The same text, all 2 words", ("a b", "a b")),
        ("a b", "a", "The same for 1 word, then they part (»)", ("a »b", "a »")),
        ("b", "a", "The same for no words, then they part (»)", ("»b", "»a")),
    ],
)
def test_texts_side_by_side(dense, pruned, caption, cells):
    made = {"dense": {"text": dense}, "pruned": {"text": pruned, "method": "dart", "sparsity": 0.5}}
    table = report.side_by_side(made)
    assert table.caption == caption and table.cells() == (cells,)
    assert table.head == ("dense", "dart 50 %")
