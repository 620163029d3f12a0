"""A gated FFN of vLLM under the masks of a step: gate and up in one projection, then down.

Three ways, by what the step's tokens need:

- no token is pruned or observed: vLLM's own forward;
- all tokens share their masks: narrower projections with only the kept neurons, so that the other
  weights are not read;
- otherwise: all neurons are computed, and each token's removed neurons are set to zero.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.errors import UnsupportedModel
from dart_llm.pruning.masks import LayerMask, Masks
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.weights import FfnWeights
from dart_vllm.policy import Step

STEADY = 4
"""Number of consecutive steps with the same masks before a request's weights are gathered."""


def gated_ffns(model: nn.Module, layers: int) -> Iterator[nn.Module]:
    """Yield the FFN of each of the model's ``layers`` decoder layers.

    Raises ``UnsupportedModel`` if a layer's FFN is not a gate and an up projection in one module,
    an activation, and a down projection, or does not compute what this form says.
    """
    for index, layer in enumerate(decoder_layers(model, layers)):
        mlp = getattr(layer, "mlp", None)
        parts = [getattr(mlp, name, None) for name in ("gate_up_proj", "act_fn", "down_proj")]
        if not isinstance(mlp, nn.Module) or any(part is None for part in parts):
            raise UnsupportedModel(
                f"layer {index} of {type(model).__name__} is a {type(layer).__name__} whose FFN "
                f"({type(mlp).__name__}) is not a gated MLP in vLLM's usual form (gate_up_proj, "
                "act_fn, down_proj), so dart-vllm cannot prune it"
            )
        _check_quantized(mlp, index)
        yield mlp


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The decoder's ``count`` layers; raises ``UnsupportedModel`` if they cannot be identified."""
    lists = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.endswith("layers") and len(module) == count
    ]
    if len(lists) != 1:
        raise UnsupportedModel(
            f"{type(model).__name__} has {len(lists)} lists of {count} layers, so dart-vllm cannot "
            "tell which are the decoder's"
        )
    return lists[0]


def _check_quantized(mlp: Any, index: int) -> None:
    for linear in (mlp.gate_up_proj, mlp.down_proj):
        method = type(getattr(linear, "quant_method", None)).__name__
        if method != "UnquantizedLinearMethod" or full_weight(linear).dim() != 2:
            raise UnsupportedModel(
                f"layer {index}: {type(linear).__name__} has quantised weights ({method}), which "
                "dart-vllm cannot prune: serve the checkpoint that is not quantised"
            )


def full_weight(linear: Any) -> Tensor:
    """The weight of a linear layer, [out, in]."""
    return linear.weight.detach()  # type: ignore[no-any-return]


@contextmanager
def weights_kept() -> Iterator[None]:
    """While a model loads: keep the weights of FFNs, which vLLM's CPU layers would drop.

    These layers compute with packed copies.  Masks are chosen and applied with the weights.
    """
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm

    def pack_and_keep(layer: Any, remove_weight: bool) -> None:
        is_ffn = getattr(layer, "prefix", "").endswith((".gate_up_proj", ".down_proj"))
        pack(layer, remove_weight and not is_ffn)

    utils.dispatch_cpu_unquantized_gemm = pack_and_keep
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = pack


def weights_of(mlps: Sequence[Any]) -> tuple[FfnWeights, ...]:
    """The weights of all FFNs as dart_llm's scores and compensation read them."""
    layers = []
    for index, mlp in enumerate(mlps):
        both, down = full_weight(mlp.gate_up_proj), full_weight(mlp.down_proj)
        gate, up = both.chunk(2)
        layers.append(FfnWeights(index, index / max(1, len(mlps) - 1), up, gate, down))
    return tuple(layers)


class _Linear(nn.Module):
    """A linear layer with other weights than ``like``, run by the same kernel of vLLM."""

    def __init__(self, like: Any, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.method, self.bias = like.quant_method, bias
        self.method.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x, self.bias)  # type: ignore[no-any-return]


