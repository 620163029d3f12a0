"""What parts of a method cost: differences between rows that decode in turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dart_llm.life import Phase
from dart_llm.speed_cases import FOREVER, TRANSFORMERS, Case
from dart_llm.speed_limit import spread

Sample = Mapping[str, Any]
Samples = Mapping[str, Sequence[Sample]]

ATTACHED, OBSERVING, CHECKS, REMASK = "attaching", "observing", "drift checks", "a re-mask"
WHAT = {
    ATTACHED: "per token of a model attached at sparsity 0, against the untouched model; medians "
    "of turns",
    OBSERVING: "per observed token (no mask is ever built), against the row that is named; means "
    "of turns",
    CHECKS: "per pruned token, against the same row with the drift rule never; means of turns",
    REMASK: "of the step that builds masks, beyond the median pruned step of the same repetition",
}


def costs(cases: Sequence[Case], samples: Samples) -> list[dict[str, Any]]:
    """One entry per cost that was measured: ms, its spread, and its share of a dense token."""
    found = []
    for case in cases:
        if case.kind == "cost":
            kind = kind_of(case)
            values = _values(kind, case, samples)
            reference = TRANSFORMERS if kind in (CHECKS, REMASK) else case.against
            if values:
                found.append(_entry(kind, case, values, reference, samples))
    return found


def kind_of(case: Case) -> str:
    """Which of ``WHAT`` a case measures."""
    assert case.config is not None
    if not case.config.target:
        return ATTACHED
    if case.config.masking_step == FOREVER:
        return OBSERVING
    return CHECKS if case.against else REMASK


def _values(kind: str, case: Case, samples: Samples) -> list[float]:
    """The cost in ms, one value per turn, or per mask that was built."""
    own = samples[case.label]
    if kind == REMASK:
        return [value for one in own for value in builds(one)]
    turns = [turn for one in own for turn in one.get("turns", ())]
    if kind == OBSERVING and not any(Phase.OBSERVE in turn["own"]["phases"] for turn in turns):
        return []  # a method whose masks are made beforehand observes nothing
    if kind == CHECKS:  # here the row that is named is the one that costs more
        each = [(_pruned_mean(turn["base"]), _pruned_mean(turn["own"])) for turn in turns]
        return [more - less for more, less in each if more is not None and less is not None]
    # every step costs the same while attached: medians scatter less; observing has its rare steps
    each_ms = _median_ms if kind == ATTACHED else _mean_ms
    return [each_ms(turn["own"]) - each_ms(turn["base"]) for turn in turns]


def builds(sample: Sample) -> list[float]:
    """What each step that built masks took beyond a pruned step, in ms."""
    usual = pruned_ms(sample)
    if usual is None:
        return []
    return [1000 * sample["steps_s"][at] - usual for at in sample["built"]]


def pruned_ms(sample: Sample) -> float | None:
    """Median time of a pruned step that builds no masks; None without such a step."""
    steps = _pruned(sample)
    return statistics.median(steps) if steps else None


def _pruned_mean(sample: Sample) -> float | None:
    """The mean of the same steps: a check falls into few of them."""
    steps = _pruned(sample)
    return statistics.fmean(steps) if steps else None


def _pruned(sample: Sample) -> list[float]:
    return [
        1000 * seconds
        for at, (seconds, phase) in enumerate(zip(sample["steps_s"], sample["phases"], strict=True))
        if phase == Phase.PRUNED and at not in sample["built"]
    ]


def _median_ms(sample: Sample) -> float:
    found: float = 1000 * statistics.median(sample["steps_s"])
    return found


def _mean_ms(sample: Sample) -> float:
    return 1000 * statistics.fmean(sample["steps_s"])


def _entry(
    kind: str, case: Case, values: Sequence[float], reference: str, samples: Samples
) -> dict[str, Any]:
    token = statistics.median(map(_mean_ms, samples[reference]))
    ms = statistics.median(values)
    return {
        "cost": kind,
        "row": case.label,
        "against": case.against or case.label,
        "ms": ms,
        "spread_ms": spread(values),
        "values": len(values),
        "token_of": reference,
        "share_of_token": ms / token,
        "what": WHAT[kind],
    }
