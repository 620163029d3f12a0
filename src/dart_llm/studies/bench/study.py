"""What both commands share: models by weight format, runs by candidate, interleaved repetitions.

A repetition runs every candidate once, in an order of its own: what drifts in a machine over
minutes then affects all of them alike.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dart_llm.data.documents import check_disjoint
from dart_llm.errors import ConfigError, DartError
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.llama_bench import (
    LLAMA_CPP,
    ReferenceFile,
    reference_repetition,
    require_bench,
)
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultLine
from dart_llm.experiments.study import Study, Unit
from dart_llm.experiments.timing import Make, Sample, full_masks, repetition, shuffled
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length
from dart_llm.native import build
from dart_llm.reporting.console import Ui
from dart_llm.reporting.table import Table
from dart_llm.session.prepare import prepare
from dart_llm.session.run import Run
from dart_llm.settings import LOADING
from dart_llm.studies.bench import report
from dart_llm.studies.bench.candidates import Candidate
from dart_llm.studies.bench.models import LoadedModel, gguf_path
from dart_llm.studies.bench.settings import SpeedSettings, TuneSettings

B = TypeVar("B", bound=SpeedSettings | TuneSettings)

WARMUP_TOKENS = 4
"""Timed tokens of a warm-up, whose times are not used."""


class BenchStudy(Study[B]):
    """Candidates, what makes their runs, and their repetitions.

    ``grid``: all rows that can be planned before a model is loaded: they make two runs the same.
    """

    def __init__(
        self, settings: B, ui: Ui, grid: Sequence[Candidate], texts: Mapping[str, None]
    ) -> None:
        super().__init__(settings, ui)
        self.grid = grid
        if any(one.config and one.config.calibration is not None for one in grid):
            check_disjoint(settings.calibration, texts)
        self.bench = require_bench() if settings.reference else ""
        """llama.cpp's own benchmark."""
        self.files: dict[str, ReferenceFile] = {}
        """What it reads, by label."""
        self.models: dict[str, LoadedModel] = {}
        """By the name of their weight format."""
        self.makers: dict[str, Make] = {}
        """What makes a candidate's run, by label."""
        self.left_out: dict[str, str] = {}
        """Why candidates cannot run, by label."""
        self.timed: list[Candidate] = []
        self.repetitions: list[dict[str, Any]] = []
        self.process = f"{os.getpid()} {time.time_ns()}"
        """Distinguishes the repetitions of one process from those of others."""
        self.advance: Callable[[int], Any]

    @property
    def model_name(self) -> str:
        return self.settings.name

    def digests(self, task: str, weights: str | None) -> dict[str, str]:
        """Of the model, of texts of the task and of the calibration."""
        settings = self.settings.model_copy(update={"weights": weights})
        loading = {name: getattr(settings, name) for name in LOADING}
        calibration = settings.calibration
        cell = Cell(settings.model, "dense", task, calibration=calibration, **loading)
        return Digests().of(cell)

    def requested(self) -> dict[str, Any]:
        left_out = {*self.shown, *self.settings.UNUSED, "save"}
        return self.settings.model_dump(mode="json", exclude=left_out)

    def identify(self) -> dict[str, Any]:
        configs = {one.label: one.config.to_dict() for one in self.grid if one.config}
        return {**super().identify(), "candidates": configs}

    def config_extra(self) -> dict[str, Any]:
        rows = dict.fromkeys((o.method or o.label, o.config and o.config.target) for o in self.grid)
        fixed = {"model": self.settings.name, "task": self.kind}
        return {"cells": [{**fixed, "method": name, "sparsity": target} for name, target in rows]}

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.settings.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def take_models(self, models: dict[str, LoadedModel], main: str, tokens: int) -> None:
        """The models, ``main`` being the one whose dense row is the base.

        Raises ``ConfigError`` where ``tokens`` are more than its context has.
        """
        self.models = models
        self.model, self.tokenizer = models[main].model, models[main].tokenizer
        longest = context_length(self.model)
        if longest is not None and tokens > longest:
            raise ConfigError(
                f"{tokens} tokens are longer than the context of {self.settings.name}, "
                f"{longest}: give fewer tokens, of the prompt or behind it"
            )

    def find_files(self, paths: Sequence[Path]) -> None:
        """GGUF files that llama.cpp reads, by the labels of their rows.

        ``paths``, else the model's own file and those of ``--weights``.  Raises ``ConfigError`` or
        ``LoadError``.
        """
        settings = self.settings
        if not paths:
            candidates = [one.file for one in self.models.values()]
            if self.tokenizer is not None:  # else the weights are random
                candidates.insert(0, gguf_path(settings.model, settings.cache_dir, self.ui.say))
            paths = [path for path in candidates if path]
        if not paths:
            raise ConfigError(
                f"{settings.name} is not a GGUF file, which {LLAMA_CPP} needs: give it, or "
                "--reference-file of bench speed"
            )
        files = [ReferenceFile.of(path) for path in dict.fromkeys(paths)]
        kinds = [file.kind for file in files]
        self.files = {
            f"{LLAMA_CPP} {file.kind if kinds.count(file.kind) == 1 else file.path.stem}": file
            for file in files
        }

    def reference_candidates(self) -> list[Candidate]:
        """The rows of llama.cpp."""
        files = self.files.items()
        return [Candidate(label, weights=file.kind, file=file.path) for label, file in files]

    def make_ready(self, candidate: Candidate) -> bool:
        """Whether the candidate can run; else the reason is kept."""
        try:
            self.makers[candidate.label] = self.maker(candidate)
        except DartError as error:
            self.left_out[candidate.label] = str(error)
            return False
        return True

    def maker(self, candidate: Candidate) -> Make:
        """What makes the candidate's run; raises ``DartError`` where it cannot run."""
        loaded, config = self.models[candidate.weights], candidate.config
        if config is None:
            return lambda: None
        if candidate.dense:  # native runs masks alone: here they keep everything
            whole = config.executor == "native"

            def make() -> Run:
                return Run(
                    loaded.model, config, fixed_masks=full_masks(loaded.model) if whole else None
                )

            make()
            return make
        if config.calibration is None:
            Run(loaded.model, config)  # refused before anything is learned for it
        where = (self.settings.calibration, self.settings.cache_dir, self.ui.say)
        prepared = prepare(loaded.model, loaded.tokenizer, config, *where)
        prepared.run()
        return prepared.run

    # repetitions

    def timed_units(
        self, candidates: Sequence[Candidate], kind: str = "repetition", warm_up: bool = True
    ) -> Iterator[Unit]:
        """Every repetition; before the first one that is not finished, all rows once to warm up."""
        self.timed = list(candidates)
        units = [Unit(f"{kind} {n}", data=n) for n in range(self.settings.repeats)]
        fresh = warm_up and any(self.finished(unit) is None for unit in units)
        warm = [one for one in candidates if fresh and one.file is None]
        total = len(warm) + len(units) * len(candidates)
        with self.ui.progress("decoding", total) as self.advance:
            for candidate in warm:
                self.time(candidate, WARMUP_TOKENS, 0)
                self.advance(1)
            for unit in units:
                if self.finished(unit) is not None:
                    self.advance(len(candidates))
                yield unit

    def repetition(self, number: int, tokens: int) -> dict[str, Any]:
        """``samples`` by label, ``order``, ``process``."""
        candidates, samples = {one.label: one for one in self.timed}, {}
        order = shuffled(list(candidates), self.settings.seed, number)
        for label in order:
            samples[label] = self.time(candidates[label], tokens, number)
            self.advance(1)
        return {"order": order, "process": self.process, "samples": samples}

    def time(self, candidate: Candidate, tokens: int, number: int) -> Sample:
        """One candidate in repetition ``number``."""
        if candidate.file is not None:
            sizes = self.settings.prompt_tokens, tokens, self.long_prompt
            threads = torch.get_num_threads()
            return reference_repetition(self.bench, candidate.file, threads, *sizes)
        model = self.models[candidate.weights].model
        return repetition(model, self.prompt(number), tokens, self.makers[candidate.label])

    long_prompt = 0
    """Tokens of the longer prompt whose first token is timed; 0: none."""

    def prompt(self, number: int) -> Tensor:
        """The prompt of repetition ``number``, [1, P]."""
        raise NotImplementedError

    def samples(self, label: str) -> list[Sample]:
        """All repetitions of a candidate."""
        return [one["samples"][label] for one in self.repetitions]

    # what is made of them

    def facts(self) -> dict[str, Any]:
        """What both documents begin with."""
        checkpoint = checkpoint_facts(self.model)
        return {
            "model": self.settings.name,
            "checkpoint": {name: v for name, v in checkpoint.items() if name != "path"},
            "kernels": None if build.why_not() else build.kernels_in_use(),
            "machine": self.config["machine"],
            "versions": self.config["versions"],
            "prompt_tokens": self.settings.prompt_tokens,
            "tokens": self.settings.tokens,
            "repeats": self.settings.repeats,
            "seed": self.settings.seed,
            "formats": {name: {"stored_as": one.stored_as} for name, one in self.models.items()},
            "left_out": self.left_out,
        }

    def result_lines(self) -> Sequence[ResultLine]:
        packed = {name: one.kind.lower() for name, one in self.models.items() if one.blocks}
        return report.result_lines(self.kind, self.summary, packed)

    def tables(self) -> Sequence[Table]:
        return [report.table(self.kind, self.summary)]
