"""The quality of ``dart-llm tune``: two texts, the loss of every candidate on them, the choice.

The loss of a candidate on a text is its perplexity over the reference's, minus 1, on the same
tokens; the reference is the dense model in its own dtype.  A few tokens can flatter a candidate, so
it is no less than the exponential of the mean KL, minus 1: what the loss would be on all that the
reference may write there.  With fewer slices than an interval needs it is that alone: losses of so
few tokens vary too much, KL varies little.  The loss of a row is that of the worse text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dart_llm.calibration.collect import opening_ids, sample_continuations, start_tokens
from dart_llm.data import documents
from dart_llm.errors import ConfigError
from dart_llm.evaluation.perplexity import compare_window, perplexity
from dart_llm.evaluation.windows import Window, slice_windows
from dart_llm.experiments import stats
from dart_llm.pruning.config import SelfStatsConfig
from dart_llm.reporting.table import grouped
from dart_llm.reporting.words import FEWEST_ITEMS
from dart_llm.session.run import Run

OWN_TEXT = "own"
"""Label of the self-generated text."""

STEPS_AHEAD = 1_000_003
"""Added to the seed: the text must differ from the one that statistics are learned from."""

FACTS = (
    "decoded_tokens",
    "achieved_sparsity",
    "dense_token_share",
    "remasks",
    "token_bytes_share",
    "extra_memory_bytes",
)
"""What is kept of a run's report on a slice."""


@dataclass(frozen=True, eq=False)
class Slice:
    """``text``: label of the text; ``window``: its tokens, prompt first."""

    text: str
    window: Window

    @property
    def id(self) -> str:
        """Unique among the slices of a run."""
        return f"{self.text}/{self.window.number}"


def generate_text(model: Any, count: int, length: int, seed: int, skip: int = 0) -> list[list[int]]:
    """``count`` sequences of ``length`` tokens that ``model`` samples, as learning does.

    ``skip``: sequences that were generated before: these are others.  Raises ``ConfigError`` for a
    model without a head.
    """
    prior, generator = SelfStatsConfig(), torch.Generator().manual_seed(seed + STEPS_AHEAD + skip)
    begin = opening_ids(model, skip + count, min(prior.opening, length - 1))
    if begin is not None:
        begin = begin[skip:]
    else:
        vocabulary = int(model.config.get_text_config().vocab_size)
        begin = torch.randint(vocabulary, (count, 1), generator=generator)
        if start := start_tokens(model):
            begin[:] = start[0]
    sequences: list[list[int]] = sample_continuations(
        model, begin, length, generator, lambda text: None, prior.temperature, prior.top_p
    ).tolist()
    return sequences


def all_slices(
    generated: Mapping[int, Sequence[int]], user: Sequence[Slice], prompt: int
) -> list[Slice]:
    """Self-generated slices, by number, and those of the user's text, alternating."""
    own = [Slice(OWN_TEXT, Window(torch.tensor(ids), prompt, n)) for n, ids in generated.items()]
    return sorted([*own, *user], key=lambda one: one.window.number)


