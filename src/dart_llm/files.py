"""Reads JSON, JSONL and YAML files; writes text, JSON, JSONL, CSV and tensor files atomically."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dart_llm.errors import ConfigError, ResultsError

if TYPE_CHECKING:
    from torch import Tensor


def size_text(count: int) -> str:
    """Return a number of bytes as text, such as ``0.4 MB``, ``812 MB`` or ``16.1 GB``."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys.  Also rejects aliases, which let a short file expand to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not supported: write the values out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value)[:80] for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:  # the YAML library would silently keep the last value
                raise ValueError(f'the key "{key}" appears twice: remove one')
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raises ``ConfigError`` if there is no valid mapping."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except RecursionError:
        raise ConfigError(f"the settings file {path} is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read the settings file {path}: {reason}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"the settings file {path} must contain a mapping of names to values")
    return data


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number, object)`` for each line of a JSONL file.

    Numbering starts at 1; blank lines are skipped but counted.

    Raises ``ConfigError`` for a file that is missing or not UTF-8 text, and for a line that is not
    a JSON object.
    """
    from pydantic_core import from_json  # also refuses NaN, lone surrogates, deep nesting

    try:
        # splitlines() would also split at U+2028, which may be inside a JSON string
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"the file {path} cannot be read as UTF-8 text: {reason}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = from_json(line, allow_inf_nan=False)
        except ValueError as error:
            raise ConfigError(f"line {number} of {path} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"line {number} of {path} is not a JSON object: write {{...}}")
        yield number, row


def append_row(path: Path, row: Any) -> None:
    """Append ``row`` as one line of JSON, and flush it to the disk.

    If the last line has no line break, because the disk was full or the process was killed, a new
    line is started first.  Raises ``OSError``, and ``ValueError`` for numbers that JSON does not
    support.
    """
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def whole_rows(path: Path) -> Iterator[Any]:
    """Yield the rows that ``append_row`` wrote; skips damaged lines, yields none without a file."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def finite(value: Any) -> Any:
    """Return ``value`` with None in place of numbers that are not finite, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Yield an empty file next to ``path``; it replaces ``path`` atomically when the block ends.

    The new file's name is unique, so that concurrent writers of one path do not disturb each other.
    The new file is removed after an error.  ``mode``: permissions if ``path`` does not exist yet,
    before the umask is applied; otherwise ``path`` keeps its permissions.
    If ``path`` is not a regular file (a pipe, a terminal), ``path`` itself is yielded.  Raises
    ``ResultsError`` for any ``OSError``, including those raised in the block.
    """
    target = Path(os.path.realpath(path))  # replace the target of a link, not the link
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
    """Replace ``path`` atomically, or raise ``ResultsError``; ``mode``: see ``replacing``."""
    write_bytes(path, text.encode("utf-8"), mode=mode)


def write_bytes(path: Path, data: bytes, make_folder: bool = False, mode: int = 0o666) -> None:
    """Like ``write_text``, for bytes; with ``make_folder``, also create the file's folder."""
    if make_folder:
        with contextlib.suppress(OSError):  # the next step reports the reason
            path.parent.mkdir(exist_ok=True)
    with replacing(path, mode) as partial:
        partial.write_bytes(data)


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as JSON, atomically; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(data), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if the file is missing or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write each row as one line of JSON, atomically; numbers that are not finite become null."""
    write_text(path, "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows))


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file, atomically; None becomes an empty cell."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    write_text(path, buffer.getvalue())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, atomically; equal contents give equal bytes."""
    from safetensors.torch import save

    data = save(dict(tensors), None if metadata is None else dict(metadata))
    if metadata:  # safetensors writes the metadata in random order
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        data = len(text).to_bytes(8, "little") + text + data[end:]
    write_bytes(path, data, make_folder=True)
