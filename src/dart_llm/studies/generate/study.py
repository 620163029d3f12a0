"""The study ``run``: continue a prompt dense and pruned, and report accounting and times."""

from __future__ import annotations

import contextlib
import hashlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
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
from dart_llm.experiments.stats import judge
from dart_llm.experiments.store import ResultLine
from dart_llm.experiments.study import Study, Unit
from dart_llm.experiments.timing import WARM, Make, repetition
from dart_llm.files import write_lines, write_text
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
from dart_llm.session.run import BoundMethod, Run, is_untouched, prepare
from dart_llm.session.trace import check_traceable
from dart_llm.studies.generate import report
from dart_llm.studies.generate.report import DENSE, PRUNED
from dart_llm.studies.generate.settings import RunSettings

# Reading and tokenising the prompt.

MMLU_DEFAULT_TOKENS = 1024
"""The default number of tokens in a prompt of MMLU questions."""


def read_prompt(settings: RunSettings) -> str:
    """The prompt; "" for MMLU questions, because selecting them needs the tokenizer.

    Raises ``ConfigError`` if the prompt is missing or empty, or no tokens are to be generated.
    """
    if not settings.tokens:
        raise ConfigError(
            "nothing to do: give --prompt TEXT and --generation N (in the scripts GENERATION=N); "
            "dart-llm perplexity, eval and summarize measure a model without a prompt"
        )
    if settings.mmlu_subjects:
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
    """The final prompt and its ids [1, T]; ``config``: the model's configuration.

    Raises ``ConfigError`` if prompt and generated text do not fit the context.
    """
    limit = configured_context(config)
    if subjects := settings.mmlu_subjects:
        length = settings.prompt_length or min(limit or MMLU_DEFAULT_TOKENS, MMLU_DEFAULT_TOKENS)
        prompt = mmlu_prompt(subjects, tokenizer, length)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    ids = encode_prompt(tokenizer, prompt, has_template if settings.chat is None else settings.chat)
    if settings.prompt_length and ids.shape[1] > settings.prompt_length:
        ids = ids[:, -settings.prompt_length :]
    if limit and ids.shape[1] + settings.tokens > limit:
        raise ConfigError(
            f"the prompt has {ids.shape[1]} tokens and {settings.tokens} are to be generated, but "
            f"the model's context is {limit}: shorten the prompt with --prompt-length, or generate "
            "fewer tokens"
        )
    return prompt, ids


# Times per token, from short interleaved repetitions on the same text.  Interleaving spreads the
# slowdown by other work on the machine over all decodings.

REPETITIONS, FEWEST_REPETITIONS = 8, 4
"""A timing has ``REPETITIONS`` repetitions; on a slow machine, at least ``FEWEST_REPETITIONS``."""

PATIENCE_S = 15.0
"""After this many seconds no repetition begins, once there are ``FEWEST_REPETITIONS``."""

STEPS, TAIL = 8, 16
"""A repetition reads at most ``TAIL`` tokens, then times the decoding of at most ``STEPS``."""

Clock = Callable[[], float]
"""A function that times a repetition and returns seconds per token."""


@dataclass
class Decoding:
    """A clock: a call decodes after ``ids`` [1, T] and times the last ``tokens`` tokens.

    ``make``: a function that returns the run to attach, or None for the untouched model.
    """

    model: Any
    ids: Tensor
    tokens: int
    make: Make = lambda: None
    limit: float | None = field(default=None, init=False)
    """Bytes read per dense token, divided by bytes per timed token; None before the first call."""

    def __call__(self) -> float:
        run = self.make()
        sample = repetition(self.model, self.ids.to(self.model.device), self.tokens, lambda: run)
        if run is not None:
            counted = run.report()
            self.limit = 1.0 if counted.executor == "masked" else counted.bytes_limit
        return statistics.fmean(sample["steps_s"])


def interleave(clocks: Mapping[str, Clock]) -> dict[str, list[float]]:
    """Each clock's seconds per token in every repetition; odd repetitions run in reverse order."""
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    began = time.perf_counter()
    for number in range(REPETITIONS):
        if number >= FEWEST_REPETITIONS and time.perf_counter() - began > PATIENCE_S:
            break
        for name in list(clocks) if number % 2 == 0 else reversed(list(clocks)):
            seconds[name].append(clocks[name]())
    return seconds


def text_end(ids: Tensor, more: Sequence[int], tokens: int, context: int | None) -> Tensor:
    """The end of the text ``ids`` [1, T] + ``more``, at most ``TAIL`` tokens.

    It is shorter if the model's context has no room for so many and ``tokens`` timed tokens.
    """
    text = torch.cat([ids, torch.tensor([more], dtype=ids.dtype, device=ids.device)], dim=1)
    room = TAIL if context is None else min(TAIL, max(1, context - 1 - WARM - tokens))
    return text[:, -room:]


