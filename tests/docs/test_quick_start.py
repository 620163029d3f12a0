"""The published quick start and the recipes: what people copy first."""

from collections import Counter

import pytest

from dart_llm.files import read_yaml
from dart_llm.studies.sweep.grid import expand
from dart_llm.studies.sweep.settings import SweepSettings
from shells import DRIFT, EXPERIMENT, ROOT, make_desk
from tiny_gpt2 import write_gpt2

PUBLISHED = f"""
set -a
DEVICE=0
MODEL="gpt2"
LAYER_TOPK="all:auto"
MASKING_STEP=10
EVAL_PERPLEXITY=true
SHORT
./{EXPERIMENT}

KNOWLEDGE_DRIFT=true
CUSTOM_PROMPT_TEXT="Write about artificial intelligence"
GENERATION=500
./{DRIFT}
"""
SHORT = "PPL_MAX_SAMPLES=1"
SPARSITIES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


@pytest.mark.contract("published quick start")
def test_the_published_quick_start_runs_line_by_line(tmp_path):
    desk = make_desk(tmp_path, real=True)
    write_gpt2(desk.root / "gpt2")
    done = desk.bash(PUBLISHED.replace("SHORT", SHORT), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    first, run, second = desk.configs()
    published = {"device": "0", "model": "gpt2", "layer_topk": "all:auto", "masking_step": 10}
    published |= {"method": "dart", "total_prune_percent": 50.0, "knowledge_drift": True}
    added = {"generation": 500, "custom_prompt_text": "Write about artificial intelligence"}
    assert {name: run["settings"][name] for name in (published | added)} == published | added
    assert [config["kind"] for config in (first, run, second)] == [
        "perplexity",
        "run",
        "perplexity",
    ]
    for config in (first, run, second):
        assert config["status"] == "complete"
        assert config["prune"]["sparsity"] == 0.5 and config["prune"]["masking_step"] == 10
    (folder,) = (desk.root / "results/gpt2-dart-0.5").iterdir()
    assert len((folder / "drift.csv").read_text().splitlines()) > 2


def test_recipes_hold_every_method_at_every_sparsity(monkeypatch):
    monkeypatch.chdir(ROOT)
    for recipe, tasks in (("small", 2), ("paper-llama-3.1-8b", 13)):
        cells = expand(SweepSettings(**read_yaml(ROOT / f"recipes/{recipe}.yaml")))
        counts = Counter(cell.task for cell in cells)
        assert len(counts) == tasks and set(counts.values()) == {1 + 4 * len(SPARSITIES)}
        methods = list(dict.fromkeys(cell.method for cell in cells))
        assert methods == ["dense", "griffin", "published", "dart", "dart-token"]
        assert sorted({cell.sparsity for cell in cells if cell.method == "dart"}) == SPARSITIES
