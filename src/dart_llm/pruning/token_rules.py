"""Per-token rules: how each token of one FFN block selects what it reads.

A new rule is a subclass of ``TokenRule`` with what it prepares of a block, what it ranks neurons by
and what bytes that takes, and ``TOKEN_RULES.register("name", MyRule)``.  Of each class the first
line of its docstring is what ``dart-llm methods`` lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig, TokenConfig
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.token_level import (
    SCALE_BYTES,
    QuantizedProxy,
    TokenMask,
    at_largest,
    contribution_estimate,
    input_count,
    low_bit,
    winner_places,
)
from dart_llm.pruning.weights import FfnWeights, norms_of, stored_bytes

NORM_BYTES = 4
"""A float32 norm."""


@dataclass(frozen=True)
class LayerCost:
    """One layer whose tokens select, for the count of bytes.

    ``winners``: neurons that are kept; ``computed``: those whose rows are read anyway.  ``width``:
    bytes of a weight that is not in low-bit blocks; None: as it is stored.
    """

    layer: FfnWeights
    winners: int
    computed: int
    width: int | None = None

    def losing_rows(self, *matrices: Tensor) -> float:
        """Bytes of the rows of ``matrices`` that are read for the ranking alone."""
        share = 1 - self.computed / self.layer.width
        return share * sum(stored_bytes(matrix, self.width) for matrix in matrices)


class TokenRule:
    """How each token of one FFN block (``models.ffn.FfnBlock``) selects neurons: by ``strengths``.

    I: neurons, D: hidden size.
    """

    native: ClassVar[bool] = False
    """Whether native kernels run it; else it is there for its quality, not for its speed."""
    by_weights: ClassVar[bool] = False
    """Whether the exact activations rank the neurons, gate and up being read as a whole."""
    selects_neurons: ClassVar[bool] = True
    """False: it selects inputs of each matrix (``Teal``), so that no neuron is left out."""
    attention: ClassVar[bool] = False
    """Whether the projections of attention are read at their largest inputs too."""
    compensates: ClassVar[bool] = False
    """Whether neurons that a token leaves out are replaced by their mean activation there."""
    options: ClassVar[frozenset[str]] = frozenset()
    """Fields of ``TokenConfig``, beside ``rule``, that it reads."""

    def __init__(self, block: Any, config: TokenConfig) -> None:
        self.block, self.config = block, config
        self.proxies: tuple[QuantizedProxy, ...] = ()
        """Low-bit proxies of gate and up, where it makes any."""
        with torch.inference_mode(False):
            self.prepare()

    @classmethod
    def for_weights(cls, config: TokenConfig, blocks: bool) -> type[TokenRule]:
        """The class that runs on weights that are stored in low-bit ``blocks``, or are not."""
        return cls

    @classmethod
    def check(cls, config: PruneConfig) -> None:
        """Raise ``ConfigError`` for settings that it cannot honour."""
        assert config.token is not None
        rule = config.token.rule
        for name in sorted(config.token.model_fields_set - cls.options - {"rule"}):
            if getattr(config.token, name) != TokenConfig.model_fields[name].default:
                raise ConfigError(f'token rule "{rule}" does not read {name}: drop it')
        if config.compensation and not cls.compensates:
            raise ConfigError(
                f'token rule "{rule}" has no mean of what it leaves out: drop the compensation'
            )

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        """Bytes that selecting reads per forward, beside the rows of ``cost.computed``."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make what is read to select: proxies, norms."""

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        """What each candidate of ``mask`` is ranked by, [..., n].

        fed: the FFN's input [..., D]; u: its activations [..., I], None: not computed yet.
        """
        raise NotImplementedError

    @torch.no_grad()
    def winners(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        """Ids of the neurons that each token keeps, ascending, [..., k] int64."""
        places = winner_places(self.strengths(fed, u, mask), mask.winners)
        return places if mask.candidates is None else mask.candidates[places]

    def hidden(self, fed: Tensor, mask: LayerMask | None) -> Tensor:
        """u as the down projection reads it, where inputs are selected and not neurons."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes of what ``prepare`` made."""
        return sum(proxy.nbytes() for proxy in self.proxies)


class LowBit(TokenRule):
    """Winners of every token by low-bit proxies of gate and up."""

    native = True
    compensates = True
    options = frozenset({"proxy", "bits", "group"})

    @classmethod
    def for_weights(cls, config: TokenConfig, blocks: bool) -> type[TokenRule]:
        return ByActivations if blocks and config.proxy == "auto" else cls

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        """The rows of the proxies with all of their scales, and a norm per neuron."""
        inputs, matrices = cost.layer.hidden, len(cost.layer.matrices) - 1
        levels = math.ceil(math.ceil(config.inputs * inputs) * config.bits / 8)
        row = levels + SCALE_BYTES * math.ceil(inputs / config.group)
        return cost.layer.width * (matrices * row + NORM_BYTES)

    def prepare(self) -> None:
        *inputs, down = self.block.matrices()
        parts = [part.detach() for part in inputs if part is not None]
        config = self.config
        self.proxies = tuple(low_bit(part, config.bits, config.group) for part in parts)
        self.norms = norms_of(down.detach(), 0)

    def estimate(self, fed: Tensor, ids: Tensor | None = None) -> Tensor:
        """u~ [..., n] float32 of the neurons ``ids`` (None: all), from the proxies alone."""
        made = [proxy.product(fed, ids) for proxy in self.proxies]
        for at, bias in enumerate(self.block.biases()[2 - len(made) : 2]):
            if bias is not None:
                made[at] += bias if ids is None else bias[ids]
        act: Callable[[Tensor], Tensor] = self.block.act
        return act(made[0]) if len(made) == 1 else act(made[0]) * made[1]

    def saliency(self, mask: TokenMask) -> Tensor:
        """What multiplies each neuron's activation, [I] float32."""
        return self.norms if mask.saliency is None else mask.saliency

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        ids, saliency = mask.candidates, self.saliency(mask)
        saliency = saliency if ids is None else saliency[ids]
        return contribution_estimate(self.estimate(fed, ids), saliency)

    def nbytes(self) -> int:
        return self.norms.nbytes + super().nbytes()


class ByActivations(LowBit):
    """Winners of every token by exact activations, from weights that are in low-bit blocks."""

    by_weights = True

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        """Gate and up of the neurons that lose, and a norm per neuron."""
        return cost.losing_rows(*cost.layer.matrices[:-1]) + NORM_BYTES * cost.layer.width

    def prepare(self) -> None:
        self.norms = norms_of(self.block.matrices()[-1].detach(), 0)

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        u = (self.block.hidden(fed) if u is None else u).float()
        ids, saliency = mask.candidates, self.saliency(mask)
        if ids is not None:
            u, saliency = u[..., ids], saliency[ids]
        return contribution_estimate(u, saliency)


class Prox(LowBit):
    """Winners of every token by low-bit proxies at the largest inputs.

    ``u~ = act(gate~ x~) * (up~ x~)``, where x~ keeps the share ``inputs`` of x with the largest
    ``abs(x_j)``, and gate~, up~ are proxies (arXiv 2607.27591).
    """

    native = False
    options = LowBit.options | {"inputs"}

    @classmethod
    def for_weights(cls, config: TokenConfig, blocks: bool) -> type[TokenRule]:
        return cls

    def estimate(self, fed: Tensor, ids: Tensor | None = None) -> Tensor:
        count = math.ceil(self.config.inputs * fed.shape[-1])
        return super().estimate(at_largest(fed, count), ids)


class Cats(TokenRule):
    """Winners of every token by the exact gate (in a plain FFN: by u).

    ``v = act(W_gate x)``; ``z = W_down[:, S] (v_S * (W_up[S] x))`` with S the k largest
    ``abs(v_i)`` (arXiv 2404.08763).
    """

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        gate = cost.layer.gate
        return cost.losing_rows(cost.layer.stored_up if gate is None else gate)

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        block = self.block
        v: Tensor = block.act(block.up_of(fed) if block.plain else block.gate_of(fed))
        return v.abs()


class Countdown(TokenRule):
    """Winners of every token by the exact up projection (in a plain FFN: by u).

    ``s = W_up x``; ``z = W_down[:, S] (act(W_gate[S] x) * s_S)`` with S the k largest ``abs(s_i)``
    (arXiv 2505.17701, variant M).
    """

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        return cost.losing_rows(cost.layer.stored_up)

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        up: Tensor = self.block.up_of(fed)
        s: Tensor = self.block.act(up) if self.block.plain else up
        return s.abs()


class Teal(TokenRule):
    """Every token's largest inputs of each matrix of the FFN.

    ``W x`` becomes ``W s(x)``, where s keeps the entries of largest ``abs(x_j)`` and sets the
    others to 0: x of gate and up, u of down (arXiv 2408.14690).
    """

    selects_neurons: ClassVar[bool] = False

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        """Inputs of gate and up beyond the winners' share, which is rounded up."""
        layer = cost.layer
        if cost.computed == layer.width:
            return 0.0
        count = input_count(layer.hidden, cost.winners, layer.width)
        more = count - layer.hidden * cost.winners / layer.width
        inputs = stored_bytes(layer.stored_up, cost.width) / layer.hidden
        return (len(layer.matrices) - 1) * inputs * more

    def hidden(self, fed: Tensor, mask: LayerMask | None) -> Tensor:
        """[B, T, I]; ``mask`` of the sequence: its neurons alone, of whole inputs."""
        block, (gate, up, down) = self.block, self.block.matrices()
        u: Tensor = block.up_of(self.largest(fed, mask, "up", up))
        if gate is None:
            u = block.act(u)
        else:
            u = u * block.act(block.gate_of(self.largest(fed, mask, "gate", gate)))
        if mask is None or isinstance(mask, TokenMask):
            return self.largest(u, mask, "down", down)
        return u * mask.dense(u.dtype).to(u.device)

    def largest(self, x: Tensor, mask: LayerMask | None, key: Hashable, matrix: Tensor) -> Tensor:
        """x [..., M] as ``matrix`` [N, M] reads it: whole unless ``mask`` lets tokens select.

        ``key``: what its norms are kept under.
        """
        if not isinstance(mask, TokenMask):
            return x
        count = input_count(x.shape[-1], mask.winners, mask.width)
        return at_largest(x, count, self.input_norms(key, matrix))

    def input_norms(self, key: Hashable, matrix: Tensor) -> Tensor | None:
        """What multiplies the inputs' magnitudes, [M]; None: nothing."""
        return None


class TealAttention(Teal):
    """Every token's largest inputs of each matrix of FFN and attention."""

    attention = True


class Wina(Teal):
    """Every token's largest inputs times column norm of each matrix of the FFN.

    The entries of largest ``abs(x_j) * ||W[:, j]||_2`` stay, by matrix (arXiv 2505.19427).
    """

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        """A norm of each input of each matrix too."""
        layer = cost.layer
        norms = (len(layer.matrices) - 1) * layer.hidden + layer.width
        return NORM_BYTES * norms + super().selection_bytes(config, cost)

    def prepare(self) -> None:
        self._norms: dict[Hashable, Tensor] = {}

    def input_norms(self, key: Hashable, matrix: Tensor) -> Tensor:
        if key not in self._norms:
            with torch.inference_mode(False):
                self._norms[key] = norms_of(matrix, 0)
        return self._norms[key]

    def nbytes(self) -> int:
        return sum(norms.nbytes for norms in self._norms.values())
