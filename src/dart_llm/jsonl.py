"""Reading JSONL files: one JSON object a line, with errors that name the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError


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
            if "\\ud" in line.lower():  # an escape may be half a character, which is no text
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
