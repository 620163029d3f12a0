"""The page, past runs, and recordings as one HTML file.

Past runs for ``/api/runs``: folders below the configured one, and nothing else.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dart_llm.data.texts import prompt_names, read_prompt
from dart_llm.errors import ConfigError
from dart_llm.experiments import index
from dart_llm.experiments.comparison import Row
from dart_llm.experiments.index import GENERATE, ResultsSummary
from dart_llm.files import page_json
from dart_llm.server.responses import APIError

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
"""Kinds of records and what a page that shows them cannot do without."""

LARGEST_REPLAY = 64 << 20  # characters of a recording that is still taken


def read_records(source: str) -> list[Record]:
    """The records in a file (``-``: standard input), as JSON lines or as server-sent events.

    Raises ``ConfigError`` with the line that is wrong.
    """
    name = "standard input" if source == "-" else source
    records = []
    for number, line in enumerate(_replay_text(source, name).splitlines(), 1):
        text = line.strip().removeprefix("data:").strip()
        if not text or text == "[DONE]" or text.startswith((":", "event:", "id:", "retry:")):
            continue
        records.append(_record(text, f"{name}, line {number}"))
    if not records or records[0]["kind"] != "start":
        raise ConfigError(
            f"{name} does not begin with a start record: give what POST /api/events answered, or "
            "what the window saved"
        )
    return records


def _replay_text(source: str, name: str) -> str:
    try:
        if source == "-":
            text = sys.stdin.read(LARGEST_REPLAY + 1)
        else:
            with open(source, encoding="utf-8-sig") as file:
                text = file.read(LARGEST_REPLAY + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is no text in UTF-8: give a recording, JSON lines") from None
    if len(text) > LARGEST_REPLAY:
        most = f"{LARGEST_REPLAY >> 20} MiB"
        raise ConfigError(f"{name} is larger than {most}: give a shorter recording")
    return text


def _record(text: str, place: str) -> Record:
    try:
        record = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise ConfigError(f"{place} is no JSON: give one record a line") from None
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{place} is no record: its kind must be one of {', '.join(KINDS)}")
    missing = [field for field in KINDS[kind] if field not in record]
    if missing:
        raise ConfigError(f"{place}: a {kind} record needs {', '.join(missing)}")
    return dict(record)


def _no_number(text: str) -> None:
    raise ValueError(text)


# A recording as one HTML file: the window's own page, scripts and styles, and the records.
#
# The file asks nothing of anybody: a Content-Security-Policy in it allows its own script and style
# by their hashes, and no connection.


ENTRY = "main.js"
IMPORT = re.compile(r'^import \{ ([^}]*) \} from "\./(\w+\.js)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export ((?:async )?function\*?|class|const) (\w+)", re.MULTILINE)
STYLE = re.compile(r'<link rel="stylesheet" href="/static/(\w+\.css)">\n')
LINKS = re.compile(r'<(?:link rel="icon"|script type="module")[^>]*>(?:</script>)?\n')


def page(records: Sequence[Record]) -> str:
    """The whole page, which plays ``records`` without a model."""
    text = _static("index.html")
    style = "\n".join(_static(name) for name in STYLE.findall(text))
    script = bundle(ENTRY)
    text = LINKS.sub("", STYLE.sub("", text)).replace('data-mode="live"', 'data-mode="replay"')
    model = html.escape(str(records[0].get("model") or records[0]["method"]))
    text = text.replace("<title>DART for LLMs</title>", f"<title>DART for LLMs: {model}</title>")
    policy = _policy(script, style)
    text = text.replace("</head>\n", f"{policy}<style>{style}</style>\n</head>\n")
    data = page_json(list(records))
    return text.replace(
        "</body>\n",
        f'<script type="application/json" id="records">{data}</script>\n'
        f'<script type="module">{script}</script>\n</body>\n',
    )


def bundle(entry: str) -> str:
    """The module ``entry`` and all that it imports, each in a scope of its own, in one script."""
    order: list[str] = []
    _visit(entry, order, ())
    return "\n".join(_scoped(name) for name in order)


def _visit(name: str, order: list[str], inside: tuple[str, ...]) -> None:
    assert name not in inside, f"the page's modules import each other: {(*inside, name)}"
    if name in order:
        return
    for _, other in IMPORT.findall(_static(name)):
        _visit(other, order, (*inside, name))
    order.append(name)


def _scoped(name: str) -> str:
    text = _static(name)
    names = [found for _, found in EXPORT.findall(text)]
    text = IMPORT.sub(lambda found: f"const {{ {found[1]} }} = {_variable(found[2])};\n", text)
    text = EXPORT.sub(r"\1 \2", text)
    left = re.search(r"^(?:import|export)\b", text, re.MULTILINE)
    assert left is None, f"{name}: an import or export in a form that is not bundled"
    return f"const {_variable(name)} = (() => {{\n{text}\nreturn {{ {', '.join(names)} }};\n}})();"


def _variable(name: str) -> str:
    return f"module_{name.removesuffix('.js')}"


def _static(name: str) -> str:
    return (files("dart_llm.server") / "static" / name).read_text(encoding="utf-8")


def _policy(script: str, style: str) -> str:
    allowed = f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    policy = f"{allowed}; base-uri 'none'; form-action 'none'"
    return f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


DOCUMENTS = (
    "config.json",
    "masks.json",
    "timing.json",
    "perplexity.json",
    "mmlu.json",
    "general_nlp.json",
    "summarization.json",
    "compare.json",
    "inspect.json",
)
"""Files that are shown as they are, where a run has them, under their names without ``.json``."""

TABLES = {
    "compare": "compare.md",
    "sweep": "compare.md",
    "drift": "summary.md",
    "detect": "detection.md",
    "inspect": "inspect.md",
    "quality": "quality.md",
    "speed": "speed.md",
}
"""The file with all tables, by kind of run."""

MEASURED = (
    *("model", "label", "asked", "task", "protocol", "status", "metric", "value", "items"),
    *("achieved", "dense_share", "remasks"),
)
"""What is told of a measured row, under its names in compare.csv."""

LARGEST_RUN = 8 << 20  # bytes of a file that is still read
MOST_RUNS = 500  # the newest ones are listed

REPORT = "report.html"
"""A run's own page."""


