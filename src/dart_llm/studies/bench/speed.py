"""``bench speed``: every row in interleaved repetitions; what is finished is not repeated."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dart_llm.experiments.study import Unit
from dart_llm.experiments.timing import (
    WARM,
    Sample,
    cache_bytes,
    prefill,
    prompt_ids,
    read_bandwidth,
)
from dart_llm.files import file_sha256
from dart_llm.models.describe import describe
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import TOKEN_RULES
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.words import TRANSFORMERS
from dart_llm.session.run import Run
from dart_llm.studies.bench import report
from dart_llm.studies.bench.candidates import Candidate, native_dense, speed_grid
from dart_llm.studies.bench.models import load_formats
from dart_llm.studies.bench.rows import speed_document
from dart_llm.studies.bench.settings import SpeedSettings, is_file
from dart_llm.studies.bench.study import BenchStudy

CACHE_BYTES = 2
"""Bytes of a number in llama.cpp's key-value cache, float16."""


class SpeedStudy(BenchStudy[SpeedSettings]):
    """A unit is a repetition: ``samples`` by label, ``order``, ``process``, ``read_bandwidth``.

    ``bandwidth_mib``: size of the buffer by which the read bandwidth is measured.  Raises
    ``ConfigError`` and ``UnknownName`` before the model is loaded where that is possible.
    """

    kind = "speed"
    document = "speed.json"

    def __init__(self, settings: SpeedSettings, ui: Ui, bandwidth_mib: int = 512) -> None:
        super().__init__(settings, ui, speed_grid(settings, "", ""), {})
        self.bandwidth_mib = bandwidth_mib
        self.long_prompt = settings.prefill
        self.ids = torch.empty(0)
        """The prompt, [1, P]."""
        self.candidates: list[Candidate] = []
        """What this model and this machine can run, in the order of the rows."""
        self.bases: dict[str, str] = {}
        """Labels of dense (native) by format; transformers where it cannot run."""

    @property
    def notes(self) -> list[str]:
        """Why rows are missing, and which rows no kernel serves."""
        slow = [
            one.label
            for one in self.candidates
            if one.config and one.config.token is not None
            if not TOKEN_RULES.get(one.config.token.rule).native
        ]
        served = f"{'; '.join(slow)}: plain PyTorch under any executor, all neurons computed; for "
        notes = report.left_out(self.left_out)
        return [*notes, f"{served}quality at equal bytes, not for speed"] if slow else notes

    def inputs(self) -> Mapping[str, Any]:
        settings = self.settings
        formats = settings.format_list()
        paths = [Path(weights) for weights in formats if is_file(weights)]
        paths += [Path(name).expanduser() for name in settings.reference_file or ()]
        files = {f"file {path}": file_sha256(path) for path in dict.fromkeys(paths)}
        if settings.shape is not None:
            return {"shape": hashlib.sha256(Path(settings.shape).read_bytes()).hexdigest(), **files}
        single = settings.weights if len(formats) < 2 and not paths else "dense"
        return {**self.digests("speed", single), **files}

    def load(self) -> None:
        """Models and prompt; raises ``ConfigError`` for one longer than the model's context."""
        settings, began = self.settings, time.perf_counter()
        models = load_formats(settings, self.ui)
        requested = [name for name, loaded in models.items() if loaded.requested]
        self.main = "dense" if "dense" in requested else requested[0]
        tokens = max(settings.prompt_tokens + settings.tokens + WARM, settings.prefill)
        self.take_models(models, self.main, tokens)
        if self.bench:
            self.find_files([Path(name).expanduser() for name in settings.reference_file or ()])
        self.timing["load_s"] = time.perf_counter() - began
        self.ids = prompt_ids(self.model, self.tokenizer, settings.prompt_tokens, settings.seed)

    # rows

    def find_candidates(self) -> None:
        """The untouched model, the best dense (native), and all methods that can run.

        Ours in every format that was requested; llama.cpp after all.
        """
        dense = [name for name, loaded in self.models.items() if not loaded.blocks]
        self.candidates = [Candidate(TRANSFORMERS, weights=(dense or list(self.models))[0])]
        self.makers[TRANSFORMERS] = lambda: None
        device = torch.device(self.model.device).type
        requested = {name: one for name, one in self.models.items() if one.requested}
        for name, loaded in requested.items():
            suffix = f", {name if loaded.blocks else loaded.dtype}" if len(requested) > 1 else ""
            native = (c for c in native_dense(name, suffix, device) if self.make_ready(c))
            best = [c for c in (next(native, None),) if c is not None]
            self.bases[name] = best[0].label if best else TRANSFORMERS
            methods = speed_grid(self.settings, name, suffix)
            self.candidates += best + [c for c in methods if self.make_ready(c)]
        self.candidates += self.reference_candidates()

    def units(self) -> Iterator[Unit]:
        self.find_candidates()
        for note in self.notes:
            self.ui.say(f"note: {note}")
        yield from self.timed_units(self.candidates, warm_up=self.settings.warmup)

    def compute(self, unit: Unit) -> dict[str, Any]:
        speed = read_bandwidth(torch.device(self.model.device), self.bandwidth_mib)
        return {**self.repetition(unit.data, self.settings.tokens), "read_bandwidth": speed}

    def take(self, unit: Unit, value: Any) -> None:
        super().take(unit, value)
        self.repetitions.append(value)

    def prompt(self, number: int) -> Tensor:
        return self.ids

    def time(self, candidate: Candidate, tokens: int, number: int) -> Sample:
        sample = super().time(candidate, tokens, number)
        if self.long_prompt and candidate.method is None and candidate.file is None:
            loaded = self.models[candidate.weights]
            ids = prompt_ids(loaded.model, loaded.tokenizer, self.long_prompt, self.settings.seed)
            sample["prefill_s"] = prefill(loaded.model, ids, self.makers[candidate.label])
        return sample

    # what is made of them

    def summarise(self) -> dict[str, Any]:
        speeds = [one["read_bandwidth"] for one in self.repetitions]
        facts = self.facts()
        for name, one in facts["formats"].items():
            one |= {"base": self.bases.get(name), "weights": self._sizes(self.models[name].model)}
        kinds = {self.models[name].kind: name for name in self.bases}
        cache = facts["formats"][self.main]["weights"]["cache_bytes_per_position"]
        position = cache * CACHE_BYTES / self.model.dtype.itemsize
        facts |= {
            "notes": self.notes,
            "reference": {
                label: {
                    "file": file.path.name,
                    "bytes": file.bytes,
                    "format": kinds.get(file.kind),
                    "cache_bytes_per_position": position,
                }
                for label, file in self.files.items()
            },
            "prefill_tokens": self.settings.prefill or None,
            "processes": len({one["process"] for one in self.repetitions}),
            "base": self.bases[self.main],
            "read_bandwidth": {
                "bytes_per_second": statistics.median(speeds),
                "repetitions": speeds,
            },
            "orders": [one["order"] for one in self.repetitions],
        }
        samples = {one.label: self.samples(one.label) for one in self.candidates}
        return speed_document(self.candidates, samples, facts)

    def _sizes(self, model: Any) -> dict[str, float]:
        share = Run(model, PruneConfig.build("dense")).report().ffn_share_of_bytes
        weights = describe(model).parameter_bytes
        sizes = {
            "ffn_bytes": share * weights,
            "weight_bytes": weights,
            "cache_bytes_per_position": cache_bytes(model, self.ids),
        }
        if any(one.config and one.config.screens for one in self.grid):
            sizes["head_bytes"] = model.get_output_embeddings().weight.nbytes
        return sizes

    def sentences(self) -> Sequence[str]:
        return [*report.speed_sentences(self.summary), *self.summary["notes"]]

    def markdown(self) -> str:
        return report.markdown("Speed", self.sentences(), *self.tables())

    def figures(self) -> Iterable[Plot]:
        return [report.speed_plot(self.summary)]

    def last_line(self) -> dict[str, Any]:
        """What ends the output without ``--json``: each row in a few numbers."""
        rows = [report.brief(row) for row in self.summary["rows"]]
        return {"folder": str(self.path), "model": self.summary["model"], "rows": rows}
