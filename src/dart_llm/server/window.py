"""The window: its ready prompts, past runs for ``/api/runs``, and recordings as one HTML file."""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import html
import io
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from dart_llm.data.texts import prompt_names, read_prompt
from dart_llm.errors import ConfigError
from dart_llm.experiments import index
from dart_llm.experiments.result_line import ROWS
from dart_llm.files import page_json
from dart_llm.server.responses import APIError

STATIC = Path(__file__).parent / "static"
"""The page, its scripts, styles and data."""

PROMPTS = "prompts.json"
GREETING = "greeting.json"
"""Records of an answer that plays before the first question (benchmarks/make_greeting.py)."""


def ready_prompts(is_ready: Callable[[str], bool]) -> dict[str, Any]:
    """``prompts``: those on the page; ``shipped``: those of ``--prompt NAME``.

    A prompt whose method is not ready is asked with the server's settings.
    """
    shipped = [{"title": name, "text": read_prompt(name), "note": ""} for name in prompt_names()]
    prompts = json.loads((STATIC / PROMPTS).read_text(encoding="utf-8"))
    return {"prompts": [_ready_prompt(one, is_ready) for one in prompts], "shipped": shipped}


def _ready_prompt(prompt: Mapping[str, Any], is_ready: Callable[[str], bool]) -> Mapping[str, Any]:
    method = prompt["dart"]["method"]
    if is_ready(method):
        return prompt
    return {
        "title": prompt["title"].partition(":")[0],
        "text": prompt["text"],
        "note": "With this server's settings. To see its masks, start the server with "
        f"--methods {method}.",
    }


# past runs: folders below the configured one, and nothing else

LARGEST_FILE = 8 << 20  # bytes of a run's file that is still read
MOST_RUNS = 500  # the newest ones are listed

REPORT = "report.html"
"""A run's own page."""

FACTS = ("experiment", "time", "status", "kind", "models", "methods", "sparsities", "tasks")
"""Facts of a run in the list, beside its name, start and duration."""


def list_runs(root: Path) -> dict[str, Any]:
    """``runs``: facts of those below ``root``, the newest first; ``total``: how many there are."""
    runs = _find_runs(root)
    newest = [_facts(root, run) for run in reversed(runs[-MOST_RUNS:])]
    return {"runs": newest, "total": len(runs)}


def _find_runs(root: Path) -> list[Any]:
    try:
        runs = index.find(root)
    except ConfigError:
        return []
    home = root.resolve()
    return [run for run in runs if run.path.resolve().is_relative_to(home)]


def _facts(root: Path, run: Any) -> dict[str, Any]:
    return {
        "name": run.path.relative_to(root).as_posix(),
        "started": run.started and run.started.isoformat(),
        "seconds": run.seconds,
        **{name: getattr(run, name) for name in FACTS},
    }


def read_run(root: Path, name: str) -> dict[str, Any]:
    """One run with the content of its files; raises ``APIError`` (404) for every other name.

    ``name`` is compared with the names of the runs, and never joined to a path.
    """
    run = _named_run(root, name)
    names = sorted(path.name for path in run.path.iterdir() if path.is_file())
    tables = (_read(run.path, name) for name in names if name.endswith(".md"))
    return {
        **_facts(root, run),
        "files": names,
        "config": _parse_json(_read(run.path, "config.json")),
        "masks": _parse_json(_read(run.path, "masks.json")),
        "generation": _parse_lines(_read(run.path, "generation.jsonl")),
        "drift": _parse_csv(_read(run.path, "drift.csv")),
        "rows": _parse_lines(_read(run.path, ROWS)),
        "tables": "\n\n".join(tables),
    }


def _named_run(root: Path, name: str) -> Any:
    for run in _find_runs(root):
        if run.path.relative_to(root).as_posix() == name:
            return run
    raise APIError(404, "there is no such run: /api/runs lists them", code="run_not_found")


def read_report(root: Path, name: str) -> str:
    """The page of one run; raises ``APIError`` (404) where there is none."""
    text = _read(_named_run(root, name).path, REPORT)
    if not text:
        raise APIError(404, f"this run has no readable {REPORT}", code="report_not_found")
    return text


def _read(folder: Path, name: str) -> str:
    """Text of a file; "" if it is missing, links out of its folder, is too large or not UTF-8."""
    path = folder / name
    try:
        if path.resolve().parent != folder.resolve() or path.stat().st_size > LARGEST_FILE:
            return ""
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None


