"""docs/models.md: its rows are what the package does, and nothing of the package is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tiny
from dart_llm.errors import ConfigError, UnsupportedModel
from dart_llm.models.architectures import LAYER_NAMES as LAYERS
from dart_llm.session.run import prune
from scripts_of import FOLDER, script
from steps import shared_model

ROOT = FOLDER.parent
model_pages = script("model_pages")
PAGE = (ROOT / "docs/models.md").read_text(encoding="utf-8")
ROWS = {row[0]: row for row in re.findall(r"^\| `(\w+)` \|" + r" (.+?) \|" * 5 + "$", PAGE, re.M)}


def test_every_model_type_has_a_row_and_is_tested() -> None:
    assert sorted(ROWS) == sorted(LAYERS)
    tested = [name for row in ROWS.values() for name in re.findall(r"`(.+?)`", row[5])]
    assert sorted(tested) == sorted(tiny.NAMES)
    assert "not tested**" not in PAGE


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("model_type", ROWS)
def test_executors_that_stand_in_the_row_run_and_no_others(model_type: str) -> None:
    listed = ROWS[model_type][4].split(", ")
    for name in re.findall(r"`(.+?)`", ROWS[model_type][5]):
        for executor in model_pages.EXECUTORS:
            if executor in listed:
                prune(shared_model(name), "griffin", sparsity=0.5, executor=executor)
                continue
            with pytest.raises(ConfigError, match=f'executor "{executor}" cannot run'):
                prune(shared_model(name), "griffin", sparsity=0.5, executor=executor)


def test_a_model_type_without_a_tiny_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, "olmo", LAYERS["llama"])
    assert "| `olmo` |  |  |  |  | **not tested** |" in model_pages.types(tiny)


def test_what_is_said_of_a_model_that_is_not_listed() -> None:
    settings: dict[str, Any] = tiny.CONFIGS["llama"][1]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["stablelm"](**settings))
    quoted = re.findall(r"^> UnsupportedModel: (.+), …$", PAGE, re.M)
    with pytest.raises(UnsupportedModel) as caught:
        prune(model)
    assert len(quoted) == 1 and str(caught.value).startswith(quoted[0])


def test_measured_checkpoints_come_from_the_results_files(tmp_path: Path) -> None:
    for folder in ("benchmarks/results", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    facts = {"name": "A", "source": "a file", "revision": None, "file_quantisation": "Q8_0"}
    facts |= {"sha256": "ab" * 32, "dtype": "float32", "parameters": 1234567}
    less = {**facts, "source": None, "parameters": None, "dtype": "bfloat16"}
    random = {**facts, "sha256": None, "name": "random weights"}
    for name, data in {"one": {"runs": [{"checkpoint": facts}]}, "two": [less, random]}.items():
        (tmp_path / f"benchmarks/results/{name}.json").write_text(json.dumps(data))
    (tmp_path / "README.md").write_text("[t](benchmarks/results/one.json)")
    (tmp_path / "docs/a.md").write_text("[t](../benchmarks/results/two.json)")
    assert model_pages.measured(tmp_path) == (
        "**A**: a file;\nfile quantisation Q8_0; 1,234,567 parameters as loaded; run in bfloat16 "
        f"and float32;\nsha256 `{'ab' * 32}`.\n\n"
        "- [README.md](../README.md):\n  [one.json](../benchmarks/results/one.json)\n"
        "- [a.md](a.md):\n  [two.json](../benchmarks/results/two.json)"
    )


def test_test_files_are_those_that_run_on_every_tiny_model() -> None:
    named = re.findall(r"\(\.\./tests/(test_\w+\.py)\):", PAGE)
    assert "test_contract_matrix.py" in named and "test_restore.py" in named
    for name in named:
        assert 'parametrize("name", NAMES)' in (ROOT / "tests" / name).read_text(encoding="utf-8")
