"""The settings of ``dart-llm run``, for flags, YAML files, the environment and scripts."""

from __future__ import annotations

from functools import partial

from pydantic import model_validator

from dart_llm.data.texts import is_text
from dart_llm.errors import ConfigError, check_name
from dart_llm.pruning.config import PruneConfig
from dart_llm.settings import ActivationSettings, merge, setting, words


class RunSettings(ActivationSettings):
    """The settings of ``dart-llm run``; None means that a setting was not given."""

    prompt: str | None = setting("Prompt", "Continue this prompt (text or shipped prompt's name).")
    prompt_file: str | None = setting("Prompt", "Read the prompt from this file; - is stdin.")
    custom_prompt_text: str | None = setting("Prompt", "Like --prompt; for the published scripts.")
    prompt_type: str = setting("Prompt", "Your text (custom), or MMLU questions (mmlu).", "custom")
    prompt_subject: str | None = setting("Prompt", "Use these MMLU subjects, comma-separated.")
    prompt_length: int | None = setting("Prompt", "Maximum number of tokens in the prompt.", ge=1)
    chat: bool | None = setting("Prompt", "Wrap the prompt in the model's chat template.", False)
    """With None, the template is used only if the model has one."""
    generation: int | None = setting("Prompt", "Generate this many tokens (default: 200).", ge=0)
    temperature: float | None = setting(
        "Prompt", "Sample at this temperature (default: greedy).", ge=0, allow_inf_nan=False
    )
    calibration: str | None = setting("Pruning", "Calibrate on this text (default: c4 on the hub).")
    trace: str | None = setting("Results", "Write to this file which neurons ran for each token.")
    verbose: bool = setting("Results", "Log every mask and every drift window.", False)

    @model_validator(mode="after")
    def _check(self) -> RunSettings:
        self._check_save_activations()
        check_name("prompt type", self.prompt_type, ("custom", "mmlu"))
        if self.prompt_type == "mmlu" and not self.prompt_subject:
            raise ConfigError("--prompt-type mmlu needs --prompt-subject, e.g. astronomy")
        for name in ("prompt", "custom_prompt_text"):
            if not is_text(getattr(self, name) or ""):
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(
                    f"{flag} is not valid UTF-8: put the text in a file and give --prompt-file"
                )
        return self

    def _check_save_activations(self) -> None:
        if self.save_activations and self.executor not in (None, "auto", "masked"):
            raise ConfigError(
                f"--save-activations cannot record neurons that executor {self.executor} skips: "
                "give --executor masked, or omit the executor"
            )

    def prune_config(self) -> PruneConfig:
        """The preset with all settings applied; with executor masked if activations are saved."""
        config = super().prune_config()
        return config.replace({"executor": "masked"}) if self.save_activations else config

    @property
    def tokens(self) -> int:
        """The number of tokens to generate."""
        return 200 if self.generation is None else self.generation

    @property
    def has_custom_prompt(self) -> bool:
        """Whether the user gave a prompt, as text or file."""
        sources = (self.prompt, self.prompt_file, self.custom_prompt_text)
        return any(source is not None for source in sources)

    @property
    def mmlu_subjects(self) -> list[str]:
        """The subjects of the prompt's MMLU questions; empty for other prompts."""
        is_mmlu = self.prompt_type == "mmlu" or not self.has_custom_prompt
        return words(self.prompt_subject) if is_mmlu else []


class DemoSettings(RunSettings):
    """The settings of ``dart-llm demo``: those of a run with other defaults."""

    prompt: str | None = setting("Prompt", "Continue this prompt.", "sky")
    chat: bool | None = setting(
        "Prompt", "Use the model's chat template (default: only if it has one).", None
    )
    generation: int | None = setting("Prompt", "Generate this many tokens.", 64)
    experiment_name: str | None = setting("Results", "Name of the experiment's folder.", "demo")


collect = partial(merge, RunSettings)
"""Merges the settings of ``dart-llm run`` from flags, files, the environment and defaults."""
