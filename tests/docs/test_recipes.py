"""The files under recipes/: they are read, and ``--dry-run`` plans them, without the hub."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dart_llm.cli.app import app
from dart_llm.data.documents import read_documents
from dart_llm.studies.sweep.grid import collect, expand

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAPER, SMALL = ROOT / "recipes/paper-llama-3.1-8b.yaml", ROOT / "recipes/small.yaml"
METHODS = ["dense", "griffin", "published", "dart", "dart-token"]
SPARSITIES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
PER_TASK = 1 + 4 * len(SPARSITIES)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the root of the clone, with results elsewhere and a cache without data sets."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DART_RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_the_two_recipes() -> None:
    assert RECIPES == [PAPER, SMALL]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_methods_and_sparsities(path: Path) -> None:
    cells = expand(collect({}, path))
    seen = Counter(cell.task for cell in cells)
    assert set(seen.values()) == {PER_TASK}
    assert list(dict.fromkeys(cell.method for cell in cells)) == METHODS
    dart = [c.sparsity for c in cells if c.method == "dart"][: len(SPARSITIES)]
    assert dart == SPARSITIES


def test_the_benchmarks_and_their_shots() -> None:
    found = {c.task: c.options for c in expand(collect({}, PAPER)) if c.method == "dense"}
    shots = {task: options.num_fewshot or 0 for task, options in found.items()}
    assert shots == {
        "boolq": 0,
        "rte": 0,
        "hellaswag": 0,
        "winogrande": 0,
        "arc_easy": 0,
        "arc_challenge": 0,
        "openbookqa": 0,
        "mmlu": 0,
        "gpqa_main_n_shot": 5,
        "medmcqa": 5,
        "perplexity:wikitext2": 0,
        "summarize:xsum": 0,
        "summarize:cnn_dailymail": 0,
    }


def test_the_small_documents() -> None:
    path = "recipes/small-documents.jsonl"
    options = yaml.safe_load(SMALL.read_text(encoding="utf-8"))["task_options"]
    assert options[f"summarize:{path}"]["limit"] == len(read_documents(path)) == 3


def test_the_dry_run_of_the_paper() -> None:
    done = CliRunner().invoke(app, ["sweep", str(PAPER), "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert [row["status"] for row in plan["rows"]] == 13 * PER_TASK * ["to do"]
    assert plan["seconds"] > 3600
    assert plan["disk_bytes"] >= 16 * 10**9 + 13 * PER_TASK * 500_000
    downloads = {one["name"]: one for one in plan["downloads"]}
    model = downloads["meta-llama/Llama-3.1-8B"]
    assert model["size"] == 16 * 10**9 and model["note"].startswith("by its name: the hub cannot")
    assert len(downloads) == 14
    assert downloads["data set allenai/ai2_arc (ARC-Easy, test)"]["size"] == 10**6
    assert downloads["data set Idavidrein/gpqa (gpqa_main, train)"]["size"] == 4 * 10**6


def test_the_dry_run_of_the_small_one() -> None:
    done = CliRunner().invoke(app, ["sweep", str(SMALL), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "58 cells: 0 finished, 58 to do" in done.stdout
    assert "\ndisk: about 29 MB" in done.stdout and "\ntime: about " in done.stdout
