"""Data for the server's web page (the "window"): example prompts, past runs, recorded answers.

A recorded answer can also be written as one HTML file that plays without a server.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import html
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from dart_llm.errors import ConfigError
from dart_llm.experiments import index
from dart_llm.experiments.store import ROWS
from dart_llm.server.schemas import APIError

STATIC = Path(__file__).parent / "static"
"""The page, its scripts, styles and data."""

PROMPTS = "prompts.json"
GREETING = "greeting.json"
"""Files in ``STATIC``.  ``PROMPTS``: the example prompts.  ``GREETING``: a recorded answer, made by
benchmarks/make_greeting.py, that plays before the first question."""

Record = dict[str, Any]


def ready_prompts(is_ready: Callable[[str], bool]) -> Record:
    """The example prompts.  A prompt whose method is not ready uses the server's settings."""
    prompts = json.loads(_static(PROMPTS))
    for number, prompt in enumerate(prompts):
        method = prompt["dart"]["method"]
        if not is_ready(method):
            prompts[number] = {
                "title": prompt["title"].partition(":")[0],
                "text": prompt["text"],
                "note": f"Uses this server's settings, because {method} is not ready. To see its "
                f"masks, start the server with --methods {method}.",
            }
    return {"prompts": prompts}


# Past runs: only folders below the configured results folder.

LARGEST_FILE = 8 << 20  # bytes; larger files of a run are not read
MOST_RUNS = 500  # maximum number of listed runs; older runs are not listed

REPORT = "report.html"
"""File name of a run's report page."""

RUN_FIELDS = ("experiment", "time", "status", "kind", "models", "methods", "sparsities", "tasks")
"""Fields of a run in the list, besides its name, start and duration."""


def list_runs(root: Path) -> Record:
    """A dict: ``runs`` has the newest runs below ``root``, newest first; ``total`` counts all."""
    runs = list(_runs(root).items())
    newest = [_run_fields(name, run) for name, run in reversed(runs[-MOST_RUNS:])]
    return {"runs": newest, "total": len(runs)}


def _runs(root: Path) -> dict[str, Any]:
    """Maps names to the runs below ``root``, oldest first."""
    runs = {}
    with contextlib.suppress(ConfigError):  # ``root`` does not exist
        for run in index.find(root):
            if run.path.resolve().is_relative_to(root.resolve()):
                runs[run.path.relative_to(root).as_posix()] = run
    return runs


def _run_fields(name: str, run: Any) -> Record:
    started = run.started and run.started.isoformat()
    fields = {field: getattr(run, field) for field in RUN_FIELDS}
    return {"name": name, "started": started, "seconds": run.seconds, **fields}


def _find_run(root: Path, name: str) -> Any:
    """The run ``name``.  For safety, the name is compared with run names, not used as a path."""
    if (run := _runs(root).get(name)) is None:
        raise APIError(404, "there is no such run: /api/runs lists all", code="run_not_found")
    return run


def read_run(root: Path, name: str) -> Record:
    """A run with the content of its files; raises ``APIError`` (404) for an unknown name."""
    run = _find_run(root, name)
    names = sorted(path.name for path in run.path.iterdir() if path.is_file())
    tables = (_read(run.path, name) for name in names if name.endswith(".md"))
    drift: list[Record] = []
    with contextlib.suppress(csv.Error):  # raised, for example, for a field of a megabyte
        drift = list(csv.DictReader(_read(run.path, "drift.csv").splitlines()))
    return {
        **_run_fields(name, run),
        "files": names,
        "config": next(_documents(_read(run.path, "config.json")), None),
        "masks": next(_documents(_read(run.path, "masks.json")), None),
        "generation": list(_documents(*_read(run.path, "generation.jsonl").splitlines())),
        "drift": drift,
        "rows": list(_documents(*_read(run.path, ROWS).splitlines())),
        "tables": "\n\n".join(tables),
    }


def read_report(root: Path, name: str) -> str:
    """The report page of a run; raises ``APIError`` (404) if the run or the page is missing."""
    text = _read(_find_run(root, name).path, REPORT)
    if not text:
        raise APIError(404, f"this run has no readable {REPORT}", code="report_not_found")
    return text


def _read(folder: Path, name: str) -> str:
    """The text of a file; "" if it is missing, too large, not UTF-8 or a link to another folder."""
    path = folder / name
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.resolve().parent == folder.resolve() and path.stat().st_size <= LARGEST_FILE:
            return path.read_text(encoding="utf-8")
    return ""


def _documents(*texts: str) -> Iterator[Any]:
    """Yield the content of each of ``texts``; a text that is not valid JSON is skipped."""
    for text in texts:
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(text)


# A recorded answer: the records that ``/api/events`` sends, one JSON document per line.

KINDS = ("start", "token", "check", "remask", "mask", "done", "error")


def read_records(source: str) -> list[Record]:
    """Read records from the file ``source``, or from standard input if it is ``-``.

    The records are JSON lines or server-sent events.  Raises ``ConfigError`` if the file cannot be
    read, if a line is invalid, or if the first record is not ``start``.
    """
    name = "standard input" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read {name}: {reason}") from None
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        data = line.strip().removeprefix("data:").strip()
        if not data or data == "[DONE]" or data.startswith((":", "event:", "id:", "retry:")):
            continue
        record = None
        with contextlib.suppress(ValueError):
            record = from_json(data, allow_inf_nan=False)
        if not isinstance(record, dict) or record.get("kind") not in KINDS:
            raise ConfigError(f"{name}, line {number} is not a JSON record of a request")
        records.append(record)
    if not records or records[0]["kind"] != "start":
        raise ConfigError(
            f"{name} does not begin with a start record: give a response of POST /api/events, or a "
            "file saved from the window"
        )
    return records


# A recorded answer as one HTML file.  The file contains the window's page, scripts and styles, and
# the records.  Its Content-Security-Policy forbids all connections, and allows only the script and
# the style whose hashes it lists.

IMPORT = re.compile(r'^import \{ ([^}]*) \} from "\./(\w+\.js)";\n', re.MULTILINE)
STYLE = re.compile(r'<link rel="stylesheet" href="/static/(\w+\.css)">\n')
LINKS = re.compile(r'<(?:link rel="icon"|script type="module")[^>]*>(?:</script>)?\n')


def page(records: Sequence[Record]) -> str:
    """The HTML page that plays ``records`` without a model."""
    text = _static("index.html")
    style = "\n".join(_static(name) for name in STYLE.findall(text))
    modules: dict[str, str] = {}
    _add_module("main.js", modules)
    script = "\n".join(modules.values())
    text = LINKS.sub("", STYLE.sub("", text)).replace('data-mode="live"', 'data-mode="replay"')
    model = html.escape(str(records[0].get("model")))
    text = text.replace("<title>DART for LLMs</title>", f"<title>DART for LLMs: {model}</title>")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    text = text.replace("</head>\n", f"{head}<style>{style}</style>\n</head>\n")
    # "<" is escaped, so that the data cannot close the script element
    data = json.dumps(list(records), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    data = data.replace("<", "\\u003c")
    return text.replace(
        "</body>\n",
        f'<script type="application/json" id="records">{data}</script>\n'
        f'<script type="module">{script}</script>\n</body>\n',
    )


def _add_module(name: str, modules: dict[str, str]) -> None:
    """Add the JavaScript module ``name`` to ``modules``, after the modules that it imports.

    All modules are joined into one script.  This works because their top-level names are unique.
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
