"""What a comparison says in words: its conclusion, and the size of the leak.

A method beats another on a task when the paired 95 % interval excludes "no difference"; it is only
counted where both removed the same share of neurons, to a point.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dart_llm import compare_layers
from dart_llm.compare_format import amount, quantity
from dart_llm.compare_row import DENSE, FEW, GRIFFIN, Row
from dart_llm.sentences import count, percent
from dart_llm.stats import Interval

USUAL = 0.5
"""The sparsity that the conclusion speaks of, or the nearest one measured."""


@dataclass(frozen=True)
class Leak:
    """One method under the protocols ``full`` and ``published`` on the same items."""

    full: Row
    published: Row
    interval: Interval | None
    """Published against full: a difference, or a ratio of perplexities."""


def leaks(rows: Sequence[Row], seed: int = 0) -> list[Leak]:
    """Every row that was measured under both protocols; what differs is what the masks leak."""
    found: dict[Any, dict[str | None, Row]] = {}
    for row in rows:
        if row.status == "done" and not row.method.startswith(DENSE):
            key = (row.model, row.dtype, row.task, row.label, row.layers, row.keep, row.seed)
            found.setdefault(key, {})[row.protocol] = row
    return [
        Leak(
            pair["full"],
            pair["published"],
            pair["published"].scores.against(pair["full"].scores, seed),
        )
        for pair in found.values()
        if "full" in pair and "published" in pair
    ]


def conclusion(rows: Sequence[Row]) -> str:
    """One plain sentence: how the first method does at 50 %, or near it, on each model."""
    parts = []
    curves = compare_layers.sentences(rows)
    if curves and not any(_methods(own) for _, own in _models(rows)):
        return curves[0]
    for model, own in _headlined(_models(rows)):
        methods = _methods(own)
        told = _at(own, methods[0], _usual(own, methods[0])) if methods else _no_method(own)
        parts.append(f"{model}: {told}" if model else told)
    text = "; ".join(parts)
    return _sentence(text) if text else "Nothing was measured."


def conclusions(rows: Sequence[Row]) -> list[str]:
    """The conclusion, then the same of every other method and sparsity, a sentence each."""
    found = list(dict.fromkeys([conclusion(rows), *compare_layers.sentences(rows)]))
    models = _models(rows)
    headlined = [model for model, _ in _headlined(models)]
    for model, own in models:
        for place, method in enumerate(_methods(own)):
            usual = _usual(own, method)
            for asked in _sparsities(own, method):
                if place == 0 and asked == usual and model in headlined:
                    continue
                told = _at(own, method, asked)
                found.append(_sentence(f"{model}: {told}" if model else told))
    failed = [row for row in rows if row.status != "done"]
    if failed:
        found.append(f"{count(len(failed), 'cell')} failed and {_is(len(failed))} not counted.")
    return found


def _sentence(text: str) -> str:
    """With a full stop, and a capital unless a model's name comes first."""
    ours = text.startswith(("at ", "with ", "no ", "protocol "))
    return f"{text[0].upper()}{text[1:]}." if ours else f"{text}."


Models = list[tuple[str, list[Row]]]


def _headlined(models: Models) -> Models:
    """Those that the conclusion speaks of: not what leaks, where there is anything else."""
    honest = [(model, own) for model, own in models if not any(row.leaks for row in own)]
    return honest or models


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _models(rows: Sequence[Row]) -> Models:
    """Rows of whole-model pruning by model, dtype and protocol, which are named where several."""
    found: dict[tuple[str, str | None, str | None], list[Row]] = {}
    for row in rows:
        if row.layers is None and row.status == "done":
            found.setdefault((row.model, row.dtype, row.protocol), []).append(row)
    varied = [len({key[place] for key in found}) > 1 for place in range(3)]
    names = {}
    for model, dtype, protocol in found:
        parts = (model, dtype, f"protocol {protocol or 'not known'}")
        named = " ".join(str(p) for p, many in zip(parts, varied, strict=True) if many)
        leaking = any(row.leaks for row in found[model, dtype, protocol])
        names[model, dtype, protocol] = (
            f"{named} (LEAK)" if leaking and named else "LEAK" if leaking else named
        )
    return [(names[key], own) for key, own in found.items()]


def _methods(rows: Iterable[Row]) -> list[str]:
    """``dart`` first, then the others as they come, GRIFFIN only where it is alone."""
    names = dict.fromkeys(row.method for row in rows if not row.method.startswith(DENSE))
    others = sorted((name for name in names if name != GRIFFIN), key=lambda name: name != "dart")
    return others or list(names)


