"""WINA (arXiv 2505.19427)."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.token_rules.rule import NORM_BYTES, LayerCost
from dart_llm.pruning.token_rules.teal import Teal
from dart_llm.pruning.weights import norms_of


class Wina(Teal):
    """Each token selects, for each matrix of the FFN, inputs by magnitude times column norm.

    Inputs with the largest ``abs(x_j) * ||W[:, j]||_2`` stay (arXiv 2505.19427).
    """

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        """The bytes of ``Teal``, plus the bytes of a norm for each input of each matrix."""
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
