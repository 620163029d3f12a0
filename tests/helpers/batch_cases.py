"""Rows of different lengths, decoded together and alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dart_llm.session.run import prune
from steps import Forced, generate, selections, state_of
from tiny import tokens

LENGTHS = (20, 13, 8)
"""Real tokens of each row's prompt."""

CHOSEN = ([10, 11, 12, 13, 2], [20, 21, 2], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 2])
"""The tokens that each row generates; 2 ends it."""

NEW = max(len(row) for row in CHOSEN)


def padded(side: str = "left") -> tuple[Tensor, Tensor]:
    """Prompts of different lengths padded to one: ids and mask, [3, 20]."""
    ids, mask = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        place = slice(20 - length, 20) if side == "left" else slice(0, length)
        ids[row, place] = tokens(1, length, seed=row)[0]
        mask[row, place] = 1
    return ids, mask


def run_batch(model: Any, rows: list[int], ids: Tensor, mask: Tensor, **settings: Any):
    """Run the rows together (their choices forced).  Returns run, masks, logits [B, steps, V]."""
    chosen = [CHOSEN[row] for row in rows]
    run = prune(model, **settings)
    found = selections(run)
    with run:
        out = generate(
            model,
            ids,
            NEW,
            attention_mask=mask,
            eos_token_id=2,
            logits_processor=[Forced(ids.shape[1], chosen)],
        )
    for row, wanted in enumerate(chosen):
        assert out.sequences[row, ids.shape[1] :].tolist()[: len(wanted)] == wanted
    return run, found, torch.stack(out.logits, 1)


def run_alone(model: Any, row: int, **settings: Any):
    ids = tokens(1, LENGTHS[row], seed=row)
    return run_batch(model, [row], ids, torch.ones_like(ids), **settings)


def evidence_sums(run: Any, row: int = 0) -> list[dict[str, tuple[Tensor, float]]]:
    """Every sum and weight of the newest sequence, per layer."""
    return [
        {name: (known.total.clone(), float(known.weight)) for name, known in layer.sums.items()}
        for layer in state_of(run, row).evidence
    ]
