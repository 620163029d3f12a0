"""The text that static baselines are calibrated on, cut into token sequences.

A source is a text file, a JSONL file whose rows hold a ``text`` or a ``document``
(``FILE.jsonl#100``: from row 100 on, counted from 0), or ``c4_train``: C4's English training split
from the hub, which no evaluation uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dart_llm import hub_data
from dart_llm.errors import ConfigError, LoadError
from dart_llm.jsonl import read_rows

HUB = (None, "c4_train", "c4")
"""Names of the hub's text; None: nothing was said."""

COLUMNS = ("text", "document")
SEPARATOR = "\n\n"
PIECE = 1 << 17
"""Characters that are tokenised at a time: no more of a long text is read than is needed."""

INSTEAD = (
    "give a text of your own with --calibration FILE: a text file, or JSONL rows with a text or a "
    "document (FILE.jsonl#100 starts at row 100)"
)


def documents(source: str | None) -> Iterator[str]:
    """The documents of a source; None is ``c4_train``.

    Raises ``ConfigError`` for a file that cannot be used, ``LoadError`` or ``MissingExtra`` when
    the hub cannot be reached; both name the way out.
    """
    if source in HUB:
        yield _from_hub()
        return
    path, first = split(source)
    if path.suffix in (".jsonl", ".ndjson"):
        yield from _rows(path, first)
        return
    try:
        yield path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the calibration text {path}: {error}") from None


def split(source: str) -> tuple[Path, int]:
    """The file of a source and its first row; raises ``ConfigError`` when there is no such file."""
    name, mark, row = source.rpartition("#")
    if not mark or not row.isdigit() or Path(source).is_file():
        name, row = source, "0"
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f'no calibration text "{source}": {INSTEAD}')
    if int(row) and path.suffix not in (".jsonl", ".ndjson"):
        raise ConfigError(f'"{source}" starts at a row, but only a JSONL file has rows')
    return path, int(row)


def title(source: str | None) -> str:
    """The source in words, without its folder."""
    if source in HUB:
        return "C4 (English, training split)"
    path, first = split(source)
    return f"{path.name} from row {first} on" if first else path.name


def check_disjoint(source: str | None, evaluated: Mapping[str, int | None]) -> None:
    """Raise ``ConfigError`` when the source reads what is evaluated.

    ``evaluated``: texts and files, each with how many of its first rows are; None: any of them.
    """
    if source in HUB:
        return
    path, first = split(source)
    for name, rows in evaluated.items():
        other = next((place for place in _places(name) if place.is_file()), None)
        if other is None or not path.samefile(other) or (rows is not None and first >= rows):
            continue
        way = "" if rows is None else f", or start after the evaluated rows: {path}#{rows}"
        raise ConfigError(
            f"{path} is evaluated and cannot be the calibration text too: give another text{way}"
        )


def _places(name: str) -> tuple[Path, ...]:
    """Where a text or a file of documents is looked for, in this order."""
    plain, local = name.partition("#")[0], Path("datasets")
    return Path(plain), local / plain, local / f"{plain}.txt"


def _rows(path: Path, first: int) -> Iterator[str]:
    count = 0
    for count, (line, row) in enumerate(read_rows(path), start=1):
        if count <= first:
            continue
        text = next((row[name] for name in COLUMNS if isinstance(row.get(name), str)), None)
        if text is None:
            raise ConfigError(
                f"line {line} of {path} has neither a {' nor a '.join(COLUMNS)}: complete it"
            )
        yield text
    if count <= first:
        raise ConfigError(f"{path} has {count} rows: it cannot be read from row {first} on")


def _from_hub() -> str:
    try:
        return hub_data.calibration_text()
    except LoadError as error:
        reason = str(error).removesuffix(f"; {hub_data.INSTEAD['text']}")
        raise LoadError(f"{reason}; {INSTEAD}") from error


def sequences(tokenizer: Any, texts: Iterable[str], count: int, length: int) -> Tensor:
    """The first ``count`` windows of ``length`` tokens of the joined texts; fewer if it is short.

    Where the tokenizer starts a text with a token of its own, every window starts with it.
    Returns [n, length] int64; raises ``ConfigError`` when the text does not fill one window.
    """
    first = start_token(tokenizer)
    body = length - len(first)
    ids: list[int] = []
    for piece in _pieces(texts):
        if len(ids) >= count * body:
            break
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    fit = min(count, len(ids) // body)
    if not fit:
        raise ConfigError(
            f"the calibration text has {len(ids)} tokens and one sequence needs {body}: {INSTEAD}"
        )
    rows = [first + ids[row * body : (row + 1) * body] for row in range(fit)]
    return torch.tensor(rows, dtype=torch.int64)


def start_token(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, or nothing."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [int(bos)] if bos is not None and ids and ids[0] == bos else []


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        joined = SEPARATOR + text if number else text
        for start in range(0, len(joined), PIECE):
            yield joined[start : start + PIECE]
