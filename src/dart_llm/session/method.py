"""A configuration and what it knows of one model: what ``Run`` has once and the engine many times.

Start here for how weights, learnt parts, masks and accounting of one model come together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dart_llm.models.describe import ModelView
from dart_llm.patching.executors.whole_step import effective_executor
from dart_llm.pruning.accounting import Costs, known_bytes, run_report
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.controller import PruningController, RemaskHook
from dart_llm.pruning.masks import USER_MASKS, Masks
from dart_llm.pruning.records import RunReport
from dart_llm.pruning.selection import MaskSelector, check_fits
from dart_llm.pruning.weights import FfnWeights, with_prior


@dataclass(frozen=True)
class PatchCosts:
    """What a patch holds and did: bytes beside the model, whole steps, errors of low-bit copies."""

    nbytes: int = 0
    steps: int = 0
    proxy_errors: tuple[float, float] | None = None


@dataclass(frozen=True)
class MethodOnModel:
    """A configuration and what it knows of a model.

    ``layers``: the weights, with what was learnt of them.  ``fixed_masks``: masks that were given
    or calibrated, one per layer (None: dense), or None where masks are chosen.  ``prior``: [I] per
    layer, as of calibration.  ``by_hand``: whether the masks are the user's own.
    """

    config: PruneConfig
    layers: tuple[FfnWeights, ...]
    selector: MaskSelector
    fixed_masks: Masks | None = None
    prior: tuple[Tensor, ...] | None = None
    by_hand: bool = False

    @classmethod
    def of(
        cls,
        view: ModelView,
        config: PruneConfig,
        fixed_masks: Masks | None = None,
        prior: Sequence[Tensor] | None = None,
        layers: tuple[FfnWeights, ...] | None = None,
        by_hand: bool = False,
    ) -> MethodOnModel:
        """``layers``: what learning made of the weights; None: the weights as they are.

        Raises ``ConfigError`` where the configuration does not fit the layers.
        """
        if layers is None:
            layers = view.weights(config.score.proxy_embedding, config.seed)
        if prior is not None:
            layers = with_prior(layers, prior=prior)
        ranks = None if prior is None else tuple(prior)
        return cls(config, layers, check_fits(config, layers), fixed_masks, ranks, by_hand)

    @property
    def chooses(self) -> bool:
        """Whether it chooses masks by itself."""
        return self.fixed_masks is None and not self.selector.removes_nothing

    @property
    def dense(self) -> bool:
        """Whether it can remove nothing: sparsity 0, a table of ones, masks of everything."""
        if self.fixed_masks is not None:
            return all(mask is None for mask in self.fixed_masks)
        return self.selector.removes_nothing

    @property
    def asked(self) -> float | None:
        """The sparsity asked for; None where it is not one of the whole model."""
        return self.config.target if self.selector.asks_total and not self.by_hand else None

    def controller(self, on_remask: RemaskHook | None = None) -> PruningController:
        """One that has seen nothing."""
        return PruningController(self.config, self.layers, self.fixed_masks, on_remask)

    def report(
        self, view: ModelView, controller: PruningController, executor: str, costs: PatchCosts
    ) -> RunReport:
        """Accounting of what ``controller`` counted."""
        sequences = controller.all_sequences()
        return run_report(
            sequences,
            Costs(self.layers, view.parameter_bytes, self.config.compensation),
            effective_executor(executor, costs.steps, sequences),
            costs.nbytes + known_bytes(self.layers, self.prior),
            USER_MASKS if self.by_hand else self.config.method,
            self.asked,
            costs.proxy_errors,
        )
