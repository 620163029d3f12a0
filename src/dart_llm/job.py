"""The main job: generate dense and pruned, evaluate, write the results folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dart_llm import job_eval, job_prompt, measure_rows, ppl_texts
from dart_llm.arch import context_length, widths
from dart_llm.candidate import Candidate
from dart_llm.cell_inputs import Digests
from dart_llm.config import PruneConfig
from dart_llm.errors import ConfigError, MissingExtra
from dart_llm.job_common import config_document, load_model, write_logs
from dart_llm.job_ending import complete, kept
from dart_llm.job_generate import generate_texts
from dart_llm.job_state import Job
from dart_llm.measurement import MeasureOptions
from dart_llm.outputs import check_masks, read_masks
from dart_llm.perplexity import slices
from dart_llm.ppl_rows import rows_to_dict, score_row
from dart_llm.prepare import prepare
from dart_llm.results import open_folder, write_json
from dart_llm.settings import RunSettings
from dart_llm.tables import conclusion, perplexity_table, report_table
from dart_llm.ui import Ui


def run_job(
    settings: RunSettings, ui: Ui, fresh: bool = False, also: Sequence[PruneConfig] = ()
) -> Job:
    """Run everything that ``settings`` ask for; returns the finished job.

    An interruption or an error keeps what was computed and is raised again.
    """
    texts = _texts(settings)
    evaluations = job_eval.asked(settings)
    prompt = job_prompt.source(settings)
    masks = read_masks(settings.masks) if settings.masks else None
    inputs = _inputs(settings, prompt, evaluations)
    folder = open_folder(
        Path(settings.results_dir), settings.experiment, _identity(settings, also, inputs), fresh
    )
    job = Job(settings, ui, folder, also, inputs)
    with kept(job, lambda status: _leave(job, status), settings.model, settings.dtype) as took:
        _write_config(job, "running")
        _load(job)
        _write_config(job, "running")
        own = _prepare(job, masks)
        if settings.tokens:
            generate_texts(job, prompt, own)
        dense = prepare(job.model, job.tokenizer, None)
        others = [Candidate(job.model, job.tokenizer, config) for config in also]
        candidates = [dense, *others, *([own] if own.label != "dense" else [])]
        for text in texts:
            _perplexity(job, text, candidates)
        for evaluation in evaluations:
            job_eval.evaluate(job, evaluation, candidates)
        took()
        _finish(job)
    return job


def _leave(job: Job, status: str) -> None:
    _write_config(job, status)
    write_logs(job.folder, job.ui.log, job.timing)


def _inputs(
    settings: RunSettings, prompt: str, evaluations: Sequence[job_eval.Evaluation]
) -> dict[str, Any]:
    """Digests of what the settings only point at: files that change, and standard input."""
    tasks = [(f"perplexity:{text}", MeasureOptions()) for text in _texts(settings)]
    tasks += [(task, one.options) for one in evaluations for task in one.tasks]
    found = Digests().of_settings(settings, tasks)
    if prompt:
        data = prompt.encode("utf-8", "surrogatepass")
        found["prompt"] = hashlib.sha256(data).hexdigest()
    return found


def _texts(settings: RunSettings) -> list[str]:
    return ppl_texts.names(settings.ppl_datasets) if settings.eval_perplexity else []


def _identity(
    settings: RunSettings, also: Sequence[PruneConfig], inputs: dict[str, Any]
) -> dict[str, Any]:
    """What makes two runs the same run."""
    data = {**settings.model_dump(mode="json"), "inputs": inputs}
    if also:
        data["also"] = [config.to_dict() for config in also]
    return data


def _write_config(job: Job, status: str) -> None:
    job.config = config_document(
        "run",
        _identity(job.settings, job.also, job.inputs),
        job.settings.prune_config().to_dict(),
        job.model,
        status,
        job.config,
    )
    write_json(job.path / "config.json", job.config)


def _load(job: Job) -> None:
    job.model, job.tokenizer, job.timing["load_s"] = load_model(job.settings, job.ui)


def _prepare(job: Job, masks: dict[int, Tensor] | None) -> Candidate:
    settings = job.settings
    if settings.masks:
        check_masks(settings.masks, widths(job.model))
    return prepare(
        job.model,
        job.tokenizer,
        settings.prune_config(),
        settings.calibration,
        settings.cache_dir,
        job.ui.say,
        masks=masks,
    )


def _perplexity(job: Job, text: str, candidates: Sequence[Candidate]) -> None:
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
    with job.ui.progress(f"perplexity on {text}", len(windows) * len(candidates)) as advance:
        rows = [score_row(c, windows, prompt, job.folder, text, advance) for c in candidates]
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
    for rows in job.evaluations.values():
        job.ui.table(measure_rows.table(rows))
        for note in measure_rows.notes(rows):
            job.ui.say(f"note: {note}")
    for sentence in conclusion(accounting, job.perplexity):
        job.ui.say(sentence)
    complete(job, lambda status: _write_config(job, status), lambda: _write_pages(job))


def _write_pages(job: Job) -> None:
    from dart_llm import plots, report

    try:
        plots.write_all(job.path)
    except MissingExtra as error:
        job.ui.say(f"no plots: {error}")
    job.ui.say(f"report: {report.write(job.path)}")
