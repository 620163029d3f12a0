"""Modules of scripts/, for tests of what they find."""

from __future__ import annotations

import importlib
from typing import Any

from published import ROOT, scripts

FOLDER = ROOT / "scripts"


def script(name: str) -> Any:
    """A module of scripts/, which may import others that lie beside it."""
    with scripts():
        return importlib.import_module(name)
