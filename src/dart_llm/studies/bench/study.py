"""The study ``bench speed``, and the base class that it shares with ``tune``.

Both commands time candidates.  A candidate is a weight format of the model together with a pruning
configuration.  "Dense (native)" is the dense model with dart-llm's native kernels.  Each repetition
runs every candidate once, in a new random order, so that changes in the machine's speed affect all
candidates alike.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dart_llm.cache import cache_folder
from dart_llm.data.documents import check_disjoint
from dart_llm.errors import ConfigError, DartError
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultLine
from dart_llm.experiments.study import Study, Unit, load_model
from dart_llm.experiments.timing import (
    REFERENCE_FLAGS,
    WARM,
    Make,
    ReferenceFile,
    Sample,
    cache_bytes,
    prompt_ids,
    reference_repetition,
    repetition,
    require_bench,
    shuffled,
)
from dart_llm.experiments.variants import DENSE
from dart_llm.files import file_sha256
from dart_llm.models.cached import MEMBER, default_folder
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length, describe
from dart_llm.models.gguf_file import ROUNDED
from dart_llm.models.loading import is_default
from dart_llm.native import build
from dart_llm.native.memory import read_speed
from dart_llm.pruning import registry
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import TOKEN_RULES
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.reporting.words import TRANSFORMERS
from dart_llm.session.run import Run, prepare
from dart_llm.studies.bench import report
from dart_llm.studies.bench.rows import speed_document
from dart_llm.studies.bench.settings import (
    LLAMA_CPP,
    Candidate,
    SpeedSettings,
    TuneSettings,
    is_file,
    make_candidate,
    speed_grid,
)

B = TypeVar("B", bound=SpeedSettings | TuneSettings)

WARMUP_TOKENS = 4
"""The number of tokens that a candidate decodes before the first repetition, to warm up."""

CACHE_BYTES = 2
"""Bytes per number in llama.cpp's float16 KV cache."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in one weight format.

    ``weights``: the setting with which the model was loaded (``auto``, a format or a GGUF file);
    None if the caller loaded it.
    """

    weights: str | None
    model: Any
    tokenizer: Any

    @property
    def quantised_as(self) -> str | None:
        """How weights are quantised, e.g. "Q4_1 as in the file"; None if they are not quantised."""
        quantised_as: str | None = checkpoint_facts(self.model).get("weights")
        return quantised_as

    @property
    def dtype(self) -> str:
        """The dtype of the weights that are not quantised."""
        return str(checkpoint_facts(self.model)["dtype"])

    @property
    def byte_ratio(self) -> float:
        """The bytes that the weights occupy, divided by the bytes that reports count for them.

        Reports count quantised weights as they are stored, and all other weights as bfloat16.
        """
        return 1.0 if self.quantised_as else self.model.dtype.itemsize / 2

    @property
    def kind(self) -> str:
        """GGUF's name of the quantisation, such as Q8_0; for unquantised weights, the dtype."""
        if self.weights in ROUNDED:
            return str(self.weights).upper()
        quantisation = checkpoint_facts(self.model)["file_quantisation"]
        return str(quantisation) if self.quantised_as else self.dtype


def native_dense(model: Any, config: PruneConfig) -> PruneConfig:
    """``config`` with the executor ``native``, or unchanged if ``native`` cannot run.

    A configuration that names an executor stays unchanged; raises ``DartError`` if that executor
    cannot run.
    """
    has_executor = config.executor != "auto"
    native = config if has_executor else config.replace({"executor": "native"})
    try:
        Run(model, native)
    except DartError:
        if has_executor:
            raise
        return config
    return native