def user_slices(text: str, tokenizer: Any, count: int, prompt: int, scored: int) -> list[Slice]:
    """Slices of the user's text; raises ``ConfigError`` where it is too short for two."""
    ids: Tensor = tokenizer(documents.read(text), return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < 2 * (prompt + scored):
        raise ConfigError(
            f'the text "{text}" has {len(ids)} tokens, and two slices need '
            f"{2 * (prompt + scored)}: give a longer text, or a smaller --prompt-tokens or --tokens"
        )
    label = documents.resolve(text).label
    label = f"{label}, yours" if label == OWN_TEXT else label
    return [Slice(label, window) for window in slice_windows(ids, count, prompt, scored)]


def score(model: Any, run: Run, one: Slice, reference: Tensor) -> dict[str, Any]:
    """One slice by ``run``, not attached; ``reference``: [C, V] logits of the dense model.

    ``loss`` and ``kl``: means over the scored ``tokens``, nats; ``accounting``: ``FACTS``.  Raises
    ``ConfigError`` when all of them ran dense although a sparsity was requested.
    """
    run.reset()
    with run:
        compared = compare_window(model, run, one.window, reference)
    report = run.report().to_dict()
    if report["dense_token_share"] == 1 and run.asks_for_pruning:
        raise ConfigError(
            f"all {report['decoded_tokens']} decoded tokens of slice {one.id} ran dense, so this "
            "would measure the untouched model; give more --prompt-tokens or --tokens"
        )
    return {**compared._asdict(), "accounting": {name: report[name] for name in FACTS}}


REFERENCE = "reference"
"""Candidate of the lines that losses are counted from."""

Line = Mapping[str, Any]
"""One slice of one candidate: ``candidate``, ``text``, ``slice``, ``loss``, ``kl``, ``tokens``,
``accounting``."""

Row = dict[str, Any]


def quality_row(label: str, lines: Sequence[Line], seed: int) -> Row:
    """Loss by text, the worse one's with its interval, KL and accounting of a candidate."""
    by_candidate = grouped(lines, lambda line: line["candidate"])
    scored, reference = by_candidate[label], by_candidate[REFERENCE]
    dense = {line["slice"]: line for line in reference}
    texts = {
        text: _on_text(own, [dense[line["slice"]] for line in own], seed)
        for text, own in grouped(scored, lambda line: line["text"]).items()
    }
    worse = max(texts, key=lambda text: texts[text]["loss"])
    names = ("loss", "loss_interval", "loss_range", "perplexity")
    return {
        "worse_text": worse,
        **{name: texts[worse][name] for name in names},
        "kl": max(row["kl"] for row in texts.values()),
        "slices": len(scored),
        **_accounting([line["accounting"] for line in scored]),
        "texts": texts,
    }


def _on_text(scored: Sequence[Line], base: Sequence[Line], seed: int) -> Row:
    losses, dense = (
        {line["slice"]: (line["loss"], line["tokens"]) for line in lines}
        for lines in (scored, base)
    )
    tokens = sum(line["tokens"] for line in scored)
    loss, dense_loss = (
        sum(line["loss"] * line["tokens"] for line in lines) / tokens for lines in (scored, base)
    )
    kls = [line["kl"] for line in scored]
    kl = sum(line["kl"] * line["tokens"] for line in scored) / tokens
    paired = stats.paired_interval(losses, dense, "ratio_of_exp_mean", seed)
    over_kl = stats.interval(kls, seed=seed)
    by_tokens = (
        perplexity(loss - dense_loss) - 1,
        paired and paired.ends and [end - 1 for end in paired.ends],
    )
    by_kl = math.expm1(kl), over_kl and over_kl.ends and [*map(math.expm1, over_kl.ends)]
    enough = len(scored) >= FEWEST_ITEMS
    lost, interval = max(by_tokens, by_kl, key=lambda pair: pair[0]) if enough else by_kl
    return {
        "loss": lost,
        "loss_interval": interval,
        "loss_range": [math.expm1(min(kls)), math.expm1(max(kls))],
        "kl": kl,
        "perplexity": perplexity(loss),
        "dense_perplexity": perplexity(dense_loss),
        "slices": len(scored),
    }


def _accounting(reports: Sequence[Mapping[str, Any]]) -> Row:
    """Over all slices, weighted by their decoded tokens."""
    total = sum(report["decoded_tokens"] for report in reports)

    def mean(name: str) -> float | None:
        if any(report[name] is None for report in reports):
            return None
        return float(sum(r[name] * r["decoded_tokens"] for r in reports) / total)

    return {
        "achieved_sparsity": mean("achieved_sparsity"),
        "dense_token_share": mean("dense_token_share"),
        "remasks": sum(report["remasks"] for report in reports),
        "bytes_share": mean("token_bytes_share"),
        "extra_memory_bytes": max(report["extra_memory_bytes"] for report in reports),
    }


def clearly_over(row: Row, max_loss: float) -> bool:
    """Whether the whole interval of the loss lies above the budget.

    With too few slices for an interval: whether the least of their losses does.
    """
    ends = row["loss_interval"]
    return bool((_lost(row, -1) if ends is None else ends[0]) > max_loss)


def recommend(rows: Sequence[Row], base: str, max_loss: float, noise: float) -> str:
    """Label of the fastest row whose estimated loss is within ``max_loss``.

    What leaves something out must beat the fastest dense row by more than ``noise``, and that one
    the row ``base`` (the model as it is loaded): else the simpler one is taken.  Where nothing is
    within, and ``base`` is not, it is ``base`` all the same.  Disturbed timings recommend nothing.
    """
    fit = [row for row in rows if _is_trusted(row) and row["loss"] <= max_loss]
    if not fit:
        return base
    best = min(fit, key=_ms)
    dense = min((row for row in fit if row["dense"]), key=_ms, default=None)
    for simpler in (dense, next((row for row in fit if row["row"] == base), None)):
        if simpler is not None and simpler["ms"] <= best["ms"] * (1 + noise):
            best = simpler
    return str(best["row"])


def _is_trusted(row: Row) -> bool:
    """Whether a row was timed, and its timing was not disturbed."""
    return row["ms"] is not None and row["disturbed"] is None


def undecided(
    rows: Sequence[Row], base: str, recommended: str, max_loss: float, noise: float
) -> list[str]:
    """Labels of rows that further measurements may show to be the better choice; [] if none.

    A few slices and repetitions decide only what is clear: a row is clearly good where it is faster
    than dense by more than ``noise`` and loses no more than ``max_loss``, both beyond their scatter
    (of the repetitions, and over the slices), and clearly not where one of the two is beyond it on
    the other side.
    """
    others = [row for row in rows if row["row"] != base]
    clear = [row for row in others if _gain(row, -1) > 1 + noise and _lost(row, 1) <= max_loss]
    if any(row["row"] == recommended for row in clear):
        return []
    return [
        row["row"]
        for row in others
        if row["ms"] is not None and _gain(row, 1) > 1 + noise and _lost(row, -1) <= max_loss
    ]


def _gain(row: Row, side: int) -> float:
    """The least (-1) or the largest (1) speed-up that the repetitions allow."""
    if not _is_trusted(row):
        return math.inf if side > 0 else 0.0
    return float(row["times_dense"] * (1 + side * (row["scatter"] or 0.0)))


def _lost(row: Row, side: int) -> float:
    """The least (-1) or the largest (1) loss that the slices allow."""
    low, high = row["loss_range"]
    return float(min(low, row["loss"]) if side < 0 else max(high, row["loss"]))


def _ms(row: Row) -> float:
    return float(row["ms"])


def pareto(rows: Sequence[Row]) -> list[str]:
    """Labels of the timed rows that no other one beats in loss and time alike."""
    timed = [(row["row"], row["ms"], row["loss"]) for row in rows if _is_trusted(row)]
    return [
        label
        for label, ms, loss in timed
        if not any(
            other <= ms and lost <= loss and (other, lost) != (ms, loss) for _, other, lost in timed
        )
    ]
