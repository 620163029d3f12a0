"""The job of ``dart-llm bench speed``: one model, then tables and a plot; resumable."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dart_llm import native_build, speed_plot, speed_table
from dart_llm.arch import context_length, describe
from dart_llm.calibration_text import check_disjoint
from dart_llm.cell import Cell
from dart_llm.cell_inputs import Digests
from dart_llm.checkpoint import checkpoint_facts
from dart_llm.config import PruneConfig
from dart_llm.errors import ConfigError
from dart_llm.job_common import config_document
from dart_llm.job_ending import complete, kept, leave, write_plots
from dart_llm.results import ResultsFolder, open_folder, write_json, write_lines
from dart_llm.session import Run
from dart_llm.settings_speed import SpeedSettings
from dart_llm.speed_limit import WARM
from dart_llm.speed_model import prepare_model, prompt_ids
from dart_llm.speed_study import Plan, Study, bytes_of_position
from dart_llm.speed_summary import summarise
from dart_llm.ui import Ui


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
    keeping = kept(job, lambda status: _leave(job, status), settings.name, settings.dtype)
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
        "kernels": native_build.kernels_in_use() if native else None,
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
    speed_table.write(job.path, job.found)
    for table in speed_table.rich_tables(job.found):
        job.ui.table(table)
    for line in (*speed_table.sentences(job.found), *job.found["notes"]):
        job.ui.say(line)
    write_plots(job, speed_plot.make(job.found))
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
