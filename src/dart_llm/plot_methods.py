"""Picture: the methods compared: each quality with its interval, achieved sparsity beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dart_llm import drift_words
from dart_llm.drift_view import DriftView
from dart_llm.drift_words import Estimate
from dart_llm.plot_bars import GREY, HATCHES
from dart_llm.plot_base import INK, Palette, Plot
from dart_llm.plot_topics import PATTERNS, Drawing, Kit, looks, web_looks
from dart_llm.sentences import percent
from dart_llm.text_metrics import NUMBERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSSES = (
    ("after_minus_dense", "loss after the change, over dense (nats per token)"),
    ("after", "loss after the change (nats per token)"),
)
"""The first that was measured is shown."""

METRICS = ("document_similarity", "rougeL", "bertscore", "sentence_coverage")
"""Shown of the free mode; the table has the others."""

TITLES = {number.name: number.title for number in NUMBERS}


@dataclass(frozen=True)
class Bar:
    """One method's number, and the summary's row that accounts for it."""

    label: str
    estimate: Estimate
    line: Mapping[str, Any]

    @property
    def top(self) -> float:
        """Where the bar and its whisker end."""
        return float(max(0.0, self.estimate["mean"], self.estimate["high"] or 0.0))


Panels = Mapping[str, Sequence[Bar]]


def make(view: DriftView) -> Iterator[Drawing]:
    """One, with a panel per number: the loss after the change, or metrics against dense."""
    found = panels(view)
    if found:
        yield _drawing(view, found)


def panels(view: DriftView) -> dict[str, list[Bar]]:
    """Bars by the words of their axis."""
    found: dict[str, list[Bar]] = {}
    for kind, names in (("loss", LOSSES), ("metrics", [(name, name) for name in METRICS])):
        for name, words in names:
            title = words if kind == "loss" else f"{TITLES[name]} against the dense text"
            bars = [
                Bar(str(line["label"]), line[kind][name], line)
                for line in view.lines
                if line[kind] and line[kind].get(name)
            ]
            if bars and not (kind == "loss" and found):
                found[title] = bars
    return found


def _drawing(view: DriftView, found: Panels) -> Drawing:
    axis, first = next(iter(found.items()))
    kind = drift_words.MODES.get(view.mode, "source")
    bounded = any(bar.estimate["low"] is not None for bar in first)
    whiskers = "whiskers: 95 % bootstrap intervals" if bounded else "no intervals, means"
    small = f"{whiskers} over {first[0].estimate['n']} {kind}s · {view.results.small_print}"
    counts = [len(bars) for bars in found.values()]

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        shape = {
            "height_ratios": [count + 1.2 for count in counts],
            "width_ratios": (1.7, 1.0) if narrow else (2.4, 1.2),
        }
        drawn = figure.subplots(len(found), 2, squeeze=False, gridspec_kw=shape)
        for (quality, removed), (words, bars) in zip(drawn, found.items(), strict=True):
            _quality(quality, bars, palette)
            _removed(removed, bars, narrow)
            quality.set_xlabel(_folded(words) if narrow else words)
        drawn[-1][1].set_xlabel("achieved\nsparsity (%)" if narrow else "achieved sparsity (%)")

    listed = "; ".join(
        f"{bar.label} {bar.estimate['mean']:.3f} with {drift_words.accounted(bar.line)}"
        for bar in first
    )
    title = drift_words.conclusion(view)
    height = 0.7 + sum(0.75 + 0.36 * count for count in counts)
    plot = Plot("methods", title, f"Bars: {axis}. {listed}.", small, height, draw)
    return Drawing(plot, lambda kit: _web(kit, found), tall=_tall(found))


def _tall(found: Panels) -> int:
    return 80 + sum(95 + 34 * len(bars) for bars in found.values())


def _folded(text: str) -> str:
    return text.replace(", over", ",\nover").replace(" (", "\n(").replace(" against", "\nagainst")


def _quality(axes: Axes, bars: Sequence[Bar], palette: Palette) -> None:
    colours = looks([bar.label for bar in bars], palette)
    for place, bar in enumerate(bars):
        look = {"color": colours[bar.label]["color"], "hatch": HATCHES[place % len(HATCHES)]}
        axes.barh(place, bar.estimate["mean"], 0.62, edgecolor="white", linewidth=0, **look)
        if bar.estimate["low"] is not None:
            x = [bar.estimate["low"], bar.estimate["high"]]
            for ink, extra in (("white", 2.0), (INK, 0.0)):
                style: dict[str, Any] = {"color": ink, "linewidth": 1.4 + extra, "marker": "|"}
                axes.plot(x, [place, place], markersize=7 + extra, **style)
        _write(axes, f"{bar.estimate['mean']:.2f}", bar.top, place, 8.5)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.16 * (high - low))
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    _rows(axes, len(bars))


def _removed(axes: Axes, bars: Sequence[Bar], narrow: bool) -> None:
    for place, bar in enumerate(bars):
        removed = bar.line["achieved_sparsity"]
        axes.barh(place, 100 * removed, 0.62, color=GREY)
        words = percent(removed)
        if not narrow:
            dense = percent(bar.line["dense_token_share"])
            words += f"\n{dense} dense, {drift_words.plural(bar.line['remasks_per_cell'])}"
        _write(axes, words, 0, place, 7.2)
    axes.set_xlim(0, 100)
    axes.set_yticks([])
    _rows(axes, len(bars))


def _write(axes: Axes, text: str, x: float, place: int, size: float) -> None:
    look: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (x, place), fontsize=size, color=INK, in_layout=False, **look)


def _rows(axes: Axes, count: int) -> None:
    axes.set_ylim(count - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _web(kit: Kit, found: Panels) -> Any:
    figure = kit.subplots(
        rows=len(found),
        cols=2,
        column_widths=[0.66, 0.34],
        horizontal_spacing=0.04,
        vertical_spacing=min(95 / _tall(found), 0.9 / len(found)),
        row_heights=[float(len(bars)) for bars in found.values()],
    )
    for row, (words, bars) in enumerate(found.items(), start=1):
        labels = [bar.label for bar in bars]
        styles = web_looks(labels, kit)
        for place, bar in enumerate(bars):
            colour = styles[bar.label]["line"]["color"]
            trace = _web_bar(kit, bar, colour, HATCHES[place % len(HATCHES)])
            figure.add_trace(trace, row=row, col=1)
        for trace in _web_whiskers(kit, bars):
            figure.add_trace(trace, row=row, col=1)
        removed = kit.go.Bar(
            y=labels,
            x=[100 * bar.line["achieved_sparsity"] for bar in bars],
            orientation="h",
            marker={"color": GREY},
            text=[percent(bar.line["achieved_sparsity"]) for bar in bars],
            textposition="inside",
            textangle=0,
            constraintext="none",
            insidetextanchor="start",
            textfont={"color": INK},
            customdata=[drift_words.accounted(bar.line) for bar in bars],
            hovertemplate="%{y}<br>%{customdata}<extra></extra>",
            showlegend=False,
        )
        figure.add_trace(removed, row=row, col=2)
        figure.update_yaxes(autorange="reversed", row=row)
        figure.update_yaxes(showticklabels=False, row=row, col=2)
        figure.update_xaxes(title_text=_folded(words).replace("\n", "<br>"), row=row, col=1)
        figure.update_xaxes(range=[0, 100], tickvals=[0, 50, 100], row=row, col=2)
    figure.update_xaxes(title_text="achieved<br>sparsity (%)", row=len(found), col=2)
    figure.update_layout(barmode="overlay")
    return figure


def _web_bar(kit: Kit, bar: Bar, colour: str, hatch: str) -> Any:
    pattern = {"shape": PATTERNS[hatch], "fillmode": "overlay", "fgcolor": "white", "size": 7}
    return kit.go.Bar(
        y=[bar.label],
        x=[bar.estimate["mean"]],
        orientation="h",
        marker={"color": colour, "pattern": pattern},
        customdata=[
            f"{drift_words.bounds(bar.estimate)} over {bar.estimate['n']}<br>"
            f"{drift_words.accounted(bar.line)}"
        ],
        hovertemplate="%{y}: %{x:.3f} (%{customdata})<extra></extra>",
        showlegend=False,
    )


def _web_whiskers(kit: Kit, bars: Sequence[Bar]) -> Iterator[Any]:
    """White below ink, to be seen on dark bars too."""
    known = [bar for bar in bars if bar.estimate["low"] is not None]
    for colour, thick in (("white", 5), (INK, 1.8)):
        yield kit.go.Scatter(
            x=[bar.estimate["mean"] for bar in known],
            y=[bar.label for bar in known],
            mode="markers",
            marker={"size": 1, "color": colour},
            error_x={
                "type": "data",
                "array": [bar.estimate["high"] - bar.estimate["mean"] for bar in known],
                "arrayminus": [bar.estimate["mean"] - bar.estimate["low"] for bar in known],
                "color": colour,
                "thickness": thick,
                "width": 4 + thick / 2,
            },
            hoverinfo="skip",
            showlegend=False,
        )
