"""``dart-llm demo``: bytes per token, llama.cpp where it is at hand, and perplexity."""

import json

import pytest
import torch

from checkpoints import write_bench, write_folder, write_gguf
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.parts import MemoryStore
from dart_llm.evaluation.tasks import measure
from dart_llm.experiments.study import load_model
from dart_llm.experiments.timing import VARIABLE, WARM
from dart_llm.reporting.console import Ui
from dart_llm.studies.generate import demo as demo_study
from dart_llm.studies.generate import report, study
from dart_llm.studies.generate.demo import DemoStudy, run_demo
from dart_llm.studies.generate.settings import RunSettings
from html_page import Page

pytestmark = pytest.mark.usefixtures("native")

# of a layer's 12 matrices of 64 x 64 and 64 x 96: 5 bytes hold 8 weights of Q4_1
FFN = 2 * 3 * 64 * 96 * 20 // 32
REST = 2 * 4 * 64 * 64 * 20 // 32 + 300 * 64 * 34 // 32
NORMS = 5 * 64

OWN = ["dense", "pruned", "transformers"]
OPTIONS = MeasureOptions(limit=6, prompt_tokens=32, scored_tokens=16)


def names(times):
    """What was timed; of transformers whichever dtype decoded faster."""
    return sorted(name.partition(" ")[0] for name in times)


@pytest.fixture(autouse=True)
def _alone(no_pictures, monkeypatch):
    monkeypatch.setattr(demo_study, "OPTIONS", OPTIONS)
    monkeypatch.setattr(demo_study, "COMPARED", ())
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")


def demo(model, folder, **more):
    given = {"model": str(model), "method": "griffin", "sparsity": 0.5, "prompt": "hi there"}
    given |= {"chat": False, "generation": 9, "device": "cpu"}
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
    assert seconds["llama.cpp Q4_1"] == 0.002
    assert timing["bytes_limit"] == accounting["bytes_limit"]
    # as many tokens after the same prompt, in every repetition and once before
    asked = [json.loads(line)[0] for line in log.read_text().splitlines()]
    assert len(asked) == 1 + len(timing["repetitions"]["dense"])
    depth = min(study.TAIL, accounting["prompt_tokens"] + 9) + WARM
    wanted = {"-p": "0", "-n": "8", "-d": str(depth), "-t": str(torch.get_num_threads())}
    assert all(wanted.items() <= one.items() for one in asked)
    assert asked[0]["-m"].endswith("tiny.gguf")
    assert found.identity == DemoStudy(found.settings, Ui(quiet=True)).identify()
    # transformers holds the same weights in 2 or 4 bytes each, as it decodes faster
    plain = next(name for name in sizes if name.startswith("transformers"))
    width = {"transformers bfloat16": 2, "transformers float32": 4}[plain]
    assert sizes[plain] == width * (2 * 3 * 64 * 96 + 2 * 4 * 64 * 64 + 300 * 64 + NORMS)
    table, _ = found.tables()
    assert table.caption.startswith(f"Decoding, median of {len(asked) - 1} repetitions")
    rows = {row["name"]: row for row in table.rows}
    assert set(rows) == {"dense", "griffin pruned", plain, "llama.cpp Q4_1"}
    assert [row["seconds"] for row in table.rows] == sorted(seconds.values(), reverse=True)
    assert rows[plain]["over_transformers"] is None and "over_dense" not in rows["dense"]
    over = timing["over_transformers"]["llama.cpp Q4_1"]["speed_up"]
    shown = "disturbed" if over is None else f"{over:.2f}"
    assert rows["llama.cpp Q4_1"]["over_transformers"] == shown
    page = Page((found.path / "report.html").read_text(encoding="utf-8"))
    heads = page.row("decoding")
    same = [row for row in page.rows if len(row) == len(heads)]
    shown = {row[0]: dict(zip(heads, row, strict=True)) for row in same}
    assert shown["llama.cpp Q4_1"]["ms per token"] == "2.0"
    pruned = shown["griffin pruned"]
    assert pruned["MB read per token"] == f"{sizes['pruned'] / 1e6:,.1f}"
    assert pruned["bandwidth limit"] == f"{accounting['bytes_limit']:.2f} x"