def timing_document(
    repetitions: Mapping[str, Sequence[float]], limit: float | None, reference: str | None
) -> dict[str, Any]:
    """Entries of timing.json: ``repetitions``, their medians, and speed-ups.

    The machine's speed drifts between repetitions, but ratios within a repetition hardly change.
    The speed-up is therefore computed from these ratios, and the pruned time is the median dense
    time divided by the speed-up.  The speed-up over dense is at the top level, with the keys of
    ``SpeedUp.to_dict``.  ``over_transformers``: speed-ups over ``reference``, without bandwidth
    limits, because the weights of ``reference`` may have another format.
    """
    medians = {name: statistics.median(seconds) for name, seconds in repetitions.items()}
    pruned = {}
    if PRUNED in repetitions:
        pruned = judge(repetitions[DENSE], repetitions[PRUNED], limit).to_dict()
        if pruned["speed_up"]:
            medians[PRUNED] = medians[DENSE] / pruned["speed_up"]
    document: dict[str, Any] = {
        "repetitions": {name: list(seconds) for name, seconds in repetitions.items()},
        "seconds_per_token": medians,
        **pruned,
    }
    if reference is not None:
        base = repetitions[reference]
        others = {name: seconds for name, seconds in repetitions.items() if name != reference}
        over = {name: judge(base, seconds).to_dict() for name, seconds in others.items()}
        if pruned:  # (dense over reference) x (pruned over dense), so that the ratios agree
            disturbed = over[DENSE]["disturbed"] or pruned["disturbed"]
            ratio = None if disturbed else over[DENSE]["speed_up"] * pruned["speed_up"]
            over[PRUNED] = {**over[DENSE], "speed_up": ratio, "disturbed": disturbed}
        document["over_transformers"] = over
    return document


TORCH_EXECUTORS = ("auto", "masked", "compact")
"""Executors with the same kernels as the untouched model."""


