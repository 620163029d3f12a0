"""Files: whole or not at all; JSON, JSONL with errors that name the line, CSV, YAML, tensors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dart_llm.errors import ConfigError, ResultsError

if TYPE_CHECKING:
    from torch import Tensor


def size_text(count: int) -> str:
    """Bytes for people: ``0.4 MB``, ``812 MB``, ``16.1 GB``."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"


def file_sha256(path: Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


MOST_VALUES = 100_000
"""In a YAML file, those of an alias counted at each use."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ``ConfigError`` when there is none."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the settings file {path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"the settings file {path} must hold names and values")
    return data


def parse_yaml(text: str) -> Any:
    """What a YAML text says, None if nothing.

    Raises ``ValueError``, one line, for what is not YAML, for more than ``MOST_VALUES`` values, and
    for a name that is given twice, where YAML would keep the last.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def _count_values(node: Any, counts: dict[int, int]) -> int:
    """Values in a YAML node; ``counts``: of nodes, by identity, those that hold themselves too."""
    if isinstance(node.value, str):
        return 1
    if id(node) not in counts:
        counts[id(node)] = MOST_VALUES + 1
        names = set[str]()
        parts = [part for item in node.value for part in (item if type(item) is tuple else (item,))]
        for key in parts[::2] if node.id == "mapping" else ():
            if isinstance(key.value, str) and key.value in names:
                where = f"line {key.start_mark.line + 1}"
                raise ValueError(f'the name "{key.value[:80]}" is given twice: drop one, {where}')
            names.update([key.value] if isinstance(key.value, str) else [])
        counts[id(node)] = 1 + sum(_count_values(part, counts) for part in parts)
    if counts[id(node)] > MOST_VALUES:
        raise ValueError(f"it holds more than {MOST_VALUES} values")
    return counts[id(node)]


BLOCK = 2**16
"""Bytes that are read at once to find the last line break."""


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of ``path`` with the numbers of their lines, from 1; blank lines are skipped.

    Raises ``ConfigError`` for a file that is missing or cannot be read as UTF-8 text, and for a
    line that is not a JSON object.
    """
    try:
        # Not splitlines(): a JSON string may hold U+2028, which that takes for a line break.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}: give an existing one") from None
    except OSError as error:
        raise ConfigError(f"cannot read the file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the file {path} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\ud" in line.lower():  # an escape may be half a character, which is not text
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ConfigError(
                f"line {number} of {path} holds half a character, {half}: correct it"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"line {number} of {path} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(
                f"line {number} of {path} needs a JSON object, and holds a {type(row).__name__}: "
                "write {...}"
            )
        yield number, row


def append_row(path: Path, row: Any) -> None:
    """Add one document as a line that survives whatever happens after this call.

    A line without its line break, which a full disk or a kill left, is cut off first: it would
    swallow this one.  Raises ``OSError``, and ``ValueError`` for numbers that JSON has not.
    """
    line = json.dumps(row, allow_nan=False) + "\n"
    with path.open("a+b") as file:
        cut_torn_line(file)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def cut_torn_line(file: BinaryIO) -> None:
    """Cut an open file to its last line break."""
    end = size = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - BLOCK)
        file.seek(start)
        line_break = file.read(end - start).rfind(b"\n")
        if line_break >= 0:
            end = start + line_break + 1
            break
        end = start
    if end < size:
        file.truncate(end)


def whole_rows(path: Path) -> Iterator[Any]:
    """The documents of a file that ``append_row`` made; what is torn or damaged is left out."""
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # a power cut may leave other bytes
            continue


def finite(value: Any) -> Any:
    """The same data with numbers that are not finite replaced by None (JSON has none)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """An empty file beside ``path`` that takes its place, whole, when the block ends.

    Its name belongs to this call alone, so that writers of one path never mix; nothing of it stays
    after an error.  ``mode``: permissions of a new file, before the umask; one that is replaced
    keeps its own.  What is not a regular file (a pipe, a terminal) is yielded itself.  Raises
    ``ResultsError`` for any ``OSError``, also one of the block.
    """
    target = Path(os.path.realpath(path))  # a link stays, and what it names is replaced
    partial = target.with_name(f".{target.name[:50]}.{secrets.token_hex(8)}.part")
    try:
        if path.exists() and not path.is_file():
            yield path
            return
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        if target.exists():
            partial.chmod(target.stat().st_mode & 0o7777)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Replace ``path`` whole; raises ``ResultsError`` when the disk is full or read-only.

    ``mode``: permissions of a new file.
    """
    write_bytes(path, text.encode("utf-8"), mode=mode)


def write_bytes(path: Path, data: bytes, make_folder: bool = False, mode: int = 0o666) -> None:
    """The same for data; ``make_folder``: also the folder that it lies in."""
    if make_folder:
        with contextlib.suppress(OSError):  # the next step says what is wrong with it
            path.parent.mkdir(exist_ok=True)
    with replacing(path, mode) as partial:
        partial.write_bytes(data)


def write_json(path: Path, data: Any) -> None:
    """Write as valid JSON, whole."""
    write_text(path, json.dumps(finite(data), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON document; empty where there is none, or it is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def page_json(data: Any) -> str:
    """JSON for a page: no ``<`` in it, so nothing can end the element around it."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON document per line, whole."""
    write_text(path, "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows))


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file, whole; None is an empty cell."""
    import csv
    import io

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    write_text(path, buffer.getvalue())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole; equal contents give equal bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
    with replacing(path) as partial:
        mode = partial.stat().st_mode & 0o777  # safetensors writes 0600
        try:
            save_file(dict(tensors), partial, None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise OSError(error) from None
        partial.chmod(mode)
        _sort_header(partial)


def _sort_header(path: Path) -> None:
    """Metadata in alphabetical order: safetensors writes it in a new order each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        data = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(data) <= size:
            file.seek(8)
            file.write(data.ljust(size))
