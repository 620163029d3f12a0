"""The sections of an inspection, each with a function for numbers and a function for tables.

Text A has index 0, and text B has index 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.evaluation.perplexity import score_window
from dart_llm.evaluation.windows import Window
from dart_llm.experiments.line_plots import Curve, Panel, line_plot
from dart_llm.experiments.stats import Interval, Sample, interval, paired_interval
from dart_llm.pruning.config import PruneConfig, ScoreConfig
from dart_llm.pruning.masks import top_ids
from dart_llm.pruning.registry import SCORES
from dart_llm.pruning.weights import REACH_CHUNK, FfnWeights
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.page import flat
from dart_llm.reporting.table import Column, Record, Table, keys_of, value_columns
from dart_llm.reporting.words import percent, with_interval
from dart_llm.session.run import prune
from dart_llm.studies.inspection.readings import FIRST, SECOND, WHOLE, Readings


@dataclass(frozen=True)
class TableWithPanels:
    """A table and its plot panels."""

    table: Table
    panels: Sequence[Panel] = ()

    def plot(self, small: str) -> Plot:
        return line_plot(f"inspect_{self.table.name}", self.table.caption, small, self.panels)


Compute = Callable[[Readings], dict[str, Any]]
Show = Callable[[Record], list[TableWithPanels]]

LAYER = Column("layer", "layer")

NUMBER_FORMAT = ".3g"


def _by_layer(layers: Sequence[Record]) -> list[dict[str, Any]]:
    return [{"layer": index, **flat(layer)} for index, layer in enumerate(layers)]


def _panel(
    ylabel: str,
    rows: Sequence[Record],
    lines: Mapping[str, str],
    band: tuple[str, str] | None = None,
    **options: Any,
) -> Panel:
    """Curves over layers.  ``lines`` maps labels to keys; ``band``: keys of the first's bounds."""
    x = [row["layer"] for row in rows]
    low, high = band or ("", "")
    ends = ([row[low] for row in rows], [row[high] for row in rows]) if band else None
    curves = [
        Curve(label, x, [row[key] for row in rows], ends if index == 0 else None)
        for index, (label, key) in enumerate(lines.items())
    ]
    return Panel("layer", ylabel, curves, **options)


# How each FFN changes the residual stream, and the FFN's activations on text A.


def layers(study: Readings) -> dict[str, Any]:
    """``impact`` and ``activations`` of every layer on text A."""
    readings = study.reading(0)
    return {
        "text": study.texts[0].label,
        "layers": [reading.impact for reading in readings],
        "activations": [reading.activations for reading in readings],
    }


def show_layers(data: Record) -> list[TableWithPanels]:
    rows, text = _by_layer(data["layers"]), data["text"]
    heads = ("cos(x, x+r)", "|r|/|x|", "S residual", "cos(x, z)", "|z-x|/|x|", "S output")
    names = ("cosine.median", "change.median", "s")
    keys = " ".join(f"{pair}.{name}" for pair in ("residual", "output") for name in names)
    panels = [
        _panel(
            ylabel,
            rows,
            {label: f"{pair}.{what}.median" for pair, label in labels.items()},
            (f"residual.{what}.q05", f"residual.{what}.q95"),
            is_log=what == "change",
        )
        for what, ylabel, labels in (
            ("cosine", "cosine with x", {"residual": "x + r", "output": "z"}),
            ("change", "relative change", {"residual": "|r| / |x|", "output": "|z - x| / |x|"}),
        )
    ]
    caption = f"Each FFN and the residual stream, text {text}: medians (band: 5 to 95 % of tokens)"
    columns = (LAYER, *value_columns(keys, heads, NUMBER_FORMAT))
    impact = TableWithPanels(Table("layers", caption, columns, rows), panels)

    rows, sizes = (
        _by_layer(data["activations"]),
        ("absolute.median", "absolute.q95", "absolute.max"),
    )
    shares = {"exact zeros": "zero", "|u| < 0.1 RMS": "near", "with 90 % of u²": "concentrated"}
    columns = (
        LAYER,
        *value_columns(" ".join(sizes), ("median |u|", "95 %", "max"), NUMBER_FORMAT),
        *value_columns(" ".join(shares.values()), [*shares], percent),
    )
    panels = [
        _panel("|u|", rows, dict(zip(("median", "95 %", "max"), sizes, strict=True)), is_log=True),
        _panel("share of neurons", rows, shares),
    ]
    table = Table("activations", f"Activations u on text {text}", columns, rows)
    return [impact, TableWithPanels(table, panels)]


