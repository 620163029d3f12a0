"""A drift folder read back: its cells, their masks over time, the loss around a change, its words.

Whatever is unfinished, failed or damaged costs what it held, and leaves one sentence in
``problems``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator

from dart_llm.errors import ResultsError
from dart_llm.experiments import stats
from dart_llm.experiments.stats import Interval
from dart_llm.experiments.store import Files, ResultsView
from dart_llm.experiments.store import read as read_results
from dart_llm.pruning.records import DriftCheck
from dart_llm.reporting.words import percent
from dart_llm.studies.detection import report as detection_report
from dart_llm.studies.drift import summary
from dart_llm.studies.drift.record import BIN
from dart_llm.studies.drift.settings import DENSE

KIND = "drift"

MODES = {"forced": "passage", "free": "prompt"}
"""What a source is called in each mode."""


class TopicStart(BaseModel, frozen=True):
    """A topic and its first decoded token; None where the place is not known (free mode)."""

    name: str
    domain: str
    start: int | None


@dataclass(frozen=True)
class Masked:
    """Masks of all layers, in force from decode step ``step`` on.

    ``jaccard``: per layer against the masks before; empty for the first ones.  ``observed``:
    decoded tokens right before ``step`` that ran dense to be observed.
    """

    step: int
    cause: str
    kept: tuple[int, ...]
    jaccard: Annotated[tuple[float, ...], BeforeValidator(lambda value: value or ())] = ()
    evidence_tokens: float = 0.0
    observed: int = 0


class DriftCell(BaseModel, frozen=True):
    """One method on one source (a prompt or a passage).

    ``dense_from``: the decode step from which all ran dense to the end, where there is one.
    ``accounting``: ``RunReport.to_dict()``; None for the untouched model.  ``losses``: nats per
    decoded token (forced mode).  ``masks``: the file with the kept neurons, if it is whole.
    """

    key: str
    label: str
    status: str
    error: str | None = None
    model: str
    dtype: str | None = None
    mode: Literal["forced", "free"]
    source: str
    method: str
    sparsity: float | None = None
    seed: int = 0
    topics: tuple[TopicStart, ...] = ()
    prompt_tokens: int = 0
    decoded_tokens: int = 0
    finish: str = ""
    checks: tuple[DriftCheck, ...] = ()
    remasks: tuple[Masked, ...] = ()
    dense_from: int | None = None
    accounting: dict[str, Any] | None = None
    metrics: dict[str, float | None] | None = None
    text: str = ""
    pieces: tuple[str, ...] = ()
    losses: tuple[float | None, ...] = ()
    masks: Path | None = None

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def dense(self) -> bool:
        return self.method == DENSE

    @property
    def placed_topics(self) -> list[tuple[str, int, int]]:
        """Name, first decoded token, and the one after the last, where the places are known."""
        known = [topic for topic in self.topics if topic.start is not None]
        ends = [*(topic.start or 0 for topic in known[1:]), self.decoded_tokens]
        return [(t.name, t.start or 0, end) for t, end in zip(known, ends, strict=False)]

    @property
    def changes(self) -> tuple[int, ...]:
        """Decoded-token indices at which a new topic begins."""
        return tuple(start for _, start, _ in self.placed_topics[1:])

    @property
    def rebuilt(self) -> int:
        """Masks after the first ones."""
        return sum(mask.cause not in ("first", "given") for mask in self.remasks)


def parse(row: Mapping[str, Any], text: Mapping[str, Any], tokens: Mapping[str, Any]) -> DriftCell:
    """A cell from its lines in results.jsonl, texts.jsonl and tokens.jsonl; without masks."""
    known = {name: value for name, value in {**text, **tokens, **row}.items() if value is not None}
    if row["status"] == "done":
        known |= {name: row[name] for name in ("decoded_tokens", "prompt_tokens")}
        # the first window of an arming detector has nothing to be compared with: it stands at 0
        known["checks"] = [
            check
            for check in row.get("checks") or ()
            if check["state"] != "arming" or check["similarity"] != 0
        ]
    return DriftCell.model_validate({**known, **row["cell"], "key": row["key"]})


@dataclass(frozen=True)
class DriftView:
    """The files of one drift folder.

    ``summary``: of the cells; empty where they cannot be summed up.  ``detection``: the folder's
    ``detection.json``, or nothing.
    """

    results: ResultsView
    cells: tuple[DriftCell, ...]
    summary: Mapping[str, Any]
    detection: Mapping[str, Any]
    problems: tuple[str, ...]

    @property
    def done(self) -> tuple[DriftCell, ...]:
        return tuple(cell for cell in self.cells if cell.done)

    @property
    def labels(self) -> tuple[str, ...]:
        """Methods as labelled, dense first, then as they come."""
        return tuple(
            dict.fromkeys(cell.label for cell in sorted(self.done, key=lambda cell: not cell.dense))
        )

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
        sources = self.results.config.get("sources") or []
        return next((str(one.get("text") or "") for one in sources if one.get("id") == source), "")

    def noted(self, words: str) -> str:
        """A picture's small print: ``words``, then what was run."""
        return f"{words} · {self.results.small_print}"


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
    files = Files(folder, problems)
    files.json("config.json")
    texts, tokens = (
        {str(row.get("key")): row for row in files.lines(name)}
        for name in ("texts.jsonl", "tokens.jsonl")
    )
    cells, rows = dict[str, DriftCell](), dict[str, Mapping[str, Any]]()
    for row in files.lines("results.jsonl") if kind == KIND else ():
        key = str(row.get("key"))
        with _damage(problems, f"The cell {key} of results.jsonl lacks what it needs"):
            cell = parse(row, texts.get(key, {}), tokens.get(key, {}))
            cells[key] = cell.model_copy(update={"masks": _masks(folder, cell, problems)})
            rows[key] = row
    summed: Mapping[str, Any] = {}
    with _damage(problems, "The cells of results.jsonl cannot be summed up"):
        summed = summary.summarise([*rows.values()]) if rows else {}
    detection: Mapping[str, Any] = {}
    with _damage(problems, "detection.json is not what `dart-llm detect` writes"):
        document = files.json("detection.json")
        if document:
            detection_report.markdown(document)  # reads all that pictures and tables need
        detection = document
    return DriftView(results, tuple(cells.values()), summed, detection, tuple(problems))


