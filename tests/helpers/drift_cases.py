"""What the tests of drift studies share: passages and prompts of letters for the tiny GPT-2."""

import functools
import json
import tempfile
from pathlib import Path

import pytest

from dart_llm.experiments.study import run_study
from dart_llm.reporting.console import Ui
from dart_llm.studies.drift.settings import collect
from dart_llm.studies.drift.study import DriftStudy
from lm_cases import place
from written import lines

FIRST = "the bees fly from flower to flower and carry what they find home. "
SECOND = "a loan of 900 at 4% is paid back in 12 parts; the bank adds 3 each. "
THIRD = "granite cools slowly deep below; basalt quickly, near the top! "
PROMPT = 64


def passage(name, *parts):
    """A passage of paragraphs (sentence, times), one topic each."""
    texts = [(sentence * times).strip() for sentence, times in parts]
    changes, at = [], 0
    for text in texts[:-1]:
        at += len(text) + 2
        changes.append(at)
    topics = [{"name": f"{name} {k}", "domain": f"domain {k}"} for k in range(len(texts))]
    return {"id": name, "text": "\n\n".join(texts), "topics": topics, "changes": changes}


TWO = passage("two", (FIRST, 3), (SECOND, 3))
THREE = passage("three", (SECOND, 3), (THIRD, 3), (FIRST, 2))
PROMPTS = [
    {"id": "one", "text": "write about bees and then about loans"},
    {"id": "another", "text": "tell me of granite, and of tea"},
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings(folder, **more):
    """A study on the tiny model, without metrics; a source must be among ``more``."""
    given = {"model": str(place() / "model"), "device": "cpu", "metrics": False}
    given["results_dir"] = str(folder / "results")
    return collect({**given, **more}, environment={})


def forced(folder, **more):
    """On the two passages; dart's guards and evidence are small enough for them."""
    file = write_rows(folder / "passages.jsonl", [TWO, THREE])
    return settings(folder, **{"passages": file, "prompt_tokens": PROMPT, **more})


def free(folder, **more):
    file = write_rows(folder / "prompts.jsonl", PROMPTS)
    return settings(folder, **{"prompts": file, "generation": 40, "min_evidence": 0, **more})


def study(asked, ui=None):
    return run_study(DriftStudy(asked, ui or Ui(quiet=True)))


def draw_nothing(patch):
    """Pictures and pages have tests of their own."""
    patch.setattr(DriftStudy, "figures", lambda self: ())
    patch.setattr(DriftStudy, "write_page", lambda self: None)


@functools.cache
def finished():
    """A forced study of three methods beside dense on both passages, without pictures."""
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        return study(forced(Path(tempfile.mkdtemp()), methods="never,interval:40,dart@0.3"))


def results(job):
    return {row["key"]: row for row in lines(job.path / "results.jsonl")}
