"""Markdown tables of benchmarks/results/quality-*.json; used by check_docs.py."""

from __future__ import annotations

from pathlib import Path

from table_head import above, linked, read, table

HEADS = {
    "variant": 0,
    "asked": 1,
    "achieved": 2,
    "dense tokens": 4,
    "re-masks per slice": 5,
    "FFN bytes": 6,
    "perplexity": 8,
    "GRIFFIN, equal sparsity": 10,
    "gap closed": 11,
    "GRIFFIN, equal bytes": 12,
    "gap closed ": 13,
}
"""Heads of the columns, and their places in ``quality_table.HEADS``."""


def quality(root: Path, name: str) -> str:
    """Gap closed by model, cell, sparsity and variant, and pooled."""
    from dart_llm.studies.quality.report import grid

    data = read(root, name)
    parts = []
    alone = len(data["sparsities"]) == 1  # then pooled rows say again what the cells say
    for caption, rows in grid(data):
        rows = [row for row in rows if not (alone and row[1].startswith("pooled"))]
        if not rows:
            continue
        lines = [list(HEADS), ["---", *["---:"] * (len(HEADS) - 1)]]
        lines += [[row[place] for place in HEADS.values()] for row in rows]
        parts.append(f"**{caption}**\n\n{table(lines)}")
    return "\n\n".join([above(root, name), *parts])


def page_of(root: Path, name: str) -> Path:
    """The page with the markers of the block ``name``; docs/measurements.md where none has them."""
    pages = [root / "docs/measurements.md", root / "docs/method.md"]
    marker = f"<!-- generated: {name} -->"
    having = (page for page in pages if page.is_file() and marker in page.read_text("utf-8"))
    return next(having, pages[0])


def tables(root: Path) -> dict[str, tuple[Path, str]]:
    """A block per file, named like it, on the page that has its markers; none without files."""
    names = [path.stem for path in sorted((root / "benchmarks/results").glob("quality-*.json"))]
    return linked({name: (page_of(root, name), quality(root, name)) for name in names}, root)
