"""How many neurons a batch needs whose rows have masks of their own: the union of them.

    python benchmarks/batch_union.py

Every topic of the shipped passages is a prompt of at most ``PROMPT`` tokens and gets its GRIFFIN
mask.  Batches are drawn of them at random, ``DRAWS`` of each size.  Masks that are independent of
each other, of which each keeps 1 - s, have a union of 1 - s^B.  ``bytes``: what a step reads of the
weights over dense.  Writes benchmarks/results/batch-union.json.
"""

from __future__ import annotations

from typing import Any

import torch
from common import parser, save
from torch import Tensor

from dart_llm.data import passages
from dart_llm.models.loading import load
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.selection import MaskSelector
from dart_llm.session.run import Run

PROMPT, DRAWS = 256, 400
SPARSITIES = (0.3, 0.5, 0.7)
BATCHES = (1, 2, 4, 8, 16)


@torch.no_grad()
def masks_of(model: Any, prompts: list[Tensor]) -> dict[float, Tensor]:
    """Kept neurons, bool [prompts, all neurons], by sparsity."""
    found: dict[float, list[Tensor]] = {sparsity: [] for sparsity in SPARSITIES}
    with Run(model, PruneConfig.build("griffin", sparsity=0.5)) as run:
        for ids in prompts:
            model(ids, use_cache=False, logits_to_keep=1)
            evidence = run.controller.sequences[-1].evidence
            for sparsity, rows in found.items():
                config = run.config.replace({"sparsity": sparsity})
                chosen = MaskSelector(config, run.layers).select(evidence).masks
                rows.append(torch.cat([one.dense(torch.bool) for one in chosen if one is not None]))
    return {sparsity: torch.stack(rows) for sparsity, rows in found.items()}


def union(masks: Tensor, batch: int) -> float:
    """Mean share of neurons that some row of a batch keeps."""
    draw = torch.Generator().manual_seed(batch)
    shares = [
        masks[torch.randperm(len(masks), generator=draw)[:batch]].any(0).float().mean()
        for _ in range(DRAWS if batch > 1 else 1)
    ]
    return float(torch.stack(shares).mean()) if batch > 1 else float(masks.float().mean())


def main() -> None:
    args = parser(__doc__).parse_args()
    model, tokenizer = load(args.model, dtype="float32", weights="dense")
    topics = [part.text for passage in passages.shipped() for part in passage.segments()]
    prompts = [tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT] for text in topics]
    share = Run(model, PruneConfig.build("dense")).report().ffn_share_of_bytes
    rows = []
    for sparsity, masks in masks_of(model, prompts).items():
        for batch in BATCHES:
            kept = union(masks, batch)
            row = {"sparsity": sparsity, "batch": batch, "independent": 1 - sparsity**batch}
            rows.append({**row, "union": kept, "bytes": 1 - share * (1 - kept)})
            print(rows[-1], flush=True)
    data = {"prompts": len(prompts), "prompt_tokens": PROMPT, "draws": DRAWS, "rows": rows}
    print(save(args.out or "batch-union", model, {**data, "ffn_share_of_bytes": share}))


if __name__ == "__main__":
    main()
