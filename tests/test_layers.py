"""The package's face, its errors, and that importing it is cheap; import-linter has the layers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dart_llm

HEAVY = {
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
}


def test_no_test_imports_another() -> None:
    """What tests share stands in files of its own, so that no test module is loaded twice."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    tests = {path.stem for path in files if path.name.startswith("test_")}
    for path in files:
        taken = re.findall(r"^ *(?:from|import) (\w+)", path.read_text("utf-8"), re.M)
        assert not tests & set(taken), path


def test_the_face_of_the_package() -> None:
    assert dart_llm.__all__ == sorted(set(dart_llm.__all__))
    assert set(dart_llm.__all__) <= set(dir(dart_llm))
    assert all(getattr(dart_llm, name) is not None for name in dart_llm.__all__)
    with pytest.raises(AttributeError, match="'dart_llm' has no attribute 'prunes'"):
        dart_llm.prunes  # noqa: B018


def test_errors_are_one_tree() -> None:
    faces = [getattr(dart_llm, name) for name in dart_llm.__all__ if name[0].isupper()]
    errors = [face for face in faces if issubclass(face, Exception)]
    assert len(errors) == 8 and all(issubclass(error, dart_llm.DartError) for error in errors)
    assert issubclass(dart_llm.UnknownName, dart_llm.ConfigError)


def imported_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``code``."""
    script = f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_configurations_and_names_need_no_torch() -> None:
    found = imported_by(
        "import dart_llm, dart_llm.errors, dart_llm.pruning.records, dart_llm.pruning.layer_table\n"
        "from dart_llm.pruning.config import PruneConfig\n"
        "from dart_llm.pruning.registry import ALL\n"
        "PruneConfig.build('dart', sparsity=0.5); [table.names() for table in ALL]"
    )
    assert "dart_llm" in found and not found & HEAVY


def test_the_policy_needs_no_transformers() -> None:
    found = imported_by(
        "import dart_llm.pruning.controller, dart_llm.pruning.accounting, dart_llm.pruning.scores"
    )
    assert found & HEAVY == {"torch"}
