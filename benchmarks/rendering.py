"""Published tables as Markdown: columns of benchmarks/tables.yaml, numbers of results files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from table_parts import PARTS  # beside this file

from dart_llm.reporting.words import percent

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
Row = Mapping[str, Any]


# Numbers as words.


def span(shares: Iterable[float]) -> str:
    """ "30% to 70%", or one of them where both ends are the same."""
    values = list(shares)
    low, high = f"{min(values):.0%}", f"{max(values):.0%}"
    return low if low == high else f"{low} to {high}"


def number(value: float | None) -> str:
    """About three digits: 0.042, 1.23, 17.6, 1234, 7.0e6; "" for None."""
    if value is None:
        return ""
    size = abs(value)
    if size >= 1e5:
        mantissa, _, power = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(power)}"
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}"


def interval(found: Row | None, form: str = ".3f", scale: float = 1) -> str:
    """A mean or an estimate with its 95 % interval; a dash where there is none."""
    if not found:
        return "–"
    middle = found["mean"] if "mean" in found else found["estimate"]
    if found["low"] is None:
        return f"{middle * scale:{form}} {found['no_interval']}"
    values = (middle, found["low"], found["high"])
    return "{} ({} to {})".format(*(format(scale * value, form) for value in values))


def verdict(found: Row | None, higher_is_better: bool = True, equal: float = 0) -> str:
    """ " better" or " worse" where a difference is significant."""
    if not found or not found["significant"]:
        return ""
    middle = found["mean"] if "mean" in found else found["estimate"]
    return " better" if (middle > equal) == higher_is_better else " worse"


def against(found: Row | None, row: Row) -> str:
    """A difference of scores, or a ratio of perplexities, and what may be said of it."""
    if found is None:
        return "–"
    ratio = row["metric"].endswith("perplexity")
    if found["low"] is None:
        return f"{found['estimate']:.2f} {found['no_interval']}"
    values = [found["estimate"], found["low"], found["high"]]
    middle, low, high = (number(x) if ratio else f"{x:+.3f}" for x in values)
    told = verdict(found, row["higher_is_better"], 1 if ratio else 0)
    return f"{'x ' if ratio else ''}{middle} ({low} to {high}){told}"


def yardstick(row: Row, name: str) -> str:
    """GRIFFIN's perplexity, and the sparsity at which it has it."""
    found = row[name] if row["cell_row"] else None
    return f"{number(found['perplexity'])} ({percent(found['sparsity'])})" if found else ""


def closed(found: Row | None) -> str:
    """ "27.1 % (20 % to 33.2 %)" of a gap; n/a where there is no gap to close."""
    if found is None:
        return ""
    if found["gap_closed"] is None:
        return "n/a"
    value, ends = percent(found["gap_closed"]), found["interval"]
    return value if ends is None else f"{value} ({percent(ends[0])} to {percent(ends[1])})"


# The registry and the results.


@cache
def registry() -> dict[str, Any]:
    """benchmarks/tables.yaml."""
    known: dict[str, Any] = yaml.safe_load((ROOT / "benchmarks/tables.yaml").read_text("utf-8"))
    return known


@cache
def result(name: str) -> dict[str, Any]:
    """One results file."""
    data: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return data


def today(label: str, data: Row) -> str:
    """A label of a results file with the names that methods have today."""
    for old, new in data.get("renamed", {}).items():
        label = re.sub(rf"(?<![\w-]){re.escape(old)}(?![\w-])", new, label)
    return label


def recorded_checkpoints(data: Row) -> list[Row]:
    """Every checkpoint of a results file."""
    if "checkpoints" in data:
        return list(data["checkpoints"].values())
    facts = [run["checkpoint"] for run in data.get("runs", ())]
    facts += [data.get("checkpoint_of_the_cells") or data.get("checkpoint")]
    return list({found["name"]: found for found in facts if found}.values())


def described(data: Row) -> str:
    """Name, file quantisation, dtype and checksum of each, or that there is none."""
    words = []
    for facts in recorded_checkpoints(data):
        checksum = f", sha256 {str(facts['sha256'])[:12]}" if facts["sha256"] else ""
        kind = facts["file_quantisation"] or "none"
        words.append(f"{facts['name']} (file quantisation {kind}, {facts['dtype']}{checksum})")
    return "; ".join(words) or "Without a checkpoint"


