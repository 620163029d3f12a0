"""`bench speed`: interleaved repetitions, resumable.

Every row of ``dart-llm bench speed``, interleaved; whole repetitions are what is resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dart_llm.data.documents import check_disjoint
from dart_llm.errors import ConfigError, DartError
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultsFolder, open_folder
from dart_llm.experiments.study import complete, config_document, leave, resumable, write_plots
from dart_llm.files import write_json, write_lines
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length, describe
from dart_llm.native import build
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import LayerMask
from dart_llm.reporting.console import ProgressLog, Ui
from dart_llm.session.prepare import UnitStore, prepare
from dart_llm.session.run import Run
from dart_llm.studies.speed import summary
from dart_llm.studies.speed.cases import OWN, TRANSFORMERS, Case, Variant, cost_cases, dense_cases
from dart_llm.studies.speed.model import cache_bytes, prepare_model, prompt_ids
from dart_llm.studies.speed.settings import SpeedSettings
from dart_llm.studies.speed.summary import WARM, summarise
from dart_llm.studies.speed.timing import Sample, paired_timing, read_bandwidth, repetition

WARMUP_TOKENS = 4
"""Timed tokens of a warm-up, whose times nobody reads."""


@dataclass(frozen=True)
class Plan:
    """What is measured.  ``cases``: methods; dense rows and costs are added to them."""

    cases: tuple[Case, ...]
    variants: tuple[Variant, ...]
    sparsities: tuple[float, ...]
    executors: tuple[str, ...]
    tokens: int
    repeats: int
    seed: int
    warmup: bool = True
    costs: bool = True
    calibration: str | None = None
    cache_dir: str | None = None
    bandwidth_mib: int = 512


@dataclass(frozen=True)
class Ready:
    """A case that this model and this machine can run; ``make`` gives a run, not attached."""

    case: Case
    make: Callable[[], Run | None]


@dataclass
class Study:
    """One loaded model.  ``ids``: the prompt, [1, P]."""

    model: Any
    tokenizer: Any
    plan: Plan
    ids: Tensor
    parts: UnitStore
    ui: Ui
    ready: list[Ready] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Labels by the reason why they cannot run."""
    repetitions: list[dict[str, Any]] = field(default_factory=list)
    """``samples`` by label, ``order``, ``sitting`` and ``read_bandwidth`` of each repetition."""
    sitting: str = field(default_factory=lambda: f"{os.getpid()} {time.time_ns()}")
    """Tells the repetitions of one process from those of others."""

    def run(self) -> None:
        """Measure everything that can run; raises what the untouched model raises."""
        self.ready = self._find()
        for line in self.sentences():
            self.ui.say(f"note: {line}")
        todo = [n for n in range(self.plan.repeats) if self.parts.part(_key(n)) is None]
        warm = len(self.ready) if todo and self.plan.warmup else 0
        total = warm + self.plan.repeats * len(self.ready)
        news = ProgressLog(self.ui.say if not self.ui.live else lambda text: None, total, "runs")
        with self.ui.progress("decoding", total, told=True) as advance:

            def done() -> None:
                news.done()
                advance(1)

            for one in self.ready[:warm]:
                repetition(self.model, self.ids, WARMUP_TOKENS, one.make)
                done()
            for number in range(self.plan.repeats):
                self.repetitions.append(self._repeat(number, done))

    def _repeat(self, number: int, done: Callable[[], None]) -> dict[str, Any]:
        known = self.parts.part(_key(number))
        if known is not None:
            for _ in self.ready:
                done()
            return dict(known)
        samples: dict[str, Sample] = {}
        order = shuffled([one.case.label for one in self.ready], self.plan.seed, number)
        by_label = {one.case.label: one for one in self.ready}
        found: dict[str, Any] = {
            "order": order,
            "sitting": self.sitting,
            "read_bandwidth": read_bandwidth(
                torch.device(self.model.device), self.plan.bandwidth_mib
            ),
        }
        for label in order:
            samples[label] = self._sample(by_label[label], by_label)
            done()
        found["samples"] = samples
        self.parts.save_part(_key(number), found)
        return found

    def _sample(self, one: Ready, by_label: Mapping[str, Ready]) -> Sample:
        tokens, against = self.plan.tokens, one.case.against
        if against in by_label:
            return paired_timing(self.model, self.ids, tokens, one.make, by_label[against].make)
        return repetition(self.model, self.ids, tokens, one.make)

    @property
    def own(self) -> str:
        """Label of our own dense path; the untouched model's where there is none."""
        labels = [one.case.label for one in self.ready]
        return next((label for label in OWN if label in labels), TRANSFORMERS)

    def _find(self) -> list[Ready]:
        plain, *candidates = dense_cases()
        found = [Ready(plain, lambda: None)]
        for case in candidates:
            if case.executor == "graph" and torch.device(self.model.device).type != "cuda":
                break  # graphs are recorded on a GPU alone
            one = self._ready(case)
            if one is not None:
                found.append(one)
                break  # the others are slower
        own = found[-1].case.label
        methods = [one for one in map(self._ready, self.plan.cases) if one is not None]
        found += methods
        if self.plan.costs and methods:
            first, sparsity = self.plan.variants[0], self.plan.sparsities[0]
            wanted = {one.case.executor for one in methods}
            executors = [name for name in self.plan.executors if name in wanted]
            costs = cost_cases(first, sparsity, own, executors, self.plan.tokens)
            found += [one for one in map(self._ready, costs) if one is not None]
        return found

    def _ready(self, case: Case) -> Ready | None:
        """None, with the reason kept, for what cannot run."""
        assert case.config is not None
        try:
            return Ready(case, self._maker(case, case.config))
        except DartError as error:
            self.left_out.setdefault(str(error), []).append(case.label)
            return None

    def _maker(self, case: Case, config: PruneConfig) -> Callable[[], Run | None]:
        if case.whole:
            Run(self.model, config, held=everything(self.model))  # raises for what cannot run
            return lambda: Run(self.model, config, held=everything(self.model))
        if config.calibration is None:
            Run(self.model, config)  # before anything is learnt for it
        plan = self.plan
        candidate = prepare(
            self.model, self.tokenizer, config, plan.calibration, plan.cache_dir, self.ui.say
        )
        candidate.run()
        return candidate.run

    def sentences(self) -> list[str]:
        """One sentence per reason why rows are missing."""
        found = []
        for reason, labels in self.left_out.items():
            verb = "is" if len(labels) == 1 else "are"
            found.append(f"{'; '.join(labels)} {verb} left out: {reason}")
        return found


