"""Lists in the documentation that are generated from the program: variables, data, models.

tables.py writes them into the pages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with left-aligned columns."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def recorded_checkpoints(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every checkpoint of a results file."""
    if "checkpoints" in data:
        return list(data["checkpoints"].values())
    recorded = [run.get("checkpoint") for run in data.get("runs", ())]
    recorded += [data.get("checkpoint_of_the_cells") or data.get("checkpoint")]
    return list({facts["name"]: facts for facts in recorded if facts}.values())


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|").replace("<", "&lt;")


SCRIPTS = ("run_experiment.sh", "run_knowledge_drift.sh")


def variables() -> str:
    """The variables of the two scripts, with their defaults and comments."""
    pattern = re.compile(r'^: "\$\{([A-Z_]+):=(.*)\}" +# (.*)', re.MULTILINE)
    first, second = (
        {name: (default, text) for name, default, text in pattern.findall(path.read_text("utf-8"))}
        for path in (ROOT / name for name in SCRIPTS)
    )
    rows = []
    for name, (default, meaning) in first.items():
        values = [f"`{value}`" if value else "not set" for value in (default, second[name][0])]
        shown = values[0] if len({*values}) == 1 else f"{values[0]}; {values[1]} in `{SCRIPTS[1]}`"
        rows.append([f"`{name}`", _cell(shown), _cell(meaning)])
    return markdown_table(["variable", "default", "meaning"], rows)


def data_sets() -> str:
    """A table of the data sets that dart-llm knows."""
    from dart_llm.data.datasets import DATA_SETS, LAST_RUN, get

    rows = []
    for data in map(get, DATA_SETS):
        where = [f"`{data.hub_id}`", *([f"`{data.config}`"] if data.config else [])]
        revision = f" ({data.revision})" if data.revision else ""
        columns = ", ".join(f"`{name}`" for names in data.columns.values() for name in names)
        page = data.licence_page
        licence = f"[{data.licence}]({page})" if page else data.licence
        uses = ", ".join([*data.uses, *(f"`{task}`" for task in data.tasks[:1])])
        source = ", ".join(where) + revision + (", gated" if data.gated else "")
        rows.append([f"`{data.name}`", source, data.split, columns, uses, licence])
    heads = ["name", "on the hub", "split", "columns", "used for", "licence"]
    table = markdown_table(heads, rows)
    result = f"last passed on {LAST_RUN}" if LAST_RUN else "has not been run yet"
    return f"{table}\n\n`make test-online` {result}."


def checkpoints() -> str:
    """Every checkpoint with a checksum in benchmarks/results, and the files that name it."""
    facts: dict[str, dict[str, Any]] = {}
    dtypes: dict[str, set[str]] = {}
    files: dict[str, set[str]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        for recorded in recorded_checkpoints(json.loads(path.read_text("utf-8"))):
            if key := recorded.get("sha256"):
                present = {k: v for k, v in recorded.items() if v is not None}
                facts.setdefault(key, {}).update(present)
                dtypes.setdefault(key, set()).add(str(recorded["dtype"]))
                files.setdefault(key, set()).add(path.stem)
    parts = []
    for key, checkpoint in sorted(facts.items(), key=lambda pair: str(pair[1]["name"]).lower()):
        links = ", ".join(f"[{n}](../benchmarks/results/{n}.json)" for n in sorted(files[key]))
        parts.append(
            f"**{checkpoint['name']}**: {checkpoint['source']}; file quantisation "
            f"{checkpoint['file_quantisation']}; {checkpoint['parameters']:,} parameters as "
            f"loaded; run in "
            f"{' and '.join(sorted(dtypes[key]))}; sha256 `{key}`. Files: {links}."
        )
    return "\n\n".join(parts)


def model_types() -> str:
    """The supported model types, with the tiny models that the tests build for each."""
    from dart_llm.models.architectures import LAYER_NAMES

    written = (ROOT / "tests/helpers/tiny.py").read_text(encoding="utf-8")
    tested: dict[str, list[str]] = {}
    for name, kind in re.findall(r'^    "([\w-]+)": \("(\w+)"', written, re.MULTILINE):
        tested.setdefault(kind, []).append(name)
    rows = [
        [f"`{kind}`", ", ".join(f"`{name}`" for name in tested.get(kind, [])) or "**not tested**"]
        for kind in sorted(LAYER_NAMES)
    ]
    return markdown_table(["model type", "tested as"], rows)


def names() -> str:
    """The public names of ``dart_llm``, with the first line of each docstring."""
    import dart_llm

    docs = {name: getattr(dart_llm, name).__doc__ or "" for name in dart_llm.__all__}
    rows = [[f"`{name}`", _cell(text.partition("\n")[0])] for name, text in docs.items()]
    return markdown_table(["name", "what"], rows)


LISTS: dict[str, Callable[[], str]] = {
    "variables": variables,
    "data-sets": data_sets,
    "checkpoints": checkpoints,
    "model-types": model_types,
    "names": names,
}
