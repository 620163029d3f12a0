"""One scored window as a JSON-able part: losses, which tokens ran pruned, accounting and masks."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any

import torch

from dart_llm.candidate import Candidate
from dart_llm.errors import ConfigError
from dart_llm.likelihood import SHORT
from dart_llm.mask_parts import Taken
from dart_llm.merge import slim
from dart_llm.perplexity import score_window
from dart_llm.ppl_windows import STANDARD, Window
from dart_llm.session import Run

DIGITS = 6
"""Decimals of a kept loss (nats); every number of a measurement is computed from kept losses."""

Part = Mapping[str, Any]


def score_part(candidate: Candidate, run: Run | None, window: Window, protocol: str) -> Part:
    """Score one window as a part; ``run``: not attached, or None for the untouched model."""
    if run is None:
        return _part(candidate, None, window, protocol)
    run.reset()
    asked = run.asks_for_pruning
    if protocol == STANDARD and is_first(window):
        return {**_part(candidate, None, window, protocol), "dense_tokens": len(window.ids) - 1}
    run.on_masks = taken = Taken()
    with run:
        part = _part(candidate, run, window, protocol)
        report = slim(run.report().to_dict())
    if asked and not any(ran_pruned(part)):
        raise ConfigError(
            f"perplexity of {candidate.label}: all {window.scored} scored tokens of a slice ran "
            "dense, so this would measure the untouched model; give more prompt or scored "
            "tokens, or a smaller --min-evidence or --masking-step"
        )
    found = {**part, "report": report, "masks": taken.packed}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]  # as a resumed run reads it


def is_first(window: Window) -> bool:
    """Whether too little text lies before a window of ``standard`` to choose masks from."""
    return window.before is None or len(window.before) < SHORT


def _part(candidate: Candidate, run: Run | None, window: Window, protocol: str) -> dict[str, Any]:
    found = score_window(candidate.model, run, window, protocol)
    runs = [[flag, len(list(same))] for flag, same in itertools.groupby(found.pruned)]
    return {
        "losses": [round(loss, DIGITS) for loss in found.losses],
        "pruned": runs,
        "report": None,
        "dense_tokens": 0,
        "masks": [],
    }


def ran_pruned(sample: Mapping[str, Any]) -> list[bool]:
    """Per loss of a sample (or part): whether its token ran pruned."""
    return [bool(flag) for flag, length in sample["pruned"] for _ in range(length)]


def part_key(candidate: Candidate, name: str, protocol: str, window: Window) -> str:
    """Names a part by everything that decides its value, the model aside."""
    digest = hashlib.sha256()
    if candidate.config is not None:
        digest.update(json.dumps(candidate.config.to_dict(), sort_keys=True).encode())
    for layer, ids in sorted((candidate.masks or {}).items()):
        digest.update(f"{layer}:{torch.as_tensor(ids).tolist()}".encode())
    for mask in candidate.held or ():
        digest.update(b"dense" if mask is None else mask.ids.cpu().numpy().tobytes())
    for tokens in (window.ids, window.before):
        digest.update(b"|" if tokens is None else tokens.cpu().numpy().tobytes())
    shape = f"{window.id}-{len(window.ids)}-{window.first}"
    return f"ppl/{name}/{candidate.label}/{protocol}/{shape}/{digest.hexdigest()[:24]}"