def _key(number: int) -> str:
    return f"repetition {number}"


def shuffled(labels: Sequence[str], seed: int, number: int) -> list[str]:
    """The order of repetition ``number``: it follows from the seed and the number alone."""
    return random.Random(f"{seed} {number}").sample(list(labels), len(labels))


def everything(model: Any) -> tuple[LayerMask, ...]:
    """Masks that keep every neuron."""
    return tuple(
        LayerMask(torch.arange(layer.width, device=layer.device), layer.width)
        for layer in describe(model).weights("output", 0)
    )


@torch.inference_mode()
def bytes_of_position(model: Any, ids: Tensor) -> float:
    """Bytes of keys and values of one position."""
    return cache_bytes(model(ids, use_cache=True, logits_to_keep=1).cache)


# The job of ``dart-llm bench speed``: one model, then tables and a plot; resumable.


@dataclass
class SpeedJob:
    """One job in progress; ``found`` is speed.json."""

    settings: SpeedSettings
    ui: Ui
    folder: ResultsFolder
    plan: Plan
    identity: dict[str, Any]
    model: Any = None
    study: Study | None = None
    config: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder.path


def run_speed(
    settings: SpeedSettings, ui: Ui, fresh: bool = False, bandwidth_mib: int = 512
) -> SpeedJob:
    """Measure every row; an interruption or an error keeps the repetitions that were finished.

    ``bandwidth_mib``: size of the buffer by which the read bandwidth is measured.  Raises
    ``ConfigError`` and ``UnknownName`` before the model is loaded where that is possible.
    """
    job = _open(settings, ui, fresh, bandwidth_mib)
    keeping = resumable(job, lambda status: _leave(job, status), settings.name, settings.dtype)
    with keeping as took, _threads(settings.threads):
        _write_config(job, "running")
        _measure(job)
        took()
        _finish(job)
    return job


