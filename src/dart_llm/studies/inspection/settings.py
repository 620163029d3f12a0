"""The settings of ``dart-llm inspect``, and the texts that it looks at."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import model_validator

from dart_llm.data.texts import prompt_names, read_prompt_file, resolve_prompt
from dart_llm.errors import ConfigError, check_name
from dart_llm.files import whole_rows
from dart_llm.pruning.config import DEFAULT_SPARSITY, PruneConfig
from dart_llm.settings import MASKED, ActivationSettings, setting

PANEL = "Texts"

WHAT = "Inspection"

TEXTS = {"layers": 1, "weights": 0, "neurons": 0, "overlap": 2, "ablation": 2, "space": 2}
"""What can be looked at, in the order of the report, and how many texts it needs."""

PROXIES = ("combined", "max", "mean", "product")


class InspectSettings(ActivationSettings):
    """What is looked at, and on which texts; None means "not given"."""

    UNUSED: ClassVar = (
        *("masks", "save_layer_topk", "masking_step", "release_step", "min_evidence"),
        *("knowledge_drift", "drift", "compensation", "head", "executor"),
    )

    method: str = setting(
        "Pruning",
        "Preset whose masks are compared; dart-llm methods lists them.",
        MASKED,
    )
    prompt: str | None = setting(PANEL, "Text A, or a shipped prompt's name.")
    prompt_file: str | None = setting(PANEL, "Read text A from this file; - is stdin.")
    prompt_b: str | None = setting(PANEL, "Text B, or a shipped prompt's name.")
    prompt_b_file: str | None = setting(PANEL, "Read text B from this file.")
    passage: str | None = setting(
        PANEL, "A shipped passage (prompts list --passages): its first two topics are A and B."
    )
    runs: str | None = setting(
        PANEL, "One results folder (its dense and pruned text), or two, comma-separated."
    )
    max_tokens: int = setting(PANEL, "Tokens of each text that are read, at most.", 512, ge=2)
    top: int = setting(WHAT, "Strongest and weakest neurons listed per layer.", 5, ge=1)
    neuron_score: str = setting(WHAT, "Forward proxy: combined, max, mean, product.", "combined")
    share: float = setting(
        WHAT, "Ablation: the share of a layer's neurons that is A's own.", 0.1, gt=0, lt=1
    )
    ablation_seeds: int = setting(WHAT, "Ablation: draws of random neurons.", 3, ge=1)
    layer: int | None = setting(WHAT, "Space: layer of the per-token table (default: last).")
    top_dims: int = setting(WHAT, "Space: largest dimensions whose overlap is counted.", 32, ge=1)

    @model_validator(mode="after")
    def _check_inspect(self) -> InspectSettings:
        check_name("forward proxy", self.neuron_score, PROXIES)
        self._check_texts()
        return self

    def _check_texts(self) -> None:
        pairs = (("prompt", "prompt_file"), ("prompt_b", "prompt_b_file"))
        a, b = ([name for name in pair if getattr(self, name) is not None] for pair in pairs)
        for both in (a, b):
            if len(both) > 1:
                raise ConfigError(f"give {both[0]} or {both[1]}, not both")
        if sum(map(bool, (a or b, self.passage, self.runs))) > 1:
            raise ConfigError("give prompts, --passage or --runs: one of the three")
        if b and not a:
            raise ConfigError("text B without text A: give --prompt or --prompt-file too")

    @property
    def texts(self) -> int:
        """How many texts are given."""
        if self.passage or self.runs or self.prompt_b is not None or self.prompt_b_file:
            return 2
        return int(self.prompt is not None or self.prompt_file is not None)

    def chosen(self, what: Sequence[str]) -> list[str]:
        """What to look at; nothing named: all that the texts allow.

        Raises ``UnknownName``, and ``ConfigError`` where a text is missing.
        """
        for name in what:
            check_name("thing to inspect", name, TEXTS)
            if TEXTS[name] > self.texts:
                ways = "--prompt, --prompt-file, --passage or --runs"
                if TEXTS[name] == 2:
                    ways = "--prompt and --prompt-b, --passage, or --runs"
                raise ConfigError(f"inspect {name} needs {TEXTS[name]} text(s): give {ways}")
        return [
            name for name, need in TEXTS.items() if need <= self.texts and name in (what or TEXTS)
        ]

    def prune_config(self) -> PruneConfig:
        """The method that selects the neurons of a text, without compensation."""
        config = super().prune_config()
        free = config.sparsity is None and config.budget.table is None
        if free and config.score.strategy == "topk" and config.method != "dense":
            config = config.replace({"sparsity": DEFAULT_SPARSITY})
        return config.replace({"compensation": False}) if config.compensation else config

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        model = Path(self.model.rstrip("/")).name.lower()
        return self.experiment_name or f"inspect-{model}"


# The texts that are looked at: none, A, or A and B.

LONGEST_NAME = 48
"""Characters of a text that name it where it has no name."""


@dataclass(frozen=True)
class InspectText:
    """``label``: A or B; ``name``: what tables call it."""

    label: str
    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def title(self) -> str:
        """ "A (how bees dance)"."""
        return f"{self.label} ({self.name})"


def inspect_texts(settings: InspectSettings) -> tuple[InspectText, ...]:
    """The texts; ``ConfigError`` for what cannot be read or is empty."""
    if settings.passage:
        named = _passage(settings.passage)
    elif settings.runs:
        named = _runs(settings.runs)
    else:
        a, b = (settings.prompt, settings.prompt_file), (settings.prompt_b, settings.prompt_b_file)
        named = [_prompt(text, file) for text, file in (a, b) if text is not None or file]
    texts = tuple(InspectText(label, *part) for label, part in zip("AB", named, strict=False))
    for text in texts:
        if not text.text.strip():
            raise ConfigError(f"text {text.title} is empty: give at least one word")
    return texts


def _prompt(text: str | None, file: str | None) -> tuple[str, str]:
    if text is not None:
        name = text if text in prompt_names() else " ".join(text.split())
        short = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1].rstrip()}…"
        return short, resolve_prompt(text)
    return "stdin" if file == "-" else Path(str(file)).name, read_prompt_file(str(file))


def _passage(name: str) -> list[tuple[str, str]]:
    from dart_llm.data.passages import Passage, find, shipped

    passage = find(shipped(), name)
    assert isinstance(passage, Passage)
    return [(part.topic.name, part.text) for part in passage.segments()[:2]]


def _runs(folders: str) -> list[tuple[str, str]]:
    """The pruned texts of two runs, or the dense and the pruned text of one."""
    paths = [Path(part.strip()) for part in folders.split(",") if part.strip()]
    if len(paths) not in (1, 2):
        raise ConfigError(f"--runs takes one results folder or two, not {len(paths)}")
    generated = [_generated(path) for path in paths]
    if len(generated) == 2:
        return [
            (f"{p.parent.name}/{p.name}", t[-1][1]) for p, t in zip(paths, generated, strict=True)
        ]
    if len(generated[0]) < 2:
        raise ConfigError(
            f"{paths[0]} has one text, of the untouched model: give a second run to compare with"
        )
    return [(f"{name} text of {paths[0].name}", text) for name, text in generated[0]]


def _generated(path: Path) -> list[tuple[str, str]]:
    """Variant and text of a run, dense first."""
    rows = [row for row in whole_rows(path / "generation.jsonl") if row.get("text")]
    if not rows:
        raise ConfigError(f"{path} has no generated text: give the folder of a run that wrote one")
    rows.sort(key=lambda row: row.get("variant") != "dense")
    return [(str(row.get("variant")), str(row["text"])) for row in rows[:2]]
