"""``dart-llm demo``: bytes per token, llama.cpp where it is at hand, and perplexity."""

import pytest
import torch

from checkpoints import write_bench, write_folder, write_gguf
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.parts import MemoryStore
from dart_llm.evaluation.tasks import measure
from dart_llm.experiments.study import load_model, run_study
from dart_llm.experiments.timing import VARIABLE, WARM
from dart_llm.reporting.console import Ui
from dart_llm.studies.generate import demo as demo_study
from dart_llm.studies.generate import report
from dart_llm.studies.generate import study as timed
from dart_llm.studies.generate.demo import DemoStudy
from dart_llm.studies.generate.settings import DemoSettings
from html_page import Page
from speed_cases import FFN, NORMS, REST, write_broken_bench
from written import lines, read

pytestmark = pytest.mark.usefixtures("native")


OPTIONS = MeasureOptions(limit=6, prompt_tokens=32, scored_tokens=16)


@pytest.fixture(autouse=True)
def _alone(no_pictures, monkeypatch):
    monkeypatch.setattr(demo_study, "OPTIONS", OPTIONS)
    monkeypatch.setattr(demo_study, "COMPARED", ())
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")


def demo(model, folder, **more):
    settings = {"model": str(model), "method": "griffin", "sparsity": 0.5, "prompt": "hi there"}
    settings |= {"chat": False, "generation": 9, "device": "cpu"}
    settings |= {"results_dir": str(folder / "results"), "cache_dir": str(folder / "cache")}
    return run_study(DemoStudy(DemoSettings(**settings, **more).fitted(), Ui(quiet=True)))


def test_bytes_per_token_and_llama_cpp(tmp_path, monkeypatch):
    program, log = write_bench(tmp_path)
    monkeypatch.setenv(VARIABLE, str(program))
    study = demo(write_gguf(tmp_path / "tiny.gguf"), tmp_path)
    timing, accounting = study.timing, study.summary["accounting"]
    # as stored, the same weights for both; the file's norms are float32, dart-llm's rows are padded
    sizes, seconds = timing["weight_bytes_per_token"], timing["seconds_per_token"]
    assert sizes["llama.cpp Q4_1"] == FFN + REST + 4 * NORMS
    assert sizes["dense"] == sum(weights.nbytes for weights in study.model.parameters())
    assert sizes["dense"] == pytest.approx(FFN + REST + 2 * NORMS, rel=0.15)
    ffn = sizes["dense"] * accounting["ffn_share_of_bytes"]
    assert ffn == pytest.approx(FFN, rel=0.2) and accounting["achieved_sparsity"] == 0.5
    assert sizes["pruned"] == round(sizes["dense"] - ffn / 2)
    assert seconds["llama.cpp Q4_1"] == 0.002
    assert timing["bytes_limit"] == accounting["bytes_limit"]
    # as many tokens after the same prompt, in every repetition and once before
    flags = [flags for flags, _ in lines(log)]
    assert len(flags) == 1 + len(timing["repetitions"]["dense"])
    depth = min(timed.TAIL, accounting["prompt_tokens"] + 9) + WARM
    wanted = {"-p": "0", "-n": "8", "-d": str(depth), "-t": str(torch.get_num_threads())}
    assert all(wanted.items() <= each.items() for each in flags)
    assert flags[0]["-m"].endswith("tiny.gguf")
    assert study.identity == DemoStudy(study.settings, Ui(quiet=True)).identify()
    # transformers holds the same weights in 2 or 4 bytes each, as it decodes faster
    plain = next(name for name in sizes if name.startswith("transformers"))
    width = {"transformers bfloat16": 2, "transformers float32": 4}[plain]
    assert sizes[plain] == width * (2 * 3 * 64 * 96 + 2 * 4 * 64 * 64 + 300 * 64 + NORMS)
    table, _ = study.tables()
    assert table.caption.startswith(f"Decoding, median of {len(flags) - 1} repetitions")
    rows = {row["name"]: row for row in table.rows}
    assert set(rows) == {"dense", "griffin pruned", plain, "llama.cpp Q4_1"}
    assert [row["seconds"] for row in table.rows] == sorted(seconds.values(), reverse=True)
    assert rows[plain]["over_transformers"] is None and "over_dense" not in rows["dense"]
    over = timing["over_transformers"]["llama.cpp Q4_1"]["speed_up"]
    shown = "disturbed" if over is None else f"{over:.2f}"
    assert rows["llama.cpp Q4_1"]["over_transformers"] == shown
    page = Page((study.path / "report.html").read_text(encoding="utf-8"))
    heads = page.row("decoding")
    cells = {row[0]: dict(zip(heads, row, strict=False)) for row in page.rows if row}
    assert cells["llama.cpp Q4_1"]["ms per token"] == "2.0"
    pruned = cells["griffin pruned"]
    assert pruned["MB read per token"] == f"{sizes['pruned'] / 1e6:,.1f}"
    assert pruned["bandwidth limit"] == f"{accounting['bytes_limit']:.2f} x"


