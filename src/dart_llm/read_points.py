"""Where a model is read without being changed: attention outputs, attention weights, last state.

Everything is removed when the block ends; nothing is left on the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from dart_llm.arch import decoder_layers, decoder_of
from dart_llm.errors import UnsupportedModel

EAGER = "eager"
"""The attention kernel that gives its weights."""

Take = Callable[[int, Tensor], None]
"""Called with a layer and what was read there."""

_SUM_TOLERANCE = 0.05
"""How far the weights of one token may sum from 1 (bfloat16 has 8 bits)."""


def layer_count(model: nn.Module) -> int:
    """Decoder layers; raises ``UnsupportedModel`` where there are none that we know."""
    return len(decoder_layers(model)[0])


@contextlib.contextmanager
def attention_outputs(model: nn.Module, layers: Sequence[int], take: Take) -> Iterator[None]:
    """Inside, every forward hands out v of ``layers``: [T, D], in the model's dtype.

    v: output of the attention's output projection, before the residual add and before any norm.
    One row per forward.
    """
    found, names, _ = decoder_layers(model)

    def hook(layer: int) -> Callable[..., None]:
        return lambda module, args, v: take(layer, v.reshape(-1, v.shape[-1]))

    with contextlib.ExitStack() as stack:
        for layer in layers:
            part = found[layer].get_submodule(names.attention_out)
            stack.callback(part.register_forward_hook(hook(layer)).remove)
        yield


@contextlib.contextmanager
def attention_weights(model: nn.Module, layers: Sequence[int], take: Take) -> Iterator[None]:
    """Inside, every forward hands out the attention weights of ``layers``: [H, T, S].

    H heads, T queries, S keys; each row sums to 1.  Only eager attention has them.  Raises
    ``UnsupportedModel``, from the forward, where none are given.
    """
    found, names, _ = decoder_layers(model)
    path = names.attention_out.rpartition(".")[0]

    def hook(layer: int) -> Callable[..., None]:
        return lambda module, args, output: take(layer, _weights(module, output))

    with contextlib.ExitStack() as stack:
        for layer in layers:
            part = found[layer].get_submodule(path)
            stack.callback(part.register_forward_hook(hook(layer)).remove)
        yield


@contextlib.contextmanager
def last_hidden(model: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, every forward hands out the decoder's last hidden state: [T, D].

    It is what the language-model head reads: after the last norm.  One row per forward.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        state = output[0]
        take(state.reshape(-1, state.shape[-1]))

    handle = decoder_of(model).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _weights(module: nn.Module, output: Any) -> Tensor:
    given = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if isinstance(given, Tensor) and given.dim() == 4 and len(given) == 1:
        total = given[0].float().sum(-1)
        if bool(((total - 1).abs() < _SUM_TOLERANCE).all()):
            return given[0]
    raise UnsupportedModel(
        f"{type(module).__name__} does not give the attention weights of one text (attention must "
        "run eager): leave the signal attention-scores out"
    )
