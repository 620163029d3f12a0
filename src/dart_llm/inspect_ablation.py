"""Ablation: remove the neurons of one topic, and measure the loss on it and on another.

Neurons are chosen by the first half of each text; losses are those of the second half, whose tokens
run as decode tokens with the neurons removed, after a dense pass over the first half (protocol
``decode``).  No scored token has been seen by the choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.inspect_study import FIRST, Study
from dart_llm.masks import top_ids
from dart_llm.perplexity import score_window
from dart_llm.ppl_windows import Window
from dart_llm.session import prune
from dart_llm.stats import Interval, Sample, known

BLOCK = 16
"""Consecutive tokens that the bootstrap draws together: their losses depend on each other."""

FEWEST = 4 * BLOCK
"""Tokens that a text needs, so that half of it makes more than one block."""

ARMS = {
    "a_only": "A's own: among A's strongest, not among B's",
    "b_only": "B's own: among B's strongest, not among A's",
    "a_top": "A's strongest, B's or not",
}
"""What is removed."""

Ids = Mapping[int, Tensor]


def check(study: Study) -> None:
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
        layer: torch.randperm(widths[layer], generator=generator)[: len(own)].sort().values
        for layer, own in ids.items()
    }


def ablation(study: Study) -> dict[str, Any]:
    """Rows by arm and scored text, with intervals over blocks of ``BLOCK`` tokens.

    ``over_dense`` and ``over_random``: the loss with the arm's neurons removed minus that of the
    untouched model, and minus the mean over draws of as many random neurons (nats per token; all
    paired by block), None without scipy.  An arm without neurons (two equal texts) has rows with
    ``neurons`` 0.
    """
    check(study)
    settings, selector = study.settings, study.selector
    widths = [block.down_width for block in study.view.blocks]
    scores = [selector.scores(study.evidence(text, FIRST)) for text in (0, 1)]
    best = [strongest(own, settings.share) for own in scores]
    dense = [_losses(study, text, None)[0] for text in (0, 1)]
    rows = []
    for name, ids in arms(*best).items():
        seeds = range(settings.seed, settings.seed + settings.ablation_seeds)
        drawn = [random_ids(ids, widths, seed) for seed in seeds]
        for text in (0, 1):
            rows.append(_row(study, name, text, ids, drawn, dense[text]))
    return {
        "share": settings.share,
        "score": settings.prune_config().score.name,
        "block_tokens": BLOCK,
        "random_seeds": settings.ablation_seeds,
        "rows": rows,
    }


def _row(
    study: Study, arm: str, text: int, ids: Ids, drawn: Sequence[Ids], dense: Sequence[float]
) -> dict[str, Any]:
    losses, report = _losses(study, text, ids)
    others = [_losses(study, text, other)[0] for other in drawn]
    random = [math.fsum(each) / len(each) for each in zip(*others, strict=True)]
    sample, seed = blocks(losses), study.settings.seed
    return {
        "arm": arm,
        "text": study.texts[text].label,
        "neurons": sum(len(own) for own in ids.values()),
        "tokens": len(losses),
        "achieved_sparsity": report["achieved_sparsity"],
        "dense_token_share": report["dense_token_share"],
        "remasks": report["remasks"],
        "dense_loss": _mean(dense),
        "loss": _mean(losses),
        "loss_interval": _ends(known(sample, seed=seed)),
        "random_loss": _mean(random),
        "random_losses": [_mean(each) for each in others],
        "over_dense": _ends(known(sample, blocks(dense), seed)),
        "over_random": _ends(known(sample, blocks(random), seed)),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _ends(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else found.to_dict()


def blocks(losses: Sequence[float]) -> Sample:
    """Mean loss and tokens of every ``BLOCK`` consecutive tokens; the last may be shorter."""
    parts = [losses[start : start + BLOCK] for start in range(0, len(losses), BLOCK)]
    return {f"{number:06d}": (_mean(part), float(len(part))) for number, part in enumerate(parts)}


def _losses(study: Study, text: int, remove: Ids | None) -> tuple[list[float], dict[str, Any]]:
    """Loss of every token of a text's second half, and the accounting of how it ran."""
    ids = study.ids[text]
    window = Window(ids, len(ids) // 2)
    given = {layer: own for layer, own in (remove or {}).items() if len(own)}
    if not given:
        found = score_window(study.model, None, window)
        return list(found.losses), {
            "achieved_sparsity": 0.0,
            "dense_token_share": 1.0,
            "remasks": 0,
        }
    with prune(study.model, "griffin", remove=given) as run:
        found = score_window(study.model, run, window)
        report = run.report().to_dict()
    return list(found.losses), report
