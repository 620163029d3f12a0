"""Stand-ins for the hub's data sets that the documentation's commands name: a few rows of each.

``prepare`` puts them in place of ``datasets.load_dataset``; the words were written for this test.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from typing import Any

ROWS = 7
"""Enough for an item and five examples before it."""
LETTERS = "ABCD"
WORDS = ("moon", "river", "bread", "judge", "bridge", "winter")


def _text(number: int, sentences: int = 12) -> str:
    words = itertools.islice(itertools.cycle(WORDS), number, number + sentences)
    return " ".join(f"The {word} of part {number} was seen by many people." for word in words)


def _arc(number: int) -> dict[str, Any]:
    choices = {"text": list(WORDS[:4]), "label": list(LETTERS)}
    found = {"id": f"q{number}", "choices": choices, "answerKey": LETTERS[number % 4]}
    return {**found, "question": f"Which of these is number {number}?"}


def _mmlu(number: int) -> dict[str, Any]:
    question = f"What is seen in part {number}?"
    return {"question": question, "choices": list(WORDS[:4]), "answer": number % 4}


def _gpqa(number: int) -> dict[str, Any]:
    wrong = {f"Incorrect Answer {at}": WORDS[at] for at in (1, 2, 3)}
    return {"Question": f"Which is part {number}?", "Correct Answer": WORDS[0], **wrong}


def _medmcqa(number: int) -> dict[str, Any]:
    options = dict(zip(("opa", "opb", "opc", "opd"), WORDS, strict=False))
    return {"question": f"Which is part {number}?", "cop": number % 4, **options}


def _hellaswag(number: int) -> dict[str, Any]:
    context = {"activity_label": "Baking", "ctx_a": _text(number, 1), "ctx_b": "the baker"}
    return {**context, "endings": [f"takes the {w}." for w in WORDS[:4]], "label": str(number % 4)}


def _winogrande(number: int) -> dict[str, Any]:
    sentence = "The bread did not fit into the box because the _ was too large."
    return {"sentence": sentence, "option1": "bread", "option2": "box", "answer": "1"}


def _row(name: str, number: int) -> dict[str, Any]:
    """One row of the data set that ends in ``name``, with the columns that are read."""
    made = {
        "super_glue": lambda: {"passage": _text(number), "question": "is it seen", "label": 1},
        "glue": lambda: {"sentence1": _text(number), "sentence2": "It was seen.", "label": 0},
        "openbookqa": lambda: {**_arc(number), "question_stem": "What is seen"},
        "xsum": lambda: {"document": _text(number), "summary": "It was seen.", "id": str(number)},
        "cnn_dailymail": lambda: {"article": _text(number), "highlights": "Seen.", "id": "1"},
        "wikitext": lambda: {"text": _text(number, 120)},
        "c4": lambda: {"text": _text(number, 400)},
        "ai2_arc": lambda: _arc(number),
        "mmlu": lambda: _mmlu(number),
        "gpqa": lambda: _gpqa(number),
        "medmcqa": lambda: _medmcqa(number),
        "hellaswag": lambda: _hellaswag(number),
        "winogrande": lambda: _winogrande(number),
    }
    return made[name]()


def prepare() -> None:
    """Answer ``load_dataset`` from this file, but for local files; import what is slow.

    Called once, in the process that all commands are forked from.
    """
    import datasets
    import lm_eval.evaluator  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import transformers
    import transformers.models.llama.modeling_llama
    from lm_eval.tasks import TaskManager

    import dart_llm
    from dart_llm.evaluation import lm_eval as harness

    for found in pkgutil.iter_modules(dart_llm.__path__):
        if found.name not in ("__main__", "engine_ray") and not found.name.startswith("tracker_"):
            importlib.import_module(f"dart_llm.{found.name}")
    assert transformers.AutoModelForCausalLM and TaskManager
    real = datasets.load_dataset
    splits = ("train", "validation", "test", "dev")

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        short = path.rpartition("/")[2].replace("govreport-summarization", "xsum")
        if "/" not in path:
            return real(path, name, **options)
        rows = datasets.Dataset.from_list([_row(short, number) for number in range(ROWS)])
        split = options.get("split")
        return rows if split else datasets.DatasetDict(dict.fromkeys(splits, rows))

    datasets.load_dataset = load_dataset
    harness._manager(None)
