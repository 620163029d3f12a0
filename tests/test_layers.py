"""The package's face, its errors, and that importing it is cheap; import-linter has the layers."""

import subprocess
import sys

import pytest

import dart_llm

HEAVY = set(
    "torch transformers lm_eval fastapi prometheus_client matplotlib ray sacrebleu pandas".split()
)


def test_the_face_of_the_package():
    assert dart_llm.__all__ == sorted(set(dart_llm.__all__))
    assert set(dart_llm.__all__) <= set(dir(dart_llm))
    assert all(getattr(dart_llm, name) is not None for name in dart_llm.__all__)
    with pytest.raises(AttributeError, match="'dart_llm' has no attribute 'prunes'"):
        dart_llm.prunes  # noqa: B018


NAMES = """
import dart_llm, dart_llm.errors, dart_llm.pruning.records, dart_llm.pruning.layer_table
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import ALL
PruneConfig.build('dart', sparsity=0.5); [table.names() for table in ALL]
"""
POLICY = "import dart_llm.pruning.controller, dart_llm.pruning.accounting, dart_llm.pruning.scores"


def test_importing_is_cheap():
    """Configurations and names load no heavy package, the policy torch alone."""
    for code, heavy in ((NAMES, set()), (POLICY, {"torch"})):
        script = f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        modules = set(done.stdout.split())
        assert "dart_llm" in modules and modules & HEAVY == heavy, done.stderr
