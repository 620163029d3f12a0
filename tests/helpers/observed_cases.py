"""What modules see, by hooks of our own: u, z, r, and the layers' inputs and outputs."""

import torch

from dart_llm.models.architectures import LAYER_NAMES as LAYERS
from dart_llm.models.describe import describe

PARALLEL = ("gpt_neox", "falcon", "falcon-new", "phi", "stablelm-parallel")
"""Blocks whose FFN reads the block's input and not the sum with the attention's output."""


def decoder_layers(model):
    base = model.get_decoder()
    return list(base.layers if hasattr(base, "layers") else base.h)


def tensor_of(thing):
    return thing[0] if isinstance(thing, tuple) else thing


class Recorder:
    """Clones of every layer's input, output, u, z and of the FFN half's contribution."""

    def __init__(self, model):
        self.seen = {}
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
            if not getattr(layer, "do_layer_norm_before", True):
                self._before(layer.fc1, index, "fc1")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def _keep(self, index, what, value):
        rows = value.detach().clone().reshape(1, -1, value.shape[-1])
        self.seen.setdefault((index, what), []).append(rows)

    def _before(self, module, index, what):
        def take(module, args, kwargs):
            self._keep(index, what, args[0] if args else kwargs["hidden_states"])

        self.handles.append(module.register_forward_pre_hook(take, with_kwargs=True))

    def _after(self, module, index, what):
        def take(module, args, output):
            self._keep(index, what, tensor_of(output))

        self.handles.append(module.register_forward_hook(take))

    def get(self, index, what):
        """All tokens, [T, width], float64."""
        if what == "r" and (index, "r") not in self.seen:
            what = "z"
        return torch.cat(self.seen[index, what], 1)[0].double()


def dense_u(model, ids):
    """u of every layer over all tokens of ids, [tokens, I], float64."""
    with Recorder(model) as recorder, torch.no_grad():
        model(ids)
    return [recorder.get(layer, "u") for layer in range(len(decoder_layers(model)))]


def stream(recorder, name, index):
    """x from the outside: the block's input, or its output without the FFN's contribution."""
    if name in PARALLEL:
        return recorder.get(index, "input")
    if name == "opt-postnorm":  # out = norm(x + z): x is the input of fc1
        return recorder.get(index, "fc1")
    return recorder.get(index, "output") - recorder.get(index, "r")
