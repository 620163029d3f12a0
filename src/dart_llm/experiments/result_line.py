"""One measured number: the line that every study writes to ``rows.jsonl``.

``results``, the window's list of past runs, trackers and pages read these lines and nothing else.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

ROWS = "rows.jsonl"
"""The file of the lines, in every results folder."""


class ResultLine(BaseModel):
    """One metric of one method on one model; what does not apply is None.

    ``label``: names the row for people, e.g. ``dart 30 %``.  ``requested`` and ``achieved``: the
    sparsity, as the fraction of FFN neurons removed.  ``low`` and ``high``: the 95 % interval of
    ``value``.  ``error``: why there is no value.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    label: str
    method: str
    model: str
    task: str
    metric: str
    value: float | None = None
    higher_is_better: bool = False
    requested: float | None = None
    achieved: float | None = None
    low: float | None = None
    high: float | None = None
    dense_share: float | None = None
    """Share of the decoded tokens that ran with all neurons."""
    remasks: int | None = None
    seed: int | None = None
    dtype: str | None = None
    weights: str | None = None
    """The weight format in memory, e.g. ``q8_0``; None: numbers of ``dtype``."""
    error: str | None = None
