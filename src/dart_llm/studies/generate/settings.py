"""The settings of ``dart-llm run``: one table for flags, YAML files, environment and scripts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import ClassVar

from pydantic import model_validator

from dart_llm.data.texts import is_text
from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.settings import ActivationSettings, Sparsities, Texts, merge, setting

ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "perplexity": "dart-llm perplexity",
        "ppl_": "dart-llm perplexity",
        "mmlu": "dart-llm eval --tasks mmlu",
        "general_nlp": "dart-llm eval --tasks general-nlp",
        "summarization": "dart-llm summarize",
        "include_path": "dart-llm eval --tasks TASK",
    }
)
"""What names of settings begin with that ``run`` does not have, and the command that does."""


def check_elsewhere(name: str) -> None:
    """Raise ``ConfigError`` for a setting, or its flag, that another command has."""
    key = name.lstrip("-").replace("-", "_").removeprefix("no_").removeprefix("eval_")
    for start, command in ELSEWHERE.items():
        if key.startswith(start):
            raise ConfigError(
                f"dart-llm run has no {name}: it generates one text, dense and pruned; use "
                f"{command}"
            )


class RunSettings(ActivationSettings):
    """What one run does; None means "not given"."""

    prompt: str | None = setting("Prompt", "The prompt, or a shipped prompt's name.")
    prompt_file: str | None = setting("Prompt", "Read the prompt from this file; - is stdin.")
    custom_prompt_text: str | None = setting(
        "Prompt", "The prompt, a shipped prompt's name or a text in datasets/."
    )
    prompt_type: str = setting("Prompt", "custom, or mmlu: questions without answers.", "custom")
    prompt_subject: str | None = setting("Prompt", "MMLU subjects, comma-separated.")
    prompt_length: int | None = setting(
        "Prompt", "Tokens of the prompt (default: model's context).", ge=1
    )
    chat: bool | None = setting("Prompt", "Wrap the prompt in the model's chat template.", False)
    """None: if the model has one."""
    generation: int | None = setting(
        "Prompt", "Tokens to generate (default: 200 with a prompt).", ge=0
    )
    temperature: float | None = setting(
        "Prompt", "Sample at this temperature (default: greedy).", ge=0, allow_inf_nan=False
    )
    methods: Texts = setting(
        "Pruning", "Several methods for the same prompt, comma-separated; one text each.", ()
    )
    sparsities: Sparsities = setting("Pruning", "Several sparsities, comma-separated.", ())
    calibration: str | None = setting(
        "Pruning", "Text for methods that calibrate (default: c4 of the hub)."
    )
    trace: str | None = setting(
        "Results", "Write which neurons ran for every token to this file (docs: Traces)."
    )
    verbose: bool = setting("Results", "Log every mask and every drift window.", False)

    @classmethod
    def unknown(cls, name: str) -> ConfigError:
        check_elsewhere(name)
        return super().unknown(name)

    RIVALS: ClassVar = ({"method", "methods"},)

    @model_validator(mode="after")
    def _check(self) -> RunSettings:
        self._check_recording()
        self._check_several()
        if self.prompt_type not in ("custom", "mmlu"):
            raise ConfigError(f'prompt type "{self.prompt_type}": write custom or mmlu')
        if self.prompt_type == "mmlu" and not self.prompt_subject:
            raise ConfigError("--prompt-type mmlu needs --prompt-subject, e.g. astronomy")
        given = [n for n in ("prompt", "prompt_file", "custom_prompt_text") if getattr(self, n)]
        if len(given) > 1:
            raise ConfigError(f"give one prompt: {' and '.join(given)} were both given")
        for name in ("prompt", "custom_prompt_text"):
            if not is_text(getattr(self, name) or ""):
                raise ConfigError(
                    f"--{name.replace('_', '-')} is not valid UTF-8: put the text in a file and "
                    "give --prompt-file"
                )
        return self

    def _check_recording(self) -> None:
        if self.save_activations and self.executor not in (None, "auto", "masked"):
            raise ConfigError(
                f"--save-activations cannot see the neurons that executor {self.executor} skips: "
                "give --executor masked, or leave the executor out"
            )

    def _check_several(self) -> None:
        """Raise ``ConfigError`` for several texts where a setting names one file or one mask."""
        if not (self.methods or self.sparsities):
            return
        for name in ("trace", "save_layer_topk", "masks", "layer_topk", "experiment_name"):
            if getattr(self, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')} belongs to one text: give one --method and one "
                    "--sparsity"
                )

    def each(self) -> list[RunSettings]:
        """The settings of each text: every method at every sparsity."""
        if not (self.methods or self.sparsities):
            return [self]
        pairs = product(self.methods or (self.method,), self.sparsities or (self.sparsity,))
        one = {"methods": (), "sparsities": ()}
        copies = [self.model_copy(update={**one, "method": m, "sparsity": s}) for m, s in pairs]
        return [copy.fitted() for copy in copies]

    def fitted(self) -> RunSettings:
        """Also takes ``--prompt-type mmlu`` where a subject alone was given."""
        settings = super().fitted()
        if not self.prompt_subject or self.prompt_type == "mmlu":
            return settings
        if self.has_prompt:
            note = "--prompt-subject has no effect without --prompt-type mmlu"
            return settings.noted({}, note)
        note = "--prompt-subject without a prompt: --prompt-type mmlu is used"
        return settings.noted({"prompt_type": "mmlu"}, note)

    def prune_config(self) -> PruneConfig:
        """The preset with every setting on top of it; recorded runs use the masked executor."""
        config = super().prune_config()
        return config.replace({"executor": "masked"}) if self.save_activations else config

    @property
    def tokens(self) -> int:
        """Tokens to generate."""
        if self.generation is not None:
            return self.generation
        return 200 if self.has_prompt else 0

    @property
    def has_prompt(self) -> bool:
        """Whether the settings name a prompt."""
        sources = (self.prompt, self.prompt_file, self.custom_prompt_text)
        return self.prompt_type == "mmlu" or any(source is not None for source in sources)


collect = partial(merge, RunSettings)
"""The settings of ``dart-llm run``, merged from all sources."""
