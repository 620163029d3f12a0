"""The settings of ``dart-llm run``: one table for flags, YAML files, environment and scripts.

Order of precedence: defaults < file < ``DART_*`` environment < flags.  Every field is a flag of the
same name in kebab case, an upper-case variable of the two shell scripts, and ``DART_<FIELD>``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dart_llm.config import PruneConfig, check_sparsity, first_problem, read_yaml, unknown_key
from dart_llm.errors import ConfigError
from dart_llm.layer_spec import parse_layer_spec, read_table
from dart_llm.registry import METHODS

RIVALS = (
    {"sparsity", "total_prune_percent"},
    {"knowledge_drift", "drift"},
    {"prompt", "prompt_file", "custom_prompt_text"},
)
"""Settings of which one source may give only one."""


def _field(panel: str, text: str, default: Any = None) -> Any:
    return Field(default, description=text, json_schema_extra={"panel": panel})


def _is_text(text: str) -> bool:
    """False where the command line held bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class RunSettings(BaseModel):
    """What one run is asked to do; None means "not given"."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # model
    model: str = _field(
        "Model", "Hub id, local folder, .gguf file, or smollm2-135m.", "smollm2-135m"
    )
    cache_dir: str | None = _field(
        "Model", "Where weights are kept (default: the hub's own cache)."
    )
    device: str | None = _field("Model", "0, 0,1, cuda:0, cpu or mps (default: GPU 0, else CPU).")
    device_map: str | None = _field("Model", "How layers are spread over devices, e.g. auto.")
    dtype: str | None = _field("Model", "float32, float16, bfloat16 (default: the checkpoint's).")
    revision: str | None = _field("Model", "Branch, tag or commit of a hub model.")
    attn_implementation: str | None = _field("Model", "Attention kernel: eager, sdpa, ...")
    trust_remote_code: bool = _field("Model", "Run code that comes with the checkpoint.", False)
    # pruning
    method: str = _field("Pruning", "Preset; dart-llm methods lists them.", "dart")
    sparsity: float | None = _field("Pruning", "Fraction of FFN neurons to remove, e.g. 0.5.")
    total_prune_percent: float | None = _field(
        "Pruning", "Percent of FFN neurons to remove, 0 to 100."
    )
    layer_topk: str | None = _field(
        "Pruning", "Keep ratios per layer: all:auto, 0-5:0.6,6-11:0.8, 3:#512, or @FILE."
    )
    save_layer_topk: str | None = _field(
        "Pruning", "Write the keep counts of the run to this file."
    )
    masks: str | None = _field("Pruning", "A masks.safetensors: use its newest masks, choose none.")
    masking_step: int | None = _field("Pruning", "Dense decode tokens before the first mask.")
    release_step: int | None = _field("Pruning", "Decode step from which all runs dense.")
    min_evidence: int | None = _field("Pruning", "Tokens to observe before the first mask.")
    ranking_method: str | None = _field("Pruning", "Neuron score; dart-llm methods lists them.")
    ema_decay: float | None = _field("Pruning", "Decay of averaged activations (default: sums).")
    prune_strategy: str | None = _field("Pruning", "topk, or auto: keep scores above the mean.")
    budget: str | None = _field(
        "Pruning", 'Allocator over layers, e.g. uniform, "blend energy depth".'
    )
    knowledge_drift: bool | None = _field("Pruning", "Re-mask on drift by the preset's rule.")
    drift: str | None = _field("Pruning", 'Drift rule: never, published, paper, "interval 64".')
    compensation: bool | None = _field("Pruning", "Add the removed neurons' mean contribution.")
    executor: str | None = _field("Pruning", "auto, masked or compact.")
    # prompt and generation
    prompt: str | None = _field("Prompt", "The prompt, or a shipped prompt's name.")
    prompt_file: str | None = _field("Prompt", "Read the prompt from this file; - is stdin.")
    custom_prompt_text: str | None = _field(
        "Prompt", "The prompt, a shipped prompt's name or a text in datasets/."
    )
    prompt_type: str = _field("Prompt", "custom, or mmlu: questions without answers.", "custom")
    prompt_subject: str | None = _field("Prompt", "MMLU subjects, comma-separated.")
    prompt_length: int | None = _field("Prompt", "Tokens of the prompt (default: model's context).")
    chat: bool = _field("Prompt", "Wrap the prompt in the model's chat template.", False)
    generation: int | None = _field("Prompt", "Tokens to generate (default: 200 with a prompt).")
    temperature: float | None = _field("Prompt", "Sample at this temperature (default: greedy).")
    # evaluation
    eval_perplexity: bool = _field("Evaluation", "Perplexity, dense beside pruned.", False)
    ppl_datasets: str = _field(
        "Evaluation", "embedded, wikitext2, c4, mmlu, or text files.", "embedded"
    )
    ppl_subjects: str | None = _field("Evaluation", "MMLU subjects for perplexity.")
    ppl_max_samples: int | None = _field("Evaluation", "Slices per text (default: all).")
    ppl_prompt_tokens: int = _field("Evaluation", "Prompt tokens of a slice.", 256)
    ppl_scored_tokens: int = _field("Evaluation", "Scored tokens of a slice.", 256)
    eval_mmlu: bool = _field("Evaluation", "MMLU (a later version).", False)
    mmlu_datasets: str = _field("Evaluation", "MMLU subjects.", "all")
    mmlu_shots: int = _field("Evaluation", "Examples before each question.", 0)
    mmlu_max_samples: int | None = _field("Evaluation", "Questions per subject.")
    eval_general_nlp: bool = _field("Evaluation", "BoolQ, RTE, ... (a later version).", False)
    general_nlp_datasets: str | None = _field("Evaluation", "Which of the seven tasks.")
    general_nlp_max_samples: int | None = _field("Evaluation", "Items per task.")
    eval_summarization: bool = _field("Evaluation", "Summaries (a later version).", False)
    summarization_datasets: str = _field("Evaluation", "Data sets.", "xsum")
    summarization_max_samples: int | None = _field("Evaluation", "Documents per data set.")
    summarization_max_output: int = _field("Evaluation", "Tokens per summary.", 256)
    # results
    seed: int = _field("Results", "Seed of everything random.", 0)
    verbose: bool = _field("Results", "Log every mask and every drift window.", False)
    save_activations: bool = _field("Results", "Save activations (a later version).", False)
    experiment_name: str | None = _field("Results", "Default: <model>-<method>-<sparsity>.")
    results_dir: str = _field("Results", "Folder for results.", "results")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        for key in data:
            if key not in cls.model_fields:
                raise unknown_key(cls, str(key))
        return {k: v for k, v in data.items() if not (k.endswith("_max_samples") and v == "all")}

    @model_validator(mode="after")
    def _check(self) -> RunSettings:
        METHODS.check(self.method)
        self._check_later_stages()
        if self.sparsity is not None and self.total_prune_percent is not None:
            raise ConfigError("give --sparsity or --total-prune-percent, not both")
        if self.prompt_type not in ("custom", "mmlu"):
            raise ConfigError(f'prompt type "{self.prompt_type}": write custom or mmlu')
        if self.prompt_type == "mmlu" and not self.prompt_subject:
            raise ConfigError("--prompt-type mmlu needs --prompt-subject, e.g. astronomy")
        given = [n for n in ("prompt", "prompt_file", "custom_prompt_text") if getattr(self, n)]
        if len(given) > 1:
            raise ConfigError(f"give one prompt: {' and '.join(given)} were both given")
        for name in ("generation", "prompt_length", "ppl_max_samples"):
            value = getattr(self, name)
            if value is not None and value < (0 if name == "generation" else 1):
                raise ConfigError(f"--{name.replace('_', '-')} {value} is too small")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature {self.temperature:g} must be 0 (greedy) or more")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed {self.seed} must be a whole number from 0 to 2^63 - 1")
        if self.masks and self.target_sparsity() is not None:
            raise ConfigError("--masks names the neurons themselves: drop the sparsity")
        for name in ("prompt", "custom_prompt_text"):
            if not _is_text(getattr(self, name) or ""):
                raise ConfigError(
                    f"--{name.replace('_', '-')} is not valid UTF-8: put the text in a file and "
                    "give --prompt-file"
                )
        if self.knowledge_drift is not None and self.drift is not None:
            raise ConfigError("give --knowledge-drift or --drift, not both")
        self.prune_config()
        return self

    def _check_later_stages(self) -> None:
        for name in ("eval_mmlu", "eval_general_nlp", "eval_summarization", "save_activations"):
            if getattr(self, name):
                flag = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"{flag} is not part of this version yet; a later one brings it "
                    "(CHANGELOG.md). Leave it off to run the rest."
                )

    def target_sparsity(self) -> float | None:
        """The sparsity that was asked for, as a fraction; None when nothing was said."""
        percent = self.total_prune_percent
        if percent is None:
            return None if self.sparsity is None else check_sparsity(self.sparsity)
        if 0 < percent < 1:
            raise ConfigError(
                f"--total-prune-percent {percent:g} is a percentage: did you mean "
                f"{100 * percent:g}? (--sparsity takes fractions)"
            )
        if not 0 <= percent < 100:
            raise ConfigError(f"--total-prune-percent {percent:g} must lie in [0, 100)")
        return percent / 100

    def prune_config(self) -> PruneConfig:
        """The preset with every setting that was given on top of it."""
        changes: dict[str, Any] = {
            "sparsity": self.target_sparsity(),
            "masking_step": self.masking_step,
            "release_step": self.release_step,
            "min_evidence": self.min_evidence,
            "compensation": self.compensation,
            "executor": self.executor,
            "seed": self.seed,
        }
        parts: dict[str, dict[str, Any]] = {
            "score": {
                "name": self.ranking_method,
                "ema_decay": self.ema_decay,
                "strategy": self.prune_strategy,
            },
            "budget": {"name": self.budget, "table": self._table()},
            "drift": {"rule": self._drift_rule()},
        }
        for part, values in parts.items():
            given = {key: value for key, value in values.items() if value is not None}
            changes[part] = given or None
        if self.method == "dense" and changes["sparsity"]:
            raise ConfigError("method dense removes nothing: drop the sparsity")
        return PruneConfig.build(self.method, **changes)

    def _table(self) -> str | None:
        spec = self.layer_topk
        if spec is None or spec.strip() in ("", "all:auto"):
            return None
        if spec.startswith("@"):
            return read_table(Path(spec[1:]))
        return str(parse_layer_spec(spec))

    def _drift_rule(self) -> str | None:
        if self.knowledge_drift is None:
            return self.drift
        rule = METHODS.get(self.method).drift.rule
        if not self.knowledge_drift:
            return "never"
        return "paper" if rule == "never" else rule

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

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        if self.experiment_name:
            return self.experiment_name
        config = self.prune_config()
        fixed = config.budget.table is not None or config.score.strategy == "auto"
        amount = (
            "masks"
            if self.masks
            else "table"
            if fixed and config.sparsity is None
            else f"{config.target:g}"
        )
        model = Path(self.model.rstrip("/")).name.lower()
        return f"{model}-{self.method}-{amount}"


def from_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """``DART_<FIELD>`` variables; ``DART_CACHE`` is ``cache_dir``.  Empty means not given."""
    found = {}
    for field in RunSettings.model_fields:
        value = environment.get(f"DART_{field.upper()}", "")
        if value:
            found[field] = value
    return found


def read_file(path: Path) -> dict[str, Any]:
    """Settings of a YAML file; names may be written as flags are."""
    return {str(key).replace("-", "_").lower(): value for key, value in read_yaml(path).items()}


def collect(
    flags: Mapping[str, Any],
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> RunSettings:
    """Merge the sources; ``flags`` holds None for what was not given.

    A setting also replaces its rivals of weaker sources: --sparsity beats DART_TOTAL_PRUNE_PERCENT.
    """
    variables = from_environment(os.environ if environment is None else environment)
    merged: dict[str, Any] = {}
    for source in (read_file(file) if file else {}, variables, flags):
        given = {key: value for key, value in source.items() if value is not None}
        beaten = {name for group in RIVALS if given.keys() & group for name in group}
        merged = {key: value for key, value in merged.items() if key not in beaten} | given
    try:
        return RunSettings.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(first_problem(error)) from None
