"""The architecture: imports go downward only, and importing the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dart_llm

SOURCE = Path(dart_llm.__file__).parent
LEVELS = {
    0: "errors cache kept config config_parts layer_spec records registry",
    1: "linear_time native_build weights layer_prior low_rank scores proxies evidence budgets "
    "depth_budget masks compensation drift select life signals detection "
    "plan observations reference tracer accounting low_bit token_select token_costs "
    "token_statistics drift_guards newest_masks",
    2: "bare agreement step_agreement names arch read_points ffn token_ffn layout native_ffn "
    "native_linear layer loop "
    "slim_parts slim_cache slim slim_run step_torch graph_decoder "
    "replacement changes watch attach executor export",
}
"""Files of each layer of the design; every other file joins, measures or is a door: level 3."""

LEVEL = {name: level for level, names in LEVELS.items() for name in names.split()}
FILES = sorted(SOURCE.rglob("*.py"))
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


def module_of(path: Path) -> str:
    """``presets.dart`` for presets/dart.py, ``""`` for the package itself."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


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


def level_of(module: str) -> int:
    return LEVEL.get(module, 3)


def test_no_test_imports_another() -> None:
    """What tests share stands in files of its own, so that no test module is loaded twice."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    assert Path(__file__) in files
    found = {path.name: set(imports(ast.parse(path.read_text("utf-8")))) for path in files}
    tests = {path.stem for path in files if path.name.startswith("test_")}
    assert {name: taken & tests for name, taken in found.items() if taken & tests} == {}


def test_the_layers_name_files_that_exist() -> None:
    found = {module_of(path) for path in FILES}
    assert set(LEVEL) <= found


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "dart_llm")
def test_imports_go_downward(path: Path) -> None:
    own = module_of(path)
    if not own:
        return  # the package's face names things of every layer, lazily: see the import test
    known = {module_of(other) for other in FILES}
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if name.startswith("dart_llm."):
            target = name.removeprefix("dart_llm.")
            target = target if target in known else target.rpartition(".")[0]
            assert level_of(target) <= level_of(own), f"{own} imports {target}"
        if level_of(own) == 0:
            assert name.split(".")[0] not in HEAVY, f"{own} imports {name}"
        if level_of(own) == 1:
            assert name.split(".")[0] not in HEAVY[1:], f"{own} imports {name}"


def test_within_a_layer_nothing_goes_round() -> None:
    known = {module_of(path): path for path in FILES}
    graph = {
        name: {
            found.removeprefix("dart_llm.")
            for found in imports(ast.parse(path.read_text(encoding="utf-8")))
            if found.removeprefix("dart_llm.") in known and found != "dart_llm"
        }
        for name, path in known.items()
        if LEVEL.get(name, 3) < 3
    }
    done: set[str] = set()
    while len(done) < len(graph):
        free = {name for name in graph if name not in done and graph[name] - {""} <= done}
        assert free, f"imports go round among {sorted(set(graph) - done)}"
        done |= free


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "dart_llm")
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


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
    found = imported_by("import dart_llm.tracer, dart_llm.accounting, dart_llm.proxies")
    assert "torch" in found
    assert not found & set(HEAVY[1:])
