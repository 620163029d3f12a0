"""quality.json: made from the measured lines and from what was asked, of one run or of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dart_llm import stats
from dart_llm.errors import ConfigError
from dart_llm.quality_gaps import cell_rows, pooled_rows
from dart_llm.quality_lines import YARDSTICKS, Line, Lines
from dart_llm.quality_slices import CELLS
from dart_llm.results import SCHEMA

DEFINITIONS = {
    "gap": "mean loss minus the untouched model's on the same scored tokens, nats",
    "gap_closed": "1 - gap / griffin_gap; null where GRIFFIN loses nothing",
    "interval": "95 %, bootstrap over slices, the variant and GRIFFIN on the same ones",
    **YARDSTICKS,
    **CELLS,
}
"""What the words of quality.json mean."""

OWN = ("slices", "checkpoints")
"""What runs on different models differ in, by model."""

MADE = ("schema", "cells", "pooled", "notes", "definitions")
"""What ``summarise`` adds to what was asked."""


def summarise(lines: Iterable[Line], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The document; nothing in it depends on when or how often a run was started.

    ``asked``: ``set``, ``seed``, ``sparsities``, ``pool`` (of the measured ones), ``variants``
    (configurations by label, GRIFFIN's first), ``texts``, ``checkpoints`` and ``slices`` (by
    model), tokens of a slice.
    """
    found, labels, seed = Lines(lines), list(asked["variants"]), asked["seed"]
    return {
        "schema": SCHEMA,
        **asked,
        "cells": cell_rows(found, labels, asked["sparsities"], seed),
        "pooled": pooled_rows(found, labels, asked["pool"], seed),
        "notes": _notes(asked),
        "definitions": DEFINITIONS,
    }


def _notes(asked: Mapping[str, Any]) -> list[str]:
    notes = []
    if not stats.available():
        notes.append("note: no intervals, which need scipy: pip install 'dart-llm[eval]'")
    if not asked["pool"]:
        notes.append("note: nothing is pooled, for no sparsity of --pool was measured")
    return notes


def merge(documents: Sequence[Mapping[str, Any]], lines: Iterable[Line]) -> dict[str, Any]:
    """One document over the ``lines`` of runs that asked the same of different models.

    Raises ``ConfigError`` where they did not.
    """
    asked = [{k: v for k, v in one.items() if k not in MADE} for one in documents]
    joined = dict(asked[0])
    for one in asked[1:]:
        differing = [k for k in one if k not in OWN and one[k] != joined.get(k)]
        twice = set(one["checkpoints"]) & set(joined["checkpoints"])
        if differing or twice:
            what = f"differ in {', '.join(differing)}" if differing else f"share {min(twice)}"
            raise ConfigError(f"the runs {what}: join runs that differ in their models alone")
        joined = {**joined, **{name: {**joined[name], **one[name]} for name in OWN}}
    return summarise(lines, joined)
