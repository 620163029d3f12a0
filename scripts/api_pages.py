"""The blocks of docs/api*.md: signatures and docstrings of everything that is public.

``PAGES`` says what is there; tests/test_api_docs.py says what must be.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import source_docs as source  # beside this file
from source_docs import Found

Names = dict[str, str]
PAGES: dict[str, dict[str, Names]] = {
    "api": {
        "start": {"dart_llm": "load prune restore"},
        "run": {"dart_llm": "Run"},
        "records": {
            "dart_llm": "RunReport Remask DriftCheck",
            "dart_llm.pruning.records": "SequenceReport LayerStat",
        },
        "settings": {
            "dart_llm": "PruneConfig",
            "dart_llm.pruning.config": "ScoreConfig BudgetConfig DriftConfig RemaskConfig "
            "PriorConfig CalibrationConfig TokenConfig DEFAULT_SPARSITY",
        },
        "errors": {
            "dart_llm": "DartError ConfigError UnknownName UnsupportedModel AttachError LoadError "
            "MissingExtra ResultsError"
        },
    },
    "api-engine": {
        "engine": {"dart_llm.engine": "Engine Sampling Ask Answer"},
        "told": {
            "dart_llm.engine.engine": "Record",
            "dart_llm.engine.events": "Usage Timings Start PromptToken Token Likely Check Masked "
            "Mask Done Failed",
        },
    },
    "api-measure": {
        "ready": {
            "dart_llm.session.prepare": "prepare PreparedMethod",
            "dart_llm.calibration.self_text": "remember_tokenizer",
        },
        "perplexity": {"dart_llm.evaluation.perplexity": "slices score Scored"},
        "texts": {
            "dart_llm.data.texts": "subjects read all_text topic_shift prompt_names read_prompt "
            "openings"
        },
        "activations": {
            "dart_llm.models.capture": "Recording",
            "dart_llm.settings": "Wanted",
        },
        "drift": {
            "dart_llm.studies.drift.report": "write_all write",
            "dart_llm.studies.drift.view": "read",
        },
    },
    "api-extend": {
        "registry": {"dart_llm.pruning.registry": "Registry METHODS SCORES BUDGETS DRIFT_RULES"},
        "scores": {
            "dart_llm.pruning.scores": "score Score squared squared_share",
            "dart_llm.pruning.weights": "FfnWeights",
            "dart_llm.pruning.statistics": "LayerPrior",
        },
        "budgets": {"dart_llm.pruning.budgets": "budget Budget LayerView round_counts"},
        "rules": {"dart_llm.pruning.drift": "Rule"},
        "architectures": {"dart_llm.models.architectures": "LayerNames LAYERS"},
    },
}
"""Page of docs/ -> block -> module by which users import -> names."""


def names() -> Iterator[tuple[str, str]]:
    """Module and name of everything that is on the pages."""
    for sections in PAGES.values():
        for modules in sections.values():
            for module, words in modules.items():
                yield from ((module, name) for name in words.split())


def tables(root: Path) -> dict[str, tuple[Path, str]]:
    """Block name -> the page and its content, as check_docs.py wants them."""
    package = root / "src/dart_llm"
    return {
        f"{page}-{section}": (root / f"docs/{page}.md", block(package, modules))
        for page, sections in PAGES.items()
        for section, modules in sections.items()
    }


def block(package: Path, modules: Names) -> str:
    """The entries of one block."""
    pairs = [(module, name) for module, words in modules.items() for name in words.split()]
    return "\n\n".join(entry(package, module, name) for module, name in pairs)


def entry(package: Path, place: str, name: str) -> str:
    """Heading, signature and text of one public name."""
    found = source.find(package, place, name)
    parts = [f"### `{place}.{name}`"]
    if isinstance(found.node, ast.ClassDef):
        parts += _class(found)
    elif isinstance(found.node, ast.FunctionDef):
        parts += [_code(source.heading(found)), _text(found)]
    else:
        parts += [_code(source.statement(found)), _text(found)]
    return "\n\n".join(parts)


def _class(found: Found) -> Iterator[str]:
    fields, methods = source.members(found)
    makers = [one for one in methods if one.name == "__init__"]
    body = [*map(source.statement, fields), *map(source.heading, makers)]
    colon = ":" if body else ""
    yield _code("\n".join([source.heading(found) + colon, *map(_indented, body)]))
    yield _text(found)
    yield from (source.markdown(one.doc) for one in makers if one.doc)
    if told := [f"- `{one.name}`: {source.markdown(one.doc)}" for one in fields if one.doc]:
        yield "\n".join(one.replace("\n", "\n  ") for one in told)
    for method in methods:
        if method not in makers:
            yield f"#### `{found.name}.{method.name}`"
            yield _code(source.heading(method))
            yield _text(method)


def _text(found: Found) -> str:
    if not found.doc:
        raise SystemExit(f"{found.name} is public and has no docstring")
    return source.markdown(found.doc)


def _indented(text: str) -> str:
    return textwrap.indent(text, "    ")


def _code(text: str) -> str:
    return f"```py\n{text}\n```"
