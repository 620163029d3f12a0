"""``inspect``: look at a model and two texts; a unit is a section of inspect.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError
from dart_llm.experiments.artifacts import saver
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultLine
from dart_llm.experiments.study import Study, Unit
from dart_llm.files import write_json, write_text
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.reporting import page
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Record, Table
from dart_llm.reporting.words import percent
from dart_llm.studies.inspection import analyses, sections
from dart_llm.studies.inspection.readings import Readings, weight_norms
from dart_llm.studies.inspection.sections import Shown
from dart_llm.studies.inspection.settings import InspectSettings, inspect_texts


def _layers(readings: Readings) -> dict[str, Any]:
    layers = [reading.impact for reading in readings.reading(0)]
    return {"text": readings.texts[0].label, "layers": layers}


def _weights(readings: Readings) -> dict[str, Any]:
    text, activations = None, None
    if readings.texts:
        text = readings.texts[0].label
        activations = [layer.activations for layer in readings.reading(0)]
    norms = weight_norms(readings.view.blocks)
    return {"weights": norms, "text": text, "activations": activations}


@dataclass(frozen=True)
class Section:
    """A part of an inspection: its numbers, and how they are shown."""

    title: str
    compute: Callable[[Readings], dict[str, Any]]
    show: Callable[[Record], list[Shown]]


SECTIONS = {
    "layers": Section("Layers", _layers, sections.layers),
    "weights": Section("Weights and activations", _weights, sections.weights),
    "neurons": Section("Strong and weak neurons", analyses.neurons, sections.neurons),
    "overlap": Section("Overlap of two texts", analyses.overlap, sections.overlap),
    "ablation": Section("Ablation", analyses.ablation, sections.ablation),
    "space": Section("Embedding space", analyses.space, sections.space),
}

LONG, MOST = 12, 300
"""On the page a table with more rows is folded, or left to its CSV file."""

FACTS = {"checkpoint", "file quantisation", "dtype", "device", "date", "sha256", "command"}


class InspectionStudy(Study[InspectSettings]):
    """Everything in ``what`` (empty: all that the texts allow)."""

    kind = "inspect"
    document = "inspect.json"
    unit_times = "inspect_s"
    noun = "section"

    def __init__(self, settings: InspectSettings, what: Sequence[str], ui: Ui) -> None:
        super().__init__(settings, ui)
        self.named, self.wanted = bool(what), settings.chosen(what)
        self.texts = inspect_texts(settings)
        self.readings: Readings
        self.sections: dict[str, Any] = {}

    def inputs(self) -> Mapping[str, Any]:
        texts = {f"text {text.label}": text.sha256 for text in self.texts}
        return {**Digests().of_settings(self.settings), **texts}

    def requested(self) -> dict[str, Any]:
        return {**super().requested(), "what": self.wanted}

    def load(self) -> None:
        super().load()
        self.readings = Readings(self.model, self.tokenizer, self.settings, self.texts)

    def units(self) -> Iterable[Unit]:
        units = [Unit(name) for name in self.wanted if not self._is_left_out(name)]
        self._save_activations()
        return units

    def _is_left_out(self, name: str) -> bool:
        """Whether a section that was not requested by name cannot be made of these texts."""
        try:
            if name in ("overlap", "ablation"):
                self.readings.selector  # noqa: B018 - raises where the method reads no text
            if name == "ablation":
                analyses.check(self.readings)
        except ConfigError as error:
            if self.named:
                raise
            self.ui.say(f"no {name}: {error}")
            return True
        return False

    def _save_activations(self) -> None:
        """Read the texts at once when their activations are to be kept: sections reuse that."""
        longest = max(map(len, self.readings.ids), default=0)
        keep = saver(self.settings, self.model, self.path, longest)
        if keep is None:
            return
        if not self.texts:
            raise ConfigError(
                "--save-activations keeps those of a text: give --prompt or --passage"
            )
        keep.announce(len(self.texts), self.ui.say)
        self.readings.saver = keep
        for number in range(len(self.texts)):
            self.readings.reading(number)

    def compute(self, unit: Unit) -> dict[str, Any]:
        with self.ui.status(f"inspecting {unit.key}"):
            return SECTIONS[unit.key].compute(self.readings)

    def take(self, unit: Unit, value: Any) -> None:
        self.sections[unit.key] = value
        write_json(self.path / self.document, self.summarise())

    def summarise(self) -> dict[str, Any]:
        texts = [
            {**asdict(text), "sha256": text.sha256, "tokens_read": len(ids)}
            for text, ids in zip(self.texts, self.readings.ids, strict=True)
        ]
        return {"texts": texts, "sections": dict(self.sections)}

    def result_lines(self) -> list[ResultLine]:
        """The overlap of the kept neurons, and the losses of the ablation."""
        facts = checkpoint_facts(self.model)
        line = partial(
            ResultLine,
            method=self.settings.prune_config().method,
            model=str(facts.get("name")),
            seed=self.settings.seed,
            dtype=facts.get("dtype"),
        )
        lines = list[ResultLine]()
        if overlap := self.sections.get("overlap"):
            shares = {"requested": overlap["sparsity"], "achieved": overlap["removed"]}
            value, task = overlap["mean"]["jaccard"], "inspect:overlap"
            lines = [
                line(label="kept for A and B", task=task, metric="jaccard", value=value, **shares)
            ]
        for row in self.sections.get("ablation", {}).get("rows", ()):
            ends = row["loss_interval"] or {}
            lines.append(
                line(
                    label=f"without {analyses.ARMS[row['arm']]}, loss on {row['text']}",
                    task="inspect:ablation",
                    metric="loss",
                    value=row["loss"],
                    low=ends.get("low"),
                    high=ends.get("high"),
                    achieved=row["achieved_sparsity"],
                    dense_share=row["dense_token_share"],
                    remasks=row["remasks"],
                )
            )
        return lines

    def show(self, name: str) -> list[Shown]:
        """The tables of a section, with what is drawn of them."""
        return SECTIONS[name].show(self.sections[name])

    def tables(self) -> Sequence[Table]:
        return [shown.table for name in self.sections for shown in self.show(name)]

    def sentences(self) -> Sequence[str]:
        return [headline(self.sections)]

    def figures(self) -> Iterator[Plot]:
        for name in self.sections:
            yield from self._plots(name)

    def _plots(self, name: str) -> list[Plot]:
        small = page.small_print(self.config)
        return [shown.plot(small) for shown in self.show(name) if shown.panels]

    def write_page(self) -> Path:
        """``report.html``; without matplotlib it has no plots and says so."""
        parts, missing = [], ""
        for name in self.sections:
            drawn, reason = page.pictures(self._plots(name))
            missing = missing or reason
            tables = [shown.table for shown in self.show(name)]
            short = [(t.html(), len(t.rows) > LONG) for t in tables if len(t.rows) <= MOST]
            left = [(t.caption, f"{t.name}.csv") for t in tables if len(t.rows) > MOST]
            parts.append((name, SECTIONS[name].title, drawn, short, left))
        texts = [
            (f"text {text['label']}", f"{text['name']}: {text['tokens_read']} tokens read", False)
            for text in self.summary["texts"]
        ]
        content = {
            "title": f"Inside {page.model_name(self.config)}",
            "conclusion": headline(self.sections),
            "facts": texts + [fact for fact in page.facts(self.config) if fact[0] in FACTS],
            "texts": self.summary["texts"],
            "sections": parts,
            "missing": missing,
        }
        html = page.render(self.config, "inspect.html", content)
        write_text(self.path / "report.html", html)
        return self.path / "report.html"


def headline(sections: Record) -> str:
    """How far two texts differ, or else what was looked at."""
    if overlap := sections.get("overlap"):
        mean = overlap["mean"]
        return (
            f"With {percent(overlap['removed'])} removed, the neurons kept for A and for B have a "
            f"Jaccard of {mean['jaccard']:.3f}, where chance gives {mean['chance']:.3f}."
        )
    return f"Inspected: {', '.join(sections)}."
