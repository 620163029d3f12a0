"""The settings of ``eval``, ``perplexity``, ``summarize``, ``compare`` and ``sweep``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

from pydantic import Field, model_validator

from dart_llm.data import documents
from dart_llm.errors import ConfigError, check_name
from dart_llm.evaluation.measurement import PROTOCOLS, MeasureOptions
from dart_llm.evaluation.tasks import expand, protocols
from dart_llm.experiments.variants import DENSE
from dart_llm.pruning.config import DEFAULT_METHOD, DEFAULT_SPARSITY
from dart_llm.pruning.layer_table import parse_layer_spec
from dart_llm.pruning.registry import METHODS
from dart_llm.pruning.setting_file import kept_setting
from dart_llm.settings import (
    BaseSettings,
    Fractions,
    LoadOptions,
    Numbers,
    ResultOptions,
    Settings,
    Sparsities,
    TaskOptions,
    Texts,
    check_seed,
    setting,
)

PANEL, GRID, RUN = "Evaluation", "Grid", "Run"

EACH = "each"

OPTIONS = tuple(f.name for f in fields(MeasureOptions) if f.name not in ("protocol", "seed"))
"""Names of the measuring options that can differ between tasks."""


class SliceOptions(Settings):
    """Sizes of the slices of perplexity, and of the windows of lm-eval's rolling tasks."""

    prompt_tokens: int = setting(PANEL, "Number of prompt tokens per slice or window.", 256, ge=1)
    scored_tokens: int = setting(PANEL, "Number of scored tokens per slice or window.", 256, ge=1)


class WindowOptions(Settings):
    """Sizes of the windows of the protocol ``standard``."""

    window: int = setting(PANEL, "Number of tokens per window (protocol standard).", 2048, ge=1)
    stride: int | None = setting(
        PANEL, "Start a window every N tokens (protocol standard; default: the window size).", ge=1
    )


class PromptOptions(Settings):
    """How task prompts are formatted."""

    apply_chat_template: bool | None = setting(
        PANEL, "Use the model's chat template (default: for summaries, if it has one)."
    )


class HarnessOptions(PromptOptions):
    """Options of lm-eval's tasks."""

    num_fewshot: int | None = setting(
        PANEL, "Number of examples before each item (default: the task's).", ge=0
    )
    include_path: str | None = setting(PANEL, "Also use the lm-eval task files in this folder.")
    batch_size: int = setting(PANEL, "Maximum continuations of a context per forward.", 8, ge=1)


class SummaryOptions(PromptOptions):
    """The length of summaries."""

    max_output: int = setting(PANEL, "Maximum number of tokens per summary.", 256, ge=1)


class MeasureSettings(TaskOptions, ResultOptions):
    """The settings that all five commands share."""

    kind: ClassVar[str]
    """The name of the command."""
    document: ClassVar[str]
    """The name of the file with the summary."""
    adopts: ClassVar[bool] = False
    """True if a run reuses the cells of earlier runs and continues after a failed cell."""

    def options(self) -> MeasureOptions:
        """The options with which the tasks are measured."""
        names = (*OPTIONS, "protocol", "seed")
        values = {name: getattr(self, name, None) for name in names}
        return MeasureOptions(**{name: v for name, v in values.items() if v is not None})


# One method on several tasks.


class MethodSettings(MeasureSettings, BaseSettings):
    """The settings that ``eval``, ``perplexity`` and ``summarize`` share."""

    protocol: str = setting(PANEL, "Use decode, full, or published (leaks answers).", "decode")
    dense: bool = setting(PANEL, "Measure the untouched model on the same items too.", False)

    @model_validator(mode="after")
    def _check_protocol(self) -> MethodSettings:
        for task in self.task_names():
            check_name("protocol", self.protocol, protocols(task))
        return self

    def task_names(self) -> list[str]:
        """The tasks' names, as in ``tasks.measure``."""
        raise NotImplementedError

    @property
    def experiment(self) -> str:
        """The name of the experiment's folder."""
        return self.experiment_name or f"{self.kind}-{super().experiment}"


class EvalSettings(SliceOptions, HarnessOptions, MethodSettings):
    """The settings of ``dart-llm eval``."""

    kind, document = "eval", "eval.json"

    tasks: Texts = setting(
        PANEL,
        "Run these lm-eval tasks or groups, or mmlu, general-nlp, gpqa, medmcqa; comma-separated.",
        (),
    )

    def task_names(self) -> list[str]:
        return expand(self.tasks)


class PerplexitySettings(WindowOptions, SliceOptions, MethodSettings):
    """The settings of ``dart-llm perplexity``."""

    kind, document = "perplexity", "perplexity.json"

    protocol: str = setting(
        PANEL, "Use decode, full, published (leaks), or standard (text in windows).", "decode"
    )
    limit: int | None = setting(PANEL, "Number of slices per text (default: all).", ge=1)
    dense: bool = setting(PANEL, "Measure the untouched model on the same tokens too.", True)
    data: Texts = setting(
        PANEL,
        "Score these texts, comma-separated: embedded, wikitext2, c4, mmlu, text files, or "
        "hub:owner/name/config:split:column.",
        ("embedded",),
    )

    def task_names(self) -> list[str]:
        return [f"perplexity:{name}" for name in documents.names(",".join(self.data))]


class SummarizeSettings(SummaryOptions, MethodSettings):
    """The settings of ``dart-llm summarize``."""

    kind, document = "summarize", "summarize.json"

    data: Texts = setting(
        PANEL,
        "Summarize these data: xsum, cnn_dailymail, multi_news, gov_report, a JSON-lines file of "
        "document/summary, or hub:owner/name/config:split:document:summary.",
        ("xsum",),
    )

    def task_names(self) -> list[str]:
        if not self.data:
            raise ConfigError("no data to summarize: give --data, e.g. xsum or a JSON-lines file")
        for name in self.data:
            documents.check(name)
        return [f"summarize:{name}" for name in self.data]


