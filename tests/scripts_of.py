"""Modules of scripts/, for tests of what they find."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "scripts"


def script(name: str) -> Any:
    """A module of scripts/, which may import others that lie beside it."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
