"""An independent account of token-level selection, by hooks on the down projections."""

import functools
from contextlib import contextmanager

import torch

from dart_llm.models.describe import describe
from dart_llm.pruning.config import PruneConfig
from prior_cases import SMALL

LEARNT = PruneConfig.build("dart-token", self_stats=SMALL)
"""The preset, but for a prior that is learnt in no time."""

PLAIN = LEARNT.replace(
    {"score": "normalized", "self_stats": None, "skip_sinks": False, "compensation": False}
)
"""The preset without what it learns: norms rank, the losers stand at 0."""


def best(strengths, keep):
    """Places of the largest, ascending; of equal ones the lower."""
    order = sorted(range(len(strengths)), key=lambda place: (-strengths[place], place))
    return sorted(order[:keep])


@contextmanager
def before_down(model, worth, act):
    """Calls ``act(layer, worth [I], u)`` before every down projection, which gets what it says."""
    handles = []
    for block in describe(model).blocks:
        weight = block.down.weight.detach().float()
        norms = weight.norm(dim=1 if type(block.down).__name__ == "Conv1D" else 0)
        value = norms if worth is None else worth[block.index]
        hook = functools.partial(lambda i, v, module, args: act(i, v, args[0]), block.index, value)
        handles.append(block.down.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def oracle(model, keep, prompt, mean=None, worth=None):
    """After prompts each token keeps its ``keep`` largest ``abs(u) * worth``, others their mean."""

    def keep_best(layer, value, u):
        if (u.shape[-2] if u.dim() == 3 else len(u)) >= prompt:
            return None
        rows = []
        for token in u.reshape(-1, u.shape[-1]):
            kept = best((token.abs() * value).tolist(), keep)
            row = torch.zeros_like(value) if mean is None else mean[layer].clone()
            row[kept] = token[kept]
            rows.append(row)
        return torch.stack(rows).reshape(u.shape)

    return before_down(model, worth, keep_best)


def lost_u(model, ids, keep, worth=None):
    """Per layer the sum of u [I] where ``oracle`` removes a neuron, and how often [I]."""
    lost = {}

    def take(layer, value, u):
        total, number = torch.zeros_like(value), torch.zeros_like(value)
        for token in u.reshape(-1, u.shape[-1]):
            kept = best((token.abs() * value).tolist(), keep)
            losers = torch.ones_like(value).index_fill(0, torch.tensor(kept), 0)
            total += token * losers
            number += losers
        lost[layer] = total, number

    with before_down(model, worth, take), torch.no_grad():
        model(ids)
    return lost
