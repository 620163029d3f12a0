"""A small recorded run: a pruned answer with a re-mask, and the dense one to the same question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LAYERS, WIDTH, BINS = 3, 64, 8
QUESTION = "What is </script><b>bold</b> & why?"
PROMPT = ["<|im_start|>", "user", "\n", QUESTION, "<|im_end|>", "\n", "<|im_start|>", "assistant"]
TRIGGER, READY = 10, 14
"""Tokens decoded at the trigger, and at the new mask."""


def records(tokens: int = 24) -> list[dict[str, Any]]:
    """Both answers; the second begins where the first is done."""
    return [*answer("dart", 0.5, tokens), *answer("dense", 0.0, tokens)]


def answer(method: str, sparsity: float, tokens: int) -> list[dict[str, Any]]:
    """One request as the engine tells it."""
    config = {"method": method, "drift": {"rule": "dart" if sparsity else "never"}}
    prompt = [{"id": i, "text": text} for i, text in enumerate(PROMPT)]
    start = {"kind": "start", "id": f"req-{method}", "model": "tiny", "method": method}
    size = {"layers": LAYERS, "neurons": [WIDTH] * LAYERS, "prompt": prompt}
    found: list[dict[str, Any]] = [{**start, "sparsity": sparsity, "config": config, **size}]
    for index in range(tokens):
        if sparsity and index in (1, READY + 1):
            found += _mask(index)
        found.append(_token(index, _phase(index, sparsity)))
        if sparsity and index in (5, TRIGGER, READY + 5):
            found.append(_check(index, index - READY if index > READY else index))
    return [*found, _done(method, sparsity, tokens)]


def _phase(index: int, sparsity: float) -> str:
    if not index:
        return "prefill"
    if not sparsity:
        return "dense"
    return "observe" if TRIGGER < index <= READY else "pruned"


def _token(index: int, phase: str) -> dict[str, Any]:
    logprob = -0.1 - (index % 5)
    top = [{"id": 7, "text": " other", "logprob": -1.0}]
    where = {"kind": "token", "choice": 0, "index": index, "id": index, "phase": phase}
    text = f" <i>{index}</i>"
    return {**where, "text": text, "piece": text, "logprob": logprob, "top": top, "seconds": 0.02}


def _mask(index: int) -> list[dict[str, Any]]:
    first = index == 1
    shift = 0 if first else 1
    raster = [[255 * ((bin_ + row + shift) % 2) for bin_ in range(BINS)] for row in range(LAYERS)]
    remask = {
        "kind": "remask",
        "sequence": 0,
        "row": None,
        "step": index - 1,
        "cause": "first" if first else "drift",
        "evidence_tokens": 8.0,
        "kept": [WIDTH // 2] * LAYERS,
        "overlap": None if first else 0.25,
    }
    mask = {"kind": "mask", "number": 1 + shift, "token": index, "kept_share": [0.5] * LAYERS}
    return [remask, {**mask, "raster": raster}]


def _check(step: int, window: int) -> dict[str, Any]:
    low = step == TRIGGER
    place = {"kind": "check", "sequence": 0, "row": 0, "step": step, "layer": 2, "window": window}
    found = {"similarity": 0.5 if low else 0.9, "threshold": 0.7, "counter": int(low)}
    return {**place, **found, "trigger": low, "state": "armed"}


def _done(method: str, sparsity: float, tokens: int) -> dict[str, Any]:
    dense = READY - TRIGGER if sparsity else tokens - 1
    share = dense / (tokens - 1)
    report = {
        "achieved_sparsity": sparsity * (1 - share),
        "dense_token_share": share,
        "decoded_tokens": tokens - 1,
        "remasks": int(sparsity > 0),
    }
    timings = {"predicted_per_second": 50.0}
    texts = ["".join(f" <i>{index}</i>" for index in range(tokens))]
    usage = {"prompt_tokens": len(PROMPT), "completion_tokens": tokens, "cached_tokens": 0}
    end = {"kind": "done", "id": f"req-{method}", "finish": ["length"], "texts": texts}
    return {**end, "usage": usage, "timings": timings, "report": report}


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    """The records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")
    return path
