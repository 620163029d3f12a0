"""What a per-token rule is.

A new rule is one file: a subclass of ``TokenRule`` with what it prepares of a block, what it ranks
neurons by and what bytes that takes, and ``TOKEN_RULES.register("name", MyRule)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig, TokenConfig
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.token_level import QuantizedProxy, TokenMask, winner_places
from dart_llm.pruning.weights import FfnWeights, stored_bytes


class Block(Protocol):
    """An FFN as a rule sees it (``models.ffn.FfnBlock``).  I: neurons, D: hidden size."""

    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        """The activation function."""

    @property
    def plain(self) -> bool:
        """Whether there is no gate."""

    def matrices(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gate [I, D] or None, up [I, D], down [D, I]."""

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of gate, up and down."""

    def gate_of(self, x: Tensor) -> Tensor:
        """The gate's output, before its activation function.  x: [..., D]; returns [..., I]."""

    def up_of(self, x: Tensor) -> Tensor:
        """The up projection's output."""

    def hidden(self, x: Tensor) -> Tensor:
        """u: what the down projection is given."""


@dataclass(frozen=True)
class LayerCost:
    """One layer whose tokens select, for the count of bytes.

    ``candidates``: neurons that are ranked; ``winners``: those that are kept; ``computed``: those
    whose rows are read anyway.  ``width``: bytes of a weight that is not in low-bit blocks; None:
    as it is stored.
    """

    layer: FfnWeights
    candidates: int
    winners: int
    computed: int
    width: int | None = None

    @property
    def losers(self) -> int:
        """Candidates whose rows are not read anyway."""
        return max(0, self.candidates - self.computed)

    def stored(self, matrix: Tensor) -> float:
        """Bytes of a matrix."""
        return stored_bytes(matrix, self.width)


class TokenRule:
    """How each token of one FFN block selects neurons: by ``strengths``.

    The first line of a rule's docstring is what ``dart-llm methods`` lists.
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

    def __init__(self, block: Block, config: TokenConfig) -> None:
        self.block, self.config = block, config
        self.proxies: tuple[QuantizedProxy, ...] = ()
        """Low-bit proxies of gate and up, where it makes any."""
        self.error: list[tuple[float, float]] = []
        """Squared norms of each proxy's error, and of the matrix."""
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
        rule, usual = config.token.rule, TokenConfig()
        for name in TokenConfig.model_fields:
            changed = getattr(config.token, name) != getattr(usual, name)
            if name != "rule" and name not in cls.options and changed:
                raise ConfigError(f'token rule "{rule}" does not read {name}: drop it')
        if config.compensation and not cls.compensates:
            raise ConfigError(
                f'token rule "{rule}" has no mean of what it leaves out: drop the compensation'
            )

    @classmethod
    def describe(cls, config: TokenConfig) -> str:
        """What every token selects, in words."""
        return (cls.__doc__ or "").split("\n")[0].rstrip(".")

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
