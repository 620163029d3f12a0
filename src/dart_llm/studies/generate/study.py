"""`run` and `demo`: one prompt, dense and pruned, and what is measured of the same model."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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
from dart_llm.experiments.timing import WARM
from dart_llm.files import write_json, write_lines
from dart_llm.models.checkpoint import blocks_file, checkpoint_facts
from dart_llm.models.describe import configured_context, context_length, describe, widths
from dart_llm.models.loading import is_default
from dart_llm.pruning.config import DEFAULT_METHOD, DEFAULT_SPARSITY, PruneConfig
from dart_llm.pruning.layer_table import write_table
from dart_llm.pruning.registry import SETTING
from dart_llm.reporting import words
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table, bytes_text
from dart_llm.reporting.words import OUR_KERNELS, TRANSFORMERS
from dart_llm.session.generation import generate
from dart_llm.session.prepare import PreparedMethod, is_untouched, prepare
from dart_llm.session.run import Run
from dart_llm.session.trace import check_traceable
from dart_llm.studies.generate import pace, plots, report
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


def encode(settings: RunSettings, prompt: str, config: Any, tokenizer: Any) -> tuple[str, Tensor]:
    """The final text and its ids [1, T]; ``ConfigError`` when it does not fit the context.

    ``config``: the model's.
    """
    limit = configured_context(config)
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
        for evaluation in (Evaluation("perplexity", measured, MeasureOptions()), *found):
            tasks, options = list(evaluation.tasks), evaluation.options
            for config in settings.prune_configs():
                check_calibration(config, settings.calibration, tasks, options)
    return found


OWN_KERNELS = ("slim", "native", "graph", "triton")
"""Executors whose kernels are not those of the untouched model."""

PRUNED = "pruned"
"""The pruned text of a run of one setting; several are called by method and sparsity."""


class RunStudy(Study[RunSettings]):
    """Units: the dense and the pruned texts, their times, then every evaluation.

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
        self.configs = settings.prune_configs()
        self.texts = documents.names(settings.ppl_datasets) if settings.eval_perplexity else []
        self.asked_evaluations = asked(settings)
        self.prompt = source(settings)
        self.masks = read_masks(settings.masks) if settings.masks else None
        self.encoded: tuple[str, Tensor] | None = None
        """The text of the prompt and its ids [1, T]."""
        self.generations: dict[str, dict[str, Any]] = {}
        self.perplexity: list[dict[str, Any]] = []
        """Documents of perplexity.json, one per text."""
        self.evaluations: dict[str, list[dict[str, Any]]] = {}
        """Rows of mmlu.json, general_nlp.json and summarization.json, by name."""
        self._prepared: dict[str, PreparedMethod] = {}
        if settings.trace:
            self._check_trace()

    def _check_trace(self) -> None:
        pruned = self._pruned_texts()
        if not pruned:
            raise ConfigError(
                "--trace says which neurons a pruned text runs, and method "
                f"{self.configs[0].method} removes none: give a method and a sparsity"
            )
        for config in pruned.values():
            check_traceable(config)

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

    def prune_document(self) -> dict[str, Any]:
        """The configuration; of several settings the list of them, under ``settings``."""
        if not self.settings.several:
            return super().prune_document()
        return {"settings": [config.to_dict() for config in self.configs]}

    def check(self, tokenizer: Any, config: Any) -> None:
        if self.settings.tokens:
            self.encoded = encode(self.settings, self.prompt, config, tokenizer)

    def units(self) -> Iterator[Unit]:
        if self.settings.masks:
            check_masks(self.settings.masks, widths(self.model))
        if self.settings.tokens:
            yield from self._text_units()
        yield from (Unit(f"perplexity/{text}", data=text) for text in self.texts)
        yield from (Unit(one.name, data=one) for one in self.asked_evaluations)

    def _candidates(self) -> list[PreparedMethod]:
        """Dense, what else is evaluated, and the settings of this run."""
        found = [prepare(self.model, self.tokenizer, None)]
        found += [self._ready(config) for config in (*self.also, *self.configs)]
        return list({one.label: one for one in found}.values())

    def _ready(self, config: PruneConfig) -> PreparedMethod:
        """A configuration with what it learns of the model, which is learnt once."""
        key = config.model_dump_json()
        if key not in self._prepared:
            settings = self.settings
            self._prepared[key] = prepare(
                self.model,
                self.tokenizer,
                config,
                settings.calibration,
                settings.cache_dir,
                self.ui.say,
                masks=self.masks,
            )
        return self._prepared[key]

    def _pruned_texts(self) -> dict[str, PruneConfig]:
        """The configuration of every pruned text, by the name of its variant."""
        pruned = [
            config
            for config in self.configs
            if self.masks is not None or not (config.weight_bits or is_untouched(config))
        ]
        several = self.settings.several
        return {f"{one.method}@{one.target:g}" if several else PRUNED: one for one in pruned}

    def _text_units(self) -> Iterator[Unit]:
        pruned = self._pruned_texts()
        assert self.encoded is not None
        fed = self.encoded[1].shape[1] + self.settings.tokens - 1  # the last token is never fed
        self.saver = saver(self.settings, self.model, self.path, fed)
        if self.saver is not None:
            self.saver.announce(1 + len(pruned), self.ui.say)
        self.timing["dense_by"] = OUR_KERNELS if self._kernels_of_texts() else TRANSFORMERS
        for variant, config in {"dense": None, **pruned}.items():
            yield Unit(f"generation/{variant}", f"the {variant} text", (variant, config))
        if self.settings.tokens > 1:
            yield Unit("times", "timing")

    def _kernels(self, config: PruneConfig | None) -> str | None:
        """The executor by which dense runs too, so that a speed-up is pruning's alone.

        None: the untouched model, whose kernels are those of the others.
        """
        if config is None:  # nothing is pruned: dense runs as it was asked to
            executor: str = self.configs[0].executor
        else:
            own = PreparedMethod(self.model, self.tokenizer, config, self.masks)
            run = (own if config.calibration is None else self._ready(config)).run()
            assert run is not None
            executor = run.executor
        return executor if executor in OWN_KERNELS else None

    def finished(self, unit: Unit) -> Any:
        """A text whose files are there; evaluations find their finished pieces themselves."""
        if not unit.key.startswith("generation/"):
            return None
        variant, config = unit.data
        files = [] if config is None else [self._folder(variant) / "masks.safetensors"]
        if config is not None and self.settings.trace:
            files.append(self._beside(self.settings.trace, variant))
        if self.saver is not None:
            files.append(self.saver.path(variant))
        return self.folder.part(unit.key) if all(path.exists() for path in files) else None

    def _folder(self, variant: str) -> Path:
        """Where the masks of a text go: of several, each has a folder."""
        return self.path if variant == PRUNED else self.path / variant.replace("@", "-")

    def _beside(self, path: str, variant: str) -> Path:
        """A file that was named for the text: of several, each has the setting in its name."""
        file = Path(path)
        if variant == PRUNED:
            return file
        return file.with_name(f"{file.stem}-{variant.replace('@', '-')}{file.suffix}")

    def save(self, unit: Unit, value: Any) -> None:
        if unit.key.startswith("generation/"):
            super().save(unit, value)

    def compute(self, unit: Unit) -> Any:
        if unit.key.startswith("generation/"):
            return self._generate(*unit.data)
        if unit.key == "times":
            return self._time()
        candidates = self._candidates()
        if unit.key.startswith("perplexity/"):
            return self._perplexity(unit.data, candidates)
        evaluation = unit.data
        tasks = [(candidate, task) for candidate in candidates for task in evaluation.tasks]
        return [self._measure(*one, evaluation.options) for one in tasks]

    def take(self, unit: Unit, value: Any) -> None:
        """Write what a unit gave under its published name."""
        if unit.key.startswith("generation/"):
            self.generations[unit.data[0]] = value
            write_lines(self.path / "generation.jsonl", self.generations.values())
        elif unit.key == "times":
            self.timing |= value
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

    def _generate(self, variant: str, config: PruneConfig | None) -> dict[str, Any]:
        assert self.encoded is not None
        settings, (text, ids) = self.settings, self.encoded
        own = None if config is None else self._ready(config)
        self.ui.say(f"--- {variant if own is None else words.row_name(_named(own))} ---")
        run, recorder = (None if own is None else own.run()), MaskRecorder()
        if run is not None:
            run.on_selection = recorder
        around: Any = run or self._dense(self._kernels_of_texts()) or contextlib.nullcontext()
        recorded: Any = contextlib.nullcontext()
        if self.saver is not None:
            recorded = self.saver.recording(variant, text)
        traced: Any = contextlib.nullcontext()
        if settings.trace and run is not None:
            path = str(self._beside(settings.trace, variant))
            traced = run.trace(path, settings.trace_activations)
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
        if trace is not None:
            size = bytes_text(trace.nbytes)
            self.ui.say(f"trace of {trace.tokens} tokens: {path}, {size}")
        accounting = None if run is None else self._keep(variant, run, recorder)
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

    def _keep(self, variant: str, run: Run, recorder: MaskRecorder) -> dict[str, Any]:
        """Write the files of a pruned text; returns its accounting."""
        settings, folder = self.settings, self._folder(variant)
        folder.mkdir(exist_ok=True)
        write_masks(folder, recorder, run, str(checkpoint_facts(self.model).get("name")))
        write_drift(folder, run.drift_checks)
        if settings.save_layer_topk:
            counts = [layer.kept for layer in run.report().layers]
            note = f"neurons kept per layer; {settings.experiment}"
            write_table(self._beside(settings.save_layer_topk, variant), counts, note)
        if settings.verbose:
            for remask in run.remasks:
                told = f"mask at step {remask.step} ({remask.cause}): keeps {list(remask.kept)}"
                self.ui.say(told)
            for check in run.drift_checks:
                self.ui.say(f"window {check.window}: {check.similarity:.3f} ({check.state})")
        return run.report().to_dict()

    # its time

    def _kernels_of_texts(self) -> str | None:
        return self._kernels(next(iter(self._pruned_texts().values()), None))

    def _dense(self, executor: str | None) -> Run | None:
        """What runs the model dense by ``executor``; None: nothing, it runs as it is."""
        if executor is None:
            return None
        return Run(self.model, PruneConfig.build("dense", executor=executor))

    def _ways(self) -> dict[str, pace.Way]:
        """Dense and every pruned text, each beside dense by the same kernels."""
        first = self._kernels_of_texts()
        bases: dict[str | None, str] = {first: "dense"}
        ways = {"dense": pace.Way(self.model, lambda: self._dense(first))}
        for variant, config in self._pruned_texts().items():
            own, executor = self._ready(config), self._kernels(config)
            if executor not in bases:
                name = bases[executor] = f"dense by {executor or TRANSFORMERS}"
                ways[name] = pace.Way(self.model, partial(self._dense, executor))
            make = partial(own.run, likelihood=True)  # masks at once: what is timed is pruned
            ways[variant] = pace.Way(self.model, make, bases[executor])
        return ways

    def _time(self) -> dict[str, Any]:
        """Keys of timing.json: every way to decode, timed in turns on the end of the dense text."""
        assert self.encoded is not None
        tokens = min(pace.STEPS, self.settings.tokens - 1)
        made = self.generations["dense"]["token_ids"]
        ids = pace.text_end(self.encoded[1], made, tokens, context_length(self.model))
        ways, sizes, reference = self._ways(), dict[str, int](), None
        clocks: dict[str, Callable[[], float]] = {
            name: partial(way.seconds, ids, tokens) for name, way in ways.items()
        }
        with self.ui.status(f"timing {', '.join(ways)} in turns"):
            if self.beside:
                plain = self._transformers(ids)
                reference = f"{TRANSFORMERS} {str(plain.dtype).removeprefix('torch.')}"
                clocks[reference] = partial(pace.Way(plain).seconds, ids, tokens)
                sizes[reference] = describe(plain).parameter_bytes
                for name, size, clock in self._llama_cpp(ids.shape[1], tokens):
                    clocks[name], sizes[name] = clock, size
            found = pace.document(pace.interleave(clocks), ways, reference)
        dense = describe(self.model).parameter_bytes
        sizes |= {name: dense for name, way in ways.items() if way.base is None}
        return {**found, "weight_bytes_per_token": sizes}

    def _transformers(self, ids: Tensor) -> Any:
        """The model as transformers holds it, in the dtype in which it decodes fastest here."""
        settings = self.settings.model_copy(update={"weights": "dense"})
        in_blocks = blocks_file(self.model) is not None
        models = pace.untouched(self.model, in_blocks, lambda: load_model(settings, self.ui)[0])
        return pace.fastest(models, ids)

    def _llama_cpp(self, depth: int, tokens: int) -> Iterator[tuple[str, int, Callable[[], float]]]:
        """Name, bytes and clock of llama.cpp on the model's file, where it is at hand and runs."""
        path, bench = blocks_file(self.model), find_bench()
        if path is None or bench is None:
            return
        threads = torch.get_num_threads()

        def clock() -> float:
            row = decode_row(bench, path, threads, tokens, depth + WARM)
            return float(row["avg_ns"]) / 1e9 / tokens

        try:
            file = ReferenceFile.of(path)
            clock()
        except DartError as error:
            self.ui.say(f"note: {error}")
        else:
            yield f"{LLAMA_CPP} {file.kind}", file.bytes, clock

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

    @property
    def accountings(self) -> dict[str, dict[str, Any]]:
        """Accounting of every pruned text, by the name of its variant."""
        found = {name: one["accounting"] for name, one in self.generations.items()}
        return {name: one for name, one in found.items() if one}

    def summarise(self) -> dict[str, Any]:
        self.timing["time_to_first_token_s"] = {
            name: next(iter(one["seconds"]), None) for name, one in self.generations.items()
        }
        if sizes := self.timing.get("weight_bytes_per_token"):
            sizes |= {
                name: _bytes_read(sizes["dense"], one) for name, one in self.accountings.items()
            }
        return {"accounting": next(iter(self.accountings.values()), None)}

    def tables(self) -> list[Table]:
        accountings = self.accountings
        found = list[Table]()
        if accountings and self.ui.live and (self.beside or self.settings.several):
            found += report.side_by_side(self.generations, self.ui.err.width)
        if accountings:
            counted = report.accounting_table(accountings, self.timing)
            found.append(report.pace(self.timing) if self.beside else counted)
        found += [report.perplexity_table(document) for document in self.perplexity]
        return [*found, *(measure_rows.table(rows) for rows in self.evaluations.values() if rows)]

    def sentences(self) -> list[str]:
        rows = [row for own in (self.lines, *self.evaluations.values()) for row in own]
        notes = [f"note: {note}" for note in measure_rows.notes(rows)]
        found = report.conclusion(self.accountings, self.perplexity, self.timing)
        accounting = self.summary["accounting"]
        if self.beside and accounting:
            default = is_default(self.settings.model)
            told = report.verdict(self.timing, self.perplexity, accounting, default)
            found = [*found[1:], told]  # which says what the first sentence does
        return [*notes, *found]

    def figures(self) -> Iterable[Plot]:
        drawn = plots.available(read(self.path))
        return [one for one in drawn if one.name == "perplexity"] if self.beside else drawn

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


def _named(own: PreparedMethod) -> dict[str, Any]:
    """Method and sparsity, as rows have them."""
    return {"method": own.method, "sparsity": own.asked}


def _bytes_read(dense: int, accounting: Mapping[str, Any]) -> int:
    """Bytes of weights that a mean token reads, as they are stored."""
    skips = accounting["executor"] != "masked"
    return round(dense / (accounting["bytes_limit"] if skips else 1))


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


STUDIED = (("dart", DEFAULT_SPARSITY),)
"""Masks of the sequence, whose perplexity is measured beside the default's."""

SETTINGS = {
    "prompt": "sky",
    "chat": None,
    "generation": 64,
    "eval_perplexity": True,
    "ppl_max_samples": 6,
    "ppl_prompt_tokens": 128,
    "ppl_scored_tokens": 128,
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
