"""What a per-token rule is.

A new rule is one file: a subclass of ``TokenRule`` with what it prepares of a block, what it ranks
neurons by and what bytes that takes, and ``TOKEN_RULES.register("name", MyRule)``.  Of each class
the first line of its docstring is what ``dart-llm methods`` lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig, TokenConfig
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.token_level import QuantizedProxy, TokenMask, winner_places
from dart_llm.pruning.weights import FfnWeights, stored_bytes

NORM_BYTES = 4
"""A float32 norm."""


@dataclass(frozen=True)
class LayerCost:
    """One layer whose tokens select, for the count of bytes.

    ``winners``: neurons that each token keeps; ``computed``: those whose rows the forward reads.
    ``width``: bytes of a weight that is not in low-bit blocks; None: as it is stored.
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
        """Bytes that selecting reads per forward, beside the ``cost.computed`` neurons' rows."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make what is read to select: proxies, norms."""

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        """What ranks all neurons, [..., I], or the candidates of ``mask`` alone, [..., n].

        fed: the FFN's input [..., D]; u: its activations [..., I], None: not computed yet.
        """
        raise NotImplementedError

    @torch.no_grad()
    def winners(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        """Ids of the neurons that each token keeps, ascending, [..., k] int64."""
        strengths, candidates = self.strengths(fed, u, mask), mask.candidates
        if candidates is None:
            return winner_places(strengths, mask.winners)
        if strengths.shape[-1] == mask.width:
            strengths = strengths[..., candidates]
        return candidates[winner_places(strengths, mask.winners)]

    def hidden(self, fed: Tensor, mask: LayerMask | None) -> Tensor:
        """u as the down projection reads it, where inputs are selected and not neurons."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes of what ``prepare`` made."""
        return sum(proxy.nbytes() for proxy in self.proxies)