# The strongest neurons of every layer by forward proxy: magnitude times effect on the logits.

PROXY = "combined"
"""The score by which neurons are ranked."""

TOKENS = 5
"""The number of vocabulary entries listed per neuron."""


def neurons(study: Readings) -> dict[str, Any]:
    """The strongest neurons per layer, with score, mean activation and promoted tokens.

    The score is ``PROXY`` over text A (docs/reference.md, "Scores"); without a text the magnitude
    is 1, so that only the proxy counts.  ``tokens``: the vocabulary entries whose output embedding
    has the largest product with the neuron's down column, times the sign of the neuron's mean
    activation.  Raises ``ConfigError`` for a model without an output embedding.
    """
    seed, rows = study.settings.seed, []
    proxy = PruneConfig(score=ScoreConfig(name=PROXY), seed=seed)
    for weights in study.calibrated(proxy, study.view.weights("output", seed)):
        magnitudes, signed = torch.ones(weights.width, device=weights.device), None
        if study.texts:
            reading = study.reading(0)[weights.index]
            magnitudes, signed = reading.squares.sqrt().to(weights.device), reading.signed
        scores = SCORES.get(PROXY)(magnitudes, weights).detach().float()
        strongest = scores.sort(descending=True, stable=True).indices[: study.settings.top]
        tokens = _tokens(study, weights, strongest, signed)
        for rank, (neuron, words) in enumerate(zip(strongest.tolist(), tokens, strict=True), 1):
            rows.append(
                {
                    "layer": weights.index,
                    "rank": rank,
                    "neuron": neuron,
                    "score": float(scores[neuron]),
                    "mean_activation": None if signed is None else float(signed[neuron]),
                    "tokens": words,
                }
            )
    return {"text": study.texts[0].label if study.texts else None, "rows": rows}


def _tokens(
    study: Readings, weights: FfnWeights, neurons: Tensor, signed: Tensor | None
) -> list[list[str]]:
    """The vocabulary entries that each neuron promotes most."""
    rows = weights.embedding
    assert rows is not None  # the score has already used it
    columns = weights.down[:, neurons].detach().float()
    if signed is not None:
        columns = columns * torch.where(signed[neurons.cpu()] < 0, -1.0, 1.0).to(columns.device)
    columns = columns.to(rows.device)
    chunks = torch.split(rows.detach(), REACH_CHUNK)  # avoids a float32 copy of the embedding
    reach = torch.cat([chunk.float() @ columns for chunk in chunks])
    ids = reach.topk(min(TOKENS, len(reach)), 0).indices.t()
    return [[str(study.tokenizer.decode([token])) for token in row] for row in ids.tolist()]


def show_neurons(data: Record) -> list[TableWithPanels]:
    columns = (
        LAYER,
        *value_columns("rank neuron", ("rank", "neuron"), str),
        Column("score", "score", ".2f"),
        Column("mean u", "mean_activation", NUMBER_FORMAT),
        Column("writes towards", "tokens", lambda tokens: " ".join(map(repr, tokens))),
    )
    caption = f"Strongest neurons by forward proxy ({PROXY})"
    return [TableWithPanels(Table("neurons", caption, columns, data["rows"]))]


# The neurons kept for two texts: their overlap per layer, against chance and within one text.


def jaccard(a: Tensor, b: Tensor) -> float:
    """The Jaccard index |a & b| / |a | b| of two sets of ids; 1 for two empty sets."""
    same = int(torch.isin(a, b).sum())
    union = len(a) + len(b) - same
    return same / union if union else 1.0


def expected_jaccard(width: int, a: int, b: int) -> float:
    """The Jaccard index of two random sets, with ``a`` and ``b`` of ``width`` neurons, if the
    intersection has the mean size."""
    same = a * b / width
    return same / (a + b - same) if a + b else 1.0


OVERLAPS = {
    "jaccard": "Jaccard of A and B",
    "chance": "by chance",
    "same_text": "halves of one text",
    "across": "halves of A and B",
}
"""Maps each overlap in the table and the plot to its title."""