def _leave(job: SpeedJob, status: str) -> None:
    finished = job.study is not None and bool(job.study.repetitions)
    leave(job, status, lambda status: _write_config(job, status), finished)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _open(settings: SpeedSettings, ui: Ui, fresh: bool, bandwidth_mib: int) -> SpeedJob:
    variants = settings.variant_list()
    if any(one.config.calibration is not None for one in variants):
        check_disjoint(settings.calibration, {})
    inputs: dict[str, Any] = {}
    if settings.shape is not None:
        inputs["shape"] = hashlib.sha256(Path(settings.shape).read_bytes()).hexdigest()
    else:
        cell = Cell(settings.model, "dense", "speed", calibration=settings.calibration)
        inputs |= Digests().of(cell)
    presets = {one.label: one.config.to_dict() for one in variants}
    asked = settings.model_dump(mode="json")
    identity = {"kind": "speed", **asked, "inputs": inputs, "presets": presets}
    folder = open_folder(Path(settings.results_dir), settings.experiment, identity, fresh)
    plan = Plan(
        settings.case_list(),
        variants,
        settings.sparsity_list(),
        settings.executor_list(),
        settings.tokens,
        settings.repeats,
        settings.seed,
        settings.warmup,
        settings.costs,
        settings.calibration,
        settings.cache_dir,
        bandwidth_mib,
    )
    return SpeedJob(settings, ui, folder, plan, identity)


def _measure(job: SpeedJob) -> None:
    settings, folder = job.settings, job.folder
    began = time.perf_counter()
    job.model, tokenizer = prepare_model(settings, job.ui)
    job.timing["load_s"] = time.perf_counter() - began
    _write_config(job, "running")
    longest, wanted = context_length(job.model), settings.prompt_tokens + settings.tokens + WARM
    if longest is not None and wanted > longest:
        raise ConfigError(
            f"{wanted} tokens are longer than the context of {settings.name}, {longest}: give "
            "fewer --prompt-tokens or --tokens"
        )
    ids = prompt_ids(job.model, tokenizer, settings.prompt_tokens, settings.seed)
    study = Study(job.model, tokenizer, job.plan, ids, folder, job.ui)
    job.study = study
    try:
        study.run()
    finally:
        write_lines(job.path / "results.jsonl", study.repetitions)
    job.found = summarise(
        [one.case for one in study.ready], study.own, study.repetitions, _about(job, study)
    )


def _about(job: SpeedJob, study: Study) -> dict[str, Any]:
    """What ``speed_summary.summarise`` is told beside the times."""
    settings = job.settings
    share = Run(job.model, PruneConfig.build("dense")).report().ffn_share_of_bytes
    weights = describe(job.model).parameter_bytes
    native = study.own in ("dense, slim", "dense, native")
    facts = {name: value for name, value in checkpoint_facts(job.model).items() if name != "path"}
    return {
        "model": settings.name,
        "checkpoint": facts,
        "prompt_tokens": settings.prompt_tokens,
        "tokens": settings.tokens,
        "repeats": settings.repeats,
        "seed": settings.seed,
        "kernels": build.kernels_in_use() if native else None,
        "machine": job.config["machine"],
        "versions": job.config["versions"],
        "weights": {
            "ffn_bytes": share * weights,
            "weight_bytes": weights,
            "cache_bytes_per_position": bytes_of_position(job.model, study.ids),
        },
        "variants": {one.label: one.config.to_dict() for one in job.plan.variants},
        "left_out": study.left_out,
        "notes": study.sentences(),
    }


def _write_config(job: SpeedJob, status: str) -> None:
    found = config_document("speed", job.identity, {}, job.model, status, job.config)
    found["cells"] = [
        {
            "model": job.settings.name,
            "method": one.label,
            "sparsity": sparsity,
            "task": "speed",
        }
        for one in job.plan.variants
        for sparsity in job.plan.sparsities
    ]
    job.config = found
    write_json(job.path / "config.json", found)


def _finish(job: SpeedJob) -> None:
    write_json(job.path / "speed.json", job.found)
    write_json(job.path / "timing.json", job.timing)
    summary.write(job.path, job.found)
    for table in summary.rich_tables(job.found):
        job.ui.table(table)
    for line in (*summary.sentences(job.found), *job.found["notes"]):
        job.ui.say(line)
    write_plots(job, summary.make(job.found))
    complete(job, lambda status: _write_config(job, status))


BRIEF = (
    "row",
    "tg_ms",
    "pp_tokens_per_second",
    "achieved_sparsity",
    "times_transformers",
    "times_own_dense",
    "limit",
    "share_of_limit",
)
"""What the last line holds of a row."""


def document(job: SpeedJob) -> dict[str, Any]:
    """What ``--json`` prints: speed.json with its folder, state of the source and times."""
    return {"folder": str(job.path), **job.found, "git": job.config["git"], "timing": job.timing}


def last_line(job: SpeedJob) -> dict[str, Any]:
    """What ends the output otherwise: where everything is, and each row in a few numbers."""
    rows = [{name: row[name] for name in BRIEF} for row in job.found["rows"]]
    return {"folder": str(job.path), "model": job.found["model"], "rows": rows}
