"""Read-only hooks on FFN tensors, attention outputs and the last hidden state.

The hooks do not change outputs and are removed at the end of the ``with`` block.
``capture_activations`` passes each layer's FFN tensors to a function.  ``Recording`` stores these
tensors for one sequence.  docs/reference.md defines the tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.errors import ConfigError
from dart_llm.models.calls import ForwardArgs, read_forward
from dart_llm.models.describe import decoder_layers, decoder_of, describe
from dart_llm.models.ffn import FfnBlock


@dataclass(frozen=True)
class Wanted:
    """What to record: which layers, tokens and tensors.

    ``start``: the first token, counted from the beginning of the prompt.  ``end``: the token after
    the last; None means the end of the sequence.  ``tensors``: names of attributes of
    ``LayerActivations``.
    """

    layers: tuple[int, ...]
    start: int = 0
    end: int | None = None
    tensors: tuple[str, ...] = ("u",)

    def tokens(self, total: int) -> int:
        """Number of tokens that are recorded if the sequence has ``total`` tokens."""
        return max(0, (total if self.end is None else min(self.end, total)) - self.start)


@dataclass(frozen=True)
class LayerActivations:
    """Activations of one layer's FFN in one forward: ``u`` is [B, T, I], the others are [B, T, D].

    Copy tensors that you need later: some models change z in place later in the forward.

    ``x``: the residual stream that enters the FFN half of the layer.  ``h``: the input of the up
    projection.  ``u``: the input of the down projection, 0 for neurons that a mask removes (in OPT,
    the values before masking).  ``z``: the output of the down projection, without the compensation
    for removed neurons.  ``r``: the tensor that is added to the residual stream; it differs from
    ``z`` if a norm follows the FFN.
    """

    u: Tensor
    x: Tensor
    z: Tensor
    r: Tensor
    h: Tensor


OnCapture = Callable[[int, LayerActivations], None]
"""A function that is called with a layer's number and the layer's activations."""


@contextlib.contextmanager
def capture_activations(
    model: nn.Module,
    take: OnCapture,
    layers: Sequence[int] | None = None,
    before: Callable[[ForwardArgs], None] = lambda forward: None,
    after: Callable[[], None] = lambda: None,
    graph: bool = False,
) -> Iterator[None]:
    """Call ``take(layer, activations)`` once per layer in every forward inside the block.

    ``layers``: numbers of the layers; None means all.  ``before`` is called before each forward of
    ``model``, with the forward's arguments, and ``after`` is called after each forward.  ``graph``:
    if True, the tensors stay in the autograd graph and have the model's shapes; otherwise they are
    detached and have the shapes of ``LayerActivations``.  In layers that the compact executor
    masks, ``take`` is not called, because removed neurons are not computed.
    """
    taps: list[dict[str, Tensor]] = []
    rows = 1

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal rows
        forward = read_forward(module, args, kwargs)
        rows = forward.rows
        for tensors in taps:
            tensors.clear()
        before(forward)

    def pass_on(layer: int, *tensors: Tensor) -> None:
        if not graph:
            # OPT flattens batch and tokens
            tensors = tuple(t.detach().reshape(rows, -1, t.shape[-1]) for t in tensors)
        take(layer, LayerActivations(*tensors))

    with contextlib.ExitStack() as stack:

        def remove_at_exit(handle: Any) -> None:
            stack.callback(handle.remove)

        remove_at_exit(model.register_forward_pre_hook(begin, with_kwargs=True))
        remove_at_exit(model.register_forward_hook(lambda *_: after()))
        for block in describe(model).blocks:
            if layers is None or block.index in layers:
                taps.append(_tap(block, pass_on, remove_at_exit))
        yield


def _tap(
    block: FfnBlock, take: Callable[..., None], remove_at_exit: Callable[[Any], None]
) -> dict[str, Tensor]:
    """Add hooks to one layer; return the dict that stores x, h, u and z until r is computed."""
    tensors: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors[name] = args[0] if args else next(iter(kwargs.values()))

        return hook

    def note_z(module: nn.Module, args: Any, z: Tensor) -> None:
        tensors["z"] = z
        if block.post_norm is None:
            note_r(module, args, z)

    def note_r(module: nn.Module, args: Any, r: Tensor) -> None:
        complete = dict(tensors)
        tensors.clear()
        if {"u", "x", "z"} <= complete.keys():
            z = complete["z"]
            take(block.index, complete["u"], complete["x"], z, r, complete.get("h", z))

    before_x = block.ffn if block.x_from is None else block.x_from
    for name, module in (("x", before_x), ("h", block.up), ("u", block.down)):
        remove_at_exit(module.register_forward_pre_hook(note(name), with_kwargs=True))
    remove_at_exit(block.down.register_forward_hook(note_z))
    if block.post_norm is not None:
        remove_at_exit(block.post_norm.register_forward_hook(note_r))
    return tensors


class Recording:
    """A context manager that records the ``wanted`` activations of one sequence in host memory.

    A forward without cached tokens starts a new recording.  If the cache was cropped, the recorded
    tokens that it no longer contains are dropped.  A forward raises ``ConfigError`` if its batch
    has more than one row, or if the executor does not compute a wanted activation.
    """

    def __init__(self, model: nn.Module, wanted: Wanted) -> None:
        self.model = model
        self.wanted = wanted
        self._kept: dict[str, list[Tensor]] = {}
        self._ids: list[Tensor] | None = []
        """Ids of the recorded tokens, a tensor per forward; None after a forward on embeddings."""
        self._fed = 0
        self._span = slice(0, 0)
        self._taken: set[int] = set()
        self._tap: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

    def __enter__(self) -> Recording:
        self._tap = capture_activations(
            self.model, self._take, self.wanted.layers, self._before, self._after
        )
        self._tap.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._tap.__exit__(None, None, None)

    def _before(self, forward: ForwardArgs) -> None:
        if forward.rows != 1:
            raise ConfigError(
                f"activations can be recorded only for a batch of one row, not of {forward.rows}"
            )
        if forward.cached < self._fed:
            self._cut(forward.cached)
        start, end = self.wanted.start - forward.cached, forward.tokens
        if self.wanted.end is not None:
            end = min(end, self.wanted.end - forward.cached)
        self._span = slice(max(0, start), max(0, start, end))
        self._fed = forward.cached + forward.tokens
        self._taken = set()
        ids = forward.input_ids
        if ids is None:
            self._ids = None
        elif self._ids is not None and self._span.start < self._span.stop:
            self._ids.append(ids[0, self._span].cpu().int())

    def _take(self, layer: int, activations: LayerActivations) -> None:
        self._taken.add(layer)
        if self._span.start >= self._span.stop:
            return
        for name in self.wanted.tensors:
            part = getattr(activations, name)[0, self._span].to("cpu", copy=True)
            self._kept.setdefault(f"layer{layer}.{name}", []).append(part)

    def _after(self) -> None:
        missing = [layer for layer in self.wanted.layers if layer not in self._taken]
        if missing and self._span.start < self._span.stop:
            raise ConfigError(
                f"the activations of layer {missing[0]} were not computed: the compact executor "
                "skips them; use executor masked"
            )

    def _cut(self, fed: int) -> None:
        keep = max(0, fed - self.wanted.start)
        self._kept = {name: [torch.cat(parts)[:keep]] for name, parts in self._kept.items()}
        self._ids = self._ids and [torch.cat(self._ids)[:keep]]

    def tensors(self) -> dict[str, Tensor]:
        """The recorded tensors by name.

        ``layer{l}.{name}`` is [tokens, I or D] in the model's dtype.  ``token_ids`` is int32
        [tokens]; it is missing if a forward took embeddings.
        """
        tensors = {name: torch.cat(parts) for name, parts in self._kept.items()}
        return {**tensors, "token_ids": torch.cat(self._ids)} if self._ids else tensors


EAGER = "eager"
"""The attention implementation that returns its attention weights."""

Take = Callable[[int, Tensor], None]
"""A function that is called with a layer's number and a tensor of this layer."""


def layer_count(model: nn.Module) -> int:
    """Number of decoder layers; raises ``UnsupportedModel`` if none are found."""
    return len(decoder_layers(model)[0])


@contextlib.contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def attention_outputs(
    model: nn.Module, layers: Sequence[int], take: Take
) -> contextlib.AbstractContextManager[None]:
    """Call ``take(layer, v)`` for each of ``layers`` in every forward.

    v [T, D], in the model's dtype, is the output of the attention's output projection, before any
    norm and before it is added to the residual stream.  The batch must have one row.
    """
    decoder, names, _ = decoder_layers(model)

    def hook(layer: int) -> Callable[..., None]:
        return lambda module, args, v: take(layer, v.reshape(-1, v.shape[-1]))

    return _hooked(
        (decoder[layer].get_submodule(names.attention_out), hook(layer)) for layer in layers
    )


def last_hidden(
    model: nn.Module, take: Callable[[Tensor], None]
) -> contextlib.AbstractContextManager[None]:
    """Call ``take`` in every forward with the decoder's last hidden state [T, D].

    This is the input of the language-model head, after the last norm.  The batch must have one row.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        take(output[0].reshape(-1, output[0].shape[-1]))

    return _hooked([(decoder_of(model), hook)])