def overlap(study: Readings) -> dict[str, Any]:
    """Per layer, the Jaccard index of the neurons that the method keeps for A and for B.

    ``jaccard``: for the whole texts; ``chance``: for random sets of the same sizes.  Two baselines
    compare masks from halves of texts, so that all masks have equally much evidence.
    ``same_text``: the two halves of a text, averaged over A and B.  ``across``: a half of A and a
    half of B, averaged over the four pairs.
    """
    whole = [_kept(study, text, WHOLE) for text in (0, 1)]
    halves = [[_kept(study, text, part) for part in (FIRST, SECOND)] for text in (0, 1)]
    layers = []
    for index, block in enumerate(study.view.blocks):
        a, b = (kept[index] for kept in whole)
        parts_a, parts_b = ([half[index] for half in text] for text in halves)
        layers.append(
            {
                "layer": index,
                "width": block.down_width,
                "kept_a": len(a),
                "kept_b": len(b),
                "jaccard": jaccard(a, b),
                "chance": expected_jaccard(block.down_width, len(a), len(b)),
                "same_text": fmean([jaccard(*parts_a), jaccard(*parts_b)]),
                "across": fmean([jaccard(x, y) for x, y in product(parts_a, parts_b)]),
            }
        )
    config = study.settings.prune_config()
    kept, width = (sum(layer[key] for layer in layers) for key in ("kept_a", "width"))
    return {
        "method": config.method,
        "sparsity": config.sparsity,
        "removed": 1 - kept / width,
        "mean": {key: fmean([layer[key] for layer in layers]) for key in OVERLAPS},
        "layers": layers,
    }


def _kept(study: Readings, text: int, part: str) -> list[Tensor]:
    """Ids of the kept neurons per layer, on the CPU; all ids if a layer stays dense."""
    selection = study.selector.select(study.evidence(text, part))
    return [
        torch.arange(block.down_width) if mask is None else mask.ids.cpu()
        for block, mask in zip(study.view.blocks, selection.masks, strict=True)
    ]


def show_overlap(data: Record) -> list[TableWithPanels]:
    columns = (
        LAYER,
        *value_columns("width kept_a kept_b", ("neurons", "kept for A", "kept for B"), ",.0f"),
        *value_columns(" ".join(OVERLAPS), [*OVERLAPS.values()], NUMBER_FORMAT),
    )
    lines = {head: key for key, head in OVERLAPS.items()}
    panel = _panel("Jaccard of the kept neurons", data["layers"], lines, limits=(0, 1))
    rows = [*data["layers"], {"layer": "mean", **data["mean"]}]
    caption = f"Overlap of the neurons that {data['method']} keeps for A and for B"
    return [TableWithPanels(Table("overlap", caption, columns, rows), [panel])]


# Ablation: remove the neurons of a topic, and measure the loss on this and on another topic.
#
# Neurons are selected by the first half of each text.  The second half is scored: after a dense
# pass over the first half, the second half runs as decode tokens with the neurons removed (protocol
# ``decode``).  So the selection has seen none of the scored tokens.

BLOCK = 16
"""Number of consecutive tokens that are resampled together, because their losses are dependent."""

FEWEST = 4 * BLOCK
"""The minimum number of tokens in a text; the second half then has two blocks."""

Ids = dict[int, Tensor]
"""Indices of neurons, by layer."""


def check_ablation(study: Readings) -> None:
    """Raise ``ConfigError`` if a text is too short."""
    for text, ids in zip(study.texts, study.ids, strict=True):
        if len(ids) < FEWEST:
            raise ConfigError(
                f"ablation needs {FEWEST} tokens of each text, but {text.title} has {len(ids)}: "
                "give longer texts"
            )


def ablation(study: Readings) -> dict[str, Any]:
    """A row per set of removed neurons and scored text; intervals resample blocks of tokens.

    A's own neurons are among A's strongest but not among B's; equal texts have none.
    ``over_dense``: the loss with the neurons removed, minus the untouched model's.
    ``over_random``: the same loss, minus the mean loss with as many random neurons removed.  Both
    differences are in nats per token and paired by block.
    """
    check_ablation(study)
    share = study.settings.share
    a, b = (
        [
            top_ids(scores, max(1, round(share * len(scores)))).cpu()
            for scores in study.selector.scores(study.evidence(text, FIRST))
        ]
        for text in (0, 1)
    )
    layers = list(enumerate(zip(a, b, strict=True)))
    removed: dict[str, Ids] = {
        "A's own": {layer: x[~torch.isin(x, y)] for layer, (x, y) in layers},
        "B's own": {layer: y[~torch.isin(y, x)] for layer, (x, y) in layers},
    }
    dense = [_losses(study, text, {})[0] for text in (0, 1)]
    rows = [
        {"removed": name, "text": study.texts[text].label, **_row(study, text, ids, dense[text])}
        for name, ids in removed.items()
        for text in (0, 1)
    ]
    return {"score": study.settings.prune_config().score.name, "rows": rows}


