"""What is known of one layer before a prompt is seen (docs/method.md, "Prior")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dart_llm.evidence import LayerEvidence, Sum


@dataclass(frozen=True)
class LayerPrior:
    """Learnt once per model from text that it wrote itself.

    ``evidence``: the sums of a run, over that text.  ``curvature``: [I] float32, mean squared
    gradient of the loss by u_i; None where the run does not read it.  ``basis``: [r, D] in the
    model's dtype, directions of the FFN's input that low-rank compensation reads; None: it has no
    such compensation.
    """

    evidence: LayerEvidence
    curvature: Tensor | None = None
    basis: Tensor | None = None

    def nbytes(self) -> int:
        """Bytes held."""
        held = [t for t in (self.curvature, self.basis) if t is not None]
        return self.evidence.nbytes() + sum(t.numel() * t.element_size() for t in held)


def pooled(observed: LayerEvidence, prior: LayerPrior | None, tokens: float) -> LayerEvidence:
    """``observed`` and the prior, which weighs as much as ``tokens`` observed tokens.

    Returns new sums; a prior of None, or of no tokens, leaves what was observed.
    """
    if prior is None or tokens <= 0:
        return observed
    found = dict(observed.sums)
    for name, known in prior.evidence.sums.items():
        share, seen = tokens / float(known.divisor), found.get(name)
        if seen is None:
            found[name] = Sum(share * known.total, tokens)
        else:
            there = known.total.to(seen.total.device)
            found[name] = Sum(torch.add(seen.total, there, alpha=share), seen.weight + tokens)
    return LayerEvidence(found)
