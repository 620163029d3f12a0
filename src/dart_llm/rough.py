"""What a cell costs where nothing was measured yet: items of known tasks, tokens, a model's name.

Only ``--dry-run`` reads these numbers, and it says that they are rough.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from dart_llm.cell import Cell
from dart_llm.harness_tasks import FEWSHOT
from dart_llm.hub_data import MMLU_SUBJECTS
from dart_llm.task_names import split

ITEMS: Mapping[str, int] = MappingProxyType(
    {
        "boolq": 3270,
        "rte": 277,
        "hellaswag": 10042,
        "winogrande": 1267,
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "openbookqa": 500,
        "mmlu": 14042,
        "gpqa_main_n_shot": 448,
        "medmcqa": 4183,
        "summarize:xsum": 11334,
        "summarize:cnn_dailymail": 11490,
        "summarize:multi_news": 5622,
        "summarize:gov_report": 973,
    }
)
"""Items of the split that is scored, of the tasks in ``catalogue.py``."""
_OTHER = {"perplexity": 100, "summarize": 100, "lm-eval": 1000}
"""Items of any other task without a limit."""
_TOKENS = 400
"""Tokens of an lm-eval item with its choices."""
_DOCUMENT = 1024
"""Tokens of a document to summarise."""
_DECODED = 8
"""A token that is decoded alone costs as much as so many of a prompt."""
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(b|m)(?![a-z0-9])", re.IGNORECASE)


def rough_items(cell: Cell) -> int:
    """Items that the cell measures; a limit holds for every subject of ``mmlu``."""
    known, limit = ITEMS.get(cell.task, _OTHER[split(cell.task)[0]]), cell.options.limit
    if limit is None:
        return known
    limit *= len(MMLU_SUBJECTS) if cell.task == "mmlu" else 1
    return min(limit, known) if cell.task in ITEMS else limit


def rough_tokens(cell: Cell) -> float:
    """Tokens that a cell runs, in units of what a prompt token costs."""
    kind, options, items = split(cell.task)[0], cell.options, rough_items(cell)
    if kind == "perplexity":
        return items * (options.prompt_tokens + options.scored_tokens)
    if kind == "summarize":
        return items * (_DOCUMENT + _DECODED * options.max_output)
    shots = FEWSHOT.get(cell.task, 0) if options.num_fewshot is None else options.num_fewshot
    return items * _TOKENS * (1 + shots)


def named_weights(model: str) -> int | None:
    """Weights by the model's name: 8 billion for ``Llama-3.1-8B``; None without a size in it."""
    found = _SIZE.findall(model.rstrip("/").rpartition("/")[2])
    if not found:
        return None
    number, unit = found[-1]
    return int(float(number) * (10**9 if unit in "bB" else 10**6))
