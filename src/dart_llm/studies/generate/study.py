"""`run` and `demo`: one prompt, dense and pruned, and what is measured of the same model."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dart_llm.data import documents
from dart_llm.data.prompts import encode_prompt, mmlu_prompt, read_prompt_file, resolve_prompt
from dart_llm.errors import ConfigError, DartError
from dart_llm.evaluation import perplexity
from dart_llm.evaluation.measurement import Measurement, MeasureOptions
from dart_llm.evaluation.tasks import (
    GENERAL_NLP,
    check_calibration,
    check_task,
    count,
    expand,
    measure,
    mmlu_name,
)
from dart_llm.evaluation.windows import cut
from dart_llm.experiments import rows as measure_rows
from dart_llm.experiments.artifacts import (
    MaskRecorder,
    check_masks,
    read_masks,
    saver,
    write_drift,
    write_masks,
)
from dart_llm.experiments.llama_bench import (
    LLAMA_CPP,
    ReferenceFile,
    decode_row,
    find_bench,
)
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.stats import ratio_interval
from dart_llm.experiments.store import read
from dart_llm.experiments.study import Study, Unit, load_model, run_study
from dart_llm.files import write_json, write_lines
from dart_llm.models.checkpoint import blocks_file, checkpoint_facts
from dart_llm.models.describe import context_length, describe, widths
from dart_llm.pruning.config import DEFAULT_METHOD, PruneConfig
from dart_llm.pruning.layer_table import write_table
from dart_llm.pruning.registry import SETTING
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table, bytes_text
from dart_llm.reporting.words import SAME_STEPS, TRANSFORMERS
from dart_llm.session.generation import Generation, generate
from dart_llm.session.prepare import PreparedMethod, prepare
from dart_llm.session.run import Run
from dart_llm.session.trace import check_traceable
from dart_llm.studies.generate import plots, report
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


# The evaluations: perplexity, MMLU, general NLP, summaries; each writes one published file.


@dataclass(frozen=True)
class Evaluation:
    """One switch of the scripts: its file, its tasks, how they are measured."""

    name: str
    tasks: tuple[str, ...]
    options: MeasureOptions


def asked(settings: RunSettings) -> list[Evaluation]:
    """The evaluations that are switched on, perplexity apart.

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
        measured = tuple(f"perplexity:{text.strip()}" for text in texts)
        config, calibration = settings.prune_config(), settings.calibration
        for evaluation in (Evaluation("perplexity", measured, MeasureOptions()), *found):
            check_calibration(config, calibration, list(evaluation.tasks), evaluation.options)
    return found


