"""The footnotes of a comparison's tables: only what applies to the rows that are shown."""

from __future__ import annotations

from collections.abc import Sequence

from dart_llm.compare_row import DENSE, FEW, GRIFFIN, Row
from dart_llm.measurement import LEAK
from dart_llm.sentences import count
from dart_llm.stats import FEWEST

UNEQUAL, BETWEEN, OTHER_MEAN = "†", "‡", "§"
"""Marks in the tables."""

MOST_NAMES = 4
"""Rows that a note names, at most."""

LEAK_NOTE = f"LEAK - {LEAK}. Its numbers are no measure of a method's quality."


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the tables must know; only what applies to these rows."""
    done = [row for row in rows if row.status == "done"]
    pruned = [r for r in done if not r.method.startswith(DENSE) and r.method != GRIFFIN]
    whole = [row for row in pruned if row.layers is None]
    intervals = [i for row in done for i in (row.to_dense, row.to_griffin) if i is not None]
    notes = [
        "Intervals are 95 % bootstrap intervals over items; differences are paired by item. "
        '"better" and "worse" stand where the interval excludes no difference and at least '
        f'{FEWEST} items differ, "{FEW}" where fewer do.',
        _chance(len(intervals)),
        _missing(done, whole),
        *_marks(done, whole),
        _bytes_note(done),
    ]
    leaking = any(row.leaks for row in rows)
    return [*([LEAK_NOTE] if leaking else []), *(note for note in notes if note), *_own(done)]


def _chance(comparisons: int) -> str:
    """How many of so many intervals mislead."""
    if not comparisons:
        return ""
    told = f"{count(comparisons, 'comparison')} with dense and GRIFFIN"
    if comparisons < 20:
        return (
            f"{told}: where nothing differs, each still has a chance of about 1 in 20 to look so."
        )
    return f"{told}: where nothing differs, about {round(comparisons / 20)} of them still look so."


def _own(done: Sequence[Row]) -> list[str]:
    """What the measurements themselves say, each once, with whom it concerns."""
    found: dict[str, dict[str, None]] = {}
    for row in done:
        for note in row.notes:
            if note != LEAK:
                found.setdefault(note, {})[f"{row.label} on {row.task}"] = None
    return [f"{note} ({_concerned(list(labels))})" for note, labels in found.items()]


def _concerned(labels: Sequence[str]) -> str:
    if len(labels) <= MOST_NAMES:
        return ", ".join(labels)
    return f"{', '.join(labels[: MOST_NAMES - 1])} and {len(labels) - MOST_NAMES + 1} others"


def _missing(done: Sequence[Row], pruned: Sequence[Row]) -> str:
    absent = [
        name
        for name, words in ((DENSE, "dense"), (GRIFFIN, "GRIFFIN"))
        if pruned and not any(row.method == words.lower() for row in done)
    ]
    if not absent:
        return ""
    names = " and ".join("GRIFFIN" if name == GRIFFIN else name for name in absent)
    verb = "was" if len(absent) == 1 else "were"
    return f"{names} {verb} not measured: the columns that compare with {names} are empty."


def _marks(done: Sequence[Row], pruned: Sequence[Row]) -> list[str]:
    found = []
    if any(row.unequal for row in pruned):
        found.append(
            f"{UNEQUAL} achieved sparsity differs from GRIFFIN's at the same asked sparsity by "
            "more than 1 point: compare at equal achieved sparsity instead."
        )
    equals = [e for row in pruned for e in (row.equal_sparsity, row.equal_bytes) if e]
    if any(len(equal.between) > 1 for equal in equals):
        found.append(
            f"{BETWEEN} against a GRIFFIN that was not run: item by item on the straight line "
            "between its two nearest measured points (losses in nats). GRIFFIN's true curve "
            "usually bends below that line's damage, so wide gaps flatter the other method."
        )
    if pruned and any(row.method == GRIFFIN for row in done):
        found.append(
            "At equal achieved sparsity, or FFN bytes: against GRIFFIN where it removed as much, "
            "or read as many bytes, to 1 point; empty where that lies outside of GRIFFIN's "
            "measured points."
        )
    if any(differs(row) for row in done):
        found.append(
            f"{OTHER_MEAN} the task's own aggregate is not the mean over items, which is what the "
            "intervals are of."
        )
    return found


def differs(row: Row) -> bool:
    """Whether the metric is not the mean over the items that the intervals are computed from."""
    mean = row.scores.mean
    if mean is None or row.value is None:
        return False
    return abs(mean - row.value) > 1e-4 * max(1.0, abs(row.value))


def _bytes_note(done: Sequence[Row]) -> str:
    executors = {row.executor for row in done if row.executor}
    if not executors:
        return ""
    if "masked" not in executors:
        return "FFN bytes: read per decoded token over dense, as executed, all overheads included."
    return (
        "FFN bytes: read per decoded token over dense, if the compact executor ran, all overheads "
        "included; the masked executor reads all of them."
    )
