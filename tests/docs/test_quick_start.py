"""The published quick start, line by line, in each of the three ways, on a tiny GPT-2."""

from __future__ import annotations

import csv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from shells import DRIFT, EXPERIMENT, Desk, make_desk
from tiny_gpt2 import write_gpt2

# The lines as they were published; "gpt2" is a folder of that name here.
FIRST = ["DEVICE=0", 'MODEL="gpt2"', 'LAYER_TOPK="all:auto"', "MASKING_STEP=10"]
FIRST += ["EVAL_PERPLEXITY=true"]
SECOND = ["KNOWLEDGE_DRIFT=true", 'CUSTOM_PROMPT_TEXT="Write about artificial intelligence"']
SECOND += ["GENERATION=500"]
# Arguments that only keep the measurement short.
SHORT = "--ppl-max-samples 1 --ppl-prompt-tokens 64 --ppl-scored-tokens 32"


def edited(desk: Desk) -> str:
    for script, lines in ((EXPERIMENT, FIRST), (DRIFT, [*FIRST, *SECOND])):
        pairs = (line.partition("=") for line in lines)
        desk.edit(script, {name: value.strip('"') for name, _, value in pairs})
    return f"./{EXPERIMENT} {SHORT} && ./{DRIFT} {SHORT}"


def in_front(desk: Desk) -> str:
    first, second = " ".join(FIRST), " ".join([*FIRST, *SECOND])
    return f"{first} ./{EXPERIMENT} {SHORT} && {second} ./{DRIFT} {SHORT}"


def exported(desk: Desk) -> str:
    lines = ["set -ea", *FIRST, f"./{EXPERIMENT} {SHORT}", *SECOND, f"./{DRIFT} {SHORT}"]
    return "\n".join(lines)


WAYS: dict[str, Callable[[Desk], str]] = {
    "edited": edited,
    "in front": in_front,
    "exported": exported,
}


@pytest.fixture(scope="module")
def desks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Desk]:
    """One desk per way, after its two scripts have run; the ways run beside each other."""
    model = write_gpt2(tmp_path_factory.mktemp("model") / "gpt2")

    def go(way: str) -> Desk:
        desk = make_desk(tmp_path_factory.mktemp("way"), real=True)
        (desk.root / "gpt2").symlink_to(model)
        done = desk.bash(WAYS[way](desk), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        return desk

    with ThreadPoolExecutor() as pool:
        return dict(zip(WAYS, pool.map(go, WAYS), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_published_quick_start(desks: dict[str, Desk], way: str) -> None:
    desk = desks[way]
    first, second = desk.configs()
    published = {
        "device": "0",
        "model": "gpt2",
        "layer_topk": "all:auto",
        "masking_step": 10,
        "eval_perplexity": True,
        "method": "dart",
        "total_prune_percent": 50.0,
        "generation": 0,
        "knowledge_drift": None,
        "custom_prompt_text": None,
    }
    added = {
        "knowledge_drift": True,
        "custom_prompt_text": "Write about artificial intelligence",
        "generation": 500,
    }
    for config, expected in ((first, published), (second, published | added)):
        assert {name: config["settings"][name] for name in expected} == expected
        assert config["status"] == "complete"
        assert config["prune"]["sparsity"] == 0.5 and config["prune"]["masking_step"] == 10
    assert second["prune"]["drift"]["rule"] == "dart"
    folders = sorted((desk.root / "results/gpt2-dart-0.5").iterdir())
    assert [(folder / "perplexity.json").is_file() for folder in folders] == [True, True]
    with (folders[1] / "drift.csv").open() as file:
        assert len(list(csv.DictReader(file))) > 1
