"""The main job: generate dense and pruned, evaluate, write the results folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dart_llm import job_prompt, ppl_texts
from dart_llm.arch import context_length
from dart_llm.config import PruneConfig
from dart_llm.devices import memory_failure
from dart_llm.errors import ConfigError, DartError, MissingExtra, ResultsError
from dart_llm.job_generate import generate_texts
from dart_llm.job_state import Job
from dart_llm.loading import checkpoint_facts, load
from dart_llm.outputs import read_masks, timing_text
from dart_llm.perplexity import slices
from dart_llm.ppl_rows import rows_to_dict, score_row
from dart_llm.provenance import git_state, machine, peak_memory_bytes, versions
from dart_llm.results import (
    SCHEMA,
    now,
    open_folder,
    write_json,
    write_text,
)
from dart_llm.settings import RunSettings
from dart_llm.tables import conclusion, perplexity_table, report_table
from dart_llm.ui import Ui


def run_job(
    settings: RunSettings, ui: Ui, fresh: bool = False, also: Sequence[PruneConfig] = ()
) -> Job:
    """Run everything that ``settings`` ask for; returns the finished job.

    An interruption or an error keeps what was computed and is raised again.
    """
    texts = ppl_texts.names(settings.ppl_datasets) if settings.eval_perplexity else []
    prompt = job_prompt.source(settings)
    masks = read_masks(settings.masks) if settings.masks else None
    inputs = _digests(settings, prompt, texts)
    folder = open_folder(
        Path(settings.results_dir), settings.experiment, _identity(settings, also, inputs), fresh
    )
    job = Job(settings, ui, folder, also, inputs)
    if folder.resumed:
        ui.say(f"resuming {folder.path}")
    started = time.perf_counter()
    _write_config(job, "running")
    try:
        _load(job)
        _write_config(job, "running")
        if settings.tokens:
            generate_texts(job, prompt, masks)
        for text in texts:
            _perplexity(job, text, masks)
        job.timing["total_s"] = time.perf_counter() - started
        job.timing["peak_memory_bytes"] = peak_memory_bytes()
        _finish(job)
    except BaseException as error:
        _keep(job, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        memory = memory_failure(error, settings.model, settings.dtype or "the checkpoint's dtype")
        if memory is not None and not isinstance(error, DartError):
            raise memory from None
        raise
    return job


def _keep(job: Job, status: str) -> None:
    """Leave what there is in order; a disk that is full must not hide the first error."""
    with contextlib.suppress(ResultsError):
        _write_config(job, status)
        _write_logs(job)


def _digests(settings: RunSettings, prompt: str, texts: Sequence[str]) -> dict[str, str]:
    """sha256 of what the settings only point at: files that change, and standard input."""
    found = {"prompt": prompt.encode("utf-8", "surrogatepass")} if prompt else {}
    if settings.masks:
        found["masks"] = Path(settings.masks).read_bytes()
    if settings.layer_topk and settings.layer_topk.startswith("@"):
        found["layer_topk"] = str(settings.prune_config().budget.table).encode()
    for name in texts:
        if name not in ppl_texts.KNOWN:
            found[f"text {name}"] = ppl_texts.read(name).encode()
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def _identity(
    settings: RunSettings, also: Sequence[PruneConfig], inputs: dict[str, str]
) -> dict[str, Any]:
    """What makes two runs the same run."""
    data = {**settings.model_dump(mode="json"), "inputs": inputs}
    if also:
        data["also"] = [config.to_dict() for config in also]
    return data


def _write_config(job: Job, status: str) -> None:
    done = status in ("complete", "interrupted", "failed")
    device = None if job.model is None else str(job.model.device)
    previous = job.config
    job.config = {
        "schema": SCHEMA,
        "status": status,
        "settings": _identity(job.settings, job.also, job.inputs),
        "prune": job.settings.prune_config().to_dict(),
        "command": sys.argv,
        "process": os.getpid(),
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
        "machine": machine(device),
        "checkpoint": None if job.model is None else dict(checkpoint_facts(job.model)),
        "seed": job.settings.seed,
        "started": previous.get("started", now().isoformat()),
        "finished": now().isoformat() if done else None,
    }
    write_json(job.path / "config.json", job.config)


def _load(job: Job) -> None:
    settings = job.settings
    begin = time.perf_counter()
    with job.ui.status(f"loading {settings.model}") as news:
        job.model, job.tokenizer = load(
            settings.model,
            dtype=settings.dtype,
            device=settings.device or (None if settings.device_map else "auto"),
            device_map=settings.device_map,
            revision=settings.revision,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
            cache_dir=settings.cache_dir,
            progress=news,
        )
    job.timing["load_s"] = time.perf_counter() - begin
    facts = checkpoint_facts(job.model)
    job.ui.say(
        f"{facts.get('name')}: file quantisation {facts.get('file_quantisation') or 'none'}, "
        f"dtype {facts.get('dtype')}, device {job.model.device}"
    )


def _perplexity(job: Job, text: str, masks: dict[int, Tensor] | None) -> None:
    settings = job.settings
    content = ppl_texts.read(text, settings.ppl_subjects)
    ids = job.tokenizer(content, return_tensors="pt", verbose=False).input_ids[0]
    prompt, scored = settings.ppl_prompt_tokens, settings.ppl_scored_tokens
    windows = slices(ids, settings.ppl_max_samples, prompt, scored)
    limit = context_length(job.model)
    if limit and prompt + scored > limit:
        raise ConfigError(
            f"a perplexity slice of {prompt} prompt + {scored} scored tokens is longer than the "
            f"model's context of {limit}: give fewer --ppl-prompt-tokens or --ppl-scored-tokens"
        )
    own = settings.prune_config()
    configs: list[PruneConfig | None] = [None, *job.also]
    configs += [] if own.method == "dense" else [own]
    rows = []
    with job.ui.progress(f"perplexity on {text}", len(windows) * len(configs)) as advance:
        for config in configs:
            given = masks if config is own else None
            rows.append(
                score_row(job.model, config, windows, prompt, job.folder, text, advance, given)
            )
    job.perplexity.append(rows_to_dict(rows, text, prompt, scored))
    document = job.perplexity[0] if len(job.perplexity) == 1 else {"texts": job.perplexity}
    write_json(job.path / "perplexity.json", document)


def _finish(job: Job) -> None:
    write_json(job.path / "timing.json", job.timing)
    accounting = job.generations.get("pruned", {}).get("accounting")
    if accounting:
        job.ui.table(report_table(accounting, job.timing))
    for document in job.perplexity:
        job.ui.table(perplexity_table(document))
    for sentence in conclusion(accounting, job.perplexity):
        job.ui.say(sentence)
    _write_config(job, "complete")
    _write_pages(job)
    _write_logs(job)
    job.folder.finish()
    job.ui.say(f"results: {job.path}")


def _write_pages(job: Job) -> None:
    from dart_llm import plots, report

    try:
        plots.write_all(job.path)
    except MissingExtra as error:
        job.ui.say(f"no plots: {error}")
    job.ui.say(f"report: {report.write(job.path)}")


def _write_logs(job: Job) -> None:
    write_text(job.path / f"output_{job.folder.stamp}.log", "\n".join(job.ui.log) + "\n")
    write_text(job.path / f"timing_{job.folder.stamp}.log", timing_text(job.timing))
