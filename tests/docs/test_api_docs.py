"""docs/api*.md: everything public is there, with a docstring, as the code has it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path

import pytest

import dart_llm
from scripts_of import FOLDER, script

ROOT = FOLDER.parent
api_pages, source_docs = script("api_pages"), script("source_docs")
NAMES = tuple(api_pages.names())
PAGES = {name: (ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in api_pages.PAGES}
HEADINGS = re.findall(r"^#{3,4} `(.+)`$", "\n".join(PAGES.values()), re.MULTILINE)
CLASSES = [
    (name, thing)
    for module, name in NAMES
    if inspect.isclass(thing := getattr(import_module(module), name))
]


def public_methods(thing: type) -> Iterator[str]:
    """Methods and properties that the class itself defines."""
    for name, value in vars(thing).items():
        kinds = property | classmethod | cached_property
        method = inspect.isfunction(value) or isinstance(value, kinds)
        if method and not name.startswith("_"):
            yield name


def imported() -> set[tuple[str, str]]:
    """Module and name of what the documentation and the examples import from the package."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    texts += [
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")
    ]
    texts += [path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")]
    notebook = json.loads((ROOT / "examples/first_look.ipynb").read_text(encoding="utf-8"))
    texts += ["".join(cell["source"]) for cell in notebook["cells"]]
    found = set()
    for module, words in re.findall(r"^from (dart_llm[\w.]*) import (.+)$", "\n".join(texts), re.M):
        found |= {(module, word.split(" as ")[0].strip()) for word in words.split(",")}
    for module, name in re.findall(r"\b(dart_llm(?:\.\w+)*)\.(\w+)\(", "\n".join(texts)):
        found.add((module, name))
    return found


def test_every_public_name_has_a_heading() -> None:
    assert [name for name in dart_llm.__all__ if f"dart_llm.{name}" not in HEADINGS] == []
    assert len(HEADINGS) == len(set(HEADINGS)) > 100


def test_what_the_documentation_imports_has_a_heading() -> None:
    modules = {("dart_llm", "texts")}  # imported whole
    found = imported() - modules
    assert len(found) > 15
    assert [f"{module}.{name}" for module, name in sorted(found - set(NAMES))] == []


@pytest.mark.parametrize(("name", "thing"), CLASSES)
def test_every_public_method_has_a_heading_and_says_what_it_does(name: str, thing: type) -> None:
    methods = list(public_methods(thing))
    assert [one for one in methods if f"{name}.{one}" not in HEADINGS] == []
    assert [one for one in methods if not inspect.getdoc(vars(thing)[one])] == []


def test_what_is_imported_is_what_was_read() -> None:
    """Names are followed through imports in the source; Python follows them by itself."""
    for module, name in NAMES:
        thing = getattr(import_module(module), name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert source_docs.find(ROOT / "src/dart_llm", module, name).doc == inspect.getdoc(
                thing
            )


def test_fields_stand_on_the_page_with_their_defaults() -> None:
    fields = dart_llm.PruneConfig.model_fields
    settings = PAGES["api"].split("### `dart_llm.PruneConfig`")[1].split("```")[1]
    shown = re.findall(r"^    (\w+): ", settings, re.MULTILINE)
    assert shown == list(fields)
    assert '    executor: Literal["auto", "masked", "compact",' in settings


def test_a_changed_docstring_or_default_changes_the_page(tmp_path: Path) -> None:
    package = tmp_path / "src/dart_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from dart_llm.deep import seek\n")
    text = 'def seek(\n    a: int = 1,\n) -> None:\n    """Go.\n\n    ``a``: how far.\n    """\n'
    pages = []
    for source in (text, text.replace("= 1", "= 2"), text.replace("how far", "where to")):
        (package / "deep.py").write_text(source)
        source_docs.module.cache_clear()
        pages.append(api_pages.entry(package, "dart_llm", "seek"))
    assert pages[0] == (
        "### `dart_llm.seek`\n\n```py\ndef seek(\n    a: int = 1,\n) -> None\n```\n\n"
        "Go.\n\n`a`: how far."
    )
    assert pages[1] == pages[0].replace("= 1", "= 2")
    assert pages[2] == pages[0].replace("how far", "where to")


@pytest.mark.parametrize(
    ("text", "page"),
    [
        ("One.  ``a``: two.", "One. `a`: two."),
        ("A ``b\n    c`` d", "A `b\nc` d"),
        (
            '(docs/method.md, "Token-level tracing").',
            "([method.md](method.md#token-level-tracing)).",
        ),
        ("see docs/drift.md", "see [drift.md](drift.md)"),
        (">>> f()    # doctest: +SKIP\n... g()", "```py\nf()\ng()\n```"),
    ],
)
def test_docstrings_become_markdown(text: str, page: str) -> None:
    assert source_docs.markdown(text) == page


def test_a_name_without_docstring_or_definition_is_refused(tmp_path: Path) -> None:
    package = tmp_path / "dart_llm"
    package.mkdir()
    (package / "__init__.py").write_text("def silent() -> None:\n    pass\n")
    with pytest.raises(SystemExit, match="silent is public and has no docstring"):
        api_pages.entry(package, "dart_llm", "silent")
    with pytest.raises(SystemExit, match="dart_llm holds no other"):
        api_pages.entry(package, "dart_llm", "other")