def test_transformers_runs_in_the_dtype_in_which_it_decodes_fastest(gpt2, tmp_path, monkeypatch):
    """Float32 is tried beside the model's own dtype, where there is memory for it."""
    took = {torch.bfloat16: 0.02, torch.float32: 0.01}

    def timed(model, ids, tokens, make):
        return {"steps_s": [9.0, took[model.dtype], 9.0]}

    monkeypatch.setattr(demo_study, "repetition", timed)
    given = {"model": str(gpt2), "dtype": "bfloat16", "prompt": "hi", "method": "griffin"}
    demo = DemoStudy(RunSettings(**given, sparsity=0.5), Ui(quiet=True))
    demo.model, demo.tokenizer, _ = load_model(demo.settings, demo.ui)
    ids = torch.tensor([[1, 2]])
    assert demo.transformers(ids).dtype == torch.float32
    took[torch.float32] = 0.03
    assert demo.transformers(ids) is demo.model
    took[torch.float32] = 0.01
    monkeypatch.setattr(demo_study, "can_copy", lambda model: False)
    assert demo.transformers(ids) is demo.model


def test_no_line_where_llama_cpp_is_not_at_hand(tmp_path, monkeypatch):
    found = demo(write_gguf(tmp_path / "tiny.gguf"), tmp_path)
    assert names(found.timing["weight_bytes_per_token"]) == OWN
    assert names(found.timing["seconds_per_token"]) == OWN
    page = (found.path / "report.html").read_text(encoding="utf-8")
    assert "llama.cpp" not in "\n".join([*found.ui.log, page])
    # nor for weights that are in no file's blocks
    program, log = write_bench(tmp_path)
    monkeypatch.setenv(VARIABLE, str(program))
    plain = demo(write_folder(tmp_path / "folder"), tmp_path, dtype="float32").timing
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
    assert names(found.timing["seconds_per_token"]) == OWN


@pytest.mark.parametrize(
    ("dense", "pruned", "caption", "cells"),
    [
        (
            "a b c d",
            "a b x d e",
            "The same for 2 words, then different (»)",
            ("a b c d", "a b »x d e"),
        ),
        ("a b", "a\nb", "The same text, all 2 words", ("a b", "a b")),
        ("a b", "a", "The same for 1 word, then different (»)", ("a b", "a »")),
        ("b", "a", "The same for no words, then different (»)", ("b", "»a")),
    ],
)
def test_texts_side_by_side(dense, pruned, caption, cells):
    made = {"dense": {"text": dense, "method": "dense"}}
    made["pruned"] = {"text": pruned, "method": "dart", "sparsity": 0.5}
    (table,) = report.side_by_side(made, 110)
    assert table.caption == caption and table.cells() == (cells,)
    assert table.head == ("dense", "dart 50 %")
    assert report.side_by_side(made, 40) == []  # no room for a column each


def test_its_perplexity_is_the_measurement_of_every_other_command(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_study, "COMPARED", (("published", 0.25),))
    study = demo(write_gguf(tmp_path / "tiny.gguf"), tmp_path)
    _, table = study.tables()
    labels = ["dense", "published@0.25", "griffin@0.5"]
    assert [row["label"] for row in study.perplexity] == labels
    dense, _, pruned = study.perplexity
    for row, candidate in ((dense, study.prepare(None)), (pruned, study.bound)):
        direct = measure(candidate, demo_study.TASK, OPTIONS, MemoryStore())
        assert row["perplexity"] == direct.metrics["perplexity"]
        assert row["accounting"] == direct.accounting
    low, high = pruned["interval"]
    assert low <= pruned["ratio_to_dense"] <= high and dense["ratio_to_dense"] == 1
    written = json.loads((study.path / "perplexity.json").read_text(encoding="utf-8"))
    assert [row["perplexity"] for row in written["rows"]] == [
        row["perplexity"] for row in study.perplexity
    ]
    lines = [line for line in study.result_lines() if line.task == demo_study.TASK]
    assert [(line.metric, line.label) for line in lines] == [
        ("perplexity", "dense"),
        *(
            (metric, label)
            for label in ("published 25 %", "griffin 50 %")
            for metric in ("perplexity", "perplexity_over_dense")
        ),
    ]
    assert (lines[-1].value, lines[-1].low) == (pruned["ratio_to_dense"], low)
    assert (lines[-1].requested, lines[-1].achieved) == (0.5, pytest.approx(0.5))
    assert study.sentences()[0].startswith("On this model ") and len(study.sentences()) == 1
    assert table.caption.startswith("embedded: 6 slices of 32 prompt + 16 scored tokens")
    assert [row[0] for row in table.cells()] == ["dense", "published", "griffin"]
