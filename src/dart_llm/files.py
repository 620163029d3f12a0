"""Files: whole or not at all; JSON, JSONL with errors that name the line, CSV, YAML, tensors."""

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
    """Bytes for people: ``0.4 MB``, ``812 MB``, ``16.1 GB``."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"


def file_sha256(path: Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Loader(yaml.SafeLoader):
    """Refuses aliases, by which a short file may stand for gigabytes, and repeated names."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias (*name): write the values out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [str(key.value)[:80] for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:  # YAML would keep the last
                raise ValueError(f'the name "{name}" is given twice: drop one')
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, without aliases; raises ``ConfigError`` when there is none."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except RecursionError:
        raise ConfigError(f"the settings file {path} is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read the settings file {path}: {reason}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"the settings file {path} must hold names and values")
    return data


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of ``path`` with the numbers of their lines, from 1; blank lines are skipped.

    Raises ``ConfigError`` for a file that is missing or cannot be read as UTF-8 text, and for a
    line that is not a JSON object.
    """
    from pydantic_core import from_json  # refuses NaN, half characters and deep nesting, too

    try:
        # Not splitlines(): a JSON string may contain U+2028, which that takes for a line break.
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
    """Add one document as a line that survives whatever happens after this call.

    It starts a new line after one without its line break, which a full disk or a kill left.
    Raises ``OSError``, and ``ValueError`` for numbers that JSON does not have.
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
    """The documents of a file that ``append_row`` made; what is torn or damaged is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


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
    """An empty file beside ``path`` that replaces it, whole, when the block ends.

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
    """Replace ``path`` whole, or raise ``ResultsError``; ``mode``: permissions of a new file."""
    write_bytes(path, text.encode("utf-8"), mode=mode)


def write_bytes(path: Path, data: bytes, make_folder: bool = False, mode: int = 0o666) -> None:
    """The same for data; ``make_folder``: also the folder that it lies in."""
    if make_folder:
        with contextlib.suppress(OSError):  # the next step reports the reason
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


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON document per line, whole."""
    write_text(path, "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows))


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file, whole; None is an empty cell."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    write_text(path, buffer.getvalue())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole; equal contents give equal bytes."""
    from safetensors.torch import save

    data = save(dict(tensors), None if metadata is None else dict(metadata))
    if metadata:  # safetensors writes it in a new order each time
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        data = len(text).to_bytes(8, "little") + text + data[end:]
    write_bytes(path, data, make_folder=True)