def listing(root: Path) -> dict[str, Any]:
    """``runs``: those below ``root`` in a few facts, the newest first; ``total``: how many."""
    found = _runs(root)
    runs = [_facts(root, run) for run in reversed(found[-MOST_RUNS:])]
    return {"runs": runs, "total": len(found)}


def _runs(root: Path) -> list[ResultsSummary]:
    try:
        found = index.find(root)
    except ConfigError:
        return []
    home = root.resolve()
    return [run for run in found if run.path.resolve().is_relative_to(home)]


def _facts(root: Path, run: ResultsSummary) -> dict[str, Any]:
    return {
        "name": run.path.relative_to(root).as_posix(),
        "experiment": run.experiment,
        "time": run.time,
        "started": None if run.started is None else run.started.isoformat(),
        "status": run.status,
        "kind": run.kind,
        "models": list(run.models),
        "methods": list(run.methods),
        "sparsities": list(run.sparsities),
        "tasks": list(run.tasks),
        "seconds": run.seconds,
    }


def opened(root: Path, name: str) -> dict[str, Any]:
    """One run with what its files hold; raises ``APIError`` (404) for every other name.

    ``name`` is compared with the names that were found, and never joined to a path.
    """
    run = _named(root, name)
    files = {path.name: path for path in sorted(run.path.iterdir()) if path.is_file()}
    found: dict[str, Any] = {**_facts(root, run), "files": list(files)}
    for document in DOCUMENTS:
        found[document.removesuffix(".json")] = _json(_run_text(run.path, files.get(document)))
    lines = _run_text(run.path, files.get("generation.jsonl")).splitlines()
    found["generation"] = [row for line in lines if (row := _json(line)) is not None]
    found["drift"] = _rows(_run_text(run.path, files.get("drift.csv")))
    found["rows"] = [_measured(row) for row in run.rows if row.task != GENERATE]
    found["tables"] = _run_text(run.path, files.get(TABLES.get(run.kind, "")))
    return found


def _named(root: Path, name: str) -> ResultsSummary:
    run = next((one for one in _runs(root) if _facts(root, one)["name"] == name), None)
    if run is None:
        raise APIError(404, "there is no such run: /api/runs lists them", code="run_not_found")
    return run


def report(root: Path, name: str) -> str:
    """The page of one run; raises ``APIError`` (404) where there is none, as ``opened`` does."""
    folder = _named(root, name).path
    text = _run_text(folder, folder / REPORT)
    if not text:
        raise APIError(404, f"this run has no {REPORT} that can be shown", code="report_not_found")
    return text


def _measured(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in MEASURED}


def _run_text(folder: Path, path: Path | None) -> str:
    """ "" for a file that is not there, leads out of its folder, is too large or is no text."""
    try:
        if path is None or path.resolve().parent != folder.resolve():
            return ""
        return path.read_text(encoding="utf-8") if path.stat().st_size <= LARGEST_RUN else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _rows(text: str) -> list[dict[str, Any]]:
    """[] for what is no table, such as one with a field of a megabyte."""
    try:
        return list(csv.DictReader(io.StringIO(text)))
    except csv.Error:
        return []


def _json(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None


# The page at ``/`` and its own files, read once from the package.


TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "svg": "image/svg+xml",
}
"""Kinds of files that are served."""

Site = dict[str, tuple[bytes, str]]

PROMPTS = "prompts.json"
GREETING = "greeting.json"
"""Records of an answer that the page plays until its visitor asks (benchmarks/make_greeting.py)."""


def ready_prompts(site: Site, is_ready: Callable[[str], bool]) -> dict[str, Any]:
    """``prompts``: those that the page opens with; ``shipped``: those of ``--prompt NAME``.

    A prompt whose method ``is_ready`` does not know is asked by the server's own settings.
    """
    shipped = [{"title": name, "text": read_prompt(name), "note": ""} for name in prompt_names()]
    found = json.loads(site[PROMPTS][0])
    return {"prompts": [_askable(prompt, is_ready) for prompt in found], "shipped": shipped}


def _askable(prompt: Mapping[str, Any], is_ready: Callable[[str], bool]) -> Mapping[str, Any]:
    method = prompt["dart"]["method"]
    if is_ready(method):
        return prompt
    return {
        "title": prompt["title"].partition(":")[0],
        "text": prompt["text"],
        "note": f"By this server's settings. Its masks: start the server with --methods {method}.",
    }


def static_files() -> Site:
    """{name below ``static/``: (content, type)}."""
    entries = (files("dart_llm.server") / "static").iterdir()
    return {one.name: (one.read_bytes(), TYPES[one.name.rpartition(".")[2]]) for one in entries}