def _sparsities(rows: Iterable[Row], method: str) -> list[float | None]:
    return list(dict.fromkeys(row.asked for row in rows if row.method == method))


def _usual(rows: Iterable[Row], method: str) -> float | None:
    known = [asked for asked in _sparsities(rows, method) if asked is not None]
    return min(known, key=lambda asked: (abs(asked - USUAL), asked), default=None)


def _no_method(rows: Sequence[Row]) -> str:
    told = [
        f"{row.method} has {row.metric} {quantity(row.value, row.perplexity)} on {row.task}"
        for row in rows
    ]
    return f"no pruned model was measured; {_and(told)}"


def _at(rows: Sequence[Row], method: str, asked: float | None) -> str:
    own = [row for row in rows if row.method == method and row.asked == asked]
    where = "with its own counts" if asked is None else f"at {percent(asked)}"
    if method != GRIFFIN and any(_fair(row) for row in own):
        return f"{where} {_verdicts(own, method, GRIFFIN, _griffin)}"
    if all(row.to_dense is None for row in own):
        return f"{where} {_values(own, method)}"
    return f"{where} {_verdicts(own, method, DENSE, lambda row: row.to_dense)}"


def _values(own: Sequence[Row], method: str) -> str:
    """What was measured, where there is nothing to compare it with."""
    told = [f"{row.metric} {quantity(row.value, row.perplexity)} on {row.task}" for row in own]
    if any(row.items > 1 for row in own):
        return f"{method} has {_and(told)}; nothing was measured that it can be compared with"
    return f"{method} has {_and(told)}; one item is too few to compare"


def _fair(row: Row) -> bool:
    return row.to_griffin is not None or row.equal_sparsity is not None


def _griffin(row: Row) -> Interval | None:
    """Against GRIFFIN at equal achieved sparsity; None where there is no such GRIFFIN."""
    if row.to_griffin is not None and row.gap is not None and not row.unequal:
        return row.to_griffin
    return None if row.equal_sparsity is None else row.equal_sparsity.interval


def _verdicts(own: Sequence[Row], method: str, other: str, against: Any) -> str:
    """ "dart beats griffin on 3 of 4 tasks; on mmlu the difference is within noise (...)"."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "": [], FEW: [], "unknown": []}
    seeds = len({row.seed for row in own}) > 1
    for row in own:
        interval = against(row)
        name = f"{row.task} (seed {row.seed})" if seeds else row.task
        verdict = "unknown" if interval is None else row.verdict(interval)
        if interval is not None and verdict in ("", FEW):
            few = f", {interval.differing} differ" if verdict else ""
            name = f"{name} ({_ends(interval, row.perplexity)}{few})"
        found[verdict].append(name)
    total = sum(len(names) for names in found.values())
    tasks = count(total, "task")
    parts = []
    if found["better"]:
        parts.append(f"{method} beats {other} on {len(found['better'])} of {tasks}")
        if len(found["better"]) < total:
            parts[0] += f" ({_and(found['better'])})"
        if found["worse"]:
            parts.append(f"it loses on {_and(found['worse'])}")
    elif found["worse"]:
        parts.append(f"{method} is worse than {other} on {len(found['worse'])} of {tasks}")
        if len(found["worse"]) < total:
            parts[0] += f" ({_and(found['worse'])})"
    else:
        where = f" on any of {tasks}" if total > 1 else ""
        parts.append(f"{method} neither beats nor loses to {other}{where}")
    if found[""]:
        parts.append(f"on {_and(found[''])} the difference is within noise")
    if found[FEW]:
        parts.append(f"on {_and(found[FEW])} too few items differ to tell")
    if found["unknown"]:
        why = (
            "has no interval" if other == DENSE else "is not at equal sparsity, or has no interval"
        )
        parts.append(f"on {_and(found['unknown'])} the comparison {why}")
    return "; ".join(parts)


def _ends(interval: Interval, perplexity: bool) -> str:
    text = amount(interval, perplexity)
    return f"interval {text.partition('(')[2].rstrip(')')}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def leak_sentence(leak: Leak) -> str:
    """How much better the protocol that has seen the answers looks."""
    row = leak.published
    change = amount(leak.interval, row.perplexity) or "not known: no shared items"
    verdict = row.verdict(leak.interval)
    told = {
        "better": "flattered by the leak",
        "worse": "worse all the same",
        FEW: f"only {leak.interval.differing if leak.interval else 0} items differ",
        "": "within noise",
    }
    known = f", {told[verdict]}" if leak.interval else ""
    return f"{row.label} on {row.task}: published against full {change}{known}."
