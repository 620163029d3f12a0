"""The pictures of a drift folder as ``plots/*.png``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dart_llm import (
    plot_detection_rates,
    plot_loss,
    plot_methods,
    plot_overlap,
    plot_raster,
    plot_sankey,
    plot_timeline,
    plots,
)
from dart_llm.drift_view import DriftView, read
from dart_llm.plot_topics import Drawing

MAKERS = (
    plot_methods.make,
    plot_loss.make,
    plot_timeline.make,
    plot_overlap.make,
    plot_raster.make,
    plot_sankey.make,
)
"""Each makes pictures of one kind, the best to show first."""


def kinds(view: DriftView) -> Iterator[Iterator[Drawing]]:
    """The pictures by kind, then those of detection.

    A picture is made when it is asked for: making one of masks reads their file.
    """
    for make in MAKERS:
        yield make(view)
    yield from (iter([drawing]) for drawing in plot_detection_rates.make(view))


def write_all(folder: Path) -> list[Path]:
    """Write ``plots/<name>.png``, one picture of each kind that the folder allows.

    Raises ``ResultsError`` when it is no drift folder, masks do not fit it or a file cannot be
    written, ``MissingExtra`` without matplotlib or cmcrameri.
    """
    firsts = (next(kind, None) for kind in kinds(read(folder)))
    return plots.save(folder, (drawing.plot for drawing in firsts if drawing is not None))