def _row(study: Readings, text: int, ids: Ids, dense: Sequence[float]) -> dict[str, Any]:
    """Losses on a text without the neurons ``ids``; ``dense``: the untouched model's losses."""
    seed, draws = study.settings.seed, study.settings.ablation_seeds
    losses, accounting = _losses(study, text, ids)
    drawn = [_losses(study, text, _random_ids(study, ids, seed + k))[0] for k in range(draws)]
    random = [fmean(draws_of_token) for draws_of_token in zip(*drawn, strict=True)]
    sample = _blocks(losses)
    return {
        "neurons": sum(map(len, ids.values())),
        "tokens": len(losses),
        **accounting,
        "dense_loss": fmean(dense),
        "loss": fmean(losses),
        "loss_interval": _ends(interval(sample, seed=seed)),
        "random_loss": fmean(random),
        "over_dense": _ends(paired_interval(sample, _blocks(dense), seed=seed)),
        "over_random": _ends(paired_interval(sample, _blocks(random), seed=seed)),
    }


def _random_ids(study: Readings, ids: Ids, seed: int) -> Ids:
    """Random neurons; every layer has as many as in ``ids``."""
    generator = torch.Generator().manual_seed(seed)
    widths = [block.down_width for block in study.view.blocks]
    return {
        layer: torch.randperm(widths[layer], generator=generator)[: len(neurons)].sort().values
        for layer, neurons in ids.items()
    }


def _ends(estimate: Interval | None) -> dict[str, Any] | None:
    return None if estimate is None else estimate.to_dict()


def _blocks(losses: Sequence[float]) -> Sample:
    """Mean loss and length of every block of ``BLOCK`` tokens; the last block may be shorter."""
    parts = [losses[start : start + BLOCK] for start in range(0, len(losses), BLOCK)]
    return {f"{index:06d}": (fmean(part), len(part)) for index, part in enumerate(parts)}


def _losses(study: Readings, text: int, ids: Ids) -> tuple[list[float], dict[str, Any]]:
    """The losses of the second half's tokens without the neurons ``ids``, and accounting."""
    window = Window(study.ids[text], len(study.ids[text]) // 2)
    removed = {layer: neurons for layer, neurons in ids.items() if len(neurons)}
    if not removed:
        accounting = {"achieved_sparsity": 0.0, "dense_token_share": 1.0, "remasks": 0}
        return list(score_window(study.model, None, window).losses), accounting
    with prune(study.model, "griffin", remove=removed) as run:
        scored = score_window(study.model, run, window)
        report = run.report()
    names = ("achieved_sparsity", "dense_token_share", "remasks")
    return list(scored.losses), {name: getattr(report, name) for name in names}


def _with_ends(interval: Record) -> str:
    return with_interval(interval["estimate"], interval, "+.3f")


def show_ablation(data: Record) -> list[TableWithPanels]:
    losses = ("dense loss", "loss", "loss, random neurons")
    columns = (
        *value_columns("removed text", ("removed neurons", "loss on"), str),
        Column("achieved sparsity", "achieved_sparsity", percent),
        Column("dense tokens", "dense_token_share", percent),
        *value_columns("dense_loss loss random_loss", losses, NUMBER_FORMAT),
        Column("minus dense (95 %)", "over_dense", _with_ends),
        Column("minus random (95 %)", "over_random", _with_ends),
    )
    caption = (
        "Loss (nats per token) with neurons removed, on the second half of each text; A's own "
        "neurons are among A's strongest but not among B's"
    )
    rows = [{**row, **flat(row)} for row in data["rows"]]
    fields = keys_of(map(flat, data["rows"]))
    return [TableWithPanels(Table("ablation", caption, columns, rows, fields=fields))]


SECTIONS: dict[str, tuple[Compute, Show]] = {
    "layers": (layers, show_layers),
    "neurons": (neurons, show_neurons),
    "overlap": (overlap, show_overlap),
    "ablation": (ablation, show_ablation),
}
"""For each section, the function for the numbers and the function for the tables."""
