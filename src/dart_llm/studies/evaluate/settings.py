"""The settings of ``dart-llm eval``, ``perplexity`` and ``summarize``."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from dart_llm.errors import ConfigError, check_name
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.tasks import expand, protocols
from dart_llm.experiments.trackers import TRACKERS
from dart_llm.settings import BaseSettings, TaskOptions, setting

PANEL = "Evaluation"


class MeasureSettings(TaskOptions, BaseSettings):
    """What the three commands share."""

    UNUSED: ClassVar = ("style",)  # they draw nothing

    protocol: str = setting(PANEL, "decode, full, or published (leaks answers).", "decode")
    dense: bool = setting(PANEL, "Measure the untouched model on the same items too.", False)

    @model_validator(mode="after")
    def _check_measure(self) -> MeasureSettings:
        check_name("tracker", self.tracker or None, TRACKERS)
        for task in self.task_names():
            check_name("protocol", self.protocol, protocols(task))
        return self

    @property
    def kind(self) -> str:
        """Name of the command."""
        return type(self).__name__.removesuffix("Settings").lower()

    def task_names(self) -> list[str]:
        """Tasks as ``measure`` takes them."""
        raise NotImplementedError

    def options(self) -> MeasureOptions:
        """How the tasks are measured."""
        known = MeasureOptions.__dataclass_fields__
        return MeasureOptions(
            **{
                name: value
                for name in type(self).model_fields
                if name in known and (value := getattr(self, name)) is not None
            }
        )

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        return self.experiment_name or f"{self.kind}-{super().experiment}"


class EvalSettings(MeasureSettings):
    """``dart-llm eval``."""

    tasks: str = setting(
        PANEL,
        "lm-eval tasks or groups, comma-separated; also mmlu, general-nlp, gpqa, medmcqa.",
        "",
    )
    num_fewshot: int | None = setting(
        PANEL, "Examples before each item (default: the task's).", ge=0
    )
    include_path: str | None = setting(PANEL, "Folder with further lm-eval task files.")
    batch_size: int = setting(
        PANEL, "Continuations of one context in one forward, at most.", 8, ge=1
    )
    apply_chat_template: bool = setting(PANEL, "Wrap contexts in the model's template.", False)
    log_samples: bool = setting(PANEL, "Keep every request and answer in samples.jsonl.", True)
    prompt_tokens: int = setting(PANEL, "Left context of a rolling window.", 256, ge=1)
    scored_tokens: int = setting(PANEL, "Scored tokens of a rolling window.", 256, ge=1)

    def task_names(self) -> list[str]:
        return expand(self.tasks)


class PerplexitySettings(MeasureSettings):
    """``dart-llm perplexity``."""

    protocol: str = setting(
        PANEL,
        "decode, full, published (leaks), or standard: whole text in windows.",
        "decode",
    )
    limit: int | None = setting(PANEL, "Slices per text (default: all).", ge=1)
    dense: bool = setting(PANEL, "Measure the untouched model on the same tokens too.", True)
    data: str = setting(
        PANEL,
        "embedded, wikitext2, c4, mmlu, mmlu-answers, text files, or "
        "hub:owner/name/config:split:column; comma-separated.",
        "embedded",
    )
    prompt_tokens: int = setting(PANEL, "Prompt tokens of a slice.", 256, ge=1)
    scored_tokens: int = setting(PANEL, "Scored tokens of a slice.", 256, ge=1)
    window: int = setting(PANEL, "Tokens of a window (protocol standard).", 2048, ge=1)
    stride: int | None = setting(
        PANEL, "Tokens that windows move on (protocol standard; default: the window).", ge=1
    )

    def task_names(self) -> list[str]:
        from dart_llm.data.documents import names

        return [f"perplexity:{name}" for name in names(self.data)]


class SummarizeSettings(MeasureSettings):
    """``dart-llm summarize``."""

    data: str = setting(
        PANEL,
        "xsum, cnn_dailymail, multi_news, gov_report, a JSON-lines file of document/summary, or "
        "hub:owner/name/config:split:document:summary.",
        "xsum",
    )
    max_output: int = setting(PANEL, "Tokens per summary, at most.", 256, ge=1)
    apply_chat_template: bool | None = setting(
        PANEL, "Use the model's chat template (default: if it has one)."
    )

    def task_names(self) -> list[str]:
        given = (name.strip() for name in self.data.split(","))
        names = [name for name in dict.fromkeys(given) if name]
        if not names:
            raise ConfigError("no data to summarize: give --data, e.g. xsum or a JSON-lines file")
        from dart_llm.data.documents import check

        for name in names:
            check(name)
        return [f"summarize:{name}" for name in names]
