"""What the tests of ``summarize`` share: four documents, parts as a file keeps them."""

import json

from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.parts import MemoryStore
from dart_llm.evaluation.summarization import measure
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import BoundMethod

DOCUMENTS = [
    {"document": f"the {what} went to the market. " * 6, "summary": f"a {what} shops.", "id": what}
    for what in ("cat", "dog", "duck", "pig")
]
OPTIONS = MeasureOptions(max_output=12)


class Kept(MemoryStore):
    """Parts that go through JSON, as those in a file do."""

    def save_part(self, key, value):
        super().save_part(key, json.loads(json.dumps(value, allow_nan=False)))


def write_documents(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or DOCUMENTS), encoding="utf-8")
    return str(path)


def candidate(both, method=None, sparsity=0.5, **settings):
    config = None if method is None else PruneConfig.build(method, sparsity=sparsity, **settings)
    return BoundMethod(*both, config)


def run(found, data, options=OPTIONS, parts=None):
    return measure(
        found, f"summarize:{data}", options, Kept() if parts is None else parts, lambda n: None
    )


def texts_of(measured):
    return [sample["text"] for sample in measured.samples]