class RunStudy(Study[RunSettings]):
    """Units: the dense and the pruned text, then every evaluation, dense beside pruned.

    ``also``: further configurations that are evaluated.  ``beside``: whether plain transformers is
    timed too, and llama.cpp on the file whose blocks the model holds, where ``llama-bench`` is at
    hand.
    """

    kind = "run"

    def __init__(
        self,
        settings: RunSettings,
        ui: Ui,
        also: Sequence[PruneConfig] = (),
        beside: bool = False,
    ) -> None:
        super().__init__(settings, ui)
        self.also, self.beside = also, beside
        self.texts = documents.names(settings.ppl_datasets) if settings.eval_perplexity else []
        self.asked_evaluations = asked(settings)
        self.prompt = source(settings)
        self.masks = read_masks(settings.masks) if settings.masks else None
        self.generations: dict[str, dict[str, Any]] = {}
        self.perplexity: list[dict[str, Any]] = []
        """Documents of perplexity.json, one per text."""
        self.evaluations: dict[str, list[dict[str, Any]]] = {}
        """Rows of mmlu.json, general_nlp.json and summarization.json, by name."""
        self.references: list[dict[str, Any]] = []
        """What others take: ``name``, ``bytes`` and ``seconds`` per token."""

    def inputs(self) -> dict[str, Any]:
        """Digests of the checkpoint, of files that may change, and of the prompt."""
        tasks = [(f"perplexity:{text}", MeasureOptions()) for text in self.texts]
        tasks += [(task, one.options) for one in self.asked_evaluations for task in one.tasks]
        digests = Digests().of_settings(self.settings, tasks)
        if self.prompt:
            data = self.prompt.encode("utf-8", "surrogatepass")
            digests["prompt"] = hashlib.sha256(data).hexdigest()
        return digests

    def identify(self) -> dict[str, Any]:
        identity = {**self.asked(), "inputs": self.inputs()}
        if self.also:
            identity["also"] = [config.to_dict() for config in self.also]
        return identity

    def units(self) -> Iterator[Unit]:
        own = self._prepare()
        if self.settings.tokens:
            yield from self._texts(own)
        dense = prepare(self.model, self.tokenizer, None)
        others = [PreparedMethod(self.model, self.tokenizer, config) for config in self.also]
        candidates = [dense, *others, *([own] if own.label != "dense" else [])]
        for text in self.texts:
            yield Unit(f"perplexity/{text}", data=(text, candidates))
        for evaluation in self.asked_evaluations:
            yield Unit(evaluation.name, data=(evaluation, candidates))

    def _prepare(self) -> PreparedMethod:
        settings = self.settings
        if settings.masks:
            check_masks(settings.masks, widths(self.model))
        return prepare(
            self.model,
            self.tokenizer,
            settings.prune_config(),
            settings.calibration,
            settings.cache_dir,
            self.ui.say,
            masks=self.masks,
        )

    def _texts(self, own: PreparedMethod) -> Iterator[Unit]:
        text, ids = encode(self.settings, self.prompt, self.model, self.tokenizer)
        variants = ["dense"] if own.config is None else ["dense", "pruned"]
        self.timing["dense_by"] = SAME_STEPS if _in_steps(own, self.settings) else TRANSFORMERS
        if self.settings.trace:
            if own.config is None:
                raise ConfigError(
                    f"--trace says which neurons a pruned text runs, and method {own.label} "
                    "removes none: give a method and a sparsity"
                )
            check_traceable(own.config)
        fed = ids.shape[1] + self.settings.tokens - 1  # the last token is never fed
        self.saver = saver(self.settings, self.model, self.path, fed)
        if self.saver is not None:
            self.saver.announce(len(variants), self.ui.say)
        for variant in variants:
            yield Unit(f"generation/{variant}", data=(variant, text, ids, own))
        if self.beside:
            yield Unit(TRANSFORMERS, data=(ids,))
            file, bench = blocks_file(self.model), find_bench()
            if bench and file is not None:
                yield Unit(LLAMA_CPP, data=(bench, file, ids.shape[1]))

    def finished(self, unit: Unit) -> Any:
        """A text whose files are there; evaluations find their finished pieces themselves."""
        if not unit.key.startswith("generation/"):
            return None
        variant = unit.data[0]
        files = [self.path / "masks.safetensors"] if variant == "pruned" else []
        if variant == "pruned" and self.settings.trace:
            files.append(Path(self.settings.trace))
        if self.saver is not None:
            files.append(self.saver.path(variant))
        return self.folder.part(unit.key) if all(path.exists() for path in files) else None

    def save(self, unit: Unit, value: Any) -> None:
        if unit.key.startswith("generation/"):
            super().save(unit, value)

    def compute(self, unit: Unit) -> Any:
        if unit.key.startswith("generation/"):
            return self._generate(*unit.data)
        if unit.key == TRANSFORMERS:
            return self._time_transformers(*unit.data)
        if unit.key == LLAMA_CPP:
            return self._time_reference(*unit.data)
        if unit.key.startswith("perplexity/"):
            return self._perplexity(*unit.data)
        evaluation, candidates = unit.data
        tasks = [(candidate, task) for candidate in candidates for task in evaluation.tasks]
        return [self._measure(*one, evaluation.options) for one in tasks]

    def take(self, unit: Unit, value: Any) -> None:
        """Write what a unit gave under its published name."""
        if unit.key.startswith("generation/"):
            self.generations[unit.data[0]] = value
            write_lines(self.path / "generation.jsonl", self.generations.values())
        elif unit.key in (TRANSFORMERS, LLAMA_CPP):
            self.references += [value] if value else []
        elif unit.key.startswith("perplexity/"):
            rows, document = value
            self.lines += rows
            self.perplexity.append(document)
            several = {"texts": self.perplexity}
            told = document if len(self.perplexity) == 1 else several
            write_json(self.path / "perplexity.json", told)
        else:
            rows = [self._row(candidate, found) for candidate, found in value]
            self.evaluations[unit.key] = rows
            write_json(self.path / f"{unit.key}.json", {"rows": rows})
            samples = [
                {"task": found.task, "label": candidate.label, **sample}
                for candidate, found in value
                for sample in found.samples
            ]
            write_lines(self.path / f"{unit.key}_samples.jsonl", samples)

    @property
    def has_results(self) -> bool:
        return bool(self.generations or self.lines or self.evaluations)

    # a text

    def _generate(
        self, variant: str, text: str, ids: Tensor, own: PreparedMethod
    ) -> dict[str, Any]:
        settings, config = self.settings, self.settings.prune_config()
        self.ui.say(f"--- {variant if variant == 'dense' else config.method} ---")
        run = own.run() if variant == "pruned" else None
        around: Any = run
        if run is None:
            around = contextlib.nullcontext()
            if _in_steps(own, settings):
                around = Run(self.model, PruneConfig.build("dense", executor="slim"))
        else:
            run.on_selection = recorder = MaskRecorder()
        recorded: Any = contextlib.nullcontext()
        if self.saver is not None:
            recorded = self.saver.recording(variant, text)
        traced: Any = contextlib.nullcontext()
        if settings.trace and run is not None:
            traced = run.trace(settings.trace, settings.trace_activations)
        with around, recorded, traced as trace:
            made = generate(
                self.model,
                self.tokenizer,
                ids,
                settings.tokens,
                on_step=lambda step: self.ui.token(step.text),
                temperature=settings.temperature,
                seed=settings.seed,
                run=run,
            )
        self.ui.end_text(made.text)
        if not made.text:
            self.ui.say("the model ended its text at once; a model that answers needs --chat")
        accounting = None
        if run is not None:
            accounting = run.report().to_dict()
            name = str(checkpoint_facts(self.model).get("name"))
            write_masks(self.path, recorder, run, name)
            write_drift(self.path, run.drift_checks)
            self._tell_masks(run)
        if trace is not None:
            size = bytes_text(trace.nbytes)
            self.ui.say(f"trace of {trace.tokens} tokens: {settings.trace}, {size}")
        return {
            "id": "prompt-0",
            "variant": variant,
            "method": accounting["method"] if accounting else "dense",
            "sparsity": accounting["requested_sparsity"] if accounting else 0.0,
            "prompt": text,
            "text": made.text,
            **asdict(made),
            "accounting": accounting,
        }

    def _tell_masks(self, run: Run) -> None:
        settings = self.settings
        if settings.save_layer_topk:
            counts = [layer.kept for layer in run.report().layers]
            note = f"neurons kept per layer; {settings.experiment}"
            write_table(Path(settings.save_layer_topk), counts, note)
        if settings.verbose:
            for remask in run.remasks:
                told = f"mask at step {remask.step} ({remask.cause}): keeps {list(remask.kept)}"
                self.ui.say(told)
            for check in run.drift_checks:
                self.ui.say(f"window {check.window}: {check.similarity:.3f} ({check.state})")

    def _time_transformers(self, ids: Tensor) -> dict[str, Any]:
        """The mean token of the model as transformers runs it; blocks are dequantised for it."""
        model = self.model
        if blocks_file(model) is not None:
            settings = self.settings.model_copy(update={"weights": "dense"})
            model, _, _ = load_model(settings, self.ui)
        with self.ui.status(f"timing {TRANSFORMERS}"):
            made = generate(model, self.tokenizer, ids, self.settings.tokens)
        if made.seconds_per_token is None:
            return {}
        name = f"{TRANSFORMERS} {str(model.dtype).removeprefix('torch.')}"
        size = describe(model).parameter_bytes
        return {"name": name, "bytes": size, "seconds": made.seconds_per_token}

    def _time_reference(self, bench: str, path: Path, depth: int) -> dict[str, Any]:
        """llama.cpp's mean token behind a prompt of ``depth`` tokens; empty where it fails."""
        tokens = max(1, self.settings.tokens - 1)  # the first comes from the prompt
        try:
            file = ReferenceFile.of(path)
            with self.ui.status(f"timing {LLAMA_CPP}"):
                row = decode_row(bench, path, torch.get_num_threads(), tokens, depth)
        except DartError as error:
            self.ui.say(f"note: {error}")
            return {}
        name, seconds = f"{LLAMA_CPP} {file.kind}", row["avg_ns"] / 1e9 / tokens
        return {"name": name, "bytes": file.bytes, "seconds": seconds}

    # an evaluation

    def _measure(
        self, candidate: PreparedMethod, task: str, options: MeasureOptions
    ) -> tuple[PreparedMethod, Measurement]:
        total = count(task, options, self.tokenizer, self.model)
        with self.ui.progress(f"{task}: {candidate.label}", total) as advance:
            return candidate, measure(candidate, task, options, self.folder, advance)

    def _row(self, candidate: PreparedMethod, found: Measurement) -> dict[str, Any]:
        facts = dict(checkpoint_facts(self.model))
        return measure_rows.row(candidate, found, self.settings, facts)

    def _perplexity(
        self, text: str, candidates: Sequence[PreparedMethod]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows as of any measurement, and the published document, which has the losses too."""
        settings = self.settings
        options = MeasureOptions(
            limit=settings.ppl_max_samples,
            prompt_tokens=settings.ppl_prompt_tokens,
            scored_tokens=settings.ppl_scored_tokens,
        )
        content = documents.read(text, settings.ppl_subjects)
        ids = self.tokenizer(content, return_tensors="pt", verbose=False).input_ids[0]
        windows, _ = cut(ids, options, context_length(self.model))
        total = len(windows) * len(candidates)
        with self.ui.progress(f"perplexity on {text}", total) as advance:
            measured = [
                perplexity.measure_windows(c, text, windows, "decode", self.folder, advance)
                for c in candidates
            ]
        pairs = list(zip(candidates, measured, strict=True))
        labelled = [(candidate.label, found) for candidate, found in pairs]
        shape = {"prompt_tokens": options.prompt_tokens, "scored_tokens": options.scored_tokens}
        document = perplexity.document(labelled, text, shape, ratio_interval)
        return [self._row(candidate, found) for candidate, found in pairs], document

    # what is made of them

    def summarise(self) -> dict[str, Any]:
        accounting = self.generations.get("pruned", {}).get("accounting")
        if self.generations:
            self.timing.update(_times(self.generations, self.references))
        if accounting:
            dense = describe(self.model).parameter_bytes
            self.timing["weight_bytes_per_token"] = _bytes(dense, accounting, self.references)
        return {"accounting": accounting}

    def tables(self) -> list[Table]:
        accounting = self.summary["accounting"]
        found = [report.accounting_table(accounting, self.timing)] if accounting else []
        if self.beside and accounting:
            found = [report.side_by_side(self.generations), report.pace(self.timing), *found]
        measured = [self.lines, *self.evaluations.values()]
        return [*found, *(measure_rows.table(rows) for rows in measured if rows)]

    def sentences(self) -> list[str]:
        rows = [row for own in (self.lines, *self.evaluations.values()) for row in own]
        notes = [f"note: {note}" for note in measure_rows.notes(rows)]
        return [*notes, *report.conclusion(self.summary["accounting"], self.perplexity)]

    def figures(self) -> Iterable[Plot]:
        return plots.available(read(self.path))

    def write_page(self) -> Path:
        return report.write(self.path)

    def answer(self) -> dict[str, Any]:
        return {
            "folder": str(self.path),
            "config": self.config,
            "generation": list(self.generations.values()),
            "perplexity": self.perplexity,
            **self.evaluations,
            "timing": self.timing,
        }


def _in_steps(own: PreparedMethod, settings: RunSettings) -> bool:
    """Whether the dense text runs by whole native steps: as the pruned one does, or where asked.

    Else the speed-up would be that of the kernels, not that of pruning.
    """
    run = own.run()
    executor = settings.prune_config().executor if run is None else run.executor
    return executor == "slim"


def _bytes(
    dense: int, accounting: Mapping[str, Any], references: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    """Bytes of weights that a mean token reads, as they are stored."""
    skips = accounting["executor"] != "masked"
    found = {"dense": dense, "pruned": round(dense / (accounting["bytes_limit"] if skips else 1))}
    return found | {one["name"]: one["bytes"] for one in references}


def _times(
    generations: Mapping[str, Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Times of the texts, and those of others, for timing.json."""
    made = {
        variant: Generation(
            record["token_ids"], record["tokens"], record["phases"], record["seconds"]
        )
        for variant, record in generations.items()
    }
    each = {variant: one.seconds_per_token for variant, one in made.items()}
    each |= {one["name"]: one["seconds"] for one in references}
    times: dict[str, Any] = {
        "time_to_first_token_s": {k: one.first_token_seconds for k, one in made.items()},
        "seconds_per_token": each,
        "tokens_per_second": {k: 1 / v if v else None for k, v in each.items()},
    }
    accounting = generations.get("pruned", {}).get("accounting")
    dense, pruned = each.get("dense"), each.get("pruned")
    if accounting and dense and pruned:
        times |= {"speed_up": dense / pruned, "bytes_limit": accounting["bytes_limit"]}
    return times


def run_job(
    settings: RunSettings,
    ui: Ui,
    fresh: bool = False,
    also: Sequence[PruneConfig] = (),
    beside: bool = False,
) -> RunStudy:
    """Run everything that ``settings`` ask for; returns the finished study."""
    return run_study(RunStudy(settings, ui, also, beside), fresh)


# ``dart-llm demo``: what this project does, in a minute or two.


STUDIED = (("dart", 0.2), ("dart", 0.5))
"""Masks of the sequence, whose perplexity is measured beside the default's."""

SETTINGS = {
    "prompt": "sky",
    "chat": None,
    "generation": 96,
    "eval_perplexity": True,
    "ppl_max_samples": 6,
    "experiment_name": "demo",
}


def run_demo(ui: Ui, **given: Any) -> RunStudy:
    """Generate and measure perplexity: dense, the default setting, and masks of the sequence.

    Plain transformers is timed beside them, and llama.cpp on the same file where its
    ``llama-bench`` is at hand.  ``given``: settings of a run, such as model, device and
    results_dir; they win.
    """
    settings = RunSettings(**{**SETTINGS, "method": DEFAULT_METHOD, **given}).fitted()
    kept = settings.method.startswith(SETTING)  # measured already
    also = [] if kept else [PruneConfig.build(name, sparsity=share) for name, share in STUDIED]
    return run_job(settings, ui, also=also, beside=True)
