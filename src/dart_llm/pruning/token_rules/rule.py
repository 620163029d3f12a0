"""The base class of per-token rules, by which every token selects its own neurons.

To add a rule, write a file with a subclass of ``TokenRule`` that prepares data for an FFN, ranks
the FFN's neurons and counts the bytes that ranking reads.  The file must also call
``TOKEN_RULES.register("name", MyRule)``.  ``dart-llm methods`` lists its docstring's first line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig, TokenConfig
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.statistics import FISHER
from dart_llm.pruning.token_level import QuantizedProxy, TokenMask, winner_places
from dart_llm.pruning.weights import FfnWeights, stored_bytes

NORM_BYTES = 4
"""Bytes of a float32 norm."""


@dataclass(frozen=True)
class LayerCost:
    """One layer with per-token selection, for counting bytes.

    ``winners``: number of neurons that each token selects.  ``computed``: number of neurons that a
    forward computes for any of its tokens.  ``weight_bytes``: bytes to count for a weight that is
    not quantized; None means as stored.  ``reads_all``: whether the down rows of unselected neurons
    are read, too (and multiplied by 0).
    """

    layer: FfnWeights
    winners: int
    computed: int
    weight_bytes: int | None = None
    reads_all: bool = False

    def ranking_rows(self, *matrices: Tensor) -> float:
        """Bytes of ``matrices`` read only to rank: rows of neurons that are not computed."""
        share = 1 - self.computed / self.layer.width
        return share * sum(stored_bytes(matrix, self.weight_bytes) for matrix in matrices)


class TokenRule:
    """Selects, for each token, the neurons of one FFN that have the largest ``strengths``.

    ``block``: the FFN (``models.ffn.FfnBlock``); I: neurons, D: hidden size.
    """

    native: ClassVar[bool] = False
    """Whether native kernels support the rule; without them, only quality can be measured."""
    by_weights: ClassVar[bool] = False
    """Whether exact activations rank the neurons, so that gate and up are read as a whole."""
    selects_neurons: ClassVar[bool] = True
    """Whether the rule selects neurons; if not, it selects inputs of each matrix (``Teal``)."""
    attention: ClassVar[bool] = False
    """Whether the rule also selects the largest inputs of the attention projections."""
    compensates: ClassVar[bool] = False
    """Whether neurons that a token does not select can be replaced by their mean activation."""
    learns: ClassVar[str] = FISHER
    """Statistic behind ``TokenMask.saliency``: mean squared gradients, or ``UP``."""
    options: ClassVar[frozenset[str]] = frozenset()
    """Fields of ``TokenConfig``, other than ``rule``, that the rule uses."""

    def __init__(self, block: Any, config: TokenConfig) -> None:
        self.block, self.config = block, config
        self.proxies: tuple[QuantizedProxy, ...] = ()
        """Low-bit proxies of gate and up, if the rule makes any."""
        with torch.inference_mode(False):
            self.prepare()

    @classmethod
    def for_weights(cls, config: TokenConfig, quantized: bool) -> type[TokenRule]:
        """The class to use, depending on whether the FFN's weights are ``quantized``."""
        return cls

    @classmethod
    def check(cls, config: PruneConfig) -> None:
        """Raise ``ConfigError`` for settings that the rule does not support."""
        assert config.token is not None
        rule = config.token.rule
        for name in sorted(config.token.model_fields_set - cls.options - {"rule"}):
            if getattr(config.token, name) != TokenConfig.model_fields[name].default:
                raise ConfigError(f'token rule "{rule}" does not read {name}: drop it')
        if config.compensation and not cls.compensates:
            raise ConfigError(f'token rule "{rule}" does not support compensation: drop it')

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        """Bytes that a forward reads for the selection, without computed neurons' weights."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Compute the data that the selection needs, such as proxies and norms."""

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        """Strengths of all neurons, [..., I], or of the candidates of ``mask``, [..., n].

        A token selects the neurons with the largest strengths.  fed: the FFN's input [..., D].  u:
        the neurons' activations [..., I], or None if they are not computed yet.
        """
        raise NotImplementedError

    @torch.no_grad()
    def winners(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        """Ids of the neurons that each token selects, ascending, [..., k] int64."""
        strengths, candidates = self.strengths(fed, u, mask), mask.candidates
        if candidates is None:
            return winner_places(strengths, mask.winners)
        if strengths.shape[-1] == mask.width:
            strengths = strengths[..., candidates]
        return candidates[winner_places(strengths, mask.winners)]

    def hidden(self, fed: Tensor, mask: LayerMask | None) -> Tensor:
        """The down projection's input u, for rules that select inputs instead of neurons."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes of the data that ``prepare`` computed."""
        return sum(proxy.nbytes() for proxy in self.proxies)
