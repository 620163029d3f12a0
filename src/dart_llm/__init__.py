"""DART for LLMs: prune FFN neurons while a model generates, and trace which neurons it uses.

>>> from dart_llm import load, prune                        # doctest: +SKIP
>>> model, tokenizer = load("smollm2-135m")                 # doctest: +SKIP
>>> with prune(model, sparsity=0.5) as run:                 # doctest: +SKIP
...     ids = model.generate(**tokenizer("Why?", return_tensors="pt"), max_new_tokens=200)
>>> print(run.report())                                     # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dart_llm.errors import (
    AttachError,
    ConfigError,
    DartError,
    LoadError,
    MissingExtra,
    ResultsError,
    UnknownName,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from dart_llm.models.loading import load
    from dart_llm.patching.patch import restore
    from dart_llm.pruning.config import PruneConfig
    from dart_llm.pruning.records import DriftCheck, Remask, RunReport
    from dart_llm.session.gguf_export import export_gguf
    from dart_llm.session.run import Run, prune
    from dart_llm.session.trace import TraceFile, read_trace
    from dart_llm.studies.bench.tune import tune

__version__ = "0.1.0"

_LAZY = {
    "DriftCheck": "dart_llm.pruning.records",
    "PruneConfig": "dart_llm.pruning.config",
    "Remask": "dart_llm.pruning.records",
    "Run": "dart_llm.session.run",
    "RunReport": "dart_llm.pruning.records",
    "TraceFile": "dart_llm.session.trace",
    "export_gguf": "dart_llm.session.gguf_export",
    "load": "dart_llm.models.loading",
    "prune": "dart_llm.session.run",
    "read_trace": "dart_llm.session.trace",
    "restore": "dart_llm.patching.patch",
    "tune": "dart_llm.studies.bench.tune",
}

__all__ = [
    "AttachError",
    "ConfigError",
    "DartError",
    "DriftCheck",
    "LoadError",
    "MissingExtra",
    "PruneConfig",
    "Remask",
    "ResultsError",
    "Run",
    "RunReport",
    "TraceFile",
    "UnknownName",
    "UnsupportedModel",
    "export_gguf",
    "load",
    "prune",
    "read_trace",
    "restore",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dart_llm' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
