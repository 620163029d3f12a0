"""What the pages of the site take from the program and from benchmarks/results; hooks of mkdocs.

A page says ``{{ measured("drift-forced-smollm2") }}`` and gets the table of that name:
``views`` of benchmarks/tables.yaml holds the columns, benchmarks/results the numbers.  Beside it
``{{ commands() }}``, ``{{ variables() }}``, ``{{ data_sets() }}``, ``{{ checkpoints() }}`` and
``{{ model_types() }}`` list what the program knows of itself.  The results files and the
README become part of the site, so that links to them are checked like all others.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from table_parts import PARTS  # beside this file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
Row = Mapping[str, Any]


# Numbers as words.


def percent(share: float, digits: int = 1) -> str:
    """0.4375 -> "43.8 %", 0.5 -> "50 %"."""
    text = f"{100 * share:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{'0' if text == '-0' else text} %"


def span(shares: Iterable[float]) -> str:
    """ "30% to 70%", or one of them where both ends are the same."""
    values = list(shares)
    low, high = f"{min(values):.0%}", f"{max(values):.0%}"
    return low if low == high else f"{low} to {high}"


def figure(value: float) -> str:
    """A score or a perplexity to about three digits: 0.512, 17.6, 1234, 7.0e6."""
    if value >= 1e5:
        mantissa, _, power = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(power)}"
    return f"{value:.3f}" if value < 1 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def number(value: float | None) -> str:
    """A time or a rate to three digits or so: 0.042, 1.23, 17.6, 1234; "" for None."""
    if value is None:
        return ""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}"


def ratio(value: float | None) -> str:
    """Two decimals; "" for None."""
    return "" if value is None else f"{value:.2f}"


def times(ratio: float) -> str:
    """A ratio: 1.08, 12.4, 145."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def interval(found: Row | None, form: str = ".3f", scale: float = 1) -> str:
    """A mean or an estimate with its 95 % interval; a dash where there is none."""
    if not found:
        return "–"
    middle = found["mean"] if "mean" in found else found["estimate"]
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
    values = [found["estimate"], found["low"], found["high"]]
    middle, low, high = (
        f"{x:+.3f}" if not ratio else f"{x:.2f}" if x < 100 else f"{x:.0f}" for x in values
    )
    told = verdict(found, row["higher_is_better"], 1 if ratio else 0)
    return f"{'x ' if ratio else ''}{middle} ({low} to {high}){told}"


def perplexity(value: float) -> str:
    """To about three digits: 1.23, 17.6, 1,234."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def yardstick(row: Row, name: str) -> str:
    """GRIFFIN's perplexity, and the sparsity at which it has it."""
    found = row[name] if row["cell_row"] else None
    return f"{perplexity(found['perplexity'])} ({percent(found['sparsity'])})" if found else ""


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
    return "; ".join(words) or "no checkpoint, shapes alone"


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
    for f in (percent, span, figure, number, ratio, times, interval, verdict, against, perplexity,
              yardstick, closed, today, dict)
}  # fmt: skip
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


@cache
def measured(block: str, above: bool = True) -> str:
    """The table of that name; ``above``: with its commands and files."""
    view = next((v for v in registry()["views"] if block in v["blocks"]), None)
    if view is None:
        raise KeyError(f"no view of benchmarks/tables.yaml is named {block}")
    names = registry()["blocks"].get(block, [block])
    files = [result(name) for name in names]
    known: dict[str, Any] = {"data": files[0], "files": files, "block": block}
    pieces = [source(names)] if above else []
    for part in evaluated(view.get("parts", "=[dict(rows=data.rows)]"), known):
        if part.get("caption"):
            pieces.append(part["caption"])
        if rows := part.get("rows"):
            shown = {**view, "columns": view[part.get("columns", "columns")]}
            pieces.append(_part(shown, {**known, **part, "rows": list(rows)}))
    if "note" in view:
        pieces.append(_LANGUAGE.from_string(view["note"]).render(**HELPERS, **known).strip())
    return "\n\n".join(pieces)


# What the program says of itself.


def commands() -> str:
    """Every command with its flags, from the application."""
    from typer.main import get_command

    from dart_llm.cli.app import app

    return "\n\n".join(_command("dart-llm", get_command(app)))


def _command(name: str, command: Any) -> Iterator[str]:
    yield f"## {name}"
    flags = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    places = [p.metavar or p.name.upper() for p in command.params if p not in flags]
    inner = getattr(command, "commands", {})
    words = [name, *places, *(["COMMAND"] if inner else []), *(["[OPTIONS]"] if flags else [])]
    yield f"```text\n{' '.join(words)}\n```"
    yield _plain(command.help)
    for panel in dict.fromkeys(p.rich_help_panel for p in flags):
        rows = [[_flag(p), _cell(p.help or "")] for p in flags if p.rich_help_panel == panel]
        yield markdown_table([panel or "flag", "meaning"], rows, left=2)
    if epilog := getattr(command, "epilog", None):
        yield f"```text\n{_plain(epilog)}\n```"
    for own, below in inner.items():
        yield from _command(f"{name} {own}", below)


def _plain(text: str | None) -> str:
    """A help text without the marks by which typer keeps its lines."""
    return re.sub(r"[\b\f]\n?", "", text or "").strip()


def _flag(option: Any) -> str:
    words = ", ".join(f"`{word}`" for word in [*option.opts, *option.secondary_opts])
    return words if option.is_flag else f"{words} {option.metavar or ''}".strip()


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|").replace("<", "&lt;")


SCRIPTS = ("run_experiment.sh", "run_knowledge_drift.sh")


