"""Finished parts of a measurement: how they are stored, merged and named.

A part is the result for one document, context or window, as JSON-serialisable data.  It has at
least ``report`` (``RunReport.to_dict()`` or None) and, if tokens ran without an attached run,
``dense_tokens``, the number of these tokens.  A resumed measurement reads the finished parts back
and computes only the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dart_llm.errors import ConfigError
from dart_llm.pruning.records import add_dense, merge_reports
from dart_llm.session.run import BoundMethod, Run

Part = Mapping[str, Any]


class UnitStore(Protocol):
    """Caches the finished parts of a measurement, e.g. in a results folder."""

    def part(self, key: str) -> Any: ...

    def save_part(self, key: str, value: Any) -> None: ...


@dataclass
class MemoryStore:
    """Keeps parts in memory until the process ends."""

    parts: dict[str, Any] = field(default_factory=dict)

    def part(self, key: str) -> Any:
        return self.parts.get(key)

    def save_part(self, key: str, value: Any) -> None:
        self.parts[key] = value


def merge_accounting(run: Run | None, parts: Sequence[Part]) -> dict[str, Any] | None:
    """Merge the reports of all parts, without ``sequences``; None for the untouched model."""
    if run is None:
        return None
    reports = [part["report"] for part in parts if part["report"]]
    run.reset()
    merged = merge_reports(reports) if reports else run.report().to_dict()
    merged = dict(add_dense(merged, sum(part.get("dense_tokens", 0) for part in parts)))
    merged.pop("sequences")
    return merged


def finished_part(parts: UnitStore, key: str, make: Callable[[], Part]) -> Part:
    """Return the part stored under ``key``; if there is none, make it and store it."""
    part: Part | None = parts.part(key)
    if part is None:
        part = make()
        parts.save_part(key, part)
    return part


def method_digest(candidate: BoundMethod) -> Any:
    """A SHA-256 hash object fed with the pruning configuration and the masks.

    Callers update it with the tokens, to make a part's key.
    """
    digest = hashlib.sha256()
    if candidate.config is not None:
        digest.update(json.dumps(candidate.config.to_dict(), sort_keys=True).encode())
    for layer, ids in sorted((candidate.masks or {}).items()):
        digest.update(f"{layer}:{torch.as_tensor(ids).tolist()}".encode())
    for mask in candidate.fixed_masks or ():
        digest.update(b"dense" if mask is None else mask.ids.cpu().numpy().tobytes())
        if mask is not None and mask.bias is not None:
            digest.update(f"{mask.bias.tolist()}".encode())
    return digest


def check_pruned(pruned: bool, subject: str, tokens: str, hint: str) -> None:
    """Raise ``ConfigError`` unless ``pruned``; the message says that all tokens ran dense.

    ``subject``: what was measured.  ``tokens``: number and name of the tokens.  ``hint``: advice.
    """
    if not pruned:
        raise ConfigError(
            f"{subject}: all {tokens} ran dense, so this would measure the untouched model; {hint}"
        )
