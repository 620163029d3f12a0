"""Files that published tables were made from: where they are, and whether they are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from table_registry import Input


@dataclass(frozen=True)
class Found:
    """An input on this machine.  ``problem``: one sentence; None where all is well."""

    name: str
    path: Path | None
    problem: str | None


def look(known: Input, texts: Path, others: Iterable[Path] = ()) -> Found:
    """Find ``known`` in the folder ``texts``, beside it, or in ``others``, and check it."""
    places = (texts, texts.parent, *others)
    path = next((place / known.name for place in places if (place / known.name).exists()), None)
    if path is None:
        return Found(known.name, None, f"{known.name} is missing in {texts}. {_wanted(known)}")
    checksum = sha256(path, known.files)
    if checksum == known.sha256:
        return Found(known.name, path, None)
    return Found(
        known.name, path, f"{path} is another file: its sha256 is {checksum}. {_wanted(known)}"
    )


def _wanted(known: Input) -> str:
    fetched = ", or TEXTS=hub fetches it" if known.hub else ""
    return (
        f"Expected: sha256 {known.sha256}. Where to get it: {known.get}. Put it into a folder and "
        f"give that: TEXTS=folder{fetched}"
    )


def sha256(path: Path, patterns: tuple[str, ...] = ()) -> str:
    """Checksum of a file; of a folder that of the lines "checksum  name" of its files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted({file for pattern in patterns or ("*",) for file in path.glob(pattern)})
    lines = "".join(f"{sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()
