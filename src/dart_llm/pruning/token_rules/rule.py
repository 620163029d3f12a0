"""The base class of per-token rules.

A new rule is one file: a subclass of ``TokenRule`` that prepares data for a block, ranks neurons
and counts the bytes of that, and ``TOKEN_RULES.register("name", MyRule)``.  ``dart-llm methods``
lists the first line of each class's docstring.
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
    """One layer with per-token selection, for counting bytes.

    ``winners``: neurons that each token keeps; ``computed``: neurons whose rows the forward reads.
    ``width``: bytes of a weight that is not in low-bit blocks; None: as stored.
    """

    layer: FfnWeights
    winners: int
    computed: int
    width: int | None = None

    def losing_rows(self, *matrices: Tensor) -> float:
        """Bytes of the rows of ``matrices`` that are read only for the ranking."""
        share = 1 - self.computed / self.layer.width
        return share * sum(stored_bytes(matrix, self.width) for matrix in matrices)


class TokenRule:
    """Selects neurons of one FFN block (``models.ffn.FfnBlock``) for each token, by ``strengths``.

    I: neurons, D: hidden size.
    """

    native: ClassVar[bool] = False
    """Whether native kernels support it; else it serves to measure quality, not speed."""
    by_weights: ClassVar[bool] = False
    """Whether exact activations rank the neurons, so that gate and up are read as a whole."""
    selects_neurons: ClassVar[bool] = True
    """False: it selects inputs of each matrix (``Teal``), not neurons."""
    attention: ClassVar[bool] = False
    """Whether it also selects the largest inputs of the attention projections."""
    compensates: ClassVar[bool] = False
    """Whether neurons that a token does not select are replaced by their mean activation."""
    options: ClassVar[frozenset[str]] = frozenset()
    """Fields of ``TokenConfig``, other than ``rule``, that it uses."""

    def __init__(self, block: Any, config: TokenConfig) -> None:
        self.block, self.config = block, config
        self.proxies: tuple[QuantizedProxy, ...] = ()
        """Low-bit proxies of gate and up, if it makes any."""
        with torch.inference_mode(False):
            self.prepare()

    @classmethod
    def for_weights(cls, config: TokenConfig, blocks: bool) -> type[TokenRule]:
        """The class to use, depending on whether weights are stored in low-bit ``blocks``."""
        return cls

    @classmethod
    def check(cls, config: PruneConfig) -> None:
        """Raise ``ConfigError`` for settings that it does not support."""
        assert config.token is not None
        rule = config.token.rule
        for name in sorted(config.token.model_fields_set - cls.options - {"rule"}):
            if getattr(config.token, name) != TokenConfig.model_fields[name].default:
                raise ConfigError(f'token rule "{rule}" does not read {name}: drop it')
        if config.compensation and not cls.compensates:
            raise ConfigError(f'token rule "{rule}" does not support compensation: drop it')

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        """Bytes read for selection per forward, without the ``cost.computed`` neurons' rows."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Compute data for the selection: proxies, norms."""

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        """Strengths of all neurons, [..., I], or of the candidates of ``mask``, [..., n].

        The largest win.

        fed: the FFN's input [..., D]; u: its activations [..., I], None if not computed yet.
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
        """The down projection's input u, for rules that select inputs instead of neurons."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes of the data that ``prepare`` computed."""
        return sum(proxy.nbytes() for proxy in self.proxies)
