"""Signals of a text that a drift rule can watch, recorded in one dense forward.

A signal is one vector per token, [T, D] float32.  The detector compares means of windows with the
mean of the reference, by cosine; means of attention distributions by the Jensen-Shannon divergence.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dart_llm.errors import DartError
from dart_llm.models import capture
from dart_llm.pruning.drift import SINKS, Compare, cosine
from dart_llm.studies.drift.settings import SCORES


@dataclass(frozen=True)
class Recorded:
    """One signal of one text.

    ``values``: [T, D] float32, on the host.  ``first``: the token with which the prompt's reference
    begins.  ``compare``: similarity of two means.
    """

    values: Tensor
    first: int = SINKS
    compare: Compare = cosine


def layers_of(name: str, count: int) -> tuple[int, ...]:
    """The layers, of ``count``, that a signal reads; none for the hidden state.

    The depth of layer l is l / (count - 1), as everywhere in docs/reference.md.
    """
    last = count - 1
    if name == "attention-80":
        return (round(0.8 * last),)
    if name == "attention-several":
        return tuple(range(math.ceil(last / 2), count))
    return () if name == "hidden" else (last,)


def keys_of(prompt: int) -> slice:
    """Positions over which attention distributions are taken: first half of the prompt, no sinks.

    A token of the first half does not see all of them, one of the second half or later does: every
    distribution from there on has the same support.
    """
    return slice(SINKS, prompt // 2)


def first_query(prompt: int) -> int:
    """The token from which distributions are the prompt's reference.

    A sixteenth of the prompt after the last key: tokens attend to what stands right before them,
    and just after the keys that would be the keys themselves.
    """
    return prompt // 2 + prompt // 16


def distribution(weights: Tensor, prompt: int) -> Tensor:
    """Attention weights [H, T, S] as distributions over ``keys_of(prompt)``: [T, K] float32.

    The mean over heads, restricted to the keys and scaled to sum 1; zeros where a token sees none
    of them, or gives them no weight.
    """
    mean = weights[:, :, keys_of(prompt)].float().mean(0)
    total = mean.sum(-1, keepdim=True)
    return torch.where(total > 0, mean / total.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


def shannon(mean: Tensor, others: Tensor) -> Tensor:
    """1 - Jensen-Shannon divergence (base 2) of two non-negative vectors [..., K]: [...].

    Both are scaled to sum 1 first.  1 for equal distributions, 0 for those that share nothing and
    where one is zero.  J. Lin, "Divergence measures based on the Shannon entropy", IEEE
    Transactions on Information Theory 37, 1991.
    """
    sums = mean.sum(-1), others.sum(-1)
    p, q = (x / s[..., None].clamp_min(1e-30) for x, s in zip((mean, others), sums, strict=True))
    middle = (p + q) / 2
    entropy = [-torch.xlogy(x, x).sum(-1) / math.log(2) for x in (middle, p, q)]
    similarity = (1 - entropy[0] + (entropy[1] + entropy[2]) / 2).clamp(0, 1)
    return torch.where((sums[0] > 0) & (sums[1] > 0), similarity, 0.0)


# One dense pass over a known text that records every signal of every token.


@torch.no_grad()
def record(model: Any, ids: Tensor, prompt: int, signals: Sequence[str]) -> dict[str, Recorded]:
    """All ``signals`` of one text, by name, in one forward of the untouched model.

    ids: [N], of which the first ``prompt`` are the prompt.  Values are float32 and on the host.
    Raises ``UnsupportedModel`` where the attention gives no weights, ``DartError`` where a signal
    is not finite.
    """
    count = capture.layer_count(model)
    last = layers_of(SCORES, count)
    layers = {name: layers_of(name, count) for name in signals if name != SCORES}
    taken: dict[int | str, Tensor] = {}

    def keep(name: int | str, v: Tensor) -> None:
        taken[name] = v.detach().to("cpu", torch.float32, copy=True)

    with contextlib.ExitStack() as stack:
        outputs = sorted({layer for own in layers.values() for layer in own})
        stack.enter_context(capture.attention_outputs(model, outputs, keep))
        if "hidden" in signals:
            stack.enter_context(capture.last_hidden(model, partial(keep, "hidden")))
        if SCORES in signals:
            weights = capture.attention_weights(
                model, last, lambda layer, own: keep(SCORES, distribution(own, prompt))
            )
            stack.enter_context(weights)
        model(ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    recorded = {}
    for name in signals:
        if name == SCORES:
            recorded[name] = Recorded(taken[SCORES], first_query(prompt), shannon)
        elif name == "attention-several":  # each token's vectors of unit length, side by side
            parts = [normalize(taken[layer], dim=-1) for layer in layers[name]]
            recorded[name] = Recorded(torch.cat(parts, -1))
        else:
            recorded[name] = Recorded(taken[name if name == "hidden" else layers[name][0]])
        if not bool(recorded[name].values.isfinite().all()):
            raise DartError(
                f"the signal {name} is not finite: the model overflows; try dtype float32"
            )
    return recorded
