"""Ablation, strong neurons, overlap of the neurons of two texts, embedding space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np
import torch
from scipy.stats import hypergeom
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.evaluation.perplexity import score_window
from dart_llm.evaluation.windows import Window
from dart_llm.experiments.stats import Interval, Sample, interval, paired_interval
from dart_llm.pruning.config import PruneConfig, ScoreConfig
from dart_llm.pruning.drift import SINKS
from dart_llm.pruning.masks import top_ids
from dart_llm.pruning.registry import SCORES
from dart_llm.pruning.statistics import EPS
from dart_llm.pruning.weights import REACH_CHUNK, FfnWeights
from dart_llm.session.run import prune
from dart_llm.studies.inspection.readings import FIRST, SECOND, WHOLE, Readings

# Ablation: remove the neurons of one topic, and measure the loss on it and on another.
#
# Neurons are selected by the first half of each text; losses are those of the second half, whose
# tokens run as decode tokens with the neurons removed, after a dense pass over the first half
# (protocol ``decode``).  No scored token has been seen by the choice.

BLOCK = 16
"""Consecutive tokens that the bootstrap draws together: their losses depend on each other."""

FEWEST = 4 * BLOCK
"""Tokens that a text needs, so that half of it makes more than one block."""

ARMS = {
    "a_only": "A's own",
    "b_only": "B's own",
    "a_top": "A's strongest",
}
"""What is removed: A's own are among A's strongest and not among B's."""

Ids = Mapping[int, Tensor]


def check(study: Readings) -> None:
    """Raise ``ConfigError`` when a text is too short."""
    for text, ids in zip(study.texts, study.ids, strict=True):
        if len(ids) < FEWEST:
            raise ConfigError(
                f"ablation needs {FEWEST} tokens of each text, and {text.title} has {len(ids)}: "
                "give longer texts"
            )


