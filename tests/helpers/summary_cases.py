"""What the tests of ``summarize`` share: four documents and a tiny model to summarise them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dart_llm.evaluation.measurement import Measurement, MeasureOptions
from dart_llm.evaluation.summarization import measure
from dart_llm.models.loading import load
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.prepare import MemoryStore as Memory
from dart_llm.session.prepare import PreparedMethod as Candidate
from tiny_gpt2 import make_talk, write_gpt2

DOCUMENTS = [
    {"document": f"the {what} went to the market. " * 6, "summary": f"a {what} shops.", "id": what}
    for what in ("cat", "dog", "duck", "pig")
]
OPTIONS = MeasureOptions(max_output=12)

Both = tuple[Any, Any]
"""A model and its tokenizer."""


class Kept(Memory):
    """Parts that go through JSON, as those in a file do."""

    def save_part(self, key: str, value: Any) -> None:
        super().save_part(key, json.loads(json.dumps(value, allow_nan=False)))


def write_documents(path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS), encoding="utf-8")
    return str(path)


def load_writer(folder: Path) -> Both:
    model, tokenizer = load(write_gpt2(folder), dtype="float32")
    make_talk(model, tokenizer)
    return model, tokenizer


def candidate(
    both: Both, method: str | None = None, sparsity: float = 0.5, **settings
) -> Candidate:
    if method is None:
        return Candidate(*both, None)
    return Candidate(*both, PruneConfig.build(method, sparsity=sparsity, **settings))


def run(
    found: Candidate, data: str, options: MeasureOptions = OPTIONS, parts: Memory | None = None
) -> Measurement:
    return measure(found, data, options, Kept() if parts is None else parts, lambda n: None)


def texts_of(measured: Measurement) -> list[str]:
    return [sample["text"] for sample in measured.samples]
