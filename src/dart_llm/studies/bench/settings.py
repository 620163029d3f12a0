"""The settings of ``bench speed`` and ``tune``, and the candidates of their grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, ClassVar, get_args

from pydantic import AfterValidator, model_validator

from dart_llm.data import documents
from dart_llm.errors import ConfigError, DartError, check_name
from dart_llm.experiments.variants import DENSE, Variant, parse
from dart_llm.files import size_text
from dart_llm.models.gguf_file import ROUNDED, read_gguf
from dart_llm.pruning.config import DEFAULT_METHOD, DEFAULT_SPARSITY, PruneConfig, SelfStatsConfig
from dart_llm.reporting.words import duration, percent
from dart_llm.settings import Fractions, ModelOptions, StudyOptions, Texts, check_removed, setting

STUDY = "Study"

LLAMA_CPP = "llama.cpp"

FORMATS = ("file", "dense", *ROUNDED)
"""Names of weight formats; ``bench speed`` also accepts paths of GGUF files."""

EXECUTORS = tuple(get_args(PruneConfig.model_fields["executor"].annotation))[1:]
"""The names of all executors except ``auto``."""

METHODS = ("dart-token", "dart", "griffin")
"""The methods that ``tune`` tries by default."""

HEADS = ("full", "screened")

Removed = Annotated[Fractions, AfterValidator(check_removed)]


class BenchOptions(StudyOptions, ModelOptions):
    """The settings that both commands share; None means that a setting was not given."""

    UNUSED: ClassVar = ("device_map",)
    KIND: ClassVar[str]

    experiment_name: str | None = setting("Results", "Folder name (default: command and model).")
    variants: str | None = setting(
        STUDY,
        "Also run the variants in this YAML file: LABEL: {SETTING: VALUE} (method: dart if unset).",
    )
    repeats: int = setting(STUDY, "Number of repetitions, in shuffled order.", 5, ge=1)
    threads: int | None = setting(STUDY, "Number of threads (default: torch's).", ge=1, le=4096)
    calibration: str | None = setting(STUDY, "Calibrate on this text, if a method calibrates.")
    heads: Texts = setting(STUDY, "Try these output heads: full,screened (default: by method).", ())

    @model_validator(mode="after")
    def _check_bench(self) -> BenchOptions:
        for head in self.heads:
            check_name("head", head, HEADS)
        self.variant_list()
        return self

    def variant_list(self) -> tuple[Variant, ...]:
        """The methods, then the variants in the YAML file; raises ``ConfigError``."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The model's name in the results: the last part of its path, in lower case."""
        return Path(self.model.rstrip("/")).name.lower()

    @property
    def experiment(self) -> str:
        """The name of the experiment's folder."""
        return self.experiment_name or f"{self.KIND}-{self.name}"


