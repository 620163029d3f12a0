"""Prunes FFN neurons per request in vLLM: ``vllm serve MODEL --worker-cls dart_vllm.Worker``.

The masks of a request are chosen by the methods of ``dart_llm``.  See README.md beside the sources.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Worker"]


def __getattr__(name: str) -> Any:
    if name == "Worker":  # imported late: it imports vLLM's workers, which need a chosen platform
        from dart_vllm.worker import Worker

        return Worker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