# A grid of models, methods, sparsities or layers, tasks, protocols and seeds.


class SweepSettings(
    SummaryOptions, HarnessOptions, WindowOptions, SliceOptions, MeasureSettings, LoadOptions
):
    """The settings of ``dart-llm sweep``.

    ``layers``: ``each``, or groups such as ``0-3,4-7``.  In each cell one group is pruned to
    ``keep``, while the other layers stay dense or are pruned to ``base_keep``.  Only settings files
    can have ``task_options`` (fields for single tasks) and ``overrides`` (changes to every preset).
    """

    kind, document, adopts = "sweep", "compare.json", True
    UNUSED: ClassVar = ("overrides", "task_options")
    ALIASES: ClassVar = {
        "model": "models",
        "method": "methods",
        "sparsity": "sparsities",
        "task": "tasks",
        "seed": "seeds",
        "protocol": "protocols",
    }

    models: Texts = setting(GRID, "Measure these models.", ("smollm2-135m",))
    methods: Texts = setting(
        GRID, "Run these; dart-llm methods lists all.", (DENSE, DEFAULT_METHOD)
    )
    sparsities: Sparsities = setting(GRID, "Fractions of FFN neurons to remove, e.g. 0.3,0.5.", ())
    tasks: Texts = setting(
        GRID,
        "Run these tasks: lm-eval tasks, perplexity:TEXT, summarize:DATA, continuation:TEXT, "
        "shift:TEXT; e.g. arc_easy,perplexity:embedded.",
        (),
    )
    seeds: Numbers = setting(GRID, "Run with each of these seeds.", (0,))
    protocols: Texts = setting(GRID, "Any of decode, full, published, standard.", ("decode",))
    layers: Texts = setting(GRID, "Prune groups one by one: each, or ranges 0-3,4-7.", ())
    keep: Fractions = setting(GRID, "Keep these fractions in --layers, e.g. 0.5.", ())
    base_keep: float | None = setting(GRID, "Keep this fraction in other layers (default: all).")
    weights: Texts = setting(  # type: ignore[assignment]
        "Model", "Use these weight formats: auto, file, dense, q8_0, q4_0, q4_1.", ()
    )
    engine: str = setting(RUN, "Use this process (local) or a Ray cluster (ray).", "local")
    workers: int | None = setting(RUN, "Number of worker processes of the ray engine.", ge=1)
    overrides: dict[str, Any] = Field(default_factory=dict)
    task_options: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        counts = {"sparsities": ()} if data.get("layers") else {}  # layers replace sparsities
        return super().read({**counts, **data})

    @model_validator(mode="after")
    def _check(self) -> SweepSettings:
        check_name("engine", self.engine, ("local", "ray"))
        for name in ("models", "methods", "tasks", "seeds", "protocols"):
            if not getattr(self, name):
                raise ConfigError(f"no {name} were given: give at least one (--{name})")
        for method in self.methods:
            METHODS.check(method)
        for protocol in self.protocols:
            check_name("protocol", protocol, (*PROTOCOLS, "standard"))
        for seed in self.seeds:
            check_seed(seed)
        self._check_layers()
        for task in self.task_options:
            check_name("task in task_options", task, self.tasks)
            self.options_of(task)
        return self

    def _check_layers(self) -> None:
        if bool(self.layers) != bool(self.keep) or (self.base_keep and not self.layers):
            raise ConfigError(
                "layers (each, or ranges such as 0-3,4-7) and keep, the fraction kept in a layer, "
                "require each other, and base_keep requires both"
            )
        if self.layers and self.sparsities:
            raise ConfigError("layers and keep replace the sparsities: drop the sparsities")
        for group in self.layers:
            for keep in self.keep:
                parse_layer_spec(self.layer_table("0" if self.layers == (EACH,) else group, keep))

    def layer_table(self, group: str, keep: float) -> str:
        """A layer table: ``group`` keeps ``keep``; others ``base_keep``, or all if it is None."""
        table = f"{group}:{keep:.12g}"
        return table if self.base_keep is None else f"all:{self.base_keep:.12g},{table}"

    def fitted(self) -> SweepSettings:
        """The settings; for a method from a setting file, with the weight format in this file."""
        saved = filter(None, map(kept_setting, self.methods))
        formats = list(dict.fromkeys(str(file.weights) for file in saved if file.weights))
        if self.weights or not formats:
            return self
        if len(formats) > 1:
            raise ConfigError(
                f"the settings in these files use weights {' and '.join(formats)}: select one with "
                "--weights"
            )
        return self.noted({"weights": (formats[0],)})

    def options_of(self, task: str) -> MeasureOptions:
        """The options with which ``task`` is measured; raises ``ConfigError`` if one is unknown."""
        overrides = self.task_options.get(task, {})
        for name in overrides:
            check_name("measuring option", str(name), OPTIONS)
        checked = type(self).model_validate({"tasks": self.tasks, **overrides})
        return replace(self.options(), **{name: getattr(checked, name) for name in overrides})

    @property
    def experiment(self) -> str:
        """The name of the experiment's folder."""
        return self.experiment_name or self.kind


class CompareSettings(SweepSettings):
    """The settings of ``dart-llm compare``, which always measures the untouched model."""

    kind = "compare"

    methods: Texts = setting(
        GRID, "Run these methods; dart-llm methods lists all.", (DENSE, "griffin", DEFAULT_METHOD)
    )
    sparsities: Sparsities = setting(
        GRID, "Remove these fractions of the FFN neurons, e.g. 0.3,0.5.", (DEFAULT_SPARSITY,)
    )