def variables() -> str:
    """The variables of the two scripts, with the defaults that these have."""
    from dart_llm.studies.generate.settings import RunSettings

    pattern = re.compile(r'^: "\$\{([A-Z_]+):=(.*)\}"', re.MULTILINE)
    first, second = (dict(pattern.findall((ROOT / name).read_text("utf-8"))) for name in SCRIPTS)
    rows = []
    for name, default in first.items():
        meaning = RunSettings.model_fields[name.lower()].description or ""
        if default:  # the script's, which may be another one than the flag's
            meaning = re.sub(r" \(default: [^)]*\)", "", meaning)
        values = [f"`{value}`" if value else "not given" for value in (default, second[name])]
        shown = values[0] if len({*values}) == 1 else f"{values[0]}; {values[1]} in `{SCRIPTS[1]}`"
        flag = f"`--{name.lower().replace('_', '-')}`"
        rows.append([f"`{name}`", flag, _cell(shown), _cell(meaning)])
    return markdown_table(["variable", "flag", "default", "meaning"], rows, left=4)


def data_sets() -> str:
    """The catalogue of data sets."""
    from dart_llm.data.datasets import DATA_SETS, LAST_RUN, get

    rows = []
    for data in map(get, DATA_SETS):
        where = [f"`{data.hub_id}`", *([f"`{data.config}`"] if data.config else [])]
        revision = f" ({data.revision})" if data.revision else ""
        columns = ", ".join(f"`{name}`" for names in data.columns.values() for name in names)
        page = data.licence_page
        licence = f"[{data.licence}]({page})" if page else data.licence
        uses = ", ".join([*data.uses, *(f"`{task}`" for task in data.tasks[:1])])
        place = ", ".join(where) + revision + (", gated" if data.gated else "")
        rows.append([f"`{data.name}`", place, data.split, columns, uses, licence])
    heads = ["name", "on the hub", "split", "columns", "used for", "licence"]
    table = markdown_table(heads, rows, left=len(heads))
    return f"{table}\n\n`make test-online` last passed: {LAST_RUN}."


def checkpoints() -> str:
    """Every checkpoint with a checksum in benchmarks/results, and the files that it is in."""
    facts: dict[str, dict[str, Any]] = {}
    dtypes: dict[str, set[str]] = {}
    files: dict[str, set[str]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        for found in recorded_checkpoints(result(path.stem)):
            if key := found.get("sha256"):
                known = {k: v for k, v in found.items() if v is not None}
                facts.setdefault(key, {}).update(known)
                dtypes.setdefault(key, set()).add(str(found["dtype"]))
                files.setdefault(key, set()).add(path.stem)
    parts = []
    for key, found in sorted(facts.items(), key=lambda pair: str(pair[1]["name"]).lower()):
        links = ", ".join(f"[{n}](benchmarks/results/{n}.json)" for n in sorted(files[key]))
        parts.append(
            f"**{found['name']}**: {found['source']}; file quantisation "
            f"{found['file_quantisation']}; {found['parameters']:,} parameters as loaded; run in "
            f"{' and '.join(sorted(dtypes[key]))}; sha256 `{key}`. Files: {links}."
        )
    return "\n\n".join(parts)


def model_types() -> str:
    """The model types of the package, with the tiny models of the tests that stand for them."""
    from dart_llm.models.architectures import LAYER_NAMES

    written = (ROOT / "tests/helpers/tiny.py").read_text(encoding="utf-8")
    tested: dict[str, list[str]] = {}
    for name, kind in re.findall(r'^    "([\w-]+)": \("(\w+)"', written, re.MULTILINE):
        tested.setdefault(kind, []).append(name)
    rows = [
        [f"`{kind}`", ", ".join(f"`{name}`" for name in tested.get(kind, [])) or "**not tested**"]
        for kind in sorted(LAYER_NAMES)
    ]
    return markdown_table(["model type", "tested as"], rows, left=2)


MACROS: dict[str, Callable[..., str]] = {
    f.__name__: f for f in (measured, commands, variables, data_sets, checkpoints, model_types)
}
CALL = re.compile(r"^\{\{ (\w+)\((.*)\) \}\}$", re.MULTILINE)


def expanded(text: str) -> str:
    """The page with every call of a macro replaced by what it gives."""

    def call(match: re.Match[str]) -> str:
        arguments = ast.literal_eval(f"({match[2]},)") if match[2] else ()
        return MACROS[match[1]](*arguments)

    return CALL.sub(call, text)


# Hooks of mkdocs.

BROUGHT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md",
           "third-party.md": "THIRD_PARTY.md", "changelog.md": "CHANGELOG.md",
           "benchmarks.md": "benchmarks/README.md"}  # fmt: skip
"""Pages of the site that lie outside docs/."""


def on_files(files: Any, config: Any) -> Any:
    """Bring the README and its like, and the results files, into the site."""
    from mkdocs.structure.files import File

    for place, path in BROUGHT.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    for path in sorted(RESULTS.glob("*.json")):
        place = f"benchmarks/results/{path.name}"
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Call the macros, and turn links that hold in the repository into links of the site.

    What the site lacks (sources, tests, examples) stays as the text of its link.
    """
    home = Path(BROUGHT.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent
    places = {path: place for place, path in BROUGHT.items()}

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        where = (ROOT / home / path).resolve()
        if not path or not where.exists() or ROOT not in where.parents:
            return match[0]
        inside = where.relative_to(ROOT).as_posix()
        place = places.get(inside, inside.removeprefix("docs/"))
        if files.get_file_from_path(place) is None:
            return str(text)
        return f"{image}[{text}]({place}{'#' + anchor if anchor else ''})"

    linked = re.sub(r"(!?)\[([^\]]*)\]\(((?!https?:|mailto:)[^)\s]+)\)", link, markdown)
    return expanded(linked)
