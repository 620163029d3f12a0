"""The strongest and the weakest neurons of every layer by forward proxy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dart_llm.config import PruneConfig, ScoreConfig
from dart_llm.inspect_study import Study
from dart_llm.registry import SCORES
from dart_llm.weights import REACH_CHUNK, FfnWeights

TOKENS = 5
"""Vocabulary entries listed for a strong neuron."""

SHARES = (0.01, 0.1)
"""Strongest shares of a layer's neurons whose part of all scores is told."""


def neurons(study: Study) -> dict[str, Any]:
    """``strong`` and ``weak`` neurons per layer with score, mean activation and top tokens.

    The score is ``settings.neuron_score`` over text A (docs/method.md, "Scores"); without a text
    the magnitude is 1, so the proxy decides alone.  ``tokens``: the rows e_v of the output
    embedding whose w . e_v is largest in the direction that the neuron writes (that of its mean
    activation), for strong neurons.  ``concentration``: the part of the layer's summed scores that
    its strongest 1 % and 10 % hold.  Raises ``ConfigError`` without an output embedding.
    """
    config, top = study.settings.prune_config(), study.settings.top
    rule = SCORES.get(study.settings.neuron_score)
    layers = []
    own = PruneConfig(score=ScoreConfig(name=study.settings.neuron_score), seed=config.seed)
    for weights in study.knowing(own, study.view.weights("output", config.seed)):
        a, signed = _statistics(study, weights)
        scores = rule(a, weights).detach().float()
        order = scores.sort(descending=True, stable=True).indices
        strong, weak = order[:top], order.flip(0)[:top]
        said = _tokens(study, weights, strong, signed)
        layers.append(
            {
                "layer": weights.index,
                "concentration": {f"{s:g}": concentration(scores, s) for s in SHARES},
                "strong": [
                    {**_neuron(i, scores, signed), "tokens": words}
                    for i, words in zip(strong.tolist(), said, strict=True)
                ],
                "weak": [_neuron(i, scores, signed) for i in weak.tolist()],
            }
        )
    return {
        "score": study.settings.neuron_score,
        "text": study.texts[0].label if study.texts else None,
        "layers": layers,
    }


def _statistics(study: Study, weights: FfnWeights) -> tuple[Tensor, Tensor | None]:
    """The magnitude of every neuron, and its mean activation where a text was read."""
    if not study.texts:
        return torch.ones(weights.width, device=weights.device), None
    reading = study.reading(0)[weights.index]
    return reading.squares.sqrt().to(weights.device), reading.signed


def concentration(scores: Tensor, share: float) -> float:
    """Part of the summed scores [I] that the strongest ``share`` of the neurons holds."""
    count = max(1, round(share * len(scores)))
    return float(scores.sort(descending=True).values[:count].sum() / scores.sum().clamp_min(1e-30))


def _neuron(index: int, scores: Tensor, signed: Tensor | None) -> dict[str, Any]:
    mean = None if signed is None else float(signed[index])
    return {"neuron": index, "score": float(scores[index]), "mean_activation": mean}


def _tokens(
    study: Study, weights: FfnWeights, chosen: Tensor, signed: Tensor | None
) -> list[list[str]]:
    rows = weights.embedding
    assert rows is not None  # the score has used it
    columns = weights.down[:, chosen].detach().float()
    if signed is not None:
        columns = columns * torch.where(signed[chosen.cpu()] < 0, -1.0, 1.0).to(columns.device)
    found = top_rows(rows.detach(), columns.to(rows.device), TOKENS)
    return [[str(study.tokenizer.decode([token])) for token in one] for one in found.tolist()]


def top_rows(rows: Tensor, columns: Tensor, count: int) -> Tensor:
    """Ids of the ``count`` rows [V, D] with the largest product with each column [D, n].

    Returns [n, count].  In chunks of V: the products of a large vocabulary are never held together.
    """
    values = ids = None  # type: Tensor | None
    for number, chunk in enumerate(torch.split(rows, REACH_CHUNK)):
        reach = chunk.float() @ columns
        own = torch.arange(len(chunk), device=rows.device)[:, None].expand_as(reach)
        own = own + number * REACH_CHUNK
        if values is not None and ids is not None:
            reach, own = torch.cat([values, reach]), torch.cat([ids, own])
        values, places = reach.topk(min(count, len(reach)), 0)
        ids = own.gather(0, places)
    assert ids is not None
    return ids.t()
