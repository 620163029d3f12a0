"""Every free text of a drift study against the dense text of the same source and seed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dart_llm.drift_files import StudyFiles
from dart_llm.drift_grid import DriftCell
from dart_llm.drift_methods import DENSE
from dart_llm.errors import DartError
from dart_llm.settings_drift import FORCED, DriftSettings

if TYPE_CHECKING:
    from dart_llm.text_metrics import TextTools
    from dart_llm.ui import Ui


@dataclass(frozen=True)
class Judge:
    """Loaded tools, or why there are none.  ``notes``: what a reader of the numbers must know."""

    tools: TextTools | None
    notes: tuple[str, ...] = ()

    def measure(self, files: StudyFiles, cell: DriftCell) -> None:
        """Compare the cell's text with the dense one and keep it, unless that was done before."""
        if self.tools is None or cell.method.name == DENSE or files.metrics(cell) is not None:
            return
        own, dense = files.part(cell), files.folder.part(cell.dense_key)
        if own is None or dense is None:
            return
        from dart_llm.text_metrics import compare

        began = time.perf_counter()
        found = compare(own["text"], dense["text"], self.tools).to_dict()
        files.save_metrics(cell, found, time.perf_counter() - began)

    def facts(self) -> dict[str, Any] | None:
        """The models behind the numbers, for config.json."""
        return None if self.tools is None else self.tools.to_dict()


def load_judge(settings: DriftSettings, ui: Ui) -> Judge:
    """The tools of free mode, loaded before anything long is computed.

    What is missing is said and costs the metrics alone, never the study.
    """
    if settings.kind == FORCED or not settings.metrics:
        return Judge(None)
    if all(method.name == DENSE for method in settings.method_list()):
        return Judge(None)
    from dart_llm.text_metrics import load_tools

    try:
        with ui.status("loading the models of the metrics") as news:
            tools = load_tools(
                settings.embedder,
                bertscore=settings.bertscore,
                cache_dir=settings.cache_dir,
                progress=news,
            )
    except DartError as error:
        ui.say(f"no metrics: {error}")
        return Judge(None, (f"no metrics: {error}",))
    return Judge(tools, tools.notes)