def strongest(scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """Per layer the ids of the ``share`` of neurons with the highest scores, at least one."""
    return [top_ids(s, max(1, round(share * len(s)))).cpu() for s in scores]


def arms(a: Sequence[Tensor], b: Sequence[Tensor]) -> dict[str, Ids]:
    """The neurons that each of ``ARMS`` removes per layer, from the strongest of A and of B."""

    def minus(first: Sequence[Tensor], second: Sequence[Tensor]) -> Ids:
        pairs = enumerate(zip(first, second, strict=True))
        return {layer: x[~torch.isin(x, y)] for layer, (x, y) in pairs}

    return {"a_only": minus(a, b), "b_only": minus(b, a), "a_top": dict(enumerate(a))}


def random_ids(ids: Ids, widths: Sequence[int], seed: int) -> Ids:
    """As many neurons per layer as ``ids``, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: torch.randperm(widths[layer], generator=generator)[: len(ids_of_layer)].sort().values
        for layer, ids_of_layer in ids.items()
    }


def ablation(study: Readings) -> dict[str, Any]:
    """Rows by arm and scored text, with intervals over blocks of ``BLOCK`` tokens.

    ``over_dense`` and ``over_random``: the loss with the arm's neurons removed minus that of the
    untouched model, and minus the mean over draws of as many random neurons (nats per token; all
    paired by block).  An arm without neurons (two equal texts) has rows with
    ``neurons`` 0.
    """
    check(study)
    settings = study.settings
    scores = [study.selector.scores(study.evidence(text, FIRST)) for text in (0, 1)]
    removed = arms(*(strongest(text_scores, settings.share) for text_scores in scores))
    dense = [_losses(study, text, {})[0] for text in (0, 1)]
    return {
        "share": settings.share,
        "score": settings.prune_config().score.name,
        "block_tokens": BLOCK,
        "random_seeds": settings.ablation_seeds,
        "rows": [
            {"arm": arm, "text": study.texts[text].label, **_row(study, text, ids, dense[text])}
            for arm, ids in removed.items()
            for text in (0, 1)
        ],
    }


def _row(study: Readings, text: int, ids: Ids, dense: Sequence[float]) -> dict[str, Any]:
    seed, draws = study.settings.seed, study.settings.ablation_seeds
    widths = [block.down_width for block in study.view.blocks]
    losses, spent = _losses(study, text, ids)
    drawn = [random_ids(ids, widths, one) for one in range(seed, seed + draws)]
    others = [_losses(study, text, other)[0] for other in drawn]
    random = [fmean(each) for each in zip(*others, strict=True)]
    sample = blocks(losses)
    return {
        "neurons": sum(len(own) for own in ids.values()),
        "tokens": len(losses),
        **spent,
        "dense_loss": fmean(dense),
        "loss": fmean(losses),
        "loss_interval": _ends(interval(sample, seed=seed)),
        "random_loss": fmean(random),
        "random_losses": [fmean(each) for each in others],
        "over_dense": _ends(paired_interval(sample, blocks(dense), seed=seed)),
        "over_random": _ends(paired_interval(sample, blocks(random), seed=seed)),
    }


def _ends(estimate: Interval | None) -> dict[str, Any] | None:
    return None if estimate is None else estimate.to_dict()


def blocks(losses: Sequence[float]) -> Sample:
    """Mean loss and tokens of every ``BLOCK`` consecutive tokens; the last may be shorter."""
    parts = [losses[start : start + BLOCK] for start in range(0, len(losses), BLOCK)]
    return {f"{number:06d}": (fmean(part), len(part)) for number, part in enumerate(parts)}


def _losses(study: Readings, text: int, remove: Ids) -> tuple[list[float], dict[str, Any]]:
    """Loss of every token of a text's second half, and the accounting of how it ran."""
    ids = study.ids[text]
    window = Window(ids, len(ids) // 2)
    removed = {layer: ids_of_layer for layer, ids_of_layer in remove.items() if len(ids_of_layer)}
    if not removed:
        spent = {"achieved_sparsity": 0.0, "dense_token_share": 1.0, "remasks": 0}
        return list(score_window(study.model, None, window).losses), spent
    with prune(study.model, "griffin", remove=removed) as run:
        scored = score_window(study.model, run, window)
        report = run.report()
    names = ("achieved_sparsity", "dense_token_share", "remasks")
    return list(scored.losses), {name: getattr(report, name) for name in names}


# The strongest and the weakest neurons of every layer by forward proxy.

TOKENS = 5
"""Vocabulary entries listed for a strong neuron."""

SHARES = (0.01, 0.1)
"""Strongest shares of a layer's neurons whose part of all scores is listed."""


def neurons(study: Readings) -> dict[str, Any]:
    """``strong`` and ``weak`` neurons per layer with score, mean activation and top tokens.

    The score is ``settings.neuron_score`` over text A (docs/reference.md, "Scores"); without a text
    the magnitude is 1, so the proxy decides alone.  ``tokens``: the rows e_v of the output
    embedding whose w . e_v is largest in the direction that the neuron writes (that of its mean
    activation), for strong neurons.  ``concentration``: the part of the layer's summed scores that
    its strongest 1 % and 10 % have.  Raises ``ConfigError`` without an output embedding.
    """
    config, top = study.settings.prune_config(), study.settings.top
    rule = SCORES.get(study.settings.neuron_score)
    layers = []
    proxy = PruneConfig(score=ScoreConfig(name=study.settings.neuron_score), seed=config.seed)
    for weights in study.knowing(proxy, study.view.weights("output", config.seed)):
        a, signed = _statistics(study, weights)
        scores = rule(a, weights).detach().float()
        order = scores.sort(descending=True, stable=True).indices
        strong, weak = order[:top], order.flip(0)[:top]
        tokens = _tokens(study, weights, strong, signed)
        layers.append(
            {
                "layer": weights.index,
                "concentration": {f"{s:g}": concentration(scores, s) for s in SHARES},
                "strong": [
                    {**_neuron(i, scores, signed), "tokens": words}
                    for i, words in zip(strong.tolist(), tokens, strict=True)
                ],
                "weak": [_neuron(i, scores, signed) for i in weak.tolist()],
            }
        )
    return {
        "score": study.settings.neuron_score,
        "text": study.texts[0].label if study.texts else None,
        "layers": layers,
    }


def _statistics(study: Readings, weights: FfnWeights) -> tuple[Tensor, Tensor | None]:
    """The magnitude of every neuron, and its mean activation where a text was read."""
    if not study.texts:
        return torch.ones(weights.width, device=weights.device), None
    reading = study.reading(0)[weights.index]
    return reading.squares.sqrt().to(weights.device), reading.signed


def concentration(scores: Tensor, share: float) -> float:
    """Part of the summed scores [I] that the strongest ``share`` of the neurons has."""
    count = max(1, round(share * len(scores)))
    return float(scores.sort(descending=True).values[:count].sum() / scores.sum().clamp_min(1e-30))


def _neuron(index: int, scores: Tensor, signed: Tensor | None) -> dict[str, Any]:
    mean = None if signed is None else float(signed[index])
    return {"neuron": index, "score": float(scores[index]), "mean_activation": mean}


def _tokens(
    study: Readings, weights: FfnWeights, neurons: Tensor, signed: Tensor | None
) -> list[list[str]]:
    rows = weights.embedding
    assert rows is not None  # the score has used it
    columns = weights.down[:, neurons].detach().float()
    if signed is not None:
        columns = columns * torch.where(signed[neurons.cpu()] < 0, -1.0, 1.0).to(columns.device)
    ids = top_rows(rows.detach(), columns.to(rows.device), TOKENS)
    return [[str(study.tokenizer.decode([token])) for token in row] for row in ids.tolist()]


def top_rows(rows: Tensor, columns: Tensor, count: int) -> Tensor:
    """Ids of the ``count`` rows [V, D] with the largest product with each column [D, n].

    Returns [n, count].  In chunks of V: never all products of a large vocabulary in memory.
    """
    values = ids = None  # type: Tensor | None
    for number, chunk in enumerate(torch.split(rows, REACH_CHUNK)):
        reach = chunk.float() @ columns
        numbers = torch.arange(len(chunk), device=rows.device)[:, None].expand_as(reach)
        numbers = numbers + number * REACH_CHUNK
        if values is not None and ids is not None:
            reach, numbers = torch.cat([values, reach]), torch.cat([ids, numbers])
        values, order = reach.topk(min(count, len(reach)), 0)
        ids = numbers.gather(0, order)
    assert ids is not None
    return ids.t()


# Which neurons two texts keep: their overlap per layer beside chance and beside one text's own.


def jaccard(a: Tensor, b: Tensor) -> float:
    """|a & b| / |a | b| of two sets of unique ids; 1 for two empty sets."""
    same = int(torch.isin(a, b).sum())
    union = len(a) + len(b) - same
    return same / union if union else 1.0


def expected_jaccard(width: int, a: int, b: int) -> float:
    """The mean Jaccard of random sets of ``a`` and ``b`` of ``width`` neurons, exactly.

    The size of their intersection is hypergeometric.
    """
    if not a + b:
        return 1.0
    same = np.arange(max(0, a + b - width), min(a, b) + 1)
    return float((hypergeom.pmf(same, width, a, b) * same / (a + b - same)).sum())


def overlap(study: Readings) -> dict[str, Any]:
    """Per layer the Jaccard of the neurons that the method keeps for A and for B.

    ``jaccard``: of the whole texts; ``chance``: of random sets of the same sizes.  Halves of the
    texts are a baseline with equal evidence: ``same_text`` (A's halves, and B's: the mean),
    ``across`` (a half of A with a half of B: the mean of the four pairs).
    """
    whole = [_kept(study, text, WHOLE) for text in (0, 1)]
    halves = [[_kept(study, text, part) for part in (FIRST, SECOND)] for text in (0, 1)]
    layers = []
    for index, block in enumerate(study.view.blocks):
        a, b = (kept[index] for kept in whole)
        parts = [[half[index] for half in text] for text in halves]
        layers.append(
            {
                "layer": index,
                "width": block.down_width,
                "kept_a": len(a),
                "kept_b": len(b),
                "jaccard": jaccard(a, b),
                "chance": expected_jaccard(block.down_width, len(a), len(b)),
                "same_text": fmean([jaccard(*parts[0]), jaccard(*parts[1])]),
                "across": fmean([jaccard(x, y) for x, y in product(parts[0], parts[1])]),
            }
        )
    keys = ("jaccard", "chance", "same_text", "across")
    config = study.settings.prune_config()
    return {
        "method": config.method,
        "sparsity": config.sparsity,
        "removed": 1
        - sum(layer["kept_a"] for layer in layers) / sum(layer["width"] for layer in layers),
        "mean": {key: fmean([layer[key] for layer in layers]) for key in keys},
        "layers": layers,
    }


def _kept(study: Readings, text: int, part: str) -> list[Tensor]:
    """Ids of the kept neurons per layer, on the host; all of them where a layer stays dense."""
    selection = study.selector.select(study.evidence(text, part))
    return [
        torch.arange(block.down_width) if mask is None else mask.ids.cpu()
        for block, mask in zip(study.view.blocks, selection.masks, strict=True)
    ]


# Two texts in the space of the residual stream: per layer, per token, per window from a centre.


def compare(a: Tensor, b: Tensor, dims: int) -> dict[str, float]:
    """Two vectors [D] beside each other; ``dims``: how many dimensions count as largest.

    cos(a, b); ||a - b||; ||b|| / ||a||; Jaccard of the dimensions with the largest magnitudes.
    """
    a, b = a.float(), b.float()
    size_a, size_b = a.norm(), b.norm()
    top = [t.abs().topk(min(dims, len(t))).indices for t in (a, b)]
    return {
        "cosine": float(a @ b / (size_a * size_b).clamp_min(EPS)),
        "distance": float((a - b).norm()),
        "norm_ratio": float(size_b / size_a.clamp_min(EPS)),
        "jaccard": jaccard(*top),
    }


def space(study: Readings) -> dict[str, Any]:
    """x of A beside x of B, both read by the dense model.

    ``layers``: mean vectors over all tokens but the first (attention sinks).  ``tokens``: of one
    layer, token by token at the same position.  ``windows``: of that layer, mean vectors over the
    tokens at most ``half_width`` from the middle of each text.
    """
    dims = study.settings.top_dims
    readings = [study.reading(text) for text in (0, 1)]
    a, b = (reading[study.layer].stream for reading in readings)
    assert a is not None and b is not None
    return {
        "layer": study.layer,
        "top_dims": dims,
        "sinks": SINKS,
        "layers": [
            {"layer": layer, **compare(one.centre, other.centre, dims)}
            for layer, (one, other) in enumerate(zip(*readings, strict=True))
        ],
        "tokens": [
            {"position": position, **compare(one, other, dims)}
            for position, (one, other) in enumerate(zip(a, b, strict=False))
        ],
        "windows": _windows(a, b, dims),
    }


def half_widths(longest: int) -> list[int]:
    """0, 1, 2, 4, ... and ``longest``."""
    powers = (2**power for power in range(longest.bit_length()))
    return sorted({0, longest, *powers})


def _windows(a: Tensor, b: Tensor, dims: int) -> list[dict[str, Any]]:
    """Growing windows around the middle of each text, cut at its ends and at the sinks."""
    kept = [t[SINKS:] if len(t) > SINKS else t for t in (a, b)]
    rows = []
    for half in half_widths(max(len(t) // 2 for t in kept)):
        one, other = (t[max(0, len(t) // 2 - half) : len(t) // 2 + half + 1] for t in kept)
        sizes = {"half_width": half, "tokens_a": len(one), "tokens_b": len(other)}
        rows.append({**sizes, **compare(one.mean(0), other.mean(0), dims)})
    return rows
