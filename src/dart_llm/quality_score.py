"""One slice of ``dart-llm bench quality`` measured in one way, as a JSON-able part.

GRIFFIN's masks follow from the prompt alone, and the dense prompt is the same at every sparsity:
one pass over a slice's prompt serves the untouched model and all of GRIFFIN's sparsities, in both
cells.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dart_llm.candidate import Candidate
from dart_llm.config import PruneConfig
from dart_llm.drift_forced import TimedRun
from dart_llm.errors import ConfigError
from dart_llm.perplexity import WindowLosses, score_window
from dart_llm.quality_slices import LEAD, Pair
from dart_llm.select import check_fits
from dart_llm.session import Masks, Run

MOMENT = LEAD + 1
"""Decode step that feeds the first token of the second topic: step 0 feeds the prompt's last."""

DIGITS = 9
"""Decimals of a kept mean loss (nats)."""

FACTS = (
    "decoded_tokens",
    "achieved_sparsity",
    "sparsity_while_pruned",
    "dense_token_share",
    "remasks",
    "ffn_flops_share_if_compact",
    "ffn_bytes_share_if_compact",
    "extra_memory_bytes",
)
"""What is kept of a run's report, over all decoded tokens of the slice."""

FIRST = ("first", "given")
"""Causes of a sequence's first masks."""

Part = dict[str, Any]
"""``loss``: mean over the scored tokens, nats; ``tokens``: how many those are; ``accounting``:
``FACTS`` and the decode steps of re-masks, None where nothing was pruned; ``seconds``."""


class PromptRun(Run):
    """A run that observes a prompt for configurations that differ in their sparsity alone."""

    def masks_at(self, config: PruneConfig) -> Masks:
        """The masks that ``config`` gives by what this run has observed."""
        self._tracer.flush()
        with torch.inference_mode(False):
            evidence = self._tracer.lives[-1].evidence
            return check_fits(config, self._layers).preview(evidence)


@torch.inference_mode()
def shared(
    model: Any, griffin: PruneConfig, pair: Pair, wanted: Sequence[tuple[str, float]]
) -> Iterator[tuple[str, float, Part]]:
    """Parts of the untouched model (sparsity 0) and of GRIFFIN, one per (cell, sparsity)."""
    began = time.perf_counter()
    first = pair.window(wanted[0][0])
    ids = first.ids[None, : first.first - 1].to(model.device)
    observer = PromptRun(model, griffin)
    with observer:
        prompt = model(ids, use_cache=True, logits_to_keep=1).cache
    for cell, sparsity in wanted:
        window, cache = pair.window(cell), copy.deepcopy(prompt)
        if not sparsity:
            found = score_window(model, None, window, prompt=cache)
            yield cell, sparsity, _part(found, None, pair, began)
        else:
            config = griffin.replace({"sparsity": sparsity})
            with Run(model, config, held=observer.masks_at(config)) as run:
                found = score_window(model, run, window, prompt=cache)
            yield cell, sparsity, _part(found, run, pair, began)
        began = time.perf_counter()


def alone(candidate: Candidate, run: Run | None, cell: str, pair: Pair) -> Part:
    """The part of any method; ``run``: one of the candidate's, not attached, or None for a new one
    that is told the moment of the change.

    Raises ``ConfigError`` when all decoded tokens ran dense though a sparsity was asked for.
    """
    began = time.perf_counter()
    if run is None:
        made = candidate.run(make=functools.partial(TimedRun, triggers=[MOMENT]))
        assert made is not None
        run = made
    run.reset()
    with run:
        found = score_window(candidate.model, run, pair.window(cell))
    part = _part(found, run, pair, began)
    if part["accounting"]["dense_token_share"] == 1 and run.asks_for_pruning:
        raise ConfigError(
            f"{candidate.label}: all {part['accounting']['decoded_tokens']} decoded tokens of "
            f"slice {pair.first.id} ran dense, so this would measure the untouched model; give "
            "more --prompt-tokens or --tokens"
        )
    return part


def _part(found: WindowLosses, run: Run | None, pair: Pair, began: float) -> Part:
    """The last ``pair.shape.scored`` tokens are scored, in either cell."""
    losses = found.losses[-pair.shape.scored :]
    accounting = None
    if run is not None:
        report = run.report().to_dict()
        steps = [remask.step for remask in run.remasks if remask.cause not in FIRST]
        accounting = {**{name: report[name] for name in FACTS}, "remask_steps": steps}
    return {
        "loss": round(math.fsum(losses) / len(losses), DIGITS),
        "tokens": len(losses),
        "accounting": accounting,
        "seconds": time.perf_counter() - began,
    }
