"""A drift folder read back; masks over time; loss around a change; its words.

A drift folder as read back: frozen records, whatever is unfinished, failed or damaged.

A file or line that cannot be read costs what it held and leaves one sentence in ``problems``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dart_llm.errors import ResultsError
from dart_llm.experiments import stats
from dart_llm.experiments.stats import Interval
from dart_llm.experiments.store import ResultsView, mapping, number
from dart_llm.experiments.store import read as read_results
from dart_llm.pruning.records import DriftCheck
from dart_llm.reporting.words import count, percent
from dart_llm.studies.detection import report
from dart_llm.studies.drift import summary
from dart_llm.studies.drift import summary as drift_summary
from dart_llm.studies.drift.losses import BIN

# One cell of a drift study as read back: a frozen record.


DENSE = "dense"


@dataclass(frozen=True)
class TopicSpan:
    """A topic and the decoded tokens about it: ``start`` to ``end``, which is not included.

    Both are None where the places are not known (free mode).
    """

    name: str
    domain: str
    start: int | None
    end: int | None


@dataclass(frozen=True)
class Masked:
    """Masks of all layers, in force from decode step ``step`` on."""

    step: int
    cause: str
    kept: tuple[int, ...]
    jaccard: tuple[float, ...]
    """Per layer against the masks before; empty for the first ones."""
    evidence_tokens: float
    observed: int = 0
    """Decoded tokens right before ``step`` that ran dense to be observed."""


@dataclass(frozen=True)
class DriftCell:
    """One method on one source (a prompt or a passage)."""

    key: str
    label: str
    status: str
    error: str | None
    model: str
    dtype: str | None
    mode: str
    source: str
    method: str
    sparsity: float | None
    seed: int
    topics: tuple[TopicSpan, ...] = ()
    prompt_tokens: int = 0
    decoded_tokens: int = 0
    finish: str = ""
    checks: tuple[DriftCheck, ...] = ()
    remasks: tuple[Masked, ...] = ()
    dense_from: int | None = None
    """The decode step from which all ran dense to the end, where there is one."""
    accounting: Mapping[str, Any] | None = None
    """``RunReport.to_dict()``; None for the untouched model."""
    metrics: Mapping[str, float | None] | None = None
    text: str = ""
    pieces: tuple[str, ...] = ()
    losses: tuple[float | None, ...] = ()
    """Nats per decoded token (forced mode)."""
    masks: Path | None = None
    """The safetensors file with the kept neurons, if it is there and whole."""

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def dense(self) -> bool:
        return self.method == DENSE

    @property
    def changes(self) -> tuple[int, ...]:
        """Decoded-token indices at which a new topic begins."""
        return tuple(t.start for t in self.topics[1:] if t.start is not None)


def parse(row: Mapping[str, Any], text: Mapping[str, Any], tokens: Mapping[str, Any]) -> DriftCell:
    """A cell from its lines in results.jsonl, texts.jsonl and tokens.jsonl; without masks.

    Raises ``KeyError``, ``TypeError``, ``ValueError`` or ``AttributeError`` for a damaged line.
    """
    own = row["cell"]
    cell = DriftCell(
        key=str(row["key"]),
        label=str(row["label"]),
        status=str(row["status"]),
        error=None if row.get("error") is None else str(row["error"]),
        model=str(own["model"]),
        dtype=own.get("dtype"),
        mode=str(own["mode"]),
        source=str(own["source"]),
        method=str(own["method"]),
        sparsity=number(own.get("sparsity")),
        seed=int(own.get("seed") or 0),
    )
    if not cell.done:
        return cell
    decoded = int(row["decoded_tokens"])
    return replace(
        cell,
        topics=_topics(row.get("topics") or [], decoded),
        prompt_tokens=int(row["prompt_tokens"]),
        decoded_tokens=decoded,
        finish=str(row.get("finish") or ""),
        checks=tuple(_check(check) for check in row.get("checks") or [] if not _lone(check)),
        remasks=tuple(_masked(mask) for mask in row.get("remasks") or []),
        dense_from=None if row.get("dense_from") is None else int(row["dense_from"]),
        accounting=mapping(row.get("accounting")) or None,
        metrics={k: number(v) for k, v in mapping(row.get("metrics")).items()} or None,
        text=str(text.get("text") or ""),
        pieces=tuple(map(str, tokens.get("pieces") or ())),
        losses=tuple(map(number, tokens.get("losses") or ())),
    )


def _topics(rows: Sequence[Mapping[str, Any]], decoded: int) -> tuple[TopicSpan, ...]:
    starts = [None if row.get("start") is None else int(row["start"]) for row in rows]
    found = []
    for place, row in enumerate(rows):
        end = [*starts[1:], decoded][place] if starts[place] is not None else None
        found.append(TopicSpan(str(row["name"]), str(row["domain"]), starts[place], end))
    return tuple(found)


def _masked(row: Mapping[str, Any]) -> Masked:
    jaccard = tuple(float(value) for value in row.get("jaccard") or ())
    kept = tuple(int(count) for count in row["kept"])
    evidence = number(row.get("evidence_tokens")) or 0.0
    observed = int(row.get("observed") or 0)
    return Masked(int(row["step"]), str(row.get("cause") or ""), kept, jaccard, evidence, observed)


CHECK = tuple(field.name for field in fields(DriftCheck))


def _lone(row: Mapping[str, Any]) -> bool:
    """The first window of an arming detector has nothing to be compared with: it stands at 0."""
    return bool(row["state"] == "arming" and row["similarity"] == 0)


def _check(row: Mapping[str, Any]) -> DriftCheck:
    return DriftCheck(**{name: row[name] for name in CHECK})


# The masks of a drift cell: which neurons live when, and how much of them a re-mask keeps.


ActiveNeurons = NDArray[np.bool_]

MOST_COLUMNS = 5
"""Masks that a free text's flow shows: the first ones, and the last."""


