"""The engine: answers many requests with one model, for the server, the chat and your programs.

Start with ``engine.py``.  ``host.py`` keeps the model patched; ``request.py`` answers one request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import GenerationResult as Answer
from dart_llm.engine.requests import Sampling

if TYPE_CHECKING:
    from dart_llm.engine.engine import Engine

__all__ = ["Answer", "Ask", "Engine", "Sampling"]


def __getattr__(name: str) -> Any:
    if name != "Engine":
        raise AttributeError(f"module 'dart_llm.engine' has no attribute {name!r}")
    from dart_llm.engine.engine import Engine  # imports torch

    return Engine
