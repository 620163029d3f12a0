"""The package's face, its errors, and that importing it is cheap; import-linter has the layers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dart_llm

SOURCE = Path(dart_llm.__file__).parent
HEAVY = (
    "torch",
    "transformers",
    "lm_eval",
    "fastapi",
    "prometheus_client",
    "matplotlib",
    "ray",
    "sentence_transformers",
    "bert_score",
    "sacrebleu",
    "plotly",
)


def imports(node: ast.AST) -> Iterator[str]:
    """Modules that are imported, anywhere in the file, unless for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from imports(other)
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}"
            assert child.module
            yield child.module
            if child.module == "dart_llm":
                yield from (f"dart_llm.{alias.name}" for alias in child.names)
        else:
            yield from imports(child)


def test_no_test_imports_another() -> None:
    """What tests share stands in files of its own, so that no test module is loaded twice."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    assert Path(__file__) in files
    found = {path.name: set(imports(ast.parse(path.read_text("utf-8")))) for path in files}
    tests = {path.stem for path in files if path.name.startswith("test_")}
    assert {name: taken & tests for name, taken in found.items() if taken & tests} == {}


def test_the_face_of_the_package() -> None:
    assert dart_llm.__all__ == sorted(dart_llm.__all__)
    assert len(set(dart_llm.__all__)) == len(dart_llm.__all__)
    assert set(dart_llm.__all__) <= set(dir(dart_llm))
    for name in dart_llm.__all__:
        assert getattr(dart_llm, name) is not None
    with pytest.raises(AttributeError, match="'dart_llm' has no attribute 'prunes'"):
        dart_llm.prunes  # noqa: B018


def test_errors_are_one_tree() -> None:
    errors = [getattr(dart_llm, name) for name in dart_llm.__all__ if name[0].isupper()]
    raised = [one for one in errors if issubclass(one, Exception)]
    assert len(raised) == 8
    assert all(issubclass(one, dart_llm.DartError) for one in raised)
    assert issubclass(dart_llm.UnknownName, dart_llm.ConfigError)


def imported_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``code``."""
    script = f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_is_lean() -> None:
    found = imported_by("import dart_llm")
    assert "dart_llm" in found
    assert not found & set(HEAVY)


@pytest.mark.parametrize("module", ["config", "layer_spec", "records", "registry", "errors"])
def test_the_lowest_layer_needs_no_torch(module: str) -> None:
    assert not imported_by(f"import dart_llm.{module}") & set(HEAVY)


def test_the_policy_needs_no_transformers() -> None:
    found = imported_by(
        "import dart_llm.pruning.controller, dart_llm.pruning.accounting, dart_llm.pruning.scores"
    )
    assert "torch" in found
    assert not found & set(HEAVY[1:])