def _parse_lines(text: str) -> list[Any]:
    return [row for line in text.splitlines() if (row := _parse_json(line)) is not None]


def _parse_csv(text: str) -> list[dict[str, Any]]:
    try:
        return list(csv.DictReader(io.StringIO(text)))
    except csv.Error:  # such as a field of a megabyte
        return []


# A recorded run: the records of ``/api/events``, one JSON document a line.

Record = dict[str, Any]

KINDS = {
    "start": ("method", "layers", "neurons", "prompt"),
    "token": ("index", "text", "phase"),
    "check": ("step", "similarity"),
    "remask": ("step", "cause"),
    "mask": ("number", "token", "kept_share", "raster"),
    "done": (),
    "error": ("message",),
}
"""Kinds of records and the fields that the page needs."""

LARGEST_RECORDING = 64 << 20  # characters


def read_records(source: str) -> list[Record]:
    """The records in a file (``-``: standard input), as JSON lines or as server-sent events.

    Raises ``ConfigError`` with the line that is wrong.
    """
    name = "standard input" if source == "-" else source
    try:
        with (
            contextlib.nullcontext(sys.stdin)
            if source == "-"
            else open(source, encoding="utf-8-sig") as file
        ):
            text = file.read(LARGEST_RECORDING + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not UTF-8 text: expected a JSONL recording") from None
    if len(text) > LARGEST_RECORDING:
        raise ConfigError(f"{name} is larger than 64 MiB: give a shorter recording")
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        data = line.strip().removeprefix("data:").strip()
        if data and data != "[DONE]" and not data.startswith((":", "event:", "id:", "retry:")):
            records.append(_parse_record(data, f"{name}, line {number}"))
    if not records or records[0]["kind"] != "start":
        raise ConfigError(
            f"{name} does not begin with a start record: give what POST /api/events answered, or "
            "what the window saved"
        )
    return records


def _parse_record(text: str, line: str) -> Record:
    try:
        record = from_json(text, allow_inf_nan=False)
    except ValueError:
        raise ConfigError(f"{line} is not JSON: give one record a line") from None
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{line} is not a record: its kind must be one of {', '.join(KINDS)}")
    missing = [field for field in KINDS[kind] if field not in record]
    if missing:
        raise ConfigError(f"{line}: a {kind} record needs {', '.join(missing)}")
    return dict(record)


# A recording as one HTML file: the window's own page, scripts and styles, and the records.  A
# Content-Security-Policy in it allows its own script and style by their hashes, and no connection.

IMPORT = re.compile(r'^import \{ ([^}]*) \} from "\./(\w+\.js)";\n', re.MULTILINE)
STYLE = re.compile(r'<link rel="stylesheet" href="/static/(\w+\.css)">\n')
LINKS = re.compile(r'<(?:link rel="icon"|script type="module")[^>]*>(?:</script>)?\n')


def page(records: Sequence[Record]) -> str:
    """The whole page, which plays ``records`` without a model."""
    text = _static("index.html")
    style = "\n".join(_static(name) for name in STYLE.findall(text))
    modules: dict[str, str] = {}
    _add_module("main.js", modules)
    script = "\n".join(modules.values())
    text = LINKS.sub("", STYLE.sub("", text)).replace('data-mode="live"', 'data-mode="replay"')
    model = html.escape(str(records[0].get("model") or records[0]["method"]))
    text = text.replace("<title>DART for LLMs</title>", f"<title>DART for LLMs: {model}</title>")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    text = text.replace("</head>\n", f"{head}<style>{style}</style>\n</head>\n")
    return text.replace(
        "</body>\n",
        f'<script type="application/json" id="records">{page_json(list(records))}</script>\n'
        f'<script type="module">{script}</script>\n</body>\n',
    )


def _add_module(name: str, modules: dict[str, str]) -> None:
    """Add the modules that ``name`` imports, then itself, as parts of one script.

    Names at the top of the page's modules are unique, so that they need no scopes.
    """
    text = _static(name)
    for _, imported in IMPORT.findall(text):
        if imported not in modules:
            _add_module(imported, modules)
    modules[name] = re.sub(r"^export ", "", IMPORT.sub("", text), flags=re.MULTILINE)


def _static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
