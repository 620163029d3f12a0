"""Every block of the docs that is made of benchmarks/results; used by check_docs.py."""

from __future__ import annotations

from pathlib import Path

import claims_measured  # this and the next ones beside this file
import drift_measured
import evaluation_tables
import front_table
import measured_tables
import quality_measured
import reliability_measured
import serve_measured
import speed_measured

MAKERS = (
    measured_tables,
    evaluation_tables,
    drift_measured,
    quality_measured,
    speed_measured,
    serve_measured,
    reliability_measured,
    claims_measured,
    front_table,
)


def measured(root: Path) -> dict[str, tuple[Path, str]]:
    """Block name -> the page that holds it and what belongs between its markers."""
    return {name: block for maker in MAKERS for name, block in maker.tables(root).items()}
