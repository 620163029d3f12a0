"""What is measured, and under which settings: a method made ready for one model."""

import pytest

from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import BoundMethod, prepare
from steps import picked, shared_model

HALF = PruneConfig.build("griffin", sparsity=0.5, masking_step=4, drift="interval 4")


def test_likelihood_tasks_have_masks_at_once_and_never_a_new_one():
    method = BoundMethod(shared_model(), None, HALF)
    run, scored = method.run(), method.run(likelihood=True)
    assert run.config == HALF
    assert (scored.config.masking_step, scored.config.min_evidence) == (0, 0)
    assert scored.config.drift.rule == "never" and scored.config.sparsity == 0.5


TABLE = PruneConfig.build("griffin", budget={"table": "all:0.5"})
CASES = [
    (None, None, ("dense", "dense", 0.0)),
    (PruneConfig.build("dense"), None, ("dense", "dense", 0.0)),
    (HALF, None, ("griffin@0.5", "griffin", 0.5)),
    (TABLE, None, ("griffin@table", "griffin", None)),
    (HALF, picked(), ("fixed masks", "fixed masks", None)),
]


@pytest.mark.parametrize(("config", "masks", "expected"), CASES)
def test_what_it_is_called(config, masks, expected):
    method = prepare(shared_model(), None, config, masks=masks)
    assert (method.label, method.method, method.requested) == expected
    assert (method.run() is None) == (expected[0].startswith("dense"))
    assert ("weight_bytes" in method.facts) == (method.run() is None)
