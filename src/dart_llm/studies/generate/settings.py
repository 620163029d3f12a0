"""The settings of ``dart-llm run``: one table for flags, YAML files, environment and scripts.

Every field is also an upper-case variable of the two shell scripts.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pydantic import model_validator

from dart_llm import settings
from dart_llm.data.prompts import is_text
from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.settings import ActivationSettings, merge, read_sparsities, setting, words


class RunSettings(ActivationSettings):
    """What one run is asked to do; None means "not given"."""

    COMMAS = ("methods", "sparsities")

    RIVALS = ({"method", "methods"},)

    # several settings of one prompt
    methods: str | None = setting(
        "Pruning", "Several methods, comma-separated: their texts side by side."
    )
    sparsities: str | None = setting(
        "Pruning", "Several sparsities, comma-separated, for each of the methods."
    )
    # prompt and generation
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
    """None: where it has one."""
    generation: int | None = setting(
        "Prompt", "Tokens to generate (default: 200 with a prompt).", ge=0
    )
    temperature: float | None = setting(
        "Prompt", "Sample at this temperature (default: greedy).", ge=0, allow_inf_nan=False
    )
    # evaluation
    eval_perplexity: bool = setting("Evaluation", "Perplexity, dense beside pruned.", False)
    ppl_datasets: str = setting(
        "Evaluation", "embedded, wikitext2, c4, mmlu, or text files.", "embedded"
    )
    ppl_subjects: str | None = setting("Evaluation", "MMLU subjects for perplexity.")
    ppl_max_samples: int | None = setting("Evaluation", "Slices per text (default: all).", ge=1)
    ppl_prompt_tokens: int = setting("Evaluation", "Prompt tokens of a slice.", 256)
    ppl_scored_tokens: int = setting("Evaluation", "Scored tokens of a slice.", 256)
    eval_mmlu: bool = setting("Evaluation", "MMLU accuracy, dense beside pruned.", False)
    mmlu_datasets: str = setting("Evaluation", "MMLU subjects, comma-separated.", "all")
    mmlu_shots: int = setting("Evaluation", "Examples before each question.", 0)
    mmlu_max_samples: int | None = setting("Evaluation", "Questions per subject.", ge=1)
    eval_general_nlp: bool = setting("Evaluation", "BoolQ, RTE, ..., dense beside pruned.", False)
    general_nlp_datasets: str | None = setting("Evaluation", "Which tasks (default: the seven).")
    general_nlp_max_samples: int | None = setting("Evaluation", "Items per task.", ge=1)
    eval_summarization: bool = setting(
        "Evaluation", "ROUGE of summaries, dense beside pruned.", False
    )
    summarization_datasets: str = setting(
        "Evaluation", "xsum, cnn_dailymail, multi_news, gov_report, or JSON-lines files.", "xsum"
    )
    summarization_max_samples: int | None = setting("Evaluation", "Documents per data set.", ge=1)
    summarization_max_output: int = setting("Evaluation", "Tokens per summary.", 256, ge=1)
    include_path: str | None = setting("Evaluation", "Folder with further lm-eval task files.")
    calibration: str | None = setting(
        "Evaluation", "Text for methods that calibrate (default: c4 of the hub)."
    )
    # results
    trace: str | None = setting(
        "Results", "Write which neurons ran for every token to this file (docs: Traces)."
    )
    trace_activations: bool = setting(
        "Results", "Write their activations too (by executor masked).", False
    )
    verbose: bool = setting("Results", "Log every mask and every drift window.", False)

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
        if not 0 <= self.mmlu_shots <= 5:
            raise ConfigError(f"--mmlu-shots {self.mmlu_shots} must be 0 to 5")
        for name in ("prompt", "custom_prompt_text"):
            if not is_text(getattr(self, name) or ""):
                raise ConfigError(
                    f"--{name.replace('_', '-')} is not valid UTF-8: put the text in a file and "
                    "give --prompt-file"
                )
        return self

    def _check_several(self) -> None:
        given = self.model_fields_set
        if self.methods and "method" in given:
            raise ConfigError("give --method or --methods, not both")
        if self.sparsities and self.target_sparsity() is not None:
            flag = "--sparsity" if self.sparsity is not None else "--total-prune-percent"
            raise ConfigError(f"give {flag} or --sparsities, not both")
        if self.several and self.masks:
            raise ConfigError("--masks names the neurons themselves: drop --methods, --sparsities")
        if self.methods:  # else the method may still give way to one that honours the settings
            self.prune_configs()
        if self.sparsities:
            read_sparsities("sparsities", self.sparsities)

    def _check_recording(self) -> None:
        asked = {"--save-activations": self.save_activations, "--trace": self.trace is not None}
        if self.trace_activations and self.trace is None:
            raise ConfigError("--trace-activations adds to a trace: give --trace FILE too")
        for flag in (flag for flag, given in asked.items() if given):
            if self.evaluates and not self.tokens:
                raise ConfigError(
                    f"{flag} keeps what the generated texts do, and nothing is generated: give a "
                    "prompt and --generation N, or leave it off"
                )
        if self._records and self.executor in ("compact", "native", "slim", "graph", "triton"):
            flag = "--save-activations" if self.save_activations else "--trace-activations"
            raise ConfigError(
                f"{flag} cannot see the neurons that executor {self.executor} skips: give "
                "--executor masked, or leave the executor out"
            )

    @property
    def _records(self) -> bool:
        """Whether activations are kept."""
        return self.save_activations or self.trace_activations

    def fitted(self) -> RunSettings:
        changes, notes = settings.values_for(self)
        whole = self if self.methods else super().fitted()
        for config in whole.prune_configs():
            settings.check(config)
        return whole.noted(changes, *notes)

    def prune_config(self) -> PruneConfig:
        """The preset with every setting on top of it; recorded runs use the masked executor."""
        config = super().prune_config()
        return config.replace({"executor": "masked"}) if self._records else config

    @property
    def several(self) -> bool:
        """Whether methods or sparsities are listed."""
        return self.methods is not None or self.sparsities is not None

    def prune_configs(self) -> list[PruneConfig]:
        """Each listed method at each listed sparsity, but ``dense``, which always runs; or the one
        configuration that is set.
        """
        if not self.several:
            return [self.prune_config()]
        methods = words(self.methods) or [self.method]
        sparsities = read_sparsities("sparsities", self.sparsities) if self.sparsities else ()
        listed = [
            {"method": method, **({} if sparsity is None else {"sparsity": sparsity})}
            for method in dict.fromkeys(methods)
            for sparsity in (sparsities or (None,))
            if method != "dense"
        ]
        return [self.model_copy(update=changes).prune_config() for changes in listed] or [
            PruneConfig.build("dense")
        ]

    @property
    def experiment(self) -> str:
        """Of several settings: the model, the methods and the sparsities."""
        if self.experiment_name or not self.several:
            return super().experiment
        configs = self.prune_configs()
        methods = dict.fromkeys(config.method for config in configs)
        amounts = dict.fromkeys(f"{config.target:g}" for config in configs)
        return "-".join([Path(self.model.rstrip("/")).name.lower(), *methods, *amounts])

    @property
    def evaluates(self) -> bool:
        """Whether any evaluation is switched on."""
        return (
            self.eval_perplexity
            or self.eval_mmlu
            or self.eval_general_nlp
            or self.eval_summarization
        )

    @property
    def tokens(self) -> int:
        """Tokens to generate."""
        if self.generation is not None:
            return self.generation
        return 200 if self.has_prompt else 0

    @property
    def has_prompt(self) -> bool:
        found = (self.prompt, self.prompt_file, self.custom_prompt_text)
        return self.prompt_type == "mmlu" or any(part is not None for part in found)


collect = partial(merge, RunSettings)
"""The settings of ``dart-llm run``, merged from all sources."""
