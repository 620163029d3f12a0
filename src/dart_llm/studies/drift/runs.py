"""A run of a drift study: one method on one source (a prompt or a passage), and its record.

Rows, tables, plots and the page are made from the records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dart_llm.experiments.artifacts import MaskRecorder
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.records import DriftCheck
from dart_llm.session.run import Run
from dart_llm.studies.drift.settings import DENSE, FORCED, FREE, Candidate
from dart_llm.studies.drift.sources import Source

Record = Mapping[str, Any]

EMPTY: Record = {
    "topics": [],
    "prompt_tokens": None,
    "decoded_tokens": None,
    "finish": None,
    "pieces": None,
    "losses": None,
    "text": None,
    "checks": [],
    "remasks": [],
    "accounting": None,
    "metrics": None,
}
"""The keys of a record, with the values that a failed run has.

``pieces``: the text of every token after the prompt.  ``losses``: the loss of every token after the
prompt of a passage, in nats; None for the first, which the dense prompt predicts.  ``text``: the
text generated after a prompt.  ``accounting``: ``RunReport.to_dict()``; None for the untouched
model.
"""

SOURCES = {FORCED: "passage", FREE: "prompt"}
"""The name of a source in each mode."""


@dataclass(frozen=True)
class DriftRun:
    """A candidate (a method) on a source; ``number``: the run's index in the study.

    ``record``: the result, with the keys of ``EMPTY``.  ``error``: why the run failed; None if it
    succeeded.
    """

    mode: str
    source: Source
    candidate: Candidate
    seed: int
    number: int
    record: Record = field(default_factory=lambda: EMPTY, compare=False)
    error: str | None = None

    @property
    def label(self) -> str:
        return self.candidate.label

    @property
    def is_dense(self) -> bool:
        return self.candidate.name == DENSE

    @property
    def key(self) -> str:
        return f"{self.mode}/{self.source.id}/{self.label}/{self.seed}"

    @property
    def source_key(self) -> tuple[str, int]:
        """Source id and seed; a run is compared with the dense run that has the same key."""
        return self.source.id, self.seed

    @property
    def masks_file(self) -> str:
        """The run's mask file in the results folder."""
        return f"masks/{self.number:05d}.safetensors"

    @property
    def config(self) -> PruneConfig | None:
        """The pruning configuration; None for the untouched model."""
        config = self.candidate.config
        return None if config is None else config.replace({"seed": self.seed})

    def line(self, model: str, dtype: str | None) -> dict[str, Any]:
        """The run's line in results.jsonl."""
        return {
            "key": self.key,
            "status": "failed" if self.error else "done",
            "error": self.error,
            "label": self.label,
            "model": model,
            "dtype": dtype,
            "mode": self.mode,
            "source": self.source.id,
            "method": self.candidate.name,
            "sparsity": self.candidate.sparsity,
            "seed": self.seed,
            "masks": self.masks_file if self.record["accounting"] else None,
            **self.record,
        }

    @property
    def source_name(self) -> str:
        """A readable name, such as "passage 07", with the seed if it is not 0."""
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{SOURCES[self.mode]} {self.source.id}{seed}"

    @property
    def decoded(self) -> int:
        """The number of tokens after the prompt."""
        return int(self.record["decoded_tokens"])

    @property
    def topics(self) -> list[tuple[str, int, int]]:
        """Name, first decoded token and end (exclusive) of every topic whose start is known."""
        located = [topic for topic in self.record["topics"] if topic["start"] is not None]
        ends = [*(topic["start"] for topic in located[1:]), self.decoded]
        return [(t["name"], t["start"], end) for t, end in zip(located, ends, strict=False)]

    @property
    def checks(self) -> list[DriftCheck]:
        """The checks of the detector's windows, except windows without a reference."""
        checks = [DriftCheck(**check) for check in self.record["checks"]]
        return [c for c in checks if c.state != "arming" or c.similarity != 0]


# The record of a run: detector windows, masks, accounting.


def run_record(run: Run, recorder: MaskRecorder, widths: Sequence[int]) -> dict[str, Any]:
    """``checks``, ``remasks`` and ``accounting`` of a run of one sequence.

    ``widths``: neurons per layer.
    """
    accounting = run.report().to_dict()
    accounting.pop("sequences")
    return {
        "checks": [asdict(check) for check in run.drift_checks],
        "remasks": remask_records(recorder, widths),
        "accounting": accounting,
    }


def remask_records(recorder: MaskRecorder, widths: Sequence[int]) -> list[dict[str, Any]]:
    """An entry per mask: step, cause, kept neurons, evidence, and two overlaps per layer.

    ``jaccard``: the overlap with the previous mask.  ``first_jaccard``: the overlap with the first
    mask.  Both overlaps are None for the first mask and for per-token selection.  A layer without a
    mask keeps all its neurons.
    """
    entries: list[dict[str, Any]] = []
    masks: list[list[set[int]]] = []
    for number, remask in enumerate(recorder.remasks):
        ids = [recorder.tensors.get(f"remask{number}.layer{k}.ids") for k in range(len(widths))]
        pairs = zip(ids, widths, strict=True)
        masks.append([set(range(w) if kept is None else kept.tolist()) for kept, w in pairs])
        has_overlap = number > 0 and not recorder.per_token
        entries.append(
            {
                "step": remask.step,
                "cause": remask.cause,
                "kept": list(remask.kept),
                "evidence_tokens": remask.evidence_tokens,
                "jaccard": [*map(jaccard, masks[-2], masks[-1])] if has_overlap else None,
                "first_jaccard": [*map(jaccard, masks[0], masks[-1])] if has_overlap else None,
            }
        )
    return entries


def jaccard(a: set[int], b: set[int]) -> float:
    """The Jaccard index |A and B| / |A or B|; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 1.0
