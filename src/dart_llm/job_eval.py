"""The evaluations of the main job beside perplexity: MMLU, general NLP, summaries.

Each writes one file with a published name; dense and pruned are measured on the same items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dart_llm import measure_rows
from dart_llm.candidate import Candidate
from dart_llm.harness_tasks import GENERAL_NLP, expand, mmlu_name
from dart_llm.job_state import Job
from dart_llm.loading import checkpoint_facts
from dart_llm.measure import check_calibration, check_task, count, measure
from dart_llm.measurement import MeasureOptions
from dart_llm.results import write_json, write_lines
from dart_llm.settings import RunSettings


@dataclass(frozen=True)
class Evaluation:
    """One switch of the scripts: its file, its tasks, how they are measured."""

    name: str
    tasks: tuple[str, ...]
    options: MeasureOptions


def asked(settings: RunSettings) -> list[Evaluation]:
    """The evaluations that are switched on.

    Raises ``ConfigError`` for names that do not exist, and for a calibration text that is evaluated
    (by perplexity too).
    """
    common: dict[str, Any] = {"include_path": settings.include_path, "seed": settings.seed}
    found = []
    if settings.eval_mmlu:
        options = MeasureOptions(
            limit=settings.mmlu_max_samples, num_fewshot=settings.mmlu_shots, **common
        )
        found.append(Evaluation("mmlu", (mmlu_name(settings.mmlu_datasets),), options))
    if settings.eval_general_nlp:
        tasks = expand(settings.general_nlp_datasets or ",".join(GENERAL_NLP))
        options = MeasureOptions(limit=settings.general_nlp_max_samples, **common)
        found.append(Evaluation("general_nlp", tuple(tasks), options))
    if settings.eval_summarization:
        data = [n.strip() for n in settings.summarization_datasets.split(",") if n.strip()]
        options = MeasureOptions(
            limit=settings.summarization_max_samples,
            max_output=settings.summarization_max_output,
            **common,
        )
        tasks = [f"summarize:{name}" for name in data]
        found.append(Evaluation("summarization", tuple(tasks), options))
    for evaluation in found:
        for task in evaluation.tasks:
            check_task(task, evaluation.options)
    if not settings.masks:
        texts = settings.ppl_datasets.split(",") if settings.eval_perplexity else []
        asked = [([f"perplexity:{text.strip()}" for text in texts], MeasureOptions())]
        asked += [(list(evaluation.tasks), evaluation.options) for evaluation in found]
        for tasks, options in asked:
            check_calibration(settings.prune_config(), settings.calibration, tasks, options)
    return found


def evaluate(job: Job, evaluation: Evaluation, candidates: Sequence[Candidate]) -> None:
    """Measure all candidates on all tasks of one evaluation and write its file."""
    rows = []
    samples = []
    for candidate in candidates:
        for task in evaluation.tasks:
            size = count(task, evaluation.options, job.tokenizer, job.model)
            with job.ui.progress(f"{task}: {candidate.label}", size) as advance:
                found = measure(candidate, task, evaluation.options, job.folder, advance)
            facts = dict(checkpoint_facts(job.model))
            rows.append(measure_rows.row(candidate, found, job.settings, facts))
            samples += [{"task": task, "label": candidate.label, **s} for s in found.samples]
    job.evaluations[evaluation.name] = rows
    write_json(job.path / f"{evaluation.name}.json", {"rows": rows})
    write_lines(job.path / f"{evaluation.name}_samples.jsonl", samples)
