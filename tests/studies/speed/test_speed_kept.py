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


def test_a_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = job(tmp_path / "own", executors="compact")
    monkeypatch.setattr(plots, "save", lambda folder, wanted: [])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    keeper = importlib.import_module("keep")
    kept = keeper.gather_speed([whole.path])
    assert kept["runs"][0]["rows"] == read(whole.path / "speed.json")["rows"]
    assert str(tmp_path) not in json.dumps(kept)
    (whole.path / "unfinished").mkdir()
    write_json(whole.path / "unfinished/config.json", {"kind": "speed", "status": "failed"})
    with pytest.raises(SystemExit, match="is no finished run"):
        keeper.gather_speed([whole.path / "unfinished"])


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
