"""Sources, slices and studies of ``bench quality`` on the tiny GPT-2 (a token a character)."""

import json

from dart_llm.data.documents import Source
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.experiments.study import run_study
from dart_llm.reporting.console import Ui
from dart_llm.settings import merge
from dart_llm.studies.quality.settings import QualitySettings
from dart_llm.studies.quality.study import QualityStudy
from lm_cases import place

BEES = "the bee flew home to the hive number {} and danced. "
LOANS = "interest on loan {} is 7% of what you owe; pay it! "
PROMPT, TOKENS = 70, 40
OPTIONS = MeasureOptions(limit=2, prompt_tokens=PROMPT, scored_tokens=TOKENS)


def bees(count=8):
    """Documents of about 300 characters: two slices each."""
    texts = ("".join(BEES.format(n * k + n) for n in range(6)).strip() for k in range(count))
    return Source("bees", tuple(texts))


def loans(count=24):
    """Documents of about 100 to 150 characters, of which some fill a slice alone."""
    texts = ("".join(LOANS.format(n * k) for n in range(2 + k % 2)).strip() for k in range(count))
    return Source("loans", tuple(texts))


def write_texts(root):
    """bees.txt in paragraphs and loans.jsonl in rows."""
    text, rows = root / "bees.txt", root / "loans.jsonl"
    text.write_text("\n\n".join(bees().documents), encoding="utf-8")
    lines = [json.dumps({"text": document}) for document in loans().documents]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return text, rows


def settings(root, **more):
    given = {"model": str(place() / "model"), "device": "cpu", "dtype": "float32", "slices": 2}
    given |= {"text": [str(path) for path in write_texts(root)], "sparsities": "0.5,0.7"}
    given |= {"results_dir": str(root / "results"), "prompt_tokens": PROMPT, "tokens": TOKENS}
    given |= {"methods": "dart", "oracle": "dart"}
    return merge(QualitySettings, {**given, **more}, environment={})


def job(root, ui=None, **more):
    return run_study(QualityStudy(settings(root, **more), ui or Ui(quiet=True)))
