"""What a run gives its tracker."""

from __future__ import annotations

CONFIG = {"model": "gpt2", "prune": {"method": "dart", "sparsity": 0.5, "masks": None}}

MEASUREMENT = {
    "task": "arc_easy",
    "metrics": {"acc": 0.5, "acc_norm": None, "loss": float("nan")},
    "accounting": {"achieved_sparsity": 0.25, "remasks": 3, "layers": [1], "executor": "masked"},
}