class BenchStudy(Study[B]):
    """A study that times candidates in repetitions.

    ``grid``: the candidates known before a model is loaded; they are part of the study's
    identity.  ``texts``: names of the scored texts, which must differ from the calibration text.
    """

    def __init__(
        self, settings: B, ui: Ui, grid: Sequence[Candidate], texts: Mapping[str, None]
    ) -> None:
        super().__init__(settings, ui)
        self.grid = grid
        if any(row.config and row.config.calibration is not None for row in grid):
            check_disjoint(settings.calibration, texts)
        self.models: dict[str, LoadedModel] = {}
        """The loaded models, by the name of their weight format."""
        self.makers: dict[str, Make] = {}
        """Functions that make the candidates' runs, by label."""
        self.configs: dict[str, PruneConfig] = {}
        """The configurations that the candidates run with, by label."""
        self.left_out: dict[str, str] = {}
        """The reasons why candidates cannot run, by label."""
        self.timed: list[Candidate] = []
        self.repetitions: list[dict[str, Any]] = []
        self.advance: Callable[[int], Any]

    def inputs(self) -> Mapping[str, Any]:
        """Digests of the model, the calibration text and plug-ins."""
        digests = Digests()
        settings = self.settings.model_copy(update={"weights": self.stated_format})
        files = digests.of_files(DENSE, settings.calibration)
        return {**digests.of_model(settings), **files, **registry.plugin_digest()}

    @property
    def stated_format(self) -> str | None:
        """The weight format for the model's digests; ``dense`` if the study has several formats."""
        return DENSE

    def requested(self) -> dict[str, Any]:
        excluded = {*self.shown, *self.settings.UNUSED, "save"}
        return self.settings.model_dump(mode="json", exclude=excluded)

    def identify(self) -> dict[str, Any]:
        configs = {row.label: row.config.to_dict() for row in self.grid if row.config}
        return {**super().identify(), "candidates": configs}

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.settings.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def set_models(self, models: dict[str, LoadedModel], main: str, tokens: int) -> None:
        """Set ``models``, by format; the model in the format ``main`` becomes the study's model.

        Raises ``ConfigError`` if the model's context is shorter than ``tokens`` tokens.
        """
        self.models = models
        self.model, self.tokenizer = models[main].model, models[main].tokenizer
        context = context_length(self.model)
        if context is not None and tokens > context:
            raise ConfigError(
                f"prompt and decoded tokens need a context of {tokens} tokens, but that of "
                f"{self.settings.name} is {context}: give fewer prompt or decoded tokens"
            )

    def make_ready(self, candidate: Candidate) -> bool:
        """Prepare the candidate's run; if it cannot run, record the reason and return False."""
        try:
            self.makers[candidate.label] = self.maker(candidate)
        except DartError as error:
            self.left_out[candidate.label] = str(error)
            return False
        return True

    def maker(self, candidate: Candidate) -> Make:
        """A function that makes the candidate's run; raises ``DartError`` if it cannot run."""
        loaded, config = self.models[candidate.weights], candidate.config
        assert config is not None
        if candidate.dense:
            self.configs[candidate.label] = dense = native_dense(loaded.model, config)
            return lambda: Run(loaded.model, dense)
        self.configs[candidate.label] = config
        if config.calibration is None:
            Run(loaded.model, config)  # may raise, before statistics are learned
        learning = (self.settings.calibration, self.settings.cache_dir, self.ui.say)
        prepared = prepare(loaded.model, loaded.tokenizer, config, *learning)
        prepared.run()
        return prepared.run

    # repetitions

    def timed_units(
        self, candidates: Sequence[Candidate], kind: str = "repetition"
    ) -> Iterator[Unit]:
        """Yield one unit per repetition; if any is unfinished, first warm the candidates up."""
        self.timed = list(candidates)
        units = [Unit(f"{kind} {n}", data=n) for n in range(self.settings.repeats)]
        is_unfinished = any(self.finished(unit) is None for unit in units)
        warmed = [row for row in candidates if is_unfinished and row.file is None]
        total = len(warmed) + len(units) * len(candidates)
        with self.ui.progress("decoding", total) as self.advance:
            for candidate in warmed:
                self.time(candidate, WARMUP_TOKENS, 0)
                self.advance(1)
            for unit in units:
                if self.finished(unit) is not None:
                    self.advance(len(candidates))
                yield unit

    def repetition(self, number: int, tokens: int) -> dict[str, Any]:
        """Time all candidates once: their ``samples`` by label, and the ``order`` of the labels."""
        candidates, samples = {row.label: row for row in self.timed}, {}
        order = shuffled(list(candidates), self.settings.seed, number)
        for label in order:
            samples[label] = self.time(candidates[label], tokens, number)
            self.advance(1)
        return {"order": order, "samples": samples}

    def time(self, candidate: Candidate, tokens: int, number: int) -> Sample:
        """Decode with a candidate and return its sample; ``tokens``: how many tokens to time."""
        model = self.models[candidate.weights].model
        return repetition(model, self.prompt(number), tokens, self.makers[candidate.label])

    def prompt(self, number: int) -> Tensor:
        """The prompt ids of repetition ``number``, [1, P]."""
        raise NotImplementedError

    def samples(self, label: str) -> list[Sample]:
        """A candidate's samples in all repetitions."""
        return [repetition["samples"][label] for repetition in self.repetitions]

    def facts(self) -> dict[str, Any]:
        """The entries that speed.json and tune.json share."""
        checkpoint = checkpoint_facts(self.model)
        names = ("prompt_tokens", "tokens", "repeats", "seed")
        formats = {
            name: {"stored_as": loaded.quantised_as or loaded.dtype}
            for name, loaded in self.models.items()
        }
        return {
            "model": self.settings.name,
            "checkpoint": {name: v for name, v in checkpoint.items() if name != "path"},
            "kernels": None if build.why_not() else build.kernels_in_use(),
            "machine": self.config["machine"],
            "versions": self.config["versions"],
            **{name: getattr(self.settings, name) for name in names},
            "formats": formats,
            "left_out": self.left_out,
        }

    def result_lines(self) -> Sequence[ResultLine]:
        packed = {name: m.kind.lower() for name, m in self.models.items() if m.quantised_as}
        return report.result_lines(self.kind, self.summary, packed)

    def tables(self) -> Sequence[Table]:
        return [report.table(self.kind, self.summary)]


