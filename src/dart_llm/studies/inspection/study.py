"""The study ``inspect``: a model on up to two texts; a unit is a section of inspect.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError
from dart_llm.experiments.artifacts import saver
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultLine
from dart_llm.experiments.study import Study, Unit
from dart_llm.files import write_text
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.reporting import page
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Record, Table
from dart_llm.reporting.words import percent
from dart_llm.studies.inspection.readings import Readings
from dart_llm.studies.inspection.sections import SECTIONS, TableWithPanels, check_ablation
from dart_llm.studies.inspection.settings import InspectSettings, inspect_texts


class InspectionStudy(Study[InspectSettings]):
    """Computes the sections in ``what``; if it is empty, all for which enough texts are given."""

    kind = "inspect"
    document = "inspect.json"
    unit_times = "inspect_s"
    longest = 40
    noun = "section"

    def __init__(self, settings: InspectSettings, what: Sequence[str], ui: Ui) -> None:
        super().__init__(settings, ui)
        self.explicit, self.wanted = bool(what), settings.chosen(what)
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
        units = [Unit(name) for name in self.wanted if not self._is_skipped(name)]
        self._save_activations()
        return units

    def _is_skipped(self, name: str) -> bool:
        """Whether a section cannot be computed; raises ``ConfigError`` if it was requested."""
        try:
            if name in ("overlap", "ablation"):
                self.readings.selector  # noqa: B018 - raises if the method ignores the text
            if name == "ablation":
                check_ablation(self.readings)
        except ConfigError as error:
            if self.explicit:
                raise
            self.ui.say(f"skipping {name}: {error}")
            return True
        return False

    def _save_activations(self) -> None:
        """If activations are to be saved, run all texts now; the sections reuse these passes."""
        longest = max(map(len, self.readings.ids), default=0)
        activation_saver = saver(self.settings, self.model, self.path, longest)
        if activation_saver is None:
            return
        if not self.texts:
            raise ConfigError("--save-activations needs a text: give --prompt or --passage")
        activation_saver.announce(len(self.texts), self.ui.say)
        self.readings.saver = activation_saver
        for number in range(len(self.texts)):
            self.readings.reading(number)

    def compute(self, unit: Unit) -> dict[str, Any]:
        return SECTIONS[unit.key][0](self.readings)

    def take(self, unit: Unit, value: Any) -> None:
        self.sections[unit.key] = value

    def summarise(self) -> dict[str, Any]:
        texts = [
            {**asdict(text), "sha256": text.sha256, "tokens_read": len(ids)}
            for text, ids in zip(self.texts, self.readings.ids, strict=True)
        ]
        return {"texts": texts, "sections": dict(self.sections)}

    def result_lines(self) -> list[ResultLine]:
        """The overlap of kept neurons, and the losses of the ablation."""
        facts = checkpoint_facts(self.model)
        line = partial(
            ResultLine,
            method=self.settings.prune_config().method,
            model=str(facts.get("name")),
            seed=self.settings.seed,
            dtype=facts.get("dtype"),
        )
        lines = [
            line(
                label="overlap of neurons kept for A and for B",
                task="inspect:overlap",
                metric="jaccard",
                value=data["mean"]["jaccard"],
                requested=data["sparsity"],
                achieved=data["removed"],
            )
            for data in filter(None, [self.sections.get("overlap")])
        ]
        lines += [
            line(
                label=f"loss on {row['text']} without {row['removed']} neurons",
                task="inspect:ablation",
                metric="loss",
                value=row["loss"],
                low=row["loss_interval"]["low"],
                high=row["loss_interval"]["high"],
                achieved=row["achieved_sparsity"],
                dense_share=row["dense_token_share"],
                remasks=row["remasks"],
            )
            for row in self.sections.get("ablation", {}).get("rows", ())
        ]
        return lines

    def show(self, name: str) -> list[TableWithPanels]:
        """The tables of a section, with their plot panels."""
        return SECTIONS[name][1](self.sections[name])

    def tables(self) -> Sequence[Table]:
        return [shown.table for name in self.sections for shown in self.show(name)]

    def sentences(self) -> Sequence[str]:
        return [headline(self.sections)]

    def figures(self) -> list[Plot]:
        return [plot for name in self.sections for plot in self._plots(name)]

    def _plots(self, name: str) -> list[Plot]:
        small = page.small_print(self.config)
        return [shown.plot(small) for shown in self.show(name) if shown.panels]

    def write_page(self) -> Path:
        """Write ``report.html``; without matplotlib, the page notes that plots are missing."""
        parts, missing = [], ""
        for name in self.sections:
            drawn, reason = page.pictures(self._plots(name))
            missing = missing or reason
            tables = [shown.table.html() for shown in self.show(name)]
            parts.append((name, name.capitalize(), drawn, tables))
        content = {
            "title": f"Inside {page.model_name(self.config)}",
            "conclusion": headline(self.sections),
            "facts": page.facts(self.config),
            "texts": self.summary["texts"],
            "sections": parts,
            "missing": missing,
        }
        html = page.render(self.config, "inspect.html", content)
        write_text(self.path / "report.html", html)
        return self.path / "report.html"


def headline(sections: Record) -> str:
    """A sentence on the overlap of two texts' neurons; without it, the names of the sections."""
    if overlap := sections.get("overlap"):
        mean = overlap["mean"]
        return (
            f"With {percent(overlap['removed'])} removed, the neurons kept for A and for B have a "
            f"Jaccard index of {mean['jaccard']:.3f} ({mean['chance']:.3f} by chance)."
        )
    return f"Inspected: {', '.join(sections)}."
