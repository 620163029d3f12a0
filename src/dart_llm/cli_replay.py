"""``dart-llm replay``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dart_llm.errors import ConfigError


def replay(
    records: Annotated[
        str, typer.Argument(metavar="RECORDS", help="File with the records; - is standard input.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page to write (default: beside RECORDS, .html)."),
    ] = None,
) -> None:
    """Make one HTML file of a recorded run: it plays in a browser, without a model or a server.

    RECORDS: what POST /api/events answered, or what the window saved; JSON lines.

    Example: dart-llm replay records.jsonl --out replay.html
    """
    from dart_llm.replay_page import page
    from dart_llm.replay_records import read_records

    if out is None and records == "-":
        raise ConfigError("give --out FILE: standard input has no name beside which to write")
    place = Path(records).with_suffix(".html") if out is None else out
    if place.resolve() == Path(records).resolve():
        raise ConfigError(f"{place} is the recording itself: give --out FILE")
    text = page(read_records(records))
    try:
        place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {place}: {error.strerror or error}") from None
    typer.echo(str(place))
