"""One model, many requests: the engine of the server, the chat and your programs.

Start with ``engine.py``; ``host.py`` keeps the patched model, ``request.py`` answers one request.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dart_llm.engine.engine import Engine
    from dart_llm.engine.requests import Answer, Ask, Sampling

_LAZY = {
    "Answer": "dart_llm.engine.requests",
    "Ask": "dart_llm.engine.requests",
    "Engine": "dart_llm.engine.engine",
    "Sampling": "dart_llm.engine.requests",
}

__all__ = ["Answer", "Ask", "Engine", "Sampling"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dart_llm.engine' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
