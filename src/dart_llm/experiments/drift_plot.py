"""Drift of one run over its tokens.

Plot: similarity to the reference over time, with its threshold and the re-masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dart_llm.experiments.store import ResultsView
from dart_llm.pruning.records import DriftCheck
from dart_llm.reporting.figures import INK, MAX_PANELS, SOFT, Palette, Plot, legend
from dart_llm.reporting.table import grouped
from dart_llm.reporting.words import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def is_low(check: DriftCheck) -> bool:
    """Whether a window's similarity lies under its threshold."""
    return check.threshold is not None and check.similarity < check.threshold


def drift_sentence(checks: Sequence[DriftCheck], remasks: Sequence[Mapping[str, Any]]) -> str:
    """How many windows were low, and how often the masks were rebuilt for it."""
    armed = [check for check in checks if check.threshold is not None]
    if not armed:
        return f"The drift detector did not arm within {count(len(checks), 'window')}."
    lows = sum(is_low(check) for check in armed)
    rebuilt = sum(remask.get("cause") == "drift" for remask in remasks)
    shared = any(remask.get("row") is None for remask in remasks)  # one trigger for all rows
    held = len({_place(check, shared) for check in checks if check.state == "held"})
    triggers = len({_place(check, shared) for check in checks if check.trigger})
    words = [f"{lows} of {count(len(armed), 'window')} fell below the threshold"]
    if triggers or rebuilt:
        late = " before the end" if rebuilt < triggers else ""
        words.append(f"{count(triggers, 'trigger')} led to {count(rebuilt, 're-mask')}{late}")
    else:
        words.append("nothing was re-masked")
    if held:
        words.append(f"the guards put off {count(held, 'trigger')}")
    return "; ".join(words) + "."


def _place(check: DriftCheck, shared: bool) -> tuple[int, int, int]:
    return check.sequence, -1 if shared else check.row, check.step


FEWEST_WINDOWS = 8
"""Windows of one text below which a line over time says nothing."""

MAX_NAMED = 14
"""Masks in one panel above which they are thin lines without names."""

Masks = Sequence[Mapping[str, Any]]


def make(view: ResultsView) -> Plot | None:
    """One panel per sequence and row; those with triggers first, in order, at most four.

    None of texts with few windows, and of detectors that never armed.
    """
    groups = {
        key: checks
        for key, checks in grouped(view.drift, lambda check: (check.sequence, check.row)).items()
        if worth_drawing(checks)
    }
    if not groups:
        return None
    ranked = sorted(groups, key=lambda key: (-sum(c.trigger for c in groups[key]), key))
    shown = sorted(ranked[:MAX_PANELS])
    words = drift_sentence(view.drift, view.remasks)
    window = _window(view.drift)
    small = f"each mark: the {window} tokens before it · " if window else ""
    if len(groups) > len(shown):
        small += f"{len(shown)} of {len(groups)} sequences shown · "

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (sequence, row) in zip(panels, shown, strict=True):
            masks = [m for m in view.remasks if _belongs(m, sequence, row)]
            draw_checks(axes, palette, groups[sequence, row], masks)
            if len(groups) > 1:
                axes.set_title(f"sequence {sequence}, row {row}", loc="right", fontsize=8)
        panels[-1].set_xlabel("decode step (tokens)")
        legend(panels[0], 2 if narrow else 4)

    alt = f"Marks: similarity of the attention output to its reference, over decode steps. {words}"
    return Plot("similarity", words, alt, small + view.small_print, 2.2 + 1.5 * len(shown), draw)


def worth_drawing(checks: Sequence[DriftCheck]) -> bool:
    """Whether there are enough windows, and one of them had a threshold."""
    armed = any(check.threshold is not None for check in checks)
    return armed and len(checks) >= FEWEST_WINDOWS


def _window(checks: Sequence[DriftCheck]) -> int | None:
    """Tokens per window: the smallest distance of two windows of one sequence."""
    gaps = [
        after.step - before.step
        for before, after in itertools.pairwise(checks)
        if before.sequence == after.sequence and after.step > before.step
    ]
    return min(gaps, default=None)


def _belongs(mask: Mapping[str, Any], sequence: int, row: int) -> bool:
    has_place = isinstance(mask.get("step"), int)
    return has_place and mask.get("sequence") == sequence and mask.get("row") in (None, row)


