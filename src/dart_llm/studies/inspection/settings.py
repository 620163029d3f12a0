"""The settings of ``dart-llm inspect``, and the texts to inspect."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import model_validator

from dart_llm.data.texts import prompt_names, read_prompt_file, resolve_prompt
from dart_llm.errors import ConfigError, check_name
from dart_llm.pruning.config import DEFAULT_SPARSITY, PruneConfig
from dart_llm.settings import SEQUENCE_METHOD, ActivationSettings, setting

TEXTS = {"layers": 1, "neurons": 0, "overlap": 2, "ablation": 2}
"""Maps each section, in the order of the report, to the number of texts that it needs."""


class InspectSettings(ActivationSettings):
    """The settings of ``dart-llm inspect``; None means that a setting was not given."""

    UNUSED: ClassVar = (
        *("masks", "save_layer_topk", "masking_step", "release_step", "min_evidence"),
        *("knowledge_drift", "drift", "compensation", "head", "executor"),
    )

    method: str = setting(
        "Pruning",
        "Compare the masks of this preset; dart-llm methods lists all presets.",
        SEQUENCE_METHOD,
    )
    prompt: str | None = setting("Texts", "Use this as text A, or the shipped prompt of this name.")
    prompt_file: str | None = setting("Texts", "Read text A from this file; - is stdin.")
    prompt_b: str | None = setting("Texts", "Like --prompt, for text B.")
    prompt_b_file: str | None = setting("Texts", "Read text B from this file.")
    passage: str | None = setting(
        "Texts",
        "Use the first two topics of this shipped passage as A and B (prompts list --passages).",
    )
    max_tokens: int = setting("Texts", "Read at most this many tokens of a text.", 512, ge=2)
    top: int = setting("Inspection", "List this many of the strongest neurons per layer.", 5, ge=1)
    share: float = setting(
        "Inspection",
        "Ablation: count this fraction of a layer's neurons as its strongest.",
        0.1,
        gt=0,
        lt=1,
    )
    ablation_seeds: int = setting("Inspection", "Ablation: number of random draws.", 3, ge=1)

    @model_validator(mode="after")
    def _check_inspect(self) -> InspectSettings:
        a, b = (
            [name for name in pair if getattr(self, name) is not None]
            for pair in (("prompt", "prompt_file"), ("prompt_b", "prompt_b_file"))
        )
        for names in (a, b):
            if len(names) > 1:
                raise ConfigError(f"give {names[0]} or {names[1]}, not both")
        if self.passage and (a or b):
            raise ConfigError("give prompts or --passage, not both")
        if b and not a:
            raise ConfigError("text B needs a text A: give --prompt or --prompt-file too")
        return self

    @property
    def texts(self) -> int:
        """The number of texts, 0 to 2."""
        if self.passage or self.prompt_b is not None or self.prompt_b_file:
            return 2
        return int(self.prompt is not None or self.prompt_file is not None)

    def chosen(self, what: Sequence[str]) -> list[str]:
        """The sections in ``what``; if it is empty, all sections for which there are enough texts.

        Raises ``UnknownName``, and ``ConfigError`` if a text is missing.
        """
        for name in what:
            check_name("section to inspect", name, TEXTS)
            if TEXTS[name] > self.texts:
                raise ConfigError(
                    f"inspect {name} needs {TEXTS[name]} text(s): give --prompt for the first and "
                    "--prompt-b for the second, or --passage"
                )
        return [
            name for name, need in TEXTS.items() if need <= self.texts and name in (what or TEXTS)
        ]

    def prune_config(self) -> PruneConfig:
        """The method that selects the neurons of a text, without compensation."""
        config = super().prune_config()
        has_no_amount = config.sparsity is None and config.budget.table is None
        if has_no_amount and config.score.strategy == "topk" and config.method != "dense":
            config = config.replace({"sparsity": DEFAULT_SPARSITY})
        return config.replace({"compensation": False}) if config.compensation else config

    @property
    def experiment(self) -> str:
        """The name of the experiment's folder."""
        model = Path(self.model.rstrip("/")).name.lower()
        return self.experiment_name or f"inspect-{model}"


# The texts to inspect: none, A, or A and B.


@dataclass(frozen=True)
class InspectText:
    """A text to inspect.  ``label``: A or B; ``name``: its name in tables."""

    label: str
    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def title(self) -> str:
        """Label and name: "A (how bees dance)"."""
        return f"{self.label} ({self.name})"


def inspect_texts(settings: InspectSettings) -> tuple[InspectText, ...]:
    """The texts; raises ``ConfigError`` if a text is empty or cannot be read."""
    if settings.passage:
        parts = _passage(settings.passage)
    else:
        a, b = (settings.prompt, settings.prompt_file), (settings.prompt_b, settings.prompt_b_file)
        parts = [_prompt(text, file) for text, file in (a, b) if text is not None or file]
    texts = tuple(InspectText(label, *part) for label, part in zip("AB", parts, strict=False))
    for text in texts:
        if not text.text.strip():
            raise ConfigError(f"text {text.title} is empty: give at least one word")
    return texts


def _prompt(text: str | None, file: str | None) -> tuple[str, str]:
    """The name and the text of a prompt."""
    if text is not None:
        name = text if text in prompt_names() else textwrap.shorten(text, 48, placeholder="…")
        return name, resolve_prompt(text)
    return "stdin" if file == "-" else Path(str(file)).name, read_prompt_file(str(file))


def _passage(name: str) -> list[tuple[str, str]]:
    """For each of a passage's first two topics, its name and its text."""
    from dart_llm.data.passages import Passage, find, shipped

    passage = find(shipped(), name)
    assert isinstance(passage, Passage)
    return [(part.topic.name, part.text) for part in passage.segments()[:2]]
