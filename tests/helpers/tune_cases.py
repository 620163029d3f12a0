"""Jobs of ``tune`` on the tiny GPT-2 (a token a character)."""

from dart_llm.experiments.study import run_study
from dart_llm.reporting.console import Ui
from dart_llm.settings import merge
from dart_llm.studies.bench.settings import TuneSettings
from dart_llm.studies.bench.tune import TuneStudy
from lm_cases import place
from quality_cases import bees

PROMPT, TOKENS = 40, 24


def write_text(root, version=0):
    """bees.txt in paragraphs."""
    path = root / "bees.txt"
    documents = [*bees().documents, f"another document, {version}"]
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


def settings(root, **more):
    given = {"model": str(place() / "model"), "device": "cpu", "dtype": "float32"}
    given |= {"weights": "dense", "slices": 2, "repeats": 2}
    given |= {} if "text" in more else {"text": str(write_text(root))}
    given |= {"results_dir": str(root / "results"), "prompt_tokens": PROMPT, "tokens": TOKENS}
    given |= {"methods": "griffin", "sparsities": "0.3,0.7", "heads": "full", "timed_tokens": 4}
    return merge(TuneSettings, {**given, **more}, environment={})


def job(root, ui=None, **more):
    return run_study(TuneStudy(settings(root, **more), ui or Ui(quiet=True)))
