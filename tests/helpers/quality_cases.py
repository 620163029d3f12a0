"""Sources, slices and jobs of ``bench quality`` on the tiny GPT-2 (a token a character)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dart_llm.data.documents import Source
from dart_llm.experiments.study import run_study
from dart_llm.reporting.console import Ui
from dart_llm.settings import merge
from dart_llm.studies.quality.settings import QualitySettings
from dart_llm.studies.quality.slices import Pair, Shape, pairs
from dart_llm.studies.quality.study import QualityStudy
from lm_cases import loaded, place

BEES = "the bee flew home to the hive number {} and danced. "
LOANS = "interest on loan {} is 7% of what you owe; pay it! "
PROMPT, TOKENS = 70, 40
SHAPE = Shape(PROMPT, TOKENS)


def bees(count: int = 8) -> Source:
    """Documents of about 300 characters: two slices of ``SHAPE`` each."""
    texts = ("".join(BEES.format(n * k + n) for n in range(6)).strip() for k in range(count))
    return Source("bees", tuple(texts))


def loans(count: int = 24) -> Source:
    """Documents of about 100 to 150 characters, of which some fill a slice alone."""
    texts = ("".join(LOANS.format(n * k) for n in range(2 + k % 2)).strip() for k in range(count))
    return Source("loans", tuple(texts))


def read_pairs(wanted: int = 2, *sources: Source) -> list[Pair]:
    return pairs(sources or (bees(), loans()), "report", loaded()[1], SHAPE, wanted)


def write_texts(root: Path) -> tuple[Path, Path]:
    """bees.txt in paragraphs and loans.jsonl in rows."""
    text, rows = root / "bees.txt", root / "loans.jsonl"
    text.write_text("\n\n".join(bees().documents), encoding="utf-8")
    lines = [json.dumps({"text": one}) for one in loans().documents]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return text, rows


def settings(root: Path, **more: Any) -> QualitySettings:
    given = {
        "model": [str(place() / "model")],
        "text": [str(path) for path in write_texts(root)],
        "results_dir": str(root / "results"),
        "device": "cpu",
        "dtype": "float32",
        "prompt_tokens": PROMPT,
        "tokens": TOKENS,
        "slices": 2,
        "sparsities": "0.5,0.7",
        "oracle": "dart",
    }
    return merge(QualitySettings, {**given, **more}, environment={})


def job(root: Path, ui: Ui | None = None, **more: Any) -> QualityStudy:
    return run_study(QualityStudy(settings(root, **more), ui or Ui(quiet=True)))
