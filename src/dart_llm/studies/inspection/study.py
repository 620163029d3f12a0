"""`inspect`: look at a model and two texts; a unit is a section of inspect.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError
from dart_llm.experiments.artifacts import saver
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import read
from dart_llm.experiments.study import Study, Unit
from dart_llm.files import write_json
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.studies.inspection import analyses, plots, report
from dart_llm.studies.inspection.readings import Readings, weights
from dart_llm.studies.inspection.settings import InspectSettings, inspect_texts


def _layers(readings: Readings) -> dict[str, Any]:
    layers = [reading.impact for reading in readings.reading(0)]
    return {"text": readings.texts[0].label, "layers": layers}


def _weights(readings: Readings) -> dict[str, Any]:
    text, read = None, None
    if readings.texts:
        text, read = readings.texts[0].label, [one.activations for one in readings.reading(0)]
    return {"weights": weights(readings.view.blocks), "text": text, "activations": read}


SECTIONS: dict[str, Callable[[Readings], dict[str, Any]]] = {
    "layers": _layers,
    "weights": _weights,
    "neurons": analyses.neurons,
    "overlap": analyses.overlap,
    "ablation": analyses.ablation,
    "space": analyses.space,
}


class InspectionStudy(Study[InspectSettings]):
    """Everything in ``what`` (empty: all that the texts allow)."""

    kind = "inspect"
    document = "inspect.json"
    unit_times = "inspect_s"
    longest = 40
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

    def asked(self) -> dict[str, Any]:
        return {**super().asked(), "what": self.wanted}

    def load(self) -> None:
        super().load()
        self.readings = Readings(self.model, self.tokenizer, self.settings, self.texts)

    def units(self) -> Iterable[Unit]:
        units = [Unit(name) for name in self.wanted if not self._is_left_out(name)]
        self._save_activations()
        return units

    def _is_left_out(self, name: str) -> bool:
        """Whether a section that was not asked for by name cannot be made of these texts."""
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
            return SECTIONS[unit.key](self.readings)

    def take(self, unit: Unit, value: Any) -> None:
        self.sections[unit.key] = value
        write_json(self.path / self.document, self.summarise())

    @property
    def has_results(self) -> bool:
        return bool(self.sections)

    def summarise(self) -> dict[str, Any]:
        texts = [
            {**asdict(text), "sha256": text.sha256, "tokens_read": len(ids)}
            for text, ids in zip(self.texts, self.readings.ids, strict=True)
        ]
        sentences = report.sentences(self.sections)
        return {"texts": texts, "sentences": sentences, "sections": dict(self.sections)}

    def tables(self) -> Sequence[Table]:
        return report.tables(self.sections)

    def sentences(self) -> Sequence[str]:
        return list(report.sentences(self.sections).values())

    def figures(self) -> Iterator[Plot]:
        yield from plots.make(self.summary, read(self.path).small_print)

    def write_page(self) -> Path:
        return report.write(self.path, self.summary)