@contextlib.contextmanager
def _damage(problems: list[str], words: str) -> Iterator[None]:
    """What is damaged is said and left out."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        problems.append(f"{words} ({reason}): it is left out.")


def _masks(folder: Path, cell: DriftCell, problems: list[str]) -> Path | None:
    """The cell's mask file if it is there, whole, and holds as many neurons as the cell says."""
    path = folder / "masks" / f"{cell.key.replace('/', '-')}.safetensors"
    if not cell.done or not path.exists():
        return None
    from safetensors import SafetensorError, safe_open

    told = {
        f"remask{number}.layer{layer}.ids": kept
        for number, mask in enumerate(cell.remasks)
        for layer, kept in enumerate(mask.kept)
    }
    fits = False
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="np") as file:
        names = [name for name in file.keys() if name.endswith(".ids")]  # noqa: SIM118
        fits = all(told.get(name) == file.get_slice(name).get_shape()[0] for name in names)
    if not fits:
        problems.append(
            f"masks/{path.name} holds other masks than results.jsonl speaks of: they are not shown."
        )
    return path if fits else None


# The masks of a cell: which neurons live when, and how much of them a re-mask keeps.

ActiveNeurons = NDArray[np.bool_]

MOST_COLUMNS = 5
"""Masks that a free text's flow shows: the first ones, and the last."""


@dataclass(frozen=True)
class Masks:
    """``live``: per layer, [masks, width]; ``steps``: from which decode step each is in force."""

    steps: tuple[int, ...]
    live: tuple[ActiveNeurons, ...]


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

    @property
    def total(self) -> int:
        return self.kept + self.left + self.joined + self.out


def read_masks(cell: DriftCell) -> Masks | None:
    """The masks of ``cell``; None where it has none, as where every token chooses its own neurons.

    Layers without kept ids are dense: all their neurons live.
    """
    if cell.masks is None or cell.accounting is None:
        return None
    from safetensors import safe_open

    with safe_open(cell.masks, framework="np") as file:
        names = [name for name in file.keys() if name.endswith(".ids")]  # noqa: SIM118
        ids = {name: file.get_tensor(name) for name in names}
    if not ids:
        return None

    def live(layer: int, width: int) -> ActiveNeurons:
        neurons = np.arange(width)
        kept = (ids.get(f"remask{n}.layer{layer}.ids", neurons) for n in range(len(cell.remasks)))
        return np.stack([np.isin(neurons, own) for own in kept])

    widths = [int(layer["width"]) for layer in cell.accounting["layers"]]
    steps = tuple(mask.step for mask in cell.remasks)
    return Masks(steps, tuple(live(*layer) for layer in enumerate(widths)))