def test_no_row_where_llama_cpp_is_missing_or_fails(tmp_path, monkeypatch):
    names = ["dense", "pruned", "transformers"]
    gguf = write_gguf(tmp_path / "tiny.gguf")
    study = demo(gguf, tmp_path)
    for numbers in ("weight_bytes_per_token", "seconds_per_token"):
        # of transformers whichever dtype decoded faster
        assert sorted(name.partition(" ")[0] for name in study.timing[numbers]) == names
    page = (study.path / "report.html").read_text(encoding="utf-8")
    assert "llama.cpp" not in "\n".join([*study.ui.log, page])
    # nor for weights that no file holds in blocks
    program, log = write_bench(tmp_path)
    monkeypatch.setenv(VARIABLE, str(program))
    plain = demo(write_folder(tmp_path / "folder"), tmp_path, dtype="float32").timing
    assert list(plain["seconds_per_token"]) == ["dense", "pruned", "transformers float32"]
    assert not log.exists()
    monkeypatch.setenv(VARIABLE, str(write_broken_bench(tmp_path)))
    study = demo(gguf, tmp_path)
    note = "note: llama-bench failed on tiny.gguf (exit code 3): no such model"
    assert note in study.ui.log and "speed_up" in study.timing
    assert sorted(name.partition(" ")[0] for name in study.timing["seconds_per_token"]) == names


def test_transformers_runs_in_the_dtype_in_which_it_decodes_fastest(settings, monkeypatch):
    """Float32 is tried beside the model's own dtype, where there is memory for it."""
    took = {torch.bfloat16: 0.02, torch.float32: 0.01}

    def repetition(model, ids, tokens, make):
        return {"steps_s": [9.0, took[model.dtype], 9.0]}

    monkeypatch.setattr(demo_study, "repetition", repetition)
    demo = DemoStudy(settings(dtype="bfloat16"), Ui(quiet=True))
    demo.model, demo.tokenizer, _ = load_model(demo.settings, demo.ui)
    ids = torch.tensor([[1, 2]])
    assert demo.transformers(ids).dtype == torch.float32
    took[torch.float32] = 0.03
    assert demo.transformers(ids) is demo.model
    took[torch.float32] = 0.01
    monkeypatch.setattr(demo_study, "can_copy", lambda model: False)
    assert demo.transformers(ids) is demo.model


@pytest.mark.parametrize(
    ("dense", "pruned", "caption", "cells"),
    [
        (
            "a b c d",
            "a b x d e",
            "Both texts are equal for 2 words, then differ (from »)",
            "a b »x d e",
        ),
        ("a b", "a\nb", "Both texts are equal (2 words)", "a b"),
        ("a b", "a", "Both texts are equal for 1 word, then differ (from »)", "a »"),
        ("b", "a", "Both texts are equal for no words, then differ (from »)", "»a"),
    ],
)
def test_texts_side_by_side(dense, pruned, caption, cells):
    texts = {"dense": {"text": dense, "method": "dense"}}
    texts["pruned"] = {"text": pruned, "method": "dart", "sparsity": 0.5}
    (table,) = report.side_by_side(texts, 110)
    assert table.caption == caption and table.cells() == ((dense, cells),)
    assert table.head == ("dense", "dart 50 %")
    assert report.side_by_side(texts, 40) == []  # no room for a column each


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
    written = [row["perplexity"] for row in read(study.path / "perplexity.json")["rows"]]
    assert written == [row["perplexity"] for row in study.perplexity]
    rows = [line for line in study.result_lines() if line.task == demo_study.TASK]
    metrics = ("perplexity", "perplexity_over_dense")
    labels = [(metric, label) for label in ("published 25 %", "griffin 50 %") for metric in metrics]
    assert [(row.metric, row.label) for row in rows] == [("perplexity", "dense"), *labels]
    assert (rows[-1].value, rows[-1].low) == (pruned["ratio_to_dense"], low)
    assert (rows[-1].requested, rows[-1].achieved) == (0.5, pytest.approx(0.5))
    assert study.sentences()[0].startswith("On this model ") and len(study.sentences()) == 1
    assert table.caption.startswith("embedded: 6 slices of 32 prompt + 16 scored tokens")
    assert [row[0] for row in table.cells()] == ["dense", "published", "griffin"]