@dataclass(frozen=True)
class Masks:
    """``live``: per layer, [masks, width]; ``steps``: from which decode step each is in force."""

    steps: tuple[int, ...]
    live: tuple[ActiveNeurons, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(layer.shape[1] for layer in self.live)


@dataclass(frozen=True)
class MaskSpan:
    """Decoded tokens ``start`` to ``end`` (not included) under mask ``mask``; None: dense."""

    start: int
    end: int
    mask: int | None


@dataclass(frozen=True)
class Flow:
    """Neurons between two masks: in both, only in the old, only in the new, in neither."""

    kept: int
    left: int
    joined: int
    out: int

    @property
    def share_kept(self) -> float:
        """Of the old mask's neurons."""
        return self.kept / max(1, self.kept + self.left)


def read_masks(cell: DriftCell) -> Masks | None:
    """The masks of ``cell``; None where it has none, as where every token chooses its own neurons.

    Layers without kept ids are dense: all their neurons live.  Raises ``ResultsError`` for a
    neuron beyond the layer's width.
    """
    if cell.masks is None or not cell.remasks:
        return None
    from safetensors import safe_open

    with safe_open(cell.masks, framework="np") as file:
        names = set(file.keys())
        ids = {name: file.get_tensor(name) for name in names if name.endswith(".ids")}
        widths = {name: file.get_slice(name).get_shape()[0] for name in names - ids.keys()}
    if not ids:
        return None
    layers = range(len(cell.remasks[0].kept))
    live = tuple(_layer(ids, widths, layer, cell) for layer in layers)
    return Masks(tuple(mask.step for mask in cell.remasks), live) if live else None


def _layer(
    ids: dict[str, Any], widths: dict[str, int], layer: int, cell: DriftCell
) -> ActiveNeurons:
    width = widths.get(f"remask0.layer{layer}.scores") or _width(cell, layer)
    live = np.ones((len(cell.remasks), width), dtype=np.bool_)
    for place in range(len(cell.remasks)):
        own = ids.get(f"remask{place}.layer{layer}.ids")
        if own is None:
            continue
        if len(own) and not 0 <= int(own.min()) <= int(own.max()) < width:
            raise ResultsError(
                f"the masks of the cell {cell.key} keep neurons beyond the {width} of layer "
                f"{layer}: run the cell anew"
            )
        live[place] = False
        live[place, own] = True
    return live


def _width(cell: DriftCell, layer: int) -> int:
    layers = (cell.accounting or {}).get("layers") or []
    return int(layers[layer]["width"]) if layer < len(layers) else cell.remasks[0].kept[layer]


def jaccard(one: ActiveNeurons, other: ActiveNeurons) -> float:
    """|A and B| / |A or B|; 1 for two empty sets."""
    union = int(np.count_nonzero(one | other))
    return int(np.count_nonzero(one & other)) / union if union else 1.0


def overlap(masks: Masks, before: bool = False) -> NDArray[np.float64]:
    """[layers, masks]: Jaccard with the first mask, or with the mask before (the first: 1)."""
    count = len(masks.steps)
    rows = [
        [jaccard(live[max(0, k - 1) if before else 0], live[k]) for k in range(count)]
        for live in masks.live
    ]
    return np.array(rows, dtype=np.float64)


def chance(masks: Masks) -> float:
    """Jaccard to expect of two independent masks of these sizes: mean over layers of k / (2 - k).

    k: the layer's keep ratio.  Their intersection holds k^2 of the layer, their union 2 k - k^2.
    """
    ratios = [float(live[0].mean()) for live in masks.live]
    return float(np.mean([k / (2 - k) for k in ratios]))


def flow(masks: Masks, old: int, new: int) -> Flow:
    """Summed over all layers."""
    kept = left = joined = out = 0
    for live in masks.live:
        a, b = live[old], live[new]
        both = int(np.count_nonzero(a & b))
        kept, left = kept + both, left + int(a.sum()) - both
        joined, out = joined + int(b.sum()) - both, out + int(np.count_nonzero(~(a | b)))
    return Flow(kept, left, joined, out)


def moved(masks: Masks) -> int:
    """The layer whose masks overlap least with its first one."""
    return int(overlap(masks)[:, 1:].mean(1).argmin()) if len(masks.steps) > 1 else 0


def periods(cell: DriftCell) -> list[MaskSpan]:
    """The decoded tokens cut where masks change.

    Dense: before the first mask, the tokens observed for a mask, from a trigger on, and where
    pruning ended.
    """
    cuts: dict[int, int | None] = {0: None}
    if cell.dense_from is not None:
        cuts[cell.dense_from] = None
    for check in cell.checks:
        if check.trigger:
            cuts[check.step] = None
    before = 0
    for mask in cell.remasks:
        if mask.observed:
            cuts[max(before, mask.step - mask.observed)] = None
        before = mask.step
    cuts |= {mask.step: place for place, mask in enumerate(cell.remasks)}
    starts = sorted(step for step in cuts if step < cell.decoded_tokens)
    ends = [*starts[1:], cell.decoded_tokens]
    return [MaskSpan(a, b, cuts[a]) for a, b in zip(starts, ends, strict=True) if b > a]


def columns(cell: DriftCell) -> list[tuple[str, int]]:
    """Names and mask numbers for a flow: the mask in force where each topic ends.

    Where the places of the topics are not known, the masks themselves, at most ``MOST_COLUMNS``.
    """
    if not cell.remasks:
        return []
    if cell.changes:
        ends = [topic.end or 0 for topic in cell.topics]
        return [
            (topic.name, _in_force(cell, end))
            for topic, end in zip(cell.topics, ends, strict=True)
            if cell.remasks[0].step < end
        ]
    chosen: Sequence[int] = range(len(cell.remasks))
    if len(chosen) > MOST_COLUMNS:
        chosen = [*chosen[: MOST_COLUMNS - 1], chosen[-1]]
    return [(f"mask of step {cell.remasks[k].step}", k) for k in chosen]


def _in_force(cell: DriftCell, end: int) -> int:
    return max(place for place, mask in enumerate(cell.remasks) if mask.step < end)


KIND = "drift"


@dataclass(frozen=True)
class DriftView:
    """The files of one drift folder."""

    results: ResultsView
    cells: tuple[DriftCell, ...]
    summary: Mapping[str, Any]
    """``drift_summary.summarise`` of the cells; empty where they cannot be summed up."""
    detection: Mapping[str, Any]
    """``detection.json``, if one lies in the folder."""
    problems: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.results.folder

    @property
    def done(self) -> tuple[DriftCell, ...]:
        return tuple(cell for cell in self.cells if cell.done)

    @property
    def labels(self) -> tuple[str, ...]:
        """Methods as labelled, dense first, then as they come."""
        found = dict.fromkeys(cell.label for cell in self.done if not cell.dense)
        dense = dict.fromkeys(cell.label for cell in self.done if cell.dense)
        return (*dense, *found)

    def of(self, label: str) -> tuple[DriftCell, ...]:
        return tuple(cell for cell in self.done if cell.label == label)

    def dense_of(self, cell: DriftCell) -> DriftCell | None:
        """The untouched model on the same source; of the same seed where there is one."""
        same = [c for c in self.done if c.dense and (c.mode, c.source) == (cell.mode, cell.source)]
        return next((c for c in same if c.seed == cell.seed), same[0] if same else None)

    @property
    def mode(self) -> str:
        return self.cells[0].mode if self.cells else ""

    @property
    def lines(self) -> list[Mapping[str, Any]]:
        """The summary's rows of pruned methods that have a finished cell."""
        rows = self.summary.get("rows") or []
        return [row for row in rows if row["method"] != DENSE and row["cells"]]

    def prompt(self, source: str) -> str:
        """The text of a source, where config.json holds it."""
        found = self.results.config.get("sources") or []
        return next((str(one.get("text") or "") for one in found if one.get("id") == source), "")


def read(folder: Path) -> DriftView:
    """Read a drift folder, or the folder of `dart-llm detect`, which holds no cells.

    Raises ``ResultsError`` when there is no such folder or ``config.json`` is of another command.
    """
    results = read_results(folder)
    kind = results.config.get("kind", KIND)
    if kind not in (KIND, "detect"):
        raise ResultsError(
            f"{folder} holds results of `dart-llm {kind}`, not of `dart-llm drift`: give the "
            "folder that a drift study wrote"
        )
    problems: list[str] = []
    if not results.config and (folder / "config.json").exists():
        problems.append("config.json is not JSON: settings and versions are not shown.")
    texts = {str(row.get("key")): row for row in _rows(folder / "texts.jsonl", problems)}
    tokens = {str(row.get("key")): row for row in _rows(folder / "tokens.jsonl", problems)}
    cells, good = dict[str, DriftCell](), dict[str, Mapping[str, Any]]()
    for row in _rows(folder / "results.jsonl", problems) if kind == KIND else ():
        key = str(row.get("key"))
        try:
            cell = parse(row, texts.get(key, {}), tokens.get(key, {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            words = f"{type(error).__name__}: {error}"
            problems.append(f"The cell {key} of results.jsonl lacks what it needs ({words}).")
            continue
        cells[key], good[key] = replace(cell, masks=_masks(folder, cell, problems)), row
    summary = _summary(list(good.values()), problems)
    detection = _detection(folder / "detection.json", problems)
    return DriftView(results, tuple(cells.values()), summary, detection, tuple(problems))


def _summary(rows: list[Mapping[str, Any]], problems: list[str]) -> Mapping[str, Any]:
    if not rows:
        return {}
    try:
        return drift_summary.summarise(rows)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        words = f"{type(error).__name__}: {error}"
        problems.append(f"The cells of results.jsonl cannot be summed up ({words}).")
        return {}


def _rows(path: Path, problems: list[str]) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSONL file; lines that are not whole are counted, not used."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path.name} cannot be read as UTF-8 text ({error}): it is left out.")
        return
    broken = []
    for place, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = line
        if isinstance(row, Mapping):
            yield row
        elif row is not None:
            broken.append(place)
    if broken:
        problems.append(f"{path.name}: line {broken[0]} is not a JSON object and is left out.")
        if len(broken) > 1:
            problems[-1] = f"{path.name}: {len(broken)} lines are not JSON objects, left out."


def _masks(folder: Path, cell: DriftCell, problems: list[str]) -> Path | None:
    """The cell's mask file if it is there, whole, and holds as many neurons as the cell says."""
    path = folder / "masks" / f"{cell.key.replace('/', '-')}.safetensors"
    if not cell.done or not path.exists():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            sizes = {
                name: file.get_slice(name).get_shape()[0]
                for name in file.keys()  # noqa: SIM118 - not a mapping
                if name.endswith(".ids")
            }
    except (OSError, SafetensorError) as error:
        problems.append(f"masks/{path.name} cannot be read ({error}): its masks are not shown.")
        return None
    told = {
        f"remask{number}.layer{layer}.ids": kept
        for number, mask in enumerate(cell.remasks)
        for layer, kept in enumerate(mask.kept)
    }
    if any(told.get(name) != size for name, size in sizes.items()):
        problems.append(
            f"masks/{path.name} holds other masks than results.jsonl speaks of: they are not shown."
        )
        return None
    return path


def _detection(path: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        report.markdown(found)  # reads every entry that pictures and tables need
    except FileNotFoundError:
        return {}
    except (OSError, LookupError, TypeError, ValueError, AttributeError):
        problems.append("detection.json is not what `dart-llm detect` writes: it is left out.")
        return {}
    return mapping(found)


# The loss over dense around changes of topic, in bins of tokens, with bootstrap intervals.
#
# A passage is one item: its changes and seeds are averaged first, because what varies within a
# passage says little about other passages.


BEFORE, AFTER = 128, 256
"""Tokens shown before and after a change."""


@dataclass(frozen=True)
class Point:
    """Mean loss over dense, nats per token, of the ``BIN`` tokens from ``start`` on.

    ``start``: tokens after the change, negative before it.  ``n``: passages with that bin.
    """

    start: int
    value: float
    interval: Interval | None
    n: int

    @property
    def middle(self) -> float:
        return self.start + BIN / 2


def around(view: DriftView) -> dict[str, list[Point]]:
    """By method; bins lie within the two topics, and all their tokens have a loss.

    Empty where dense was not measured on the same passages.
    """
    found = {}
    for label in view.labels:
        bins: dict[int, dict[str, list[float]]] = {}
        for cell in view.of(label):
            dense = None if cell.dense else view.dense_of(cell)
            for change in range(len(cell.changes)) if dense else ():
                for start, value in _bins(cell, dense, change):
                    bins.setdefault(start, {}).setdefault(cell.source, []).append(value)
        if bins:
            found[label] = [_point(start, bins[start]) for start in sorted(bins)]
    return found


def _bins(cell: DriftCell, dense: DriftCell | None, change: int) -> Iterator[tuple[int, float]]:
    before, after = cell.topics[change], cell.topics[change + 1]
    low, high, place = before.start or 0, after.end or 0, after.start or 0
    others = dense.losses if dense else ()
    for start in range(-BEFORE, AFTER, BIN):
        first, last = place + start, place + start + BIN
        if first < low or last > min(high, len(cell.losses), len(others)):
            continue
        pairs = zip(cell.losses[first:last], others[first:last], strict=True)
        excess = [a - b for a, b in pairs if a is not None and b is not None]
        if len(excess) == BIN:
            yield start, fmean(excess)


def _point(start: int, by_source: Mapping[str, Sequence[float]]) -> Point:
    values = {source: fmean(own) for source, own in by_source.items()}
    return Point(start, fmean(values.values()), stats.known(values), len(values))


# A drift study as plain sentences: its conclusion, the titles of its pictures, its notes.


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
    told = summary.sentence(view.summary) if view.summary else ""
    if not told and view.detection:
        told = report.conclusion(view.detection)
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
