"""Rows of different lengths, decoded together and alone."""

import torch

from dart_llm.session.run import prune
from steps import Forced, generate, selections, state_of
from tiny import tokens

LENGTHS = (20, 13, 8)
"""Real tokens of each row's prompt."""

CHOSEN = ([10, 11, 12, 13, 2], [20, 21, 2], [*range(30, 41), 2])
"""The tokens that each row generates; 2 ends it."""


def padded(side="left"):
    """Prompts of different lengths padded to one: ids and mask, [3, 20]."""
    ids, mask = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        place = slice(20 - length, 20) if side == "left" else slice(0, length)
        ids[row, place] = tokens(1, length, seed=row)[0]
        mask[row, place] = 1
    return ids, mask


def run_batch(model, rows, ids, mask, **settings):
    """Run the rows together (their choices forced).  Returns run, masks, logits [B, steps, V]."""
    chosen = [CHOSEN[row] for row in rows]
    run = prune(model, **settings)
    found = selections(run)
    forced = {"eos_token_id": 2, "logits_processor": [Forced(ids.shape[1], chosen)]}
    with run:
        out = generate(model, ids, len(CHOSEN[2]), attention_mask=mask, **forced)
    for row, wanted in enumerate(chosen):
        assert out.sequences[row, ids.shape[1] :].tolist()[: len(wanted)] == wanted
    return run, found, torch.stack(out.logits, 1)


def run_alone(model, row, **settings):
    ids = tokens(1, LENGTHS[row], seed=row)
    return run_batch(model, [row], ids, torch.ones_like(ids), **settings)


def evidence_sums(run, row=0):
    """Every sum and weight of the newest sequence, per layer."""
    return [
        {name: (known.total.clone(), float(known.weight)) for name, known in layer.sums.items()}
        for layer in state_of(run, row).evidence
    ]