def source(names: Sequence[str]) -> str:
    """What stands above a table: its commands, its checkpoints, its files, today's names."""
    entries = [registry()["results"][name] for name in names]
    commands = "\n".join(command for entry in entries for command in entry["run"])
    links: dict[str, list[str]] = {}
    for name in names:
        link = f"[{name}.json](benchmarks/results/{name}.json)"
        links.setdefault(described(result(name)), []).append(link)
    parts = [f"{facts}: {' and '.join(files)}." for facts, files in links.items()]
    renamed = {name: result(name).get("renamed", {}) for name in names}
    for old, new in dict.fromkeys(pair for pairs in renamed.values() for pair in pairs.items()):
        files = [f"{name}.json" for name in names if renamed[name].get(old) == new]
        where = "the file" if len(names) == 1 else " and ".join(files)
        parts.append(f"`{new}` is called `{old}` in {where}.")
    parts += dict.fromkeys(entry["note"].strip() for entry in entries if "note" in entry)
    return f"```sh\n{commands}\n```\n\n{' '.join(parts)}"


# Tables.

HELPERS: dict[str, Callable[..., Any]] = PARTS | {
    f.__name__: f
    for f in (percent, span, number, interval, verdict, against, yardstick, closed, today, dict)
}
_LANGUAGE = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
_LANGUAGE.filters["form"] = format


@cache
def _expression(text: str) -> Any:
    return _LANGUAGE.compile_expression(text, undefined_to_none=False)


def evaluated(text: str, names: Row) -> Any:
    """A template of ``str.format`` over the row, or after "=" an expression of Jinja."""
    if text.startswith("="):
        return _expression(text[1:])(**HELPERS, **names)
    return text.format(**names["row"])


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table of Markdown; all but the first ``left`` columns are set to the right."""
    lines = [heads, ["---"] * left + ["---:"] * (len(heads) - left), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _columns(view: Row, names: Row) -> Iterator[tuple[str, str, Row]]:
    """Head, text and names of each column; one for each value where a column says ``each``."""
    for head, column in view["columns"].items():
        if isinstance(column, str):
            yield _LANGUAGE.from_string(head).render(**HELPERS, **names), column, {}
        else:
            for each in evaluated(column["each"], names):
                own = {"each": each}
                text = _LANGUAGE.from_string(head).render(**HELPERS, **names, **own)
                yield text, column["text"], own


def _part(view: Row, names: Row) -> str:
    columns = list(_columns(view, names))
    rows = [
        [str(evaluated(text, {**names, **own, "row": row})) for _, text, own in columns]
        for row in names["rows"]
    ]
    shown = [
        place
        for place in range(len(columns))
        if not view.get("hide_empty") or any(row[place] for row in rows)
    ]
    body = [[row[place] for place in shown] for row in rows]
    return markdown_table([columns[place][0] for place in shown], body, view.get("left", 1))


def _pieces(block: str) -> Iterator[str]:
    """Captions, tables and the note of a block."""
    view = _view(block)
    files = [result(name) for name in sources(block)]
    known: dict[str, Any] = {"data": files[0], "files": files, "block": block}
    for part in evaluated(view.get("parts", "=[dict(rows=data.rows)]"), known):
        if part.get("caption"):
            yield part["caption"]
        if rows := part.get("rows"):
            chosen = {**view, "columns": view[part.get("columns", "columns")]}
            yield _part(chosen, {**known, **part, "rows": list(rows)})
    if "note" in view:
        yield _LANGUAGE.from_string(view["note"]).render(**HELPERS, **known).strip()


def _view(block: str) -> Row:
    return next(view for view in registry()["views"] if block in view["blocks"])


def sources(block: str) -> list[str]:
    """Names of the results files that a table is made of."""
    names: list[str] = registry()["blocks"].get(block, [block])
    return names


def whole(block: str) -> str:
    """A table with its commands, checkpoints and files."""
    return "\n\n".join([source(sources(block)), *_pieces(block)])


def shown(block: str) -> str:
    """A table as a page shows it: its checkpoints below, and where its commands are."""
    facts = dict.fromkeys(described(result(name)) for name in sources(block))
    said = "" if "checkpoint" in _view(block) else f"{'; '.join(facts)}. "
    origin = f"{said}[Command and file](benchmarks/results/{block}.md)."
    *tables, last = _pieces(block)
    return "\n\n".join([*tables, last + (" " if "note" in _view(block) else "\n\n") + origin])
