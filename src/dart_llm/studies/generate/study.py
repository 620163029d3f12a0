"""`run`: one prompt, dense and pruned, with the accounting and the time of both texts."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dart_llm.data.texts import encode_prompt, mmlu_prompt, read_prompt_file, resolve_prompt
from dart_llm.errors import ConfigError
from dart_llm.experiments.artifacts import (
    MaskRecorder,
    check_masks,
    read_checks,
    read_masks,
    saver,
    write_drift,
    write_masks,
)
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultLine
from dart_llm.experiments.study import Study, Unit, run_study
from dart_llm.files import write_lines
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import configured_context, context_length, describe, widths
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.layer_table import write_table
from dart_llm.reporting import words
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table, bytes_text
from dart_llm.reporting.words import OUR_KERNELS, TRANSFORMERS
from dart_llm.session.generation import generate
from dart_llm.session.prepare import is_untouched, prepare
from dart_llm.session.run import BoundMethod, Run
from dart_llm.session.trace import check_traceable
from dart_llm.studies.generate import pace, plots, report
from dart_llm.studies.generate.pace import DENSE, PRUNED
from dart_llm.studies.generate.settings import RunSettings

# Where the prompt comes from, and how it becomes tokens.

MMLU_DEFAULT_TOKENS = 1024


def read_prompt(settings: RunSettings) -> str:
    """The prompt; "" when none is needed, or when it is built after loading (mmlu).

    Raises ``ConfigError`` when a prompt is needed and there is none, or an empty one.
    """
    if not settings.tokens or settings.prompt_type == "mmlu":
        return ""
    text = _prompt_text(settings)
    if text is None:
        raise ConfigError("no prompt: give --prompt TEXT or --prompt-file FILE (- is stdin)")
    if not text.strip():
        raise ConfigError("the prompt is empty: give at least one word")
    return text


def _prompt_text(settings: RunSettings) -> str | None:
    if settings.prompt_file not in (None, "", "-"):
        return read_prompt_file(str(settings.prompt_file))
    text = settings.prompt if settings.prompt is not None else settings.custom_prompt_text
    if text is not None:
        return resolve_prompt(text)
    piped = sys.stdin is not None and not sys.stdin.isatty()
    return (read_prompt_file("-") or None) if piped or settings.prompt_file == "-" else None


def encode(settings: RunSettings, prompt: str, config: Any, tokenizer: Any) -> tuple[str, Tensor]:
    """The final text and its ids [1, T]; ``config``: the model's.

    Raises ``ConfigError`` when prompt and generated text do not fit the context.
    """
    limit = configured_context(config)
    if settings.prompt_type == "mmlu":
        subjects = [subject.strip() for subject in str(settings.prompt_subject).split(",")]
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


TORCH_EXECUTORS = ("auto", "masked", "compact")
"""Executors that run by the kernels of the untouched model."""


class RunStudy(Study[RunSettings]):
    """Units: the dense text, the pruned one, and their times."""

    kind = "run"
    bound: BoundMethod
    """The configuration with what it learned of the model."""

    def __init__(self, settings: RunSettings, ui: Ui, first: RunStudy | None = None) -> None:
        """``first``: a finished run of the same prompt, whose model and dense text are used."""
        super().__init__(settings, ui)
        self.first = first
        self.prune_config = settings.prune_config()
        self.prompt = read_prompt(settings)
        self.masks = read_masks(settings.masks) if settings.masks else None
        self.encoded: tuple[str, Tensor] | None = None
        """The text of the prompt and its ids [1, T]."""
        self.generations: dict[str, dict[str, Any]] = {}
        """Lines of generation.jsonl, by variant."""
        if settings.trace:
            if not self.prunes:
                raise ConfigError(
                    "--trace records which neurons a pruned text runs, and method "
                    f"{self.prune_config.method} removes none: give a method and a sparsity"
                )
            check_traceable(self.prune_config)

    @property
    def prunes(self) -> bool:
        """Whether there is a pruned text."""
        return self.masks is not None or not is_untouched(self.prune_config)

    def inputs(self) -> dict[str, Any]:
        """Digests of the checkpoint, of files that may change, and of the prompt."""
        digests = Digests().of_settings(self.settings)
        if self.prompt:
            data = self.prompt.encode("utf-8", "surrogatepass")
            digests["prompt"] = hashlib.sha256(data).hexdigest()
        return digests

    def load(self) -> None:
        if self.first is None:
            super().load()
            return
        self.model, self.tokenizer = self.first.model, self.first.tokenizer
        self.encoded, self.timing["load_s"] = self.first.encoded, 0.0

    def check(self, tokenizer: Any, config: Any) -> None:
        if self.settings.tokens:
            self.encoded = encode(self.settings, self.prompt, config, tokenizer)

    def units(self) -> Iterator[Unit]:
        settings = self.settings
        if settings.masks:
            check_masks(settings.masks, widths(self.model))
        self.bound = self.prepare(self.prune_config)
        if self.encoded is None:
            return
        variants = (DENSE, PRUNED) if self.prunes else (DENSE,)
        fed = self.encoded[1].shape[1] + settings.tokens - 1  # the last token is never fed
        self.saver = saver(settings, self.model, self.path, fed)
        if self.saver is not None:
            self.saver.announce(len(variants), self.ui.say)
        self.timing["dense_by"] = OUR_KERNELS if self._own_kernels else TRANSFORMERS
        for variant in variants:
            yield Unit(f"generation/{variant}", f"the {variant} text", variant)
        if settings.tokens > 1:
            yield Unit("times", "timing")

    def prepare(self, config: PruneConfig | None) -> BoundMethod:
        """A configuration with what it learns of the model."""
        settings = self.settings
        return prepare(
            self.model,
            self.tokenizer,
            config,
            settings.calibration,
            settings.cache_dir,
            self.ui.say,
            masks=None if config is None else self.masks,
        )

    @property
    def _own_kernels(self) -> str | None:
        """The executor by which dense runs too, so that a speed-up is due to pruning alone.

        None: the untouched model, whose kernels are the pruned one's.
        """
        run = self.bound.run()
        executor = str(self.prune_config.executor if run is None else run.executor)
        return None if executor in TORCH_EXECUTORS else executor

    def finished(self, unit: Unit) -> Any:
        """A text, if all of its files are there."""
        if not unit.key.startswith("generation/"):
            return None
        if unit.data == DENSE and self.first is not None and self._shares_dense(self.first):
            return self.first.generations[DENSE]
        files = [] if self.saver is None else [self.saver.path(unit.data)]
        if unit.data == PRUNED:
            files.append(self.path / "masks.safetensors")
            files += [Path(self.settings.trace)] if self.settings.trace else []
        return self.folder.part(unit.key) if all(path.exists() for path in files) else None

    def _shares_dense(self, first: RunStudy) -> bool:
        """Whether the dense text of ``first`` is this run's: same kernels, nothing recorded."""
        return self.saver is None and first._own_kernels == self._own_kernels

    def save(self, unit: Unit, value: Any) -> None:
        """Keep a text; times are measured again."""
        if unit.key.startswith("generation/"):
            super().save(unit, value)

    def compute(self, unit: Unit) -> Any:
        return self._time() if unit.key == "times" else self._generate(unit.data)

    def take(self, unit: Unit, value: Any) -> None:
        """Add a text to generation.jsonl, or the times to timing.json."""
        if unit.key == "times":
            self.timing |= value
        else:
            self.generations[unit.data] = value
            write_lines(self.path / "generation.jsonl", self.generations.values())

    # a text

    def _generate(self, variant: str) -> dict[str, Any]:
        assert self.encoded is not None
        settings, (text, ids) = self.settings, self.encoded
        run = self.bound.run() if variant == PRUNED else None
        method = self._setting(variant)
        self.ui.say(f"--- {words.row_name(method)} ---")
        recorder = MaskRecorder()
        if run is not None:
            run.on_selection = recorder
        with contextlib.ExitStack() as stack:
            stack.enter_context(run or self._dense_run() or contextlib.nullcontext())
            if self.saver is not None:
                stack.enter_context(self.saver.recording(variant, text))
            trace = None
            if settings.trace and run is not None:
                recording = run.trace(settings.trace)
                trace = stack.enter_context(recording)
            generation = generate(
                self.model,
                self.tokenizer,
                ids,
                settings.tokens,
                on_step=lambda step: self.ui.token(step.text),
                temperature=settings.temperature,
                seed=settings.seed,
                run=run,
            )
        self.ui.end_text(generation.text)
        if not generation.text:
            self.ui.say("the model ended its text at once; a model that answers needs --chat")
        if trace is not None:
            size = bytes_text(trace.nbytes)
            self.ui.say(f"trace of {trace.tokens} tokens: {settings.trace}, {size}")
        return {
            "id": "prompt-0",
            "variant": variant,
            **method,
            "prompt": text,
            "text": generation.text,
            **asdict(generation),
            "accounting": None if run is None else self._write_masks(run, recorder),
        }

    def _setting(self, variant: str) -> dict[str, Any]:
        """Method and sparsity of a text."""
        if variant == DENSE:
            return {"method": DENSE, "sparsity": 0.0}
        return {"method": self.bound.method, "sparsity": self.bound.requested}

    def _dense_run(self) -> Run | None:
        """What runs the model dense by the kernels of the pruned text; None: nothing is needed."""
        executor = self._own_kernels
        if executor is None:
            return None
        return Run(self.model, PruneConfig.build(DENSE, executor=executor))

    def _write_masks(self, run: Run, recorder: MaskRecorder) -> dict[str, Any]:
        """Write the files of the pruned text; returns its accounting."""
        settings = self.settings
        write_masks(self.path, recorder, run, str(checkpoint_facts(self.model).get("name")))
        write_drift(self.path, run.drift_checks)
        if settings.save_layer_topk:
            counts = [layer.kept for layer in run.report().layers]
            note = f"neurons kept per layer; {settings.experiment}"
            write_table(Path(settings.save_layer_topk), counts, note)
        if settings.verbose:
            for remask in run.remasks:
                self.ui.say(
                    f"mask at step {remask.step} ({remask.cause}): keeps {list(remask.kept)}"
                )
            for check in run.drift_checks:
                self.ui.say(f"window {check.window}: {check.similarity:.3f} ({check.state})")
        return run.report().to_dict()

    # the times

    def _time(self) -> dict[str, Any]:
        """Keys of timing.json, measured on the end of the dense text."""
        assert self.encoded is not None
        tokens = min(pace.STEPS, self.settings.tokens - 1)
        more = self.generations[DENSE]["token_ids"]
        ids = pace.text_end(self.encoded[1], more, tokens, context_length(self.model))
        sizes = {DENSE: describe(self.model).parameter_bytes}
        decodings = {DENSE: pace.Decoding(self.model, self._dense_run)}
        if self.prunes:  # masks at once: what is timed is pruned
            make = partial(self.bound.run, likelihood=True)
            decodings[PRUNED] = pace.Decoding(self.model, make)
        clocks: dict[str, pace.Clock] = {
            name: partial(decoding.seconds, ids, tokens) for name, decoding in decodings.items()
        }
        with self.ui.status(f"timing {', '.join(decodings)}, interleaved"):
            reference = self.add_clocks(clocks, sizes, ids, tokens)
            repetitions = pace.interleave(clocks)
        limit = decodings[PRUNED].limit if self.prunes else None
        document = pace.timing_document(repetitions, limit, reference)
        return {**document, "weight_bytes_per_token": sizes}

    def add_clocks(
        self, clocks: dict[str, pace.Clock], sizes: dict[str, int], ids: Tensor, tokens: int
    ) -> str | None:
        """Add what else is timed, and its bytes per token; returns the name of the reference."""
        return None

    # what is made of them

    @property
    def accounting(self) -> dict[str, Any] | None:
        """``RunReport.to_dict()`` of the pruned text, if there is one."""
        accounting: dict[str, Any] | None = self.generations.get(PRUNED, {}).get("accounting")
        return accounting

    def summarise(self) -> dict[str, Any]:
        self.timing["time_to_first_token_s"] = {
            name: next(iter(text["seconds"]), None) for name, text in self.generations.items()
        }
        counted, sizes = self.accounting, self.timing.get("weight_bytes_per_token")
        if counted and sizes:
            saves = counted["executor"] != "masked"
            sizes[PRUNED] = round(sizes[DENSE] / (counted["bytes_limit"] if saves else 1))
        return {"accounting": counted}

    def result_lines(self) -> Sequence[ResultLine]:
        """Seconds per token of every timing, and the speed-up over dense."""
        each = self.timing.get("seconds_per_token", {})
        lines = [self.line(name, "seconds_per_token", value) for name, value in each.items()]
        if "speed_up" in self.timing:
            facts = {"higher_is_better": True, "error": self.timing["disturbed"]}
            lines.append(self.line(PRUNED, "speed_up", self.timing["speed_up"], **facts))
        return lines

    def line(self, name: str, metric: str, value: float | None, **facts: Any) -> ResultLine:
        """A number of the dense or the pruned text, or of another program's decoding."""
        checkpoint, counted = checkpoint_facts(self.model), {}
        label = name
        if name == PRUNED and self.accounting:
            setting = self._setting(PRUNED)
            label = words.row_name(setting)
            counted = {
                "requested": setting["sparsity"],
                "achieved": self.accounting["achieved_sparsity"],
                "dense_share": self.accounting["dense_token_share"],
                "remasks": self.accounting["remasks"],
            }
        return ResultLine(
            label=label,
            method=self.bound.method if name == PRUNED else DENSE,
            model=str(checkpoint.get("name")),
            task="generation",
            metric=metric,
            value=value,
            seed=self.settings.seed,
            dtype=checkpoint.get("dtype"),
            weights=checkpoint.get("weights"),
            **counted,
            **facts,
        )

    def tables(self) -> list[Table]:
        if self.accounting is None:
            return []
        return [report.accounting_table({PRUNED: self.accounting}, self.timing)]

    def sentences(self) -> list[str]:
        return [words.bytes_sentence(self.accounting)] if self.accounting else []

    def view(self) -> plots.RunView:
        """What pictures and page are made of."""
        texts, checks = tuple(self.generations.values()), read_checks(self.path)
        return plots.RunView(self.config, texts, self.timing, checks)

    def figures(self) -> Iterable[Plot]:
        return plots.available(self.view())

    def write_page(self) -> Path:
        return report.write(self.path, self.view())

    def answer(self) -> dict[str, Any]:
        return {
            "folder": str(self.path),
            "config": self.config,
            "generation": list(self.generations.values()),
            "timing": self.timing,
        }


def run_each(settings: RunSettings, ui: Ui, fresh: bool = False) -> list[RunStudy]:
    """One run for each method and sparsity of ``settings``; the model is loaded once."""
    studies: list[RunStudy] = []
    for one in settings.each():
        study = RunStudy(one, ui, studies[0] if studies else None)
        studies.append(study)  # all of them first: none computes where another is refused
    for study in studies:
        run_study(study, fresh)
    if len(studies) > 1:
        ui.table(report.settings_table([(one.accounting, one.timing) for one in studies]))
    return studies


def run_job(settings: RunSettings, ui: Ui, fresh: bool = False) -> RunStudy:
    """Generate the texts that ``settings`` describe; returns the finished study."""
    return run_study(RunStudy(settings, ui), fresh)
