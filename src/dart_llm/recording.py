"""One dense pass over a known text that records every signal of every token."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dart_llm import read_points
from dart_llm.arch import context_length
from dart_llm.errors import ConfigError, DartError
from dart_llm.signals import (
    SCORES,
    Recorded,
    distribution,
    first_query,
    layers_of,
    several,
    shannon,
)


def needs_eager(signals: Sequence[str]) -> bool:
    """Whether one of the signals is read from the attention weights."""
    return SCORES in signals


@torch.no_grad()
def record(model: Any, ids: Tensor, prompt: int, signals: Sequence[str]) -> dict[str, Recorded]:
    """All ``signals`` of one text, by name, in one forward of the untouched model.

    ids: [N], of which the first ``prompt`` are the prompt.  Values are float32 and on the host.
    Raises ``ConfigError`` when the text does not fit the model's context, ``UnsupportedModel``
    where the attention gives no weights, ``DartError`` where a signal is not finite.
    """
    longest = context_length(model)
    if longest is not None and len(ids) > longest:
        raise ConfigError(
            f"a text of {len(ids)} tokens does not fit the model's context of {longest}: give "
            "shorter passages"
        )
    taken = _Taken(prompt)
    count = read_points.layer_count(model)
    with contextlib.ExitStack() as stack:
        outputs = sorted({layer for name in signals for layer in _output_layers(name, count)})
        stack.enter_context(read_points.attention_outputs(model, outputs, taken.output))
        if "hidden" in signals:
            stack.enter_context(read_points.last_hidden(model, taken.state))
        if SCORES in signals:
            last = layers_of(SCORES, count)
            stack.enter_context(read_points.attention_weights(model, last, taken.weights))
        model(ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    found = {name: _signal(name, taken, count) for name in signals}
    for name, signal in found.items():
        if not bool(signal.values.isfinite().all()):
            raise DartError(
                f"the signal {name} is not finite: the model overflows; try dtype float32"
            )
    return found


def _output_layers(name: str, count: int) -> tuple[int, ...]:
    return () if name == SCORES else layers_of(name, count)


class _Taken:
    """What the hooks of one forward gave, float32 on the host."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt
        self.outputs: dict[int, Tensor] = {}
        self.hidden = self.scores = torch.empty(0)

    def output(self, layer: int, v: Tensor) -> None:
        self.outputs[layer] = _host(v)

    def state(self, v: Tensor) -> None:
        self.hidden = _host(v)

    def weights(self, layer: int, weights: Tensor) -> None:
        self.scores = _host(distribution(weights, self.prompt))


def _host(v: Tensor) -> Tensor:
    return v.detach().to("cpu", torch.float32, copy=True)


def _signal(name: str, taken: _Taken, count: int) -> Recorded:
    if name == SCORES:
        return Recorded(name, taken.scores, first_query(taken.prompt), shannon)
    if name == "hidden":
        return Recorded(name, taken.hidden)
    layers = layers_of(name, count)
    if name == "attention-several":
        return Recorded(name, several(taken.outputs, layers))
    return Recorded(name, taken.outputs[layers[0]])
