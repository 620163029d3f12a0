"""What modules see, by hooks of our own: u, z, r, and the layers' inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.models.architectures import LAYER_NAMES as LAYERS
from dart_llm.models.describe import describe

PARALLEL = ("gpt_neox", "falcon", "falcon-new", "phi", "stablelm-parallel")
"""Blocks whose FFN reads the block's input and not the sum with the attention's output."""


def decoder_layers(model: Any) -> list[nn.Module]:
    base = model.get_decoder()
    return list(base.layers if hasattr(base, "layers") else base.h)


def _tensor(thing: Any) -> Tensor:
    return thing[0] if isinstance(thing, tuple) else thing


class Recorder:
    """Clones of every layer's input, output, u, z and of the FFN half's contribution."""

    def __init__(self, model: Any) -> None:
        self.seen: dict[tuple[int, str], list[Tensor]] = {}
        self.handles = []
        for index, layer in enumerate(decoder_layers(model)):
            block = describe(model).blocks[index]
            self._before(layer, index, "input")
            self._after(layer, index, "output")
            self._before(block.down, index, "u")
            self._after(block.down, index, "z")
            names = LAYERS[model.config.get_text_config().model_type]
            if names.post_norm:
                self._after(getattr(layer, names.post_norm), index, "r")

    def _keep(self, index: int, what: str, value: Tensor) -> None:
        rows = value.detach().clone().reshape(1, -1, value.shape[-1])
        self.seen.setdefault((index, what), []).append(rows)

    def _before(self, module: nn.Module, index: int, what: str) -> None:
        def take(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._keep(index, what, args[0] if args else kwargs["hidden_states"])

        self.handles.append(module.register_forward_pre_hook(take, with_kwargs=True))

    def _after(self, module: nn.Module, index: int, what: str) -> None:
        def take(module: nn.Module, args: Any, output: Any) -> None:
            self._keep(index, what, _tensor(output))

        self.handles.append(module.register_forward_hook(take))

    def get(self, index: int, what: str) -> Tensor:
        """All tokens, [T, width], float64."""
        if what == "r" and (index, "r") not in self.seen:
            what = "z"
        return torch.cat(self.seen[index, what], 1)[0].double()


def stream(recorder: Recorder, name: str, index: int) -> Tensor:
    """x from the outside: the block's input, or its output without the FFN's contribution."""
    if name in PARALLEL:
        return recorder.get(index, "input")
    if name == "opt-postnorm":  # out = norm(x + z): x is the input of fc1
        return recorder.get(index, "fc1")
    return recorder.get(index, "output") - recorder.get(index, "r")
