"""A drift study as plain sentences: its conclusion, the titles of its pictures, its notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dart_llm import detection_table, drift_tables
from dart_llm.drift_masks import Flow
from dart_llm.drift_view import DriftView
from dart_llm.drift_view_cells import DriftCell
from dart_llm.sentences import count, percent
from dart_llm.stats import Interval

Estimate = Mapping[str, Any]
"""A number of the summary: ``mean``, ``low``, ``high`` (None without an interval), ``n``."""

MODES = {"forced": "passage", "free": "prompt"}
"""What a source is called in each mode."""


def ends(interval: Interval | None) -> str:
    """ "0.61 to 1.07", or nothing where there is no interval."""
    return "" if interval is None else f"{interval.low:.2f} to {interval.high:.2f}"


def bounds(estimate: Estimate) -> str:
    """The same of a number of the summary."""
    if estimate["low"] is None:
        return "no interval"
    return f"{estimate['low']:.2f} to {estimate['high']:.2f}"


def accounted(record: Mapping[str, Any]) -> str:
    """Removed, dense and re-masks of a summary's row or of a cell's accounting."""
    remasks = record.get("remasks_per_cell", record.get("remasks"))
    return (
        f"{percent(record['achieved_sparsity'])} of the FFN neurons removed, "
        f"{percent(record['dense_token_share'])} of the decoded tokens dense, {plural(remasks)}"
    )


def plural(remasks: float | None) -> str:
    """A mean number of re-masks: "1 re-mask", "1.3 re-masks"."""
    text = f"{remasks or 0:.1f}".removesuffix(".0")
    return f"{text} re-mask{'' if text == '1' else 's'}"


def conclusion(view: DriftView) -> str:
    """What the study, the detection, or neither found."""
    told = drift_tables.sentence(view.summary) if view.summary else ""
    if not told and view.detection:
        told = detection_table.conclusion(view.detection)
    failed = sum(not cell.done for cell in view.cells)
    if not told and failed and not view.done:
        told = f"Nothing was measured: {count(failed, 'cell')} failed."
    return told or ("Nothing was measured." if not view.done else "Nothing can be compared yet.")


def figure(value: float | None) -> str:
    """Three digits of a metric."""
    if value is None:
        return "not known"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def place(cell: DriftCell) -> str:
    """ "passage 07: tides, then banking" as far as it is known."""
    topics = ", then ".join(topic.name for topic in cell.topics)
    kind = MODES.get(cell.mode, "source")
    return f"{kind} {cell.source}: {topics}" if topics else f"{kind} {cell.source}"


def choice(cell: DriftCell) -> str:
    """A cell in a list of choices."""
    seed = f", seed {cell.seed}" if cell.seed else ""
    return f"{MODES.get(cell.mode, 'source')} {cell.source}, {cell.label}{seed}"


def timeline_title(cells: Sequence[DriftCell]) -> str:
    """How often each method made new masks, and where the source's topics change."""
    told = ", ".join(f"{cell.label} {plural(_built(cell))}" for cell in cells)
    return f"Similarity to the reference on {place(cells[0])}. {told}."


def _built(cell: DriftCell) -> int:
    return sum(mask.cause not in ("first", "given") for mask in cell.remasks)


def overlap_title(cell: DriftCell, last: float, expected: float) -> str:
    return (
        f"{choice(cell)}: the last masks overlap {last:.2f} with the first, mean over layers "
        f"(independent masks: {expected:.2f})."
    )


def raster_title(cell: DriftCell, layer: int, always: int, never: int, width: int) -> str:
    return (
        f"{choice(cell)}, layer {layer}: {percent(always / width, 0)} of its {width:,} neurons "
        f"live under every mask, {percent(never / width, 0)} under none."
    )


def flow_title(cell: DriftCell, names: Sequence[str], flows: Sequence[Flow], keep: float) -> str:
    """Kept shares from one topic to the next; ``keep``: what independent masks would keep."""
    told = "; ".join(
        f"from {old} to {new} {percent(flow.share_kept, 0)} of the neurons are kept"
        for old, new, flow in zip(names, names[1:], flows, strict=False)
    )
    return f"{choice(cell)}: {told} (independent masks: {percent(keep, 0)})."