def _sliced(mlp: Any, ids: Tensor) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """Weight and bias of both projections with only the neurons ``ids``."""
    both, down = full_weight(mlp.gate_up_proj), full_weight(mlp.down_proj)
    rows = torch.cat([ids, ids + down.shape[1]])
    biases = (getattr(linear, "bias", None) for linear in (mlp.gate_up_proj, mlp.down_proj))
    first, second = biases
    return (both[rows], None if first is None else first[rows]), (down[:, ids], second)


class NarrowFfn:
    """An FFN with copies of the kept neurons' weights."""

    def __init__(self, mlp: Any, mask: LayerMask) -> None:
        self.act, self.mask = mlp.act_fn, mask
        both, down = _sliced(mlp, mask.ids)
        self.both, self.down = _Linear(mlp.gate_up_proj, *both), _Linear(mlp.down_proj, *down)

    def __call__(self, x: Tensor) -> Tensor:
        return compensated(self.down(self.act(self.both(x))), x, self.mask)


def compensated(z: Tensor, x: Tensor, mask: LayerMask) -> Tensor:
    """The FFN's output z [T, D] plus the estimate of the removed neurons' part."""
    if mask.bias is not None:
        z = z + mask.bias.to(z)
    return z if mask.low_rank is None else z + mask.low_rank(x)


def narrow_in_place(mlp: Any, mask: LayerMask) -> None:
    """Keep only a mask's neurons in the model's own projections, for all requests."""
    for linear, (weight, bias) in zip(
        (mlp.gate_up_proj, mlp.down_proj), _sliced(mlp, mask.ids), strict=True
    ):
        linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        if bias is not None and bias.shape != linear.bias.shape:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        linear.quant_method.process_weights_after_loading(linear)


@dataclass
class StepState:
    """The step that is running (None between steps), and what is kept from earlier steps.

    ``pinned``: masks that requests share by name, whose narrow weights are kept for good.
    """

    pinned: tuple[Masks, ...] = ()
    step: Step | None = None
    shared: Masks | None = None
    """Masks of all tokens of the step, if their weights are or will be gathered."""
    counts: dict[str, int] = field(default_factory=lambda: {"dense": 0, "narrow": 0, "rows": 0})
    """Number of steps by the way in which they ran."""
    _steady: tuple[Masks | None, int] = (None, 0)
    _narrow: OrderedDict[int, tuple[Masks, dict[int, NarrowFfn]]] = field(
        default_factory=OrderedDict
    )
    _removed: tuple[tuple[Any, ...], list[Masks], dict[int, Tensor]] = ((), [], {})
    """Key, masks and removed neurons by layer of the newest step that masked rows."""

    def begin(self, step: Step) -> None:
        """Start a step."""
        masks = step.shared
        run = self._steady[1] + 1 if masks is not None and masks is self._steady[0] else 1
        self._steady = masks, run
        pinned = any(masks is other for other in self.pinned)
        self.step, self.shared = step, masks if pinned or run > STEADY else None
        way = "narrow" if self.shared is not None else "rows" if step.masked() else "dense"
        self.counts[way] += 1
        if self.shared is not None:
            self._keep(self.shared)

    def end(self) -> Step | None:
        """End the step and return it; None if no step was running."""
        step, self.step, self.shared = self.step, None, None
        return step

    def forget(self, masks: Masks | None) -> None:
        """Free what was made from the masks of a request that has ended."""
        if self._steady[0] is masks:
            self._steady = None, 0
        if not any(masks is other for other in self.pinned):
            self._narrow.pop(id(masks), None)
        if any(masks is other for other in self._removed[1]):
            self._removed = (), [], {}

    def _keep(self, masks: Masks) -> None:
        """Make room for the narrow weights of ``masks``: of requests, only the newest are kept."""
        if id(masks) not in self._narrow:
            pinned = {id(other) for other in self.pinned}
            for key in [key for key in self._narrow if key not in pinned]:
                del self._narrow[key]
            self._narrow[id(masks)] = masks, {}

    def narrow(self, layer: int, mlp: Any) -> NarrowFfn | None:
        """The narrow FFN of ``shared``; None if the layer is dense."""
        assert self.shared is not None
        mask = self.shared[layer]
        if mask is None:
            return None
        made = self._narrow[id(self.shared)][1]
        if layer not in made:
            made[layer] = NarrowFfn(mlp, mask)
        return made[layer]

    def removed(self, layer: int, u: Tensor) -> Tensor:
        """A bool tensor like u [T, I], True for the removed neurons of each token."""
        assert self.step is not None
        spans = self.step.masked()
        places = [(id(span.masks), span.tokens.start, span.tokens.stop) for span in spans]
        key = (len(u), *places)
        if key != self._removed[0]:
            self._removed = key, [span.masks for span in spans if span.masks is not None], {}
        rows = self._removed[2]
        if layer not in rows:
            rows[layer] = marks = torch.zeros(u.shape, dtype=torch.bool, device=u.device)
            for span in spans:
                mask = None if span.masks is None else span.masks[layer]
                if mask is not None:
                    marks[span.tokens, mask.removed()] = True
        return rows[layer]


