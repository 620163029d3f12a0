"""The generated parts of docs/models.md: what was measured, what is tested, and by which tests.

Checkpoints come from benchmarks/results, model types from ``names.LAYERS`` and from the tiny models
of tests/tiny.py, which are built and asked what they are.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from measured_tables import table  # beside this file
from source_docs import markdown

ACTIVATIONS = ("SiLU", "GELU", "GELU (tanh)", "ReLU", "squared ReLU")
"""Names of ``native_ffn.ACTS``, by number."""
EXECUTORS = ("slim", "native", "graph", "compact", "masked")
EVERY = 'parametrize("name", NAMES)'
"""How a test says that it runs on every tiny model."""


def tables(root: Path) -> dict[str, tuple[Path, str]]:
    """Block name -> the page and its content, as check_docs.py wants them."""
    page = root / "docs/models.md"
    tiny = _tiny(root)
    return {
        "models-measured": (page, measured(root)),
        "models-types": (page, types(tiny)),
        "models-tests": (page, "\n".join(tests(root))),
    }


@dataclass
class Checkpoint:
    """What the results files say of one checkpoint."""

    facts: dict[str, Any]
    dtypes: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)


def checkpoints(root: Path) -> list[Checkpoint]:
    """Every checkpoint with a checksum in benchmarks/results, by name."""
    found: dict[str, Checkpoint] = {}
    for path in sorted((root / "benchmarks/results").glob("*.json")):
        for facts in _facts(json.loads(path.read_text(encoding="utf-8"))):
            one = found.setdefault(str(facts["sha256"]), Checkpoint({}))
            one.facts |= {key: value for key, value in facts.items() if value is not None}
            one.dtypes.add(str(facts["dtype"]))
            one.files.add(path.name)
    return sorted(found.values(), key=lambda one: str(one.facts["name"]).lower())


def _facts(data: Any) -> Iterator[dict[str, Any]]:
    if isinstance(data, dict):
        if data.get("sha256") and "file_quantisation" in data:
            yield data
        data = list(data.values())
    if isinstance(data, list):
        for value in data:
            yield from _facts(value)


def measured(root: Path) -> str:
    """A paragraph per checkpoint: what it is, and where its tables are."""
    pages = sorted({root / "README.md", *(root / "docs").glob("*.md")} - {root / "docs/models.md"})
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    parts = []
    for one in checkpoints(root):
        facts = one.facts
        lines = [
            f"**{facts['name']}**: {facts['source']};",
            f"file quantisation {facts['file_quantisation']}; {facts['parameters']:,} parameters "
            f"as loaded; run in {' and '.join(sorted(one.dtypes))};",
            f"sha256 `{facts['sha256']}`.",
            "",
        ]
        for page, text in texts.items():
            if known := sorted(name for name in one.files if f"results/{name}" in text):
                link = page.name if page.parent.name == "docs" else f"../{page.name}"
                files = ",\n  ".join(f"[{n}](../benchmarks/results/{n})" for n in known)
                lines.append(f"- [{page.name}]({link}):\n  {files}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _tiny(root: Path) -> Any:
    """The module tests/tiny.py."""
    sys.path.insert(0, str(root / "tests"))
    try:
        return import_module("tiny")
    finally:
        sys.path.pop(0)


def types(tiny: Any) -> str:
    """One row per model type of the package."""
    from dart_llm.models.architectures import LAYER_NAMES as LAYERS

    lines = [["model type", "FFN", "biases", "activation", "executors", "tested as"]]
    lines.append(["---"] * len(lines[0]))
    for model_type in sorted(LAYERS):
        names = [name for name, (kind, _) in tiny.CONFIGS.items() if kind == model_type]
        if not names:
            lines.append([f"`{model_type}`", "", "", "", "", "**not tested**"])
            continue
        rows = [_row(tiny.tiny(name)) for name in names]
        cells = [" / ".join(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
        lines.append([f"`{model_type}`", *cells, ", ".join(f"`{name}`" for name in names)])
    return table(lines)


def _row(model: Any) -> list[str]:
    """FFN, biases, activation and executors of one model."""
    from dart_llm.models.describe import describe
    from dart_llm.patching.executors.native_ffn import act_number

    block = describe(model).blocks[0]
    number = act_number(block.act)
    biased = [
        role
        for role, part in (("gate", block.gate), ("up", block.up), ("down", block.down))
        if part is not None and getattr(part, "bias", None) is not None
    ]
    every = len(biased) == (2 if block.gate is None else 3)
    return [
        _shape(block),
        "all" if every else ", ".join(biased) or "none",
        "another" if number is None else ACTIVATIONS[number],
        ", ".join(_executors(model, block)),
    ]


def _shape(block: Any) -> str:
    words = ["plain" if block.gate is None and not block.fused else "gated"]
    words += ["gate and up fused"] * block.fused
    words += ["projections in the layer itself"] * block.inline
    words += ["`Conv1D` weights"] * (type(block.up).__name__ == "Conv1D")
    words += ["norm after it"] * (block.post_norm is not None)
    words += ["adds the residual itself"] * block.adds_residual
    return ", ".join(words)


def _executors(model: Any, block: Any) -> list[str]:
    from dart_llm.models.llama import slim_unsupported_reason as why_not_slim
    from dart_llm.patching.executors import no_steps_reason as why_no_steps
    from dart_llm.patching.executors.native_ffn import native_unsupported_reason as why_not_block

    refused = {
        "slim": why_not_slim(model) or why_not_block(block),
        "native": why_not_block(block),
        "graph": why_no_steps("graph", model),
        "compact": "inline" if block.inline else "",
    }
    return [name for name in EXECUTORS if not refused.get(name)]


def tests(root: Path) -> Iterator[str]:
    """A line per test file that runs on every tiny model, with the first line of its docstring."""
    for path in sorted((root / "tests").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if re.search(r"^from tiny import .*\bNAMES\b", text, re.M) and EVERY in text:
            told = markdown(text.removeprefix('"""').split("\n")[0].removesuffix('"""'))
            yield f"- [{path.name}](../tests/{path.name}):\n  {told}"
