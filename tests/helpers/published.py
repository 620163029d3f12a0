"""What tests of the published tables share: the scripts beside check_docs.py can be imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from shells import ROOT

__all__ = ["ROOT", "scripts"]


@contextmanager
def scripts() -> Iterator[None]:
    """Modules of scripts/ can be imported inside the block."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT / "scripts"))
