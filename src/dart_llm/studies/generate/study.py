"""`run` and `demo`: generate dense and pruned, evaluate, write.

The main job: generate dense and pruned, evaluate, write the results folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dart_llm.data import documents
from dart_llm.data.prompts import encode_prompt, mmlu_prompt, read_prompt_file, resolve_prompt
from dart_llm.errors import ConfigError, MissingExtra
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.perplexity import rows_to_dict, score_row, slices
from dart_llm.evaluation.task_names import GENERAL_NLP, expand, mmlu_name
from dart_llm.evaluation.tasks import check_calibration, check_task, count, measure
from dart_llm.experiments import rows as measure_rows
from dart_llm.experiments.artifacts import (
    MaskRecorder,
    Saver,
    check_masks,
    read_masks,
    saver,
    write_drift,
    write_masks,
)
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultsFolder, open_folder
from dart_llm.experiments.study import complete, config_document, load_model, resumable, write_logs
from dart_llm.files import write_json, write_lines
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length, widths
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.layer_table import write_table
from dart_llm.reporting.console import Ui
from dart_llm.session.generation import Generation, generate
from dart_llm.session.prepare import PreparedMethod, prepare
from dart_llm.session.run import Run
from dart_llm.studies.generate.report import conclusion, perplexity_table, report_table
from dart_llm.studies.generate.settings import RunSettings

# Where the prompt of a job comes from, and how it becomes tokens.


MMLU_DEFAULT_TOKENS = 1024


def source(settings: RunSettings) -> str:
    """The prompt as given; "" when none is needed, or when it is built after loading (mmlu).

    Raises ``ConfigError`` when a prompt is needed and none, or an empty one, is given.
    """
    if not settings.tokens or settings.prompt_type == "mmlu":
        return ""
    text = _read(settings)
    if text is None:
        raise ConfigError(
            "no prompt: give --prompt TEXT, --prompt-file FILE (- is stdin), or --generation 0 to "
            "evaluate only"
        )
    if not text.strip():
        raise ConfigError("the prompt is empty: give at least one word")
    return text


def _read(settings: RunSettings) -> str | None:
    if settings.prompt_file == "-":  # what the command takes, too, where no prompt is given
        return read_prompt_file("-") or None
    if settings.prompt_file:
        return read_prompt_file(settings.prompt_file)
    given = settings.prompt if settings.prompt is not None else settings.custom_prompt_text
    if given is not None:
        return resolve_prompt(given)
    piped = sys.stdin is not None and not sys.stdin.isatty()
    return (read_prompt_file("-") or None) if piped else None


def encode(settings: RunSettings, prompt: str, model: Any, tokenizer: Any) -> tuple[str, Tensor]:
    """The final text and its ids [1, T]; ``ConfigError`` when it does not fit the context."""
    limit = context_length(model)
    if settings.prompt_type == "mmlu":
        subjects = [part.strip() for part in str(settings.prompt_subject).split(",")]
        length = settings.prompt_length or min(limit or MMLU_DEFAULT_TOKENS, MMLU_DEFAULT_TOKENS)
        prompt = mmlu_prompt(subjects, tokenizer, length)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    ids = encode_prompt(tokenizer, prompt, has_template if settings.chat is None else settings.chat)
    if settings.prompt_length and ids.shape[1] > settings.prompt_length:
        ids = ids[:, -settings.prompt_length :]
    if limit and settings.tokens >= limit:
        raise ConfigError(
            f"{settings.tokens} tokens are to be generated, but the model's context is {limit}: "
            "generate less"
        )
    if limit and ids.shape[1] + settings.tokens > limit:
        raise ConfigError(
            f"the prompt has {ids.shape[1]} tokens and {settings.tokens} are to be generated, but "
            f"the model's context is {limit}: shorten it with --prompt-length "
            f"{max(1, limit - settings.tokens)}, or generate less"
        )
    return prompt, ids


# A run in progress: what every part of the main job reads and adds to.


@dataclass
class Job:
    """One run in progress.  ``also``: further configurations for the perplexity table."""

    settings: RunSettings
    ui: Ui
    folder: ResultsFolder
    also: Sequence[PruneConfig] = ()
    inputs: dict[str, Any] = field(default_factory=dict)
    """Digests of the prompt and of the files that the settings name."""
    model: Any = None
    tokenizer: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    generations: dict[str, dict[str, Any]] = field(default_factory=dict)
    perplexity: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Rows of mmlu.json, general_nlp.json and summarization.json, by name."""
    timing: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder.path