class RunStudy(Study[RunSettings]):
    """The study ``run``; its units are the dense text, the pruned text, and their times."""

    kind = "run"
    bound: BoundMethod
    """The configuration bound to the model, with its learned statistics."""

    def __init__(self, settings: RunSettings, ui: Ui) -> None:
        super().__init__(settings, ui)
        self.prune_config = settings.prune_config()
        self.prompt = read_prompt(settings)
        self.masks = read_masks(settings.masks) if settings.masks else None
        self.encoded: tuple[str, Tensor]
        """The prompt's text and its ids [1, T]."""
        self.generations: dict[str, dict[str, Any]] = {}
        """Lines of generation.jsonl, by variant."""
        if settings.trace:
            if not self.prunes:
                raise ConfigError(
                    "--trace records which neurons run in a pruned text, but method "
                    f"{self.prune_config.method} removes none: give a method and a sparsity"
                )
            check_traceable(self.prune_config)

    @property
    def prunes(self) -> bool:
        """Whether the study generates a pruned text."""
        return self.masks is not None or not is_untouched(self.prune_config)

    def inputs(self) -> dict[str, Any]:
        """Digests of the checkpoint, of files that may change, and of the prompt."""
        digests = Digests().of_settings(self.settings)
        if self.prompt:
            data = self.prompt.encode("utf-8", "surrogatepass")
            digests["prompt"] = hashlib.sha256(data).hexdigest()
        return digests

    def check(self, tokenizer: Any, config: Any) -> None:
        self.encoded = encode(self.settings, self.prompt, config, tokenizer)

    def units(self) -> Iterator[Unit]:
        settings = self.settings
        if settings.masks:
            check_masks(settings.masks, widths(self.model))
        self.bound = self.prepare(self.prune_config)
        variants = (DENSE, PRUNED) if self.prunes else (DENSE,)
        fed = self.encoded[1].shape[1] + settings.tokens - 1  # the last token is never an input
        self.saver = saver(settings, self.model, self.path, fed)
        if self.saver is not None:
            self.saver.announce(len(variants), self.ui.say)
        self.timing["dense_by"] = OUR_KERNELS if self._dense_executor else TRANSFORMERS
        for variant in variants:
            yield Unit(f"generation/{variant}", f"the {variant} text", variant)
        if settings.tokens > 1:
            yield Unit("times", "timing")

    def prepare(self, config: PruneConfig | None) -> BoundMethod:
        """A configuration bound to the model, with its learned statistics."""
        settings = self.settings
        where = (settings.calibration, settings.cache_dir, self.ui.say)
        masks = None if config is None else self.masks
        return prepare(self.model, self.tokenizer, config, *where, masks=masks)

    @property
    def _dense_executor(self) -> str | None:
        """The executor of the dense text, whose kernels are those of the pruned text.

        A speed-up is then due only to pruning.  None if these are the kernels of the untouched
        model, which then generates the dense text.
        """
        run = self.bound.run()
        executor = str(self.prune_config.executor if run is None else run.executor)
        return None if executor in TORCH_EXECUTORS else executor

    def finished(self, unit: Unit) -> Any:
        """A stored text, if all its files exist; times are always measured again."""
        if not unit.key.startswith("generation/"):
            return None
        files = [] if self.saver is None else [self.saver.path(unit.data)]
        if unit.data == PRUNED:
            files.append(self.path / "masks.safetensors")
            files += [Path(self.settings.trace)] if self.settings.trace else []
        return self.folder.part(unit.key) if all(path.exists() for path in files) else None

    def save(self, unit: Unit, value: Any) -> None:
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
        settings, (text, ids) = self.settings, self.encoded
        run = self.bound.run() if variant == PRUNED else None
        method = self._setting(variant)
        self.ui.say(f"--- {words.row_name(method)} ---")
        recorder, trace = MaskRecorder(), None
        if run is not None:
            run.on_selection = recorder
        with contextlib.ExitStack() as stack:
            stack.enter_context(run or self._dense_run() or contextlib.nullcontext())
            if self.saver is not None:
                stack.enter_context(self.saver.recording(variant, text))
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
            self.ui.say("the model generated no text; a chat model needs --chat")
        if trace is not None:
            size = bytes_text(trace.nbytes)
            self.ui.say(f"trace of {trace.tokens} tokens: {settings.trace}, {size}")
        accounting = None if run is None else self._write_masks(run, recorder)
        fixed = {"id": "prompt-0", "variant": variant, **method, "prompt": text}
        return {**fixed, "text": generation.text, **asdict(generation), "accounting": accounting}

    def _setting(self, variant: str) -> dict[str, Any]:
        """Method and sparsity of the dense or pruned text."""
        if variant == DENSE:
            return {"method": DENSE, "sparsity": 0.0}
        return {"method": self.bound.method, "sparsity": self.bound.requested}

    def _dense_run(self) -> Run | None:
        """A dense run with the kernels of the pruned text; None if these are the model's."""
        executor = self._dense_executor
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
            for mask in run.remasks:
                self.ui.say(f"mask at step {mask.step} ({mask.cause}): keeps {list(mask.kept)}")
            for check in run.drift_checks:
                self.ui.say(f"window {check.window}: {check.similarity:.3f} ({check.state})")
        return run.report().to_dict()

    # the times

    def _time(self) -> dict[str, Any]:
        """Entries of timing.json, measured on the end of the dense text."""
        tokens = min(STEPS, self.settings.tokens - 1)
        more = self.generations[DENSE]["token_ids"]
        ids = text_end(self.encoded[1], more, tokens, context_length(self.model))
        sizes = {DENSE: describe(self.model).parameter_bytes}
        clocks: dict[str, Clock] = {DENSE: Decoding(self.model, ids, tokens, self._dense_run)}
        # ``likelihood`` applies masks at once, so that the timed tokens run pruned
        pruned = Decoding(self.model, ids, tokens, lambda: self.bound.run(likelihood=True))
        if self.prunes:
            clocks[PRUNED] = pruned
        with self.ui.status(f"timing {', '.join(clocks)}, interleaved"):
            reference = self.add_clocks(clocks, sizes, ids, tokens)
            repetitions = interleave(clocks)
        document = timing_document(repetitions, pruned.limit, reference)
        return {**document, "weight_bytes_per_token": sizes}

    def add_clocks(
        self, clocks: dict[str, Clock], sizes: dict[str, int], ids: Tensor, tokens: int
    ) -> str | None:
        """Add further timings and their bytes per token; returns the reference's name, if any."""
        return None

    # results

    @property
    def accounting(self) -> dict[str, Any] | None:
        """``RunReport.to_dict()`` of the pruned text; None without a pruned text."""
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
        times = self.timing.get("seconds_per_token", {})
        lines = [self.line(name, "seconds_per_token", value) for name, value in times.items()]
        if "speed_up" in self.timing:
            facts = {"higher_is_better": True, "error": self.timing["disturbed"]}
            lines.append(self.line(PRUNED, "speed_up", self.timing["speed_up"], **facts))
        return lines

    def line(self, name: str, metric: str, value: float | None, **facts: Any) -> ResultLine:
        """A result line of the dense or pruned text, or of another program's decoding."""
        checkpoint, label = checkpoint_facts(self.model), name
        if name == PRUNED and self.accounting:
            setting = self._setting(PRUNED)
            label = words.row_name(setting)
            facts |= {"requested": setting["sparsity"], **accounting_fields(self.accounting)}
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
            **facts,
        )

    def tables(self) -> list[Table]:
        return [report.results_table(self.timing, self.accounting)] if self.accounting else []

    def sentences(self) -> list[str]:
        return [words.bytes_sentence(self.accounting)] if self.accounting else []

    def view(self) -> report.RunView:
        """The data for plots and page."""
        texts, checks = tuple(self.generations.values()), read_checks(self.path)
        return report.RunView(self.config, texts, self.timing, checks)

    def figures(self) -> Iterable[Plot]:
        return report.pictures(self.view())

    def write_page(self) -> Path:
        write_text(self.path / "report.html", report.render(self.view()))
        return self.path / "report.html"

    def answer(self) -> dict[str, Any]:
        texts = list(self.generations.values())
        fixed = {"folder": str(self.path), "config": self.config}
        return {**fixed, "generation": texts, "timing": self.timing}


def accounting_fields(accounting: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ``ResultLine`` that come from an accounting."""
    return {
        "achieved": accounting.get("achieved_sparsity"),
        "dense_share": accounting.get("dense_token_share"),
        "remasks": accounting.get("remasks"),
    }