def jaccard(one: ActiveNeurons, other: ActiveNeurons) -> float:
    """|A and B| / |A or B|; 1 for two empty sets."""
    union = int(np.count_nonzero(one | other))
    return int(np.count_nonzero(one & other)) / union if union else 1.0


def overlap(masks: Masks) -> NDArray[np.float64]:
    """[layers, masks]: Jaccard with the first mask."""
    return np.array([[jaccard(live[0], mask) for mask in live] for live in masks.live])


def chance(masks: Masks) -> float:
    """Jaccard to expect of two independent masks of these sizes: mean over layers of k / (2 - k).

    k: the layer's keep ratio.  Their intersection holds k^2 of the layer, their union 2 k - k^2.
    """
    ratios = [float(live[0].mean()) for live in masks.live]
    return fmean(k / (2 - k) for k in ratios)


def flow(masks: Masks, old: int, new: int) -> Flow:
    """Summed over all layers."""
    a, b = (np.concatenate([live[place] for live in masks.live]) for place in (old, new))
    return Flow(*(int(np.count_nonzero(both)) for both in (a & b, a & ~b, ~a & b, ~a & ~b)))


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
    steps = [mask.step for mask in cell.remasks]
    if cell.changes:
        return [
            (name, max(place for place, step in enumerate(steps) if step < end))
            for name, _, end in cell.placed_topics
            if steps and steps[0] < end
        ]
    chosen: Sequence[int] = range(len(steps))
    if len(chosen) > MOST_COLUMNS:
        chosen = [*chosen[: MOST_COLUMNS - 1], chosen[-1]]
    return [(f"mask of step {steps[place]}", place) for place in chosen]


# The loss over dense around changes of topic, in bins of tokens, with bootstrap intervals.  A
# passage is one item: its changes and seeds are averaged first, because what varies within a
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
    curves = {}
    for label in view.labels:
        bins: dict[int, dict[str, list[float]]] = {}
        for cell in view.of(label):
            dense = None if cell.dense else view.dense_of(cell)
            for change in range(len(cell.changes)) if dense else ():
                for start, value in _bins(cell, dense.losses if dense else (), change):
                    bins.setdefault(start, {}).setdefault(cell.source, []).append(value)
        if bins:
            means = {at: {name: fmean(e) for name, e in own.items()} for at, own in bins.items()}
            curves[label] = [
                Point(at, fmean(own.values()), stats.interval(own), len(own))
                for at, own in sorted(means.items())
            ]
    return curves


def _bins(
    cell: DriftCell, dense: Sequence[float | None], change: int
) -> Iterator[tuple[int, float]]:
    (_, low, place), (_, _, high) = cell.placed_topics[change : change + 2]
    for start in range(-BEFORE, AFTER, BIN):
        first, last = place + start, place + start + BIN
        if first < low or last > min(high, len(cell.losses), len(dense)):
            continue
        pairs = zip(cell.losses[first:last], dense[first:last], strict=True)
        excess = [a - b for a, b in pairs if a is not None and b is not None]
        if len(excess) == BIN:
            yield start, fmean(excess)


# The words of a drift study.


def conclusion(view: DriftView) -> str:
    """What the study, the detection, or neither found."""
    told = summary.sentence(view.summary) if view.summary else ""
    if not told and view.detection:
        told = detection_report.conclusion(view.detection)
    return told or ("Nothing can be compared yet." if view.done else "Nothing was measured.")


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


def source_name(cell: DriftCell) -> str:
    """ "passage 07: tides, then banking" as far as it is known."""
    topics = ", then ".join(topic.name for topic in cell.topics)
    name = f"{MODES[cell.mode]} {cell.source}"
    return f"{name}: {topics}" if topics else name


def cell_name(cell: DriftCell) -> str:
    """A cell in a list of choices."""
    seed = f", seed {cell.seed}" if cell.seed else ""
    return f"{MODES[cell.mode]} {cell.source}, {cell.label}{seed}"