# The evaluations of the main job beside perplexity: MMLU, general NLP, summaries.
#
# Each writes one file with a published name; dense and pruned are measured on the same items.


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


def evaluate(job: Job, evaluation: Evaluation, candidates: Sequence[PreparedMethod]) -> None:
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


# The generating half of the main job: the same prompt dense and pruned.


def generate_texts(job: Job, prompt: str, candidate: PreparedMethod) -> None:
    """Generate the dense and the candidate's text, each kept as a finished part."""
    text, ids = encode(job.settings, prompt, job.model, job.tokenizer)
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
    job: Job, variant: str, text: str, ids: Tensor, candidate: PreparedMethod, kept: Saver | None
) -> dict[str, Any]:
    settings, config = job.settings, job.settings.prune_config()
    job.ui.say(f"--- {variant if variant == 'dense' else config.method} ---")
    options: dict[str, Any] = {
        "on_step": lambda step: job.ui.token(step.text),
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


def _same_path(job: Job, candidate: PreparedMethod) -> Any:
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


def run_job(
    settings: RunSettings, ui: Ui, fresh: bool = False, also: Sequence[PruneConfig] = ()
) -> Job:
    """Run everything that ``settings`` ask for; returns the finished job.

    An interruption or an error keeps what was computed and is raised again.
    """
    texts = _texts(settings)
    evaluations = asked(settings)
    prompt = source(settings)
    masks = read_masks(settings.masks) if settings.masks else None
    inputs = _inputs(settings, prompt, evaluations)
    folder = open_folder(
        Path(settings.results_dir), settings.experiment, _identity(settings, also, inputs), fresh
    )
    job = Job(settings, ui, folder, also, inputs)
    with resumable(job, lambda status: _leave(job, status), settings.model, settings.dtype) as took:
        _write_config(job, "running")
        _load(job)
        _write_config(job, "running")
        own = _prepare(job, masks)
        if settings.tokens:
            generate_texts(job, prompt, own)
        dense = prepare(job.model, job.tokenizer, None)
        others = [PreparedMethod(job.model, job.tokenizer, config) for config in also]
        candidates = [dense, *others, *([own] if own.label != "dense" else [])]
        for text in texts:
            _perplexity(job, text, candidates)
        for evaluation in evaluations:
            evaluate(job, evaluation, candidates)
        took()
        _finish(job)
    return job


def _leave(job: Job, status: str) -> None:
    _write_config(job, status)
    write_logs(job.folder, job.ui.log, job.timing)


def _inputs(
    settings: RunSettings, prompt: str, evaluations: Sequence[Evaluation]
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
    return documents.names(settings.ppl_datasets) if settings.eval_perplexity else []


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


def _prepare(job: Job, masks: dict[int, Tensor] | None) -> PreparedMethod:
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


def _perplexity(job: Job, text: str, candidates: Sequence[PreparedMethod]) -> None:
    settings = job.settings
    content = documents.read(text, settings.ppl_subjects)
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
    from dart_llm.studies.generate import plots, report

    try:
        plots.write_all(job.path)
    except MissingExtra as error:
        job.ui.say(f"no plots: {error}")
    job.ui.say(f"report: {report.write(job.path)}")


# ``dart-llm demo``: what this project does, in a minute or two.


SPARSITIES = (0.2, 0.5)

SETTINGS = {
    "prompt": "sky",
    "chat": None,
    "generation": 96,
    "eval_perplexity": True,
    "ppl_max_samples": 6,
    "experiment_name": "demo",
}


def run_demo(ui: Ui, **given: Any) -> Job:
    """Generate and measure perplexity, dense beside 20 % and 50 % of the FFN neurons removed.

    ``given``: settings of a run, such as model, device and results_dir; they win.
    """
    low, high = SPARSITIES
    settings = RunSettings(**{**SETTINGS, "sparsity": high, **given})
    also = [PruneConfig.build(settings.method, sparsity=low)]
    return run_job(settings, ui, also=also)
