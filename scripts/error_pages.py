"""The list of docs/errors.md: every sentence of an error that is raised on purpose."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from measured_tables import table  # beside this file
from messages import HOLE, SERVER, Sentence, holds, pieces, quoted, sentences

CLASSES = {
    "ConfigError": "A setting, an argument, a text or a file does not fit.",
    "UnknownName": "A `ConfigError`. What follows names the near ones, or all where none is near.",
    "UnsupportedModel": "The model holds what cannot be pruned.",
    "AttachError": "The model is being pruned already, or is not where it must be.",
    "LoadError": "A model or a text could not be had or read.",
    "MissingExtra": "An optional part is not installed; the sentence has the command.",
    "ResultsError": "A results folder cannot be written, read or resumed.",
    "DartError": "The base class: what a run finds out while it computes.",
    "CellsFailed": "Some cells of a sweep or a study failed, and the others are kept.",
}
"""Classes of errors in the order of the page, and what each is about."""


def tables(root: Path) -> dict[str, tuple[Path, str]]:
    """Block name -> the page and its content, as check_docs.py wants them."""
    found = sentences(root / "src/dart_llm")
    sections = faq(root)
    page = root / "docs/errors.md"
    unknown = {one.kind for one in found} - {*CLASSES, SERVER}
    if unknown:
        raise SystemExit(f"error_pages.py lacks a line about {', '.join(sorted(unknown))}")
    return {
        "errors": (page, "\n\n".join(listed(found, sections))),
        "errors-server": (page, served(found, sections)),
    }


def faq(root: Path) -> dict[str, str]:
    """Quoted message -> anchor of its section of docs/faq.md, the longest first."""
    text = (root / "docs/faq.md").read_text(encoding="utf-8")
    anchors = {}
    for heading in re.findall(r"^### (`.+)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        anchors.update(dict.fromkeys(quoted(f"### {heading}"), slug))
    return dict(sorted(anchors.items(), key=lambda one: -len(one[0])))


def listed(found: Sequence[Sentence], sections: dict[str, str]) -> Iterator[str]:
    """A heading and a list for each class."""
    for kind, about in CLASSES.items():
        lines = [
            f"- {code(one.text)}{_more(one.text, sections)}" for one in found if one.kind == kind
        ]
        yield "\n".join([f"## {kind}", "", about, "", *lines])


def served(found: Sequence[Sentence], sections: dict[str, str]) -> str:
    """The server's refusals by status."""
    lines = [["status", "`code`", "`message`"], ["---"] * 3]
    for one in found:
        if one.kind == SERVER:
            text = code(one.text).replace("|", "\\|") + _more(one.text, sections)
            lines.append([str(one.status), f"`{one.code}`" if one.code else "", text])
    return table(lines)


def code(text: str) -> str:
    """A sentence as a code span, with "…" for what differs."""
    shown = re.sub(rf"{HOLE}+", "…", text).strip()
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`"


def _more(text: str, sections: dict[str, str]) -> str:
    anchor = next((slug for told, slug in sections.items() if holds(text, pieces(told))), None)
    return f" ([more](faq.md#{anchor}))" if anchor else ""
