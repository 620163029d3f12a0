"""What is kept of runs of ``dart-llm bench speed``, and the models that they measure."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dart_llm.data import texts
from dart_llm.files import write_json
from dart_llm.reporting import figures as plots
from dart_llm.reporting.console import Ui
from dart_llm.studies.speed.model import cache_bytes, prepare_model, prompt_ids
from lm_cases import loaded, place
from shells import ROOT
from speed_cases import job, settings


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# what is kept of it


def test_a_run_is_kept_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = job(tmp_path / "own", executors="compact")
    monkeypatch.setattr(plots, "save", lambda folder, wanted: [])
    for folder in ("benchmarks", "scripts"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    gatherer, measured = (importlib.import_module(name) for name in ("speed", "speed_measured"))
    kept = gatherer.gather([whole.path])
    assert kept["runs"][0]["rows"] == read(whole.path / "speed.json")["rows"]
    assert str(tmp_path) not in json.dumps(kept)
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    write_json(tmp_path / "benchmarks/results/speed-x.json", kept)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/performance.md"
    page.write_text("nothing\n", encoding="utf-8")
    assert measured.tables(tmp_path) == {}  # no marker, no block
    page.write_text("<!-- generated: speed-x -->\n", encoding="utf-8")
    ((name, (where, text)),) = measured.tables(tmp_path).items()
    assert (name, where) == ("speed-x", page)
    assert text.count("| griffin 50 %, compact |") == 1 and "| attaching |" in text
    assert "| all x own dense |" in text
    for row in kept["runs"][0]["rows"]:  # as in files of before these columns
        del row["all_ms"], row["all_times_transformers"], row["all_times_own_dense"]
    write_json(tmp_path / "benchmarks/results/speed-x.json", kept)
    assert "all ms" not in measured.tables(tmp_path)["speed-x"][1]
    assert "[speed-x.json](../benchmarks/results/speed-x.json)" in text
    (whole.path / "unfinished").mkdir()
    write_json(whole.path / "unfinished/config.json", {"kind": "speed", "status": "failed"})
    with pytest.raises(SystemExit, match="is no finished run"):
        gatherer.gather([whole.path / "unfinished"])


def rendered(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: dict[str, Any]) -> str:
    """The block of performance.md that is made of the results file ``name``."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    measured = importlib.import_module("speed_measured")
    (root / "benchmarks/results").mkdir(parents=True)
    write_json(root / f"benchmarks/results/{name}.json", data)
    (root / "docs").mkdir()
    page = root / "docs/performance.md"
    page.write_text(f"<!-- generated: {name} -->\n", encoding="utf-8")
    text: str = measured.tables(root)[name][1]
    return text


def test_the_table_of_single_ffns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"hidden": 576, "width": 1536, "dtype": "bfloat16", "path": "native", "keep": 0.5,
           "ms": 0.1234, "times_torch": 1.5, "bytes_per_second": 2.1e10,
           "share_of_native_dense": 0.8}  # fmt: skip
    about = {"repeats": 5, "threads": 2, "machine": {"processor": "CPU"}, "kernels": "avx2",
             "read_bandwidth": 3e10, "command": "python ffn_speed.py"}  # fmt: skip
    text = rendered(tmp_path, monkeypatch, "ffn-speed", {**about, "rows": [row]})
    assert "| 576 x 1536 | bfloat16 | native | 0.5 | 0.123 | 1.50 | 21.0 | 80% |" in text
    assert "read bandwidth 30.0 GB/s" in text


def test_the_table_of_ways_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"path": path, "row": where, "case": case, "ms": ms, "mean_ms": 2 * ms}
        for path, where, ms in (("FFN", "alone", 0.045), ("linear", "alone", 0.064))
        for case in ("PASSIVE", "neither")
    ]
    about = {"calls": 20, "rounds": 3, "threads": 2, "machine": {"processor": "CPU", "cores": 4},
             "load_average_before": 0.25, "command": "python thread_policy.py"}  # fmt: skip
    text = rendered(tmp_path, monkeypatch, "thread-policy", {**about, "rows": rows})
    assert "| threads wait | FFN, alone | linear, alone |" in text
    assert "| neither | 45 us, mean 90 | 64 us, mean 128 |" in text
    assert "2 threads of CPU with 4 cores, load average before 0.2." in text


# random weights


def test_a_checkpoint_gives_its_shape_alone(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"model": str(place() / "model"), "shape": None}
    made, tokenizer = prepare_model(settings(tmp_path, random_weights=True, **asked), Ui(True))
    real, _ = prepare_model(settings(tmp_path, **asked), Ui(True))
    assert tokenizer is None and made.config.model_type == real.config.model_type == "gpt2"
    first, second = (dict(model.named_parameters()) for model in (made, real))
    assert {n: p.shape for n, p in first.items()} == {n: p.shape for n, p in second.items()}
    again, _ = prepare_model(settings(tmp_path, random_weights=True, **asked), Ui(True))
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(first[name], again.state_dict()[name])
    assert not torch.equal(first[name], second[name])


def test_prompts_have_the_length_that_was_asked_for() -> None:
    model, tokenizer = loaded()
    text = prompt_ids(model, tokenizer, 7, 0)
    assert text.tolist() == [tokenizer(texts.all_text()).input_ids[:7]]
    drawn = prompt_ids(model, None, 50, 0)
    assert drawn.shape == (1, 50) and len(set(drawn[0].tolist())) > 10
    assert torch.equal(drawn, prompt_ids(model, None, 50, 0))
    cache = model(drawn, use_cache=True).cache
    config = model.config
    assert cache_bytes(cache) == config.n_layer * 2 * config.n_embd * 4