class SpeedSettings(BenchOptions):
    """The settings of ``dart-llm bench speed``."""

    KIND: ClassVar = "speed"

    weights: Texts = setting(  # type: ignore[assignment]
        "Model", f"Formats to time: auto, {', '.join(FORMATS)}; or GGUF files.", ("auto",)
    )
    methods: Texts = setting(
        STUDY, "Time these methods, comma-separated; dense always runs.", (DEFAULT_METHOD,)
    )
    sparsities: Removed = setting(STUDY, "Fractions to remove, e.g. 0.3,0.5.", (DEFAULT_SPARSITY,))
    executors: Texts = setting(STUDY, f"Any of {', '.join(EXECUTORS)}.", ("compact", "native"))
    reference: str | None = setting(STUDY, "If llama.cpp, also time llama-bench (LLAMA_BENCH).")
    reference_file: list[str] | None = setting(
        STUDY, "Time this GGUF file by --reference (repeatable; default: --model and --weights)."
    )
    prompt_tokens: int = setting(STUDY, "Number of tokens in the prompt.", 128, ge=1)
    tokens: int = setting(STUDY, "Timed tokens per repetition, after two untimed.", 128, ge=4)

    @model_validator(mode="after")
    def _check(self) -> SpeedSettings:
        check_name("reference", self.reference, [LLAMA_CPP])
        for weights in self.weights:
            if not is_file(weights):
                check_name("weights", weights, ("auto", *FORMATS, "FILE.gguf"))
        for path in self.gguf_files:
            if not path.is_file():
                raise ConfigError(f"--weights {path} is not a file")
        if self.reference_file and self.reference is None:
            raise ConfigError(f"--reference-file has no effect without --reference {LLAMA_CPP}")
        for file in self.reference_file or ():
            if not Path(file).expanduser().is_file():
                raise ConfigError(f"--reference-file {file} is not a file")
        for executor in self.executors:
            check_name("executor", executor, EXECUTORS)
        for name in ("executors", "sparsities"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is empty: give at least one value")
        self.method_list()
        return self

    def variant_list(self) -> tuple[Variant, ...]:
        common, flags = {"seed": self.seed}, {"executor": "--executors"}
        variants = parse(self.methods, self.variants, common, flags)
        if not variants:
            raise ConfigError("--methods is empty: give at least one method, e.g. dart")
        return tuple(variants)

    @property
    def gguf_files(self) -> list[Path]:
        """The GGUF files among ``weights``."""
        return [Path(weights).expanduser() for weights in self.weights if is_file(weights)]

    def method_list(self) -> list[tuple[str | None, PruneConfig]]:
        """The label and configuration of every variant at every sparsity with every executor.

        ``heads`` repeats them with each head, beginning with the unpruned model (label None) if
        its head is screened.
        """
        cells = list(product(self.variant_list(), self.sparsities, self.executors))
        rows: list[tuple[str | None, PruneConfig]] = []
        for changes in [{"head": head} for head in self.heads] or [{}]:
            if changes.get("head") == SCREENED:
                dense = PruneConfig.build(DENSE, seed=self.seed, **changes)
                rows += [(None, dense.replace({"executor": name})) for name in self.executors]
            rows += [
                (variant.label, variant.at(sparsity, executor=executor, **changes))
                for variant, sparsity, executor in cells
            ]
        return rows


def is_file(weights: str) -> bool:
    """Whether ``weights`` is the path of a GGUF file to load instead of ``model``."""
    return weights.lower().endswith(".gguf")


def first_slices(count: int) -> tuple[int, ...]:
    """Indices of the slices that ``--quick`` scores: the first and the middle of ``count``."""
    return tuple(dict.fromkeys((0, count // 2)))


class TuneSettings(BenchOptions):
    """The settings of ``dart-llm tune``."""

    KIND: ClassVar = "tune"

    weights: Texts = setting(  # type: ignore[assignment]
        "Model", f"Formats to try: {', '.join(FORMATS)} (default: by model and machine).", ()
    )
    max_loss: float = setting(  # at most 1, because a user who gives 2 means 2 %
        STUDY, "Allowed rise of perplexity: 0.02 is 2 %.", 0.02, gt=0, le=1, allow_inf_nan=False
    )
    save: str | None = setting(STUDY, "Also write the recommended setting to this file.")
    quick: bool = setting(
        STUDY,
        "Answer in minutes: measure only dense, a screened head and dart-token at 30 %, on two "
        "slices of each text; the same command without --quick continues from there.",
        False,
    )
    methods: Texts = setting(STUDY, f"Try these, or none (default: {','.join(METHODS)}).", ())
    sparsities: Removed = setting(STUDY, "Fractions to remove (default: by method).", ())
    text: str = setting(STUDY, "Score this text: a file, JSONL or data name.", documents.EMBEDDED)
    slices: int = setting(STUDY, "Number of slices of each of the two texts.", 8, ge=2)
    prompt_tokens: int = setting(STUDY, "Number of prompt tokens per slice.", 64, ge=16)
    tokens: int = setting(STUDY, "Number of scored tokens per slice.", 96, ge=1)
    timed_tokens: int = setting(STUDY, "Number of timed tokens per repetition.", 64, ge=4)
    noise: float = setting(STUDY, "Ignore speed-ups smaller than this fraction.", 0.03, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> TuneSettings:
        for weights in self.weights:
            check_name("weights", weights, FORMATS)
        documents.names(self.text)
        return self

    def variant_list(self) -> tuple[Variant, ...]:
        methods = METHODS if not self.methods and self.variants is None else self.methods
        names = () if methods == ("none",) else methods
        flags = {"executor": "dart-llm bench speed", "head": "--heads"}
        return tuple(parse(names, self.variants, {"seed": self.seed}, flags))

    @property
    def repetition_tokens(self) -> int:
        """The number of timed tokens per repetition."""
        return min(self.timed_tokens, 24) if self.quick else self.timed_tokens


# Candidates, the rows of a grid.

SCREENED = "screened"
"""An output head that computes exact logits only for entries whose rough logit is high."""

LOADED = "own"
"""The name of the weight format of a model that the caller has loaded."""

BY_TOKEN, BY_MASK = (0.3, 0.5, 0.7), (0.2, 0.3)
"""``tune``'s default sparsities: for per-token selection, and for one mask per sequence."""

QUICK_SEQUENCES = 8
"""The number of self-generated sequences from which ``--quick`` learns statistics."""


@dataclass(frozen=True)
class Candidate:
    """A row of a grid: a weight format of the model, with a pruning configuration.

    ``config``: the pruning configuration; None for the untouched model and for llama.cpp.
    ``weights``: the name of the format.  ``method``: the label of the pruning method; None for
    dense.  ``file``: the GGUF file that llama.cpp runs; None for all other rows.
    """

    label: str
    config: PruneConfig | None = None
    weights: str = ""
    method: str | None = None
    file: Path | None = None

    @property
    def executor(self) -> str | None:
        """The name of the executor, or llama.cpp; None for plain transformers."""
        if self.file is not None:
            return LLAMA_CPP
        return None if self.config is None else self.config.executor

    @property
    def dense(self) -> bool:
        """Whether all neurons and all logits are computed."""
        return self.config is None or (self.config.target == 0 and not self.config.screens)


def make_candidate(
    config: PruneConfig, weights: str, suffix: str = "", method: str | None = None
) -> Candidate:
    """A candidate.  ``suffix``: the end of the label (the format, if there are several)."""
    parts = [f"{method} {percent(config.target)}" if method else DENSE]
    parts += [config.executor] if config.executor != "auto" else []
    parts += ["screened head"] if config.head.kind == SCREENED else []
    return Candidate(", ".join(parts) + suffix, config, weights, method)


def speed_grid(settings: SpeedSettings, weights: str, suffix: str = "") -> list[Candidate]:
    """The candidates in one format: every method at every sparsity with every executor."""
    methods = settings.method_list()
    return [make_candidate(config, weights, suffix, label) for label, config in methods]


@dataclass(frozen=True)
class Formats:
    """The weight formats that ``tune`` tries.

    ``every``: all these formats; times are compared with the dense model in the first format.
    ``pruned``: the formats in which pruning methods are tried.  In the others, the model only runs
    dense.
    """

    every: tuple[str, ...]
    pruned: tuple[str, ...]

    @classmethod
    def from_settings(cls, settings: TuneSettings) -> Formats:
        """The requested formats, with methods tried in all of them; by default, the following.

        The defaults for a GGUF file are the file's own format (pruned) and 4 bits (only dense),
        whatever ``dtype`` is.  The defaults for other checkpoints are unquantised (only dense), 8
        bits (pruned) and 4 bits (only dense).  On a machine without kernels for quantised weights,
        the only default for other checkpoints is unquantised (pruned).  Raises ``ConfigError`` or
        ``LoadError``.
        """
        from dart_llm.experiments.cell import requested_format  # imports torch

        if settings.weights:
            return cls(settings.weights, settings.weights)
        as_stored = settings.model_copy(update={"dtype": None, "weights": None})
        if requested_format(as_stored) == "file":
            return cls(("file", "q4_0"), ("file",))
        quantised = tuple(name for name in ("q8_0", "q4_0") if _is_possible(settings, name))
        return cls((DENSE, *quantised), quantised[:1] or (DENSE,))

    @property
    def reference(self) -> str:
        """The format of the dense reference for losses: the first that is not rounded on loading.

        A GGUF file's own format can be the reference: a forward of many tokens dequantises the
        weights and then computes exactly.
        """
        return next((name for name in self.every if name not in ROUNDED), DENSE)


def _is_possible(settings: TuneSettings, weights: str) -> bool:
    """Whether this machine can load the model in the format ``weights``."""
    from dart_llm.experiments.cell import requested_format

    try:
        requested_format(settings.model_copy(update={"weights": weights}))
    except ConfigError:
        return False
    return True


def tune_grid(settings: TuneSettings, formats: Formats) -> tuple[Candidate, ...]:
    """The candidates: dense in every format, then the others in each format to prune.

    The others are dense with a screened head, and every method at every sparsity with every head.
    Raises ``ConfigError`` for a method that cannot run at a sparsity.
    """
    has_several = len({*formats.every, *formats.pruned}) > 1
    suffix = {name: f", weights {name}" if has_several else "" for name in formats.every}
    dense = PruneConfig.build(DENSE, seed=settings.seed)
    grid = [make_candidate(dense, weights, suffix[weights]) for weights in formats.every]
    methods: list[tuple[str | None, PruneConfig]] = [(None, dense)]
    for variant in settings.variant_list():
        defaults = BY_MASK if variant.config.token is None else BY_TOKEN
        for sparsity in settings.sparsities or defaults:
            methods.append((variant.label, variant.at(sparsity)))
    for weights in formats.pruned:
        for method, config in methods:
            screens = method is None or config.token is not None
            for head in settings.heads or ("full", *([SCREENED] if screens else [])):
                if method or head == SCREENED:
                    headed = config.replace({"head": head})
                    grid.append(make_candidate(headed, weights, suffix[weights], method))
    return tuple(grid)


def quick_grid(
    grid: Sequence[Candidate], settings: TuneSettings, formats: Formats
) -> tuple[Candidate, ...]:
    """The candidates of ``grid`` that ``--quick`` measures for a first answer in minutes.

    The first is dense in the first of all formats.  The others are in the first format to prune:
    dense, dense with a screened head, and the first method at its lowest sparsity.  If the user
    named methods, all are measured, each at its lowest sparsity.  Statistics are learned from a
    quarter of the usual text.
    """
    has_methods = settings.methods or settings.variants is not None
    methods = [variant.label for variant in settings.variant_list()][: None if has_methods else 1]
    lowest = {
        method: min(row.config.target for row in grid if row.config and row.method == method)
        for method in methods
    }

    def is_quick(row: Candidate) -> bool:
        if row.weights != formats.pruned[0] or row.config is None:
            return row.dense and row.weights == formats.every[0]
        if row.method is None:
            return True
        return row.config.head.kind == "full" and lowest.get(row.method) == row.config.target

    return tuple(_learning_less(row) for row in grid if is_quick(row))


def _learning_less(candidate: Candidate) -> Candidate:
    """The candidate; if it learns statistics, it is changed to learn them from less text."""
    config = candidate.config
    if config is None or (config.self_stats is None and not config.screens):
        return candidate
    self_stats = {"sequences": QUICK_SEQUENCES} | ({} if config.self_stats else {"tokens": 0})
    return replace(candidate, config=config.replace({"self_stats": self_stats}))


# An estimate of the duration of ``tune``.

SCORE_S, TIME_S, LOAD_S, LEARN_S = 0.08, 0.2, 60.0, 500.0
"""Rough seconds per billion parameters on two CPU cores: to score a token (``SCORE_S``), to time a
token (``TIME_S``), to load a model (``LOAD_S``), and to learn its statistics (``LEARN_S``)."""


def estimate(settings: TuneSettings, grid: Sequence[Candidate], billions: float | None) -> str:
    """A text with the estimated duration and memory; ``billions``: parameters in billions."""
    if billions is None:
        return "the size of the model and the duration are unknown"
    tokens = settings.prompt_tokens + settings.tokens
    slices = len(first_slices(settings.slices)) if settings.quick else settings.slices
    scored = 2 * slices * (len(grid) + 1) * tokens * SCORE_S
    timed = len(grid) * settings.repeats * settings.repetition_tokens * TIME_S
    text = f"roughly {duration(billions * (scored + timed + LOAD_S))} on two CPU cores"
    weight_bytes = sum(2.0 if name == DENSE else 1.0 for name in {row.weights for row in grid})
    if any(row.config and (row.config.self_stats or row.config.screens) for row in grid):
        share = QUICK_SEQUENCES / SelfStatsConfig().sequences if settings.quick else 1.0
        text += f", and {duration(share * billions * LEARN_S)} to learn from self-generated text"
        weight_bytes += 12.0  # a float32 copy of the model, and the memory of a backward pass
    size = weight_bytes * billions * 1e9 + 0.7e9  # 0.7 GB for PyTorch, caches, logits
    return f"{text}; about {size_text(int(size))} of memory"


def model_billions(settings: TuneSettings) -> float | None:
    """The number of parameters in billions; None if it is unknown.

    Reads the GGUF file or the configuration; from the hub, only the configuration is downloaded.
    """
    from dart_llm.experiments.cell import configuration
    from dart_llm.models.loading import is_default

    if is_default(settings.model):
        return 0.135
    path = Path(settings.model).expanduser()
    try:
        if path.is_file():
            return read_gguf(path).float32_bytes / 4 / 1e9
        shape = configuration(settings).get_text_config(decoder=True)
        hidden, ffn = shape.hidden_size, getattr(shape, "intermediate_size", None)
        layer = 4 * hidden**2 + 3 * hidden * (ffn or 4 * hidden)
        return float(shape.num_hidden_layers * layer + hidden * shape.vocab_size) / 1e9
    except (DartError, AttributeError, OSError):
        return None