def draw_checks(axes: Axes, palette: Palette, checks: Sequence[DriftCheck], masks: Masks) -> None:
    """Windows with their similarity and threshold, and lines where masks were built."""
    starts = [int(mask["step"]) for mask in masks]
    label = "threshold"
    for stretch in stretches(checks, starts):
        steps = [check.step for check in stretch]
        axes.plot(steps, [c.similarity for c in stretch], color=SOFT, linewidth=0.9, zorder=2)
        limits = [(c.step, c.threshold) for c in stretch if c.threshold is not None]
        if limits:
            x, y = [limit[0] for limit in limits], [limit[1] for limit in limits]
            x, y = [x[0] - 3, *x, x[-1] + 3], [y[0], *y, y[-1]]
            axes.plot(x, y, "--", color=palette[2], linewidth=1.6, zorder=2, label=label)
            label = "_"
    _draw_windows(axes, palette, checks)
    _draw_masks(axes, checks, masks)
    axes.set_ylabel("cosine similarity")
    axes.grid(axis="y")


def stretches(checks: Sequence[DriftCheck], starts: Sequence[int]) -> list[list[DriftCheck]]:
    """The windows of each mask: lines are broken where masks were rebuilt."""
    begins, ends = [float("-inf"), *starts], [*starts, float("inf")]
    found = (
        [check for check in checks if begin < check.step <= end]
        for begin, end in zip(begins, ends, strict=True)
    )
    return [stretch for stretch in found if stretch]


def window_kind(check: DriftCheck) -> str:
    """``trigger``, ``held``, ``arming``, ``low`` or ``armed``."""
    if check.trigger:
        return "trigger"
    if check.state in ("held", "arming"):
        return check.state
    return "low" if is_low(check) else "armed"


def _draw_windows(axes: Axes, palette: Palette, checks: Sequence[DriftCheck]) -> None:
    looks: dict[str, dict[str, Any]] = {
        "armed": {"marker": "o", "color": palette[0], "label": "window"},
        "low": {"marker": "v", "color": palette[4], "markersize": 8, "label": "low window"},
        "trigger": {"marker": "*", "color": palette[4], "markersize": 14, "label": "trigger"},
        "held": {"marker": "D", "color": "white", "label": "held: guards put it off"},
        "arming": {"marker": "o", "color": "white", "label": "arming: no threshold yet"},
    }
    for kind, look in looks.items():
        points = [check for check in checks if window_kind(check) == kind]
        if points:
            edge = 1.8 if kind == "held" else 0.9
            style = {"markeredgecolor": INK, "markeredgewidth": edge, "markersize": 6.5, **look}
            x, y = [check.step for check in points], [check.similarity for check in points]
            axes.plot(x, y, linestyle="none", zorder=4, **style)


def _draw_masks(axes: Axes, checks: Sequence[DriftCheck], masks: Masks) -> None:
    """Lines where masks were built, named by their cause; hatched where tokens ran dense."""
    end = max(check.step for check in checks)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.16 * (high - low))
    axes.set_xlim(-0.02 * end - 1, 1.03 * end + 1)
    previous = float("-inf")
    for index, (begin, stop) in enumerate(
        _dense_stretches(checks, [int(m["step"]) for m in masks])
    ):
        axes.axvspan(
            begin,
            axes.get_xlim()[1] if stop is None else stop,
            facecolor="none",
            edgecolor="#b9bec5",
            hatch="////",
            linewidth=0,
            zorder=1,
            label="_" if index else "dense, observing",
        )
    few = len(masks) <= MAX_NAMED
    for mask in masks:
        step = int(mask["step"])
        axes.axvline(step, color=INK, linewidth=1.1 if few else 0.4, zorder=3 if few else 1)
        if few and step - previous > 0.03 * end:
            _name(axes, step, str(mask.get("cause", "")))
            previous = step
    if not few:
        axes.plot([], [], color=INK, linewidth=0.6, label=f"{len(masks)} masks")


def _dense_stretches(
    checks: Sequence[DriftCheck], starts: Sequence[int]
) -> list[tuple[int, int | None]]:
    """From the beginning, or a trigger, to the mask that was built; None: to the end of the run."""
    found: list[tuple[int, int | None]] = [(0, starts[0])] if starts and starts[0] > 0 else []
    triggers = [check.step for check in checks if check.trigger]
    return found + [(at, next((step for step in starts if step >= at), None)) for at in triggers]


def _name(axes: Axes, step: int, cause: str) -> None:
    axes.annotate(
        cause,
        (step, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(3, -1),
        textcoords="offset points",
        rotation=90,
        va="top",
        ha="left",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
    )
