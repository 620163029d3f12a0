"""One cell of a drift study, computed: its finished part, and its file of masks."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dart_llm import drift_forced, drift_free
from dart_llm.arch import context_length, widths
from dart_llm.candidate import Candidate
from dart_llm.drift_forced import Reading, TimedRun
from dart_llm.drift_free import Asking
from dart_llm.drift_grid import DriftCell, Source
from dart_llm.drift_record import DriftRecorder, record, write_masks
from dart_llm.errors import DartError
from dart_llm.loading import checkpoint_facts
from dart_llm.prepare import prepare
from dart_llm.results import finite
from dart_llm.session import Run
from dart_llm.settings_drift import FORCED, DriftSettings

Part = dict[str, Any]
"""``topics``, ``prompt_tokens``, ``decoded_tokens``, ``finish``, ``checks``, ``remasks``,
``dense_from``, ``accounting``, ``text``, ``pieces``, ``losses`` and ``seconds``; JSON-able."""


@dataclass
class Bench:
    """The loaded model with all sources as tokens; pruned forms of it are made once."""

    settings: DriftSettings
    model: Any
    tokenizer: Any
    say: Callable[[str], None]
    ready: dict[str, Reading | Asking] = field(default_factory=dict)
    candidates: dict[str, Candidate | DartError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.widths = widths(self.model)

    def take(self, source: Source) -> Reading | Asking:
        """The source as tokens; raises ``ConfigError`` when it does not fit model or settings."""
        if source.id not in self.ready:
            settings, longest = self.settings, context_length(self.model)
            if settings.kind == FORCED:
                self.ready[source.id] = drift_forced.read(
                    source, self.tokenizer, settings.prompt_tokens, longest
                )
            else:
                self.ready[source.id] = drift_free.ask(
                    source, self.tokenizer, settings.chat, settings.generation, longest
                )
        return self.ready[source.id]

    def candidate(self, cell: DriftCell) -> Candidate:
        """The model as the cell prunes it, calibrated or quantised where the method is.

        Raises the ``DartError`` that making it gave, at once when it was tried before.
        """
        config = cell.config()
        key = json.dumps(None if config is None else config.to_dict(), sort_keys=True)
        if key not in self.candidates:
            settings = self.settings
            try:
                self.candidates[key] = prepare(
                    self.model,
                    self.tokenizer,
                    config,
                    settings.calibration,
                    settings.cache_dir,
                    self.say,
                )
            except DartError as error:
                self.candidates[key] = error
        found = self.candidates[key]
        if isinstance(found, DartError):
            raise found
        return found


def compute(cell: DriftCell, bench: Bench, masks: Path) -> Part:
    """The cell's part; ``masks``: the folder for files of masks.

    Raises ``DartError`` for what the method or the model cannot do, a number that is not finite
    among it, and ``ResultsError`` when the masks cannot be written.
    """
    began = time.perf_counter()
    source, candidate = bench.take(cell.source), bench.candidate(cell)
    run, recorder = _run(cell, candidate, source), DriftRecorder()
    if run is not None:
        run.on_selection = recorder
    with run if run is not None else nullcontext():
        if isinstance(source, Reading):
            part = _read(candidate, run, source)
        else:
            part = _write(cell, bench.settings, candidate, run, source)
    kept: Part = {"checks": [], "remasks": [], "dense_from": None, "accounting": None}
    if run is not None:
        kept = record(run, recorder, bench.widths)
        name = str(checkpoint_facts(bench.model).get("name"))
        write_masks(masks / cell.file, recorder, name, cell.method.label)
    seconds = time.perf_counter() - began
    return dict(json.loads(json.dumps(finite({**part, **kept, "seconds": seconds}))))


def _run(cell: DriftCell, candidate: Candidate, source: Reading | Asking) -> Run | None:
    method = cell.method
    if method.observed is None or method.moment is None or not isinstance(source, Reading):
        return candidate.run()
    due = drift_forced.triggers(source, method.observed, method.moment)
    return candidate.run(make=functools.partial(TimedRun, triggers=due))


def _read(candidate: Candidate, run: Run | None, reading: Reading) -> Part:
    topics = zip(reading.source.topics, reading.starts, strict=True)
    return {
        "topics": [{"name": t.name, "domain": t.domain, "start": start} for t, start in topics],
        "prompt_tokens": reading.prompt,
        "decoded_tokens": reading.decoded,
        "finish": "length" if reading.cut else "end",
        "text": None,
        "pieces": list(reading.pieces),
        "losses": drift_forced.losses(candidate.model, run, reading),
    }


def _write(
    cell: DriftCell,
    settings: DriftSettings,
    candidate: Candidate,
    run: Run | None,
    asking: Asking,
) -> Part:
    made = drift_free.write(
        candidate.model,
        candidate.tokenizer,
        asking,
        settings.generation,
        run,
        settings.temperature,
        cell.seed,
    )
    topics = asking.source.topics
    return {
        "topics": [{"name": t.name, "domain": t.domain, "start": None} for t in topics],
        "prompt_tokens": asking.ids.shape[1],
        "decoded_tokens": len(made.pieces),
        "finish": "eos" if made.ended else "length",
        "text": made.text,
        "pieces": list(made.pieces),
        "losses": None,
    }
