"""The generating half of the main job: the same prompt dense and pruned."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from dart_llm import job_prompt
from dart_llm.activations_files import Saver, saver
from dart_llm.candidate import Candidate
from dart_llm.config import PruneConfig
from dart_llm.generate import Generation, generate
from dart_llm.job_state import Job
from dart_llm.layer_spec import write_table
from dart_llm.loading import checkpoint_facts
from dart_llm.outputs import MaskRecorder, write_drift, write_masks
from dart_llm.results import write_lines
from dart_llm.session import Run


def generate_texts(job: Job, prompt: str, candidate: Candidate) -> None:
    """Generate the dense and the candidate's text, each kept as a finished part."""
    text, ids = job_prompt.encode(job.settings, prompt, job.model, job.tokenizer)
    variants = ["dense"] if candidate.config is None else ["dense", "pruned"]
    fed = ids.shape[1] + job.settings.tokens - 1  # the last token is never fed
    kept = saver(job.settings, job.model, job.path, fed)
    if kept is not None:
        kept.announce(len(variants), job.ui.say)
    for variant in variants:
        known = job.folder.part(f"generation/{variant}")
        has_files = variant == "dense" or (job.path / "masks.safetensors").exists()
        if kept is not None:
            has_files = has_files and kept.path(variant).exists()
        if known is None or not has_files:
            known = _generate_one(job, variant, text, ids, candidate, kept)
            job.folder.save_part(f"generation/{variant}", known)
        job.generations[variant] = known
        write_lines(job.path / "generation.jsonl", job.generations.values())
    _generation_timing(job)


def _generate_one(
    job: Job, variant: str, text: str, ids: Tensor, candidate: Candidate, kept: Saver | None
) -> dict[str, Any]:
    settings, config = job.settings, job.settings.prune_config()
    job.ui.say(f"--- {variant if variant == 'dense' else config.method} ---")
    options: dict[str, Any] = {
        "on_step": job.ui.token,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }
    report, run = None, candidate.run() if variant == "pruned" else None
    recording = contextlib.nullcontext() if kept is None else kept.recording(variant, text)
    if run is None:
        with recording, _same_path(job, candidate):
            made = generate(job.model, job.tokenizer, ids, settings.tokens, **options)
        job.ui.end_text(made.text)
    else:
        recorder = MaskRecorder()
        run.on_selection = recorder
        with run, recording:
            made = generate(job.model, job.tokenizer, ids, settings.tokens, run=run, **options)
        job.ui.end_text(made.text)
        report = run.report().to_dict()
        write_masks(job.path, recorder, run, str(checkpoint_facts(job.model).get("name")))
        write_drift(job.path, run.drift_checks)
        _save_layer_table(job, run)
        if settings.verbose:
            _say_masks(job, run)
    return _generation_record(variant, text, made, report)


def _same_path(job: Job, candidate: Candidate) -> Any:
    """Dense decoding by whole native steps where the pruned text is decoded so.

    Else the speed-up would be that of the kernels, not that of pruning.
    """
    run = candidate.run()
    if run is None or run.executor != "slim":
        return contextlib.nullcontext()
    return Run(job.model, PruneConfig.build("dense", executor="slim"))


def _generation_record(
    variant: str, text: str, made: Generation, report: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": "prompt-0",
        "variant": variant,
        "method": report["method"] if report else "dense",
        "sparsity": report["requested_sparsity"] if report else 0.0,
        "prompt": text,
        "text": made.text,
        **asdict(made),
        "accounting": report,
    }


def _say_masks(job: Job, run: Run) -> None:
    for remask in run.remasks:
        job.ui.say(f"mask at step {remask.step} ({remask.cause}): keeps {list(remask.kept)}")
    for check in run.drift_checks:
        job.ui.say(f"window {check.window}: {check.similarity:.3f} ({check.state})")


def _save_layer_table(job: Job, run: Run) -> None:
    if not job.settings.save_layer_topk:
        return
    counts = [layer.kept for layer in run.report().layers]
    note = f"neurons kept per layer; {job.settings.experiment}"
    write_table(Path(job.settings.save_layer_topk), counts, note)


def _generation_timing(job: Job) -> None:
    made = {
        variant: Generation(
            record["token_ids"], record["tokens"], record["phases"], record["seconds"]
        )
        for variant, record in job.generations.items()
    }
    each = {variant: one.seconds_per_token for variant, one in made.items()}
    job.timing["time_to_first_token_s"] = {k: one.first_token_seconds for k, one in made.items()}
    job.timing["seconds_per_token"] = each
    job.timing["tokens_per_second"] = {k: 1 / v if v else None for k, v in each.items()}
    report = job.generations.get("pruned", {}).get("accounting")
    dense, pruned = each.get("dense"), each.get("pruned")
    if report and dense and pruned:
        job.timing["speed_up"] = dense / pruned
        job.timing["bytes_limit"] = report["bytes_limit"]