class SpeedStudy(BenchStudy[SpeedSettings]):
    """The study ``bench speed``; a unit is a repetition, which times all candidates once.

    Raises ``ConfigError`` and ``UnknownName`` before the model is loaded, if possible.
    """

    kind = "speed"
    document = "speed.json"

    def __init__(self, settings: SpeedSettings, ui: Ui) -> None:
        super().__init__(settings, ui, speed_grid(settings, ""), {})
        self.bench = require_bench() if settings.reference else ""
        """The path of llama-bench; "" if llama.cpp is not timed."""
        self.files: dict[str, ReferenceFile] = {}
        """The files that llama-bench reads, by the label of their row."""
        self.ids = torch.empty(0)
        """The prompt's ids, [1, P]."""
        self.candidates: list[Candidate] = []
        """The candidates that can run with this model on this machine, in row order."""
        self.bases: dict[str, str] = {}
        """Maps a format to the label of the row for comparison: dense (native), or
        transformers if dense (native) cannot run."""

    @property
    def notes(self) -> list[str]:
        """Notes on skipped candidates, and on candidates whose method has no native kernel."""
        tokens = {row.label: row.config.token for row in self.candidates if row.config}
        slow = [n for n, rule in tokens.items() if rule and not TOKEN_RULES.get(rule.rule).native]
        note = f"{'; '.join(slow)}: computed in PyTorch with any executor, including all neurons; "
        note += "compare their quality at equal bytes, not their speed"
        notes = report.left_out(self.left_out)
        return [*notes, note] if slow else notes

    @property
    def stated_format(self) -> str | None:
        (*formats,) = self.settings.weights
        return formats[0] if len(formats) == 1 and not is_file(formats[0]) else DENSE

    def inputs(self) -> Mapping[str, Any]:
        paths = [Path(name).expanduser() for name in self.settings.reference_file or ()]
        paths += self.settings.gguf_files
        return {**super().inputs(), **{f"file {path}": file_sha256(path) for path in paths}}

    def load(self) -> None:
        """Load the model in every format, and tokenise the prompt.

        If all formats are quantised, the model is also loaded unquantised, for transformers.
        Raises ``ConfigError`` if prompt and decoded tokens exceed the model's context, if two
        formats have the same name, and if the vocabularies of the files differ.
        """
        settings, began = self.settings, time.perf_counter()
        models: dict[str, LoadedModel] = {}
        for weights in settings.weights:
            loaded = self._load(weights)
            name = Path(weights).stem if is_file(weights) else weights
            if weights == "auto":
                name = loaded.kind.lower() if loaded.quantised_as else DENSE
            if name in models:
                raise ConfigError(f"--weights has two formats named {name}: rename a file")
            models[name] = loaded
        self.bases = dict.fromkeys(models, TRANSFORMERS)
        self.main = DENSE if DENSE in models else next(iter(models))
        if all(loaded.quantised_as for loaded in models.values()):
            models[DENSE] = self._load(DENSE)
        vocabularies = {n: m.model.config.get_text_config().vocab_size for n, m in models.items()}
        if len(set(vocabularies.values())) > 1:
            sizes = ", ".join(f"{name} ({size:,})" for name, size in vocabularies.items())
            raise ConfigError(f"the vocabularies differ: {sizes}; give files of the same model")
        self.set_models(models, self.main, settings.prompt_tokens + settings.tokens + WARM)
        if self.bench:
            self.find_files()
        self.timing["load_s"] = time.perf_counter() - began
        self.ids = prompt_ids(self.model, self.tokenizer, settings.prompt_tokens)

    def _load(self, weights: str) -> LoadedModel:
        """Load the model in the format ``weights``, or the GGUF file that replaces the model."""
        overrides = {"weights": weights}
        if is_file(weights):
            overrides = {"weights": "file", "model": weights}
        settings = self.settings.model_copy(update=overrides)
        return LoadedModel(weights, *load_model(settings, self.ui)[:2])

    def find_files(self) -> None:
        """Set the GGUF files that llama.cpp runs, each with the flags in ``REFERENCE_FLAGS``.

        These are given by ``--reference-file``, by default by ``--model`` and ``--weights``.
        Raises ``ConfigError`` if there are none.
        """
        settings = self.settings
        paths = [Path(name).expanduser() for name in settings.reference_file or ()]
        if not paths:
            model = Path(settings.model).expanduser()
            if is_default(settings.model):
                folder = default_folder(cache_folder(settings.cache_dir), progress=self.ui.say)
                model = folder / Path(MEMBER).name
            paths = [path for path in (model, *settings.gguf_files) if path.is_file()]
        if not paths:
            raise ConfigError(
                f"{settings.name} is not a GGUF file, which {LLAMA_CPP} needs: give a GGUF file as "
                "--model or --reference-file"
            )
        files = [ReferenceFile.of(path) for path in dict.fromkeys(paths)]
        kinds = [file.kind for file in files]
        names = [f.kind if kinds.count(f.kind) == 1 else f.path.stem for f in files]
        self.files = {
            f"{LLAMA_CPP} {name}{end}": replace(file, flags=flags)
            for name, file in zip(names, files, strict=True)
            for end, flags in REFERENCE_FLAGS.items()
        }

    def find_candidates(self) -> None:
        """Set the candidates in row order: transformers, the rows of each format, llama.cpp."""
        on_gpu = torch.device(self.model.device).type == "cuda"
        executor = {"executor": "cuda" if on_gpu else "native"}
        unquantised = next(name for name, loaded in self.models.items() if not loaded.quantised_as)
        self.candidates = [Candidate(TRANSFORMERS, weights=unquantised)]
        self.makers[TRANSFORMERS] = lambda: None
        for name in self.bases:
            loaded = self.models[name]
            stored = name if loaded.quantised_as else loaded.dtype
            suffix = f", {stored}" if len(self.bases) > 1 else ""
            native = make_candidate(PruneConfig.build(DENSE, **executor), name, suffix)
            rows = [native, *speed_grid(self.settings, name, suffix)]
            self.candidates += [row for row in rows if self.make_ready(row)]
            if native.label in self.makers:
                self.bases[name] = native.label
        files = self.files.items()
        self.candidates += [Candidate(n, weights=f.kind, file=f.path) for n, f in files]

    def units(self) -> Iterator[Unit]:
        self.find_candidates()
        for note in self.notes:
            self.ui.say(f"note: {note}")
        yield from self.timed_units(self.candidates)

    def compute(self, unit: Unit) -> dict[str, Any]:
        return self.repetition(unit.data, self.settings.tokens)

    def time(self, candidate: Candidate, tokens: int, number: int) -> Sample:
        before = self._read_speed()
        if candidate.file is None:
            sample = super().time(candidate, tokens, number)
        else:
            threads, prompt = torch.get_num_threads(), self.settings.prompt_tokens
            file = self.files[candidate.label]
            sample = reference_repetition(self.bench, file, threads, prompt, tokens)
        after = self._read_speed()  # other programs change it within seconds
        if before and after:
            sample["read_speed"] = (before + after) / 2
        return sample

    def _read_speed(self) -> float | None:
        """Bytes per second that are read from memory now; None on a GPU or without kernels."""
        on_cpu = torch.device(self.model.device).type == "cpu"
        return read_speed() if on_cpu and not build.why_not() else None

    def take(self, unit: Unit, value: Any) -> None:
        super().take(unit, value)
        self.repetitions.append(value)

    def prompt(self, number: int) -> Tensor:
        return self.ids

    def summarise(self) -> dict[str, Any]:
        facts = self.facts()
        for name, row in facts["formats"].items():
            row |= {"base": self.bases.get(name), "weights": self._sizes(self.models[name].model)}
        file_formats = {path: path.stem for path in self.settings.gguf_files}
        formats = {self.models[name].kind: name for name in reversed(self.bases)}
        reference = {
            label: {
                "file": f.path.name,
                "bytes": f.bytes,
                "format": file_formats.get(f.path, formats.get(f.kind)),
            }
            for label, f in self.files.items()
        }
        position = facts["formats"][self.main]["weights"]["cache_bytes_per_position"]
        facts |= {
            "notes": self.notes,
            "reference": reference,
            "reference_cache_bytes": position * CACHE_BYTES / self.model.dtype.itemsize,
            "main": self.main,
            "base": self.bases[self.main],
            "orders": [repetition["order"] for repetition in self.repetitions],
        }
        samples = {row.label: self.samples(row.label) for row in self.candidates}
        return speed_document(self.candidates, samples, facts)

    def _sizes(self, model: Any) -> dict[str, float]:
        """Bytes of the FFNs, all weights, one KV-cache position and, if screened, the head."""
        share = Run(model, PruneConfig.build(DENSE)).report().ffn_share_of_bytes
        weights = describe(model).parameter_bytes
        sizes = {
            "ffn_bytes": share * weights,
            "weight_bytes": weights,
            "cache_bytes_per_position": cache_bytes(model, self.ids),
        }
        if any(row.config and row.config.screens for row in self.grid):
            sizes["head_bytes"] = model.get_output_embeddings().weight.nbytes
        return sizes

    def figures(self) -> Iterable[Plot]:
        return [report.speed_plot(self.summary)]

    def sentences(self) -> Sequence[str]:
        return [*report.speed_sentences(self.summary), *self.summary["notes"]]