class PrunedFfn:
    """Replaces the forward of one FFN module."""

    def __init__(self, mlp: Any, layer: int, state: StepState) -> None:
        self.mlp, self.layer, self.state = mlp, layer, state
        self.original = mlp.forward
        self.stream: Tensor | None = None
        """The residual stream before the FFN, if a hook reads it."""

    def hidden(self, x: Tensor) -> Tensor:
        """The down projection's input u, [T, I]."""
        return self.mlp.act_fn(self.mlp.gate_up_proj(x)[0])  # type: ignore[no-any-return]

    def check(self, width: int) -> None:
        """Raise ``UnsupportedModel`` unless the module computes what this class replaces."""
        weight = full_weight(self.mlp.down_proj)
        generator = torch.Generator().manual_seed(0)  # no random number is taken from vLLM's
        x = torch.randn((4, len(weight)), generator=generator).to(weight)
        u = self.hidden(x)
        same = u.shape[-1] == width and torch.allclose(
            self.mlp.down_proj(u)[0], self.original(x), rtol=1e-3, atol=1e-5
        )
        if not same:
            raise UnsupportedModel(
                f"layer {self.layer}: {type(self.mlp).__name__} computes more than a gated MLP, so "
                "dart-vllm cannot prune it"
            )

    def __call__(self, x: Tensor) -> Tensor:
        step = self.state.step
        if step is None or not step.spans:
            return self.original(x)  # type: ignore[no-any-return]
        if self.state.shared is not None:
            narrow = self.state.narrow(self.layer, self.mlp)
            return self.original(x) if narrow is None else narrow(x)
        return self._run_rows(step, x)

    def _run_rows(self, step: Step, x: Tensor) -> Tensor:
        u, masked = self.hidden(x), step.masked()
        if masked:
            u = u.masked_fill_(self.state.removed(self.layer, u), 0)
        z: Tensor = self.mlp.down_proj(u)[0]
        for span in masked:
            mask = None if span.masks is None else span.masks[self.layer]
            if mask is not None and (mask.bias is not None or mask.low_rank is not None):
                z[span.tokens] = compensated(z[span.tokens], x[span.tokens], mask)
        for request, tokens in step.observed("observe"):
            plan, seen = request.forward, LayerObservation(u[None, tokens])
            if plan.inputs:
                seen = seen._replace(h=x[None, tokens])
            if plan.stream:
                assert self.stream is not None
                seen = seen._replace(z=z[None, tokens], x=self.stream[None, tokens])
            request.observe(self.layer, seen)
        self.stream = None
        return z
