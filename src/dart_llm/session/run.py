"""Prune() and Run: attach, detach, masks, report.

``prune(model, ...)``: a context manager that joins policy, model and accounting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dart_llm.calibration.learn import self_calibrate
from dart_llm.errors import AttachError, ConfigError
from dart_llm.models.describe import describe
from dart_llm.patching.executors import check_executor, choose_executor
from dart_llm.patching.executors.whole_step import effective_executor
from dart_llm.patching.patch import ModelPatch
from dart_llm.pruning.accounting import Costs, known_bytes, run_report
from dart_llm.pruning.config import PruneConfig, check_prepared
from dart_llm.pruning.controller import PruningController
from dart_llm.pruning.masks import USER_MASKS, LayerMask, Masks, masks_on_devices
from dart_llm.pruning.records import DriftCheck, Remask, RunReport
from dart_llm.pruning.selection import MaskSelector
from dart_llm.pruning.sequence import SequenceState
from dart_llm.pruning.token_level import plain_masks, sequence_masks
from dart_llm.pruning.weights import FfnWeights, with_prior

# The newest mask that a run's sequences hold, or how far they are from the first.


def newest_masks(
    lives: Sequence[SequenceState], selector: MaskSelector
) -> tuple[LayerMask | None, ...]:
    """Per layer; None: dense.  Raises ``AttachError`` where no mask has been built."""
    for life in reversed(lives):
        if life.selection is not None:
            return life.selection.masks
    if selector.removes_nothing:
        raise AttachError("no mask is built where nothing is removed: ask for a sparsity above 0")
    seen, left = 0.0, max(1, selector.config.min_evidence)
    if lives:
        seen, left = lives[-1].evidence_tokens, lives[-1].tokens_to_mask
    raise AttachError(
        f"no mask has been built yet: {seen:.0f} tokens were seen and {seen + left:.0f} are "
        f"needed, so decode at least {left + 1} more"
    )


Ids = Mapping[int, Sequence[int] | Tensor]


class Run:
    """A model and how it is pruned.  Use it as a context manager, or ``attach``/``detach``.

    Not made directly: ``prune`` returns it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig,
        masks: Ids | None = None,
        remove: Ids | None = None,
        on_remask: Callable[[Remask], None] | None = None,
        held: Masks | None = None,
        prior: Sequence[Tensor] | None = None,
    ) -> None:
        """As ``prune``; ``held``: masks chosen by calibration, ``prior``: [I] per layer.

        Both come from ``dart_llm.session.prepare``.
        """
        self.model = model
        self.config = config
        self.on_remask = on_remask
        self.on_selection: Callable[[Remask, SequenceState], None] | None = None
        self.on_masks: Callable[[Masks], None] | None = None
        self._view = describe(model)
        self._prior = prior
        self._layers = self._weights()
        self._by_hand = masks is not None or remove is not None
        self._given = self._first = (
            masks_on_devices(self._layers, masks, remove) if self._by_hand else held
        )
        self._tracer = self._new_tracer()
        self._attachment: ModelPatch | None = None
        self._copies = self._steps = 0
        self._proxy_errors: tuple[float, float] | None = None
        chooses = self._given is None and not self._tracer.selector.removes_nothing
        check_prepared(config, chooses, prior is not None)
        check_executor(self._view.blocks, self._tracer.selector, model, chooses)

    def _weights(self) -> tuple[FfnWeights, ...]:
        layers = self._view.weights(self.config.score.proxy_embedding, self.config.seed)
        return layers if self._prior is None else with_prior(layers, prior=self._prior)

    def _new_tracer(self) -> PruningController:
        return PruningController(self.config, self._layers, self._given, self._notify)

    def _notify(self, remask: Remask, life: SequenceState) -> None:
        if self.on_remask is not None:
            self.on_remask(remask)
        if self.on_selection is not None:
            self.on_selection(remask, life)
        if self.on_masks is not None and life.masks is not None:
            self.on_masks(sequence_masks(life.masks))

    @property
    def executor(self) -> str:
        """What runs the pruned FFNs; ``auto`` is the fastest that can run this model here."""
        return choose_executor(self._tracer.selector, self._view.blocks, self.model)

    def attach(self) -> Run:
        """Start pruning the model, and learn first what the method wants to know of it.

        Raises ``AttachError`` when it is pruned already.
        """
        if self._attachment is not None and self._attachment.installed:
            raise AttachError("this run is attached already")
        if not self._tracer.sequences:  # the model may have moved since this run was made
            self._layers = self._weights()
            # masks that are held now may be let go later, those given from the start never
            if self._first is None and not self._tracer.selector.removes_nothing:
                self._layers = self_calibrate(self.model, self.config, self._layers)
            self._tracer = self._new_tracer()
        attachment = ModelPatch(self.model, self._view, self._tracer, self.executor)
        self._attachment = attachment  # first, so that ``detach`` knows of it however this ends
        attachment.install()
        self._proxy_errors = attachment.proxy_errors
        return self

    def detach(self) -> None:
        """Stop pruning; the model is exactly what it was.  Safe to call twice."""
        attachment = self._attachment
        if attachment is None:
            return
        try:
            self._tracer.flush()
        finally:
            attachment.remove()
            self._copies, self._steps = attachment.nbytes(), attachment.steps
            self._attachment = None

    def __enter__(self) -> Run:
        before = self._attachment
        try:
            return self.attach()
        except BaseException:
            if self._attachment is not before:  # interrupted when all was done: no block is entered
                self.detach()
            raise

    def __exit__(self, *error: object) -> None:
        self.detach()

    def reset(self) -> None:
        """Forget all sequences, masks and records; the next forward starts anew."""
        self._tracer = self._new_tracer()
        if self._attachment is not None:
            self._attachment.tracer = self._tracer

    @contextlib.contextmanager
    def decoding(self, prompt: bool = False) -> Iterator[None]:
        """Inside, every forward that continues a cache counts as decode, whatever its length.

        ``prompt``: forwards that start a sequence, or that are ``generate``'s prompt step, too;
        held masks (``hold``) then serve the prompt too.  Raises ``AttachError`` when detached.
        """
        attachment = self._attachment
        if attachment is None or not attachment.installed:
            raise AttachError("decoding() needs an attached run: use it inside the with block")
        attachment.forced_decode += 1
        attachment.forced_prompt += prompt
        try:
            yield
        finally:
            attachment.forced_decode -= 1
            attachment.forced_prompt -= prompt

    def select(self) -> Masks:
        """The masks that the tokens observed so far give, compensation included; None: dense.

        Changes nothing.  With masks of the user's own: those.  Raises ``AttachError`` when the
        configuration needs observed tokens and there are none.
        """
        masks = self._given if self._given is not None else self._tracer.select()
        if self.on_masks is not None:
            self.on_masks(sequence_masks(masks))
        return masks

    def hold(self, masks: Masks | None) -> None:
        """From now on apply ``masks`` (as of ``select``) and choose none; None: choose again.

        Forgets all sequences, as ``reset`` does.
        """
        choose = masks is None or self._tracer.selector.removes_nothing
        self._given = self._first if choose else masks
        self.reset()

    def branch(self) -> None:
        """What was decoded so far stays counted when the next forward goes back in the cache.

        For several continuations of one prompt; a plain shorter cache means rolled-back tokens.
        """
        self._tracer.branch()

    def tokens_until_change(self) -> int | None:
        """Tokens that one decode forward may hold before the masks can change; None: no bound.

        For forwards of your own: raises ``AttachError`` while ``generate`` runs.
        """
        if self._generating:
            raise AttachError("generate is running: it decides itself how long a forward is")
        return self._tracer.tokens_until_change()

    @property
    def phase(self) -> str:
        """Phase in which the newest forward ran: prefill, observe, pruned or released."""
        return str(self._tracer.last_phase)

    def masks(self) -> dict[int, Tensor]:
        """Kept neuron ids per layer of the newest mask, [k] int64 on the host; none where dense.

        Raises ``AttachError`` before the first, ``ConfigError`` where every token chooses its own.
        """
        return {
            layer: mask.ids.cpu()
            for layer, mask in enumerate(plain_masks(self._newest_masks()))
            if mask is not None
        }

    def _newest_masks(self) -> tuple[LayerMask | None, ...]:
        if self._given is not None:
            return self._given
        return newest_masks(self._tracer.all_lives(), self._tracer.selector)

    @property
    def remasks(self) -> tuple[Remask, ...]:
        """Every mask that was built, in order."""
        return tuple(r for life in self._tracer.all_lives() for r in life.remasks)

    @property
    def drift_checks(self) -> tuple[DriftCheck, ...]:
        """Every window that the drift detector completed, in order."""
        self._catch_up()
        return tuple(self._tracer.checks)

    @property
    def _generating(self) -> bool:
        return self._attachment is not None and self._attachment.loop is not None

    def _catch_up(self) -> None:
        """Account for the newest forward, unless ``generate`` may still roll it back."""
        if not self._generating:
            self._tracer.flush()

    def report(self) -> RunReport:
        """Accounting so far, in total and per sequence."""
        self._catch_up()
        copies, steps = self._copies, self._steps
        if self._attachment is not None:
            copies, steps = self._attachment.nbytes(), self._attachment.steps
        copies += known_bytes(self._layers, self._prior)
        lives = list(self._tracer.all_lives())
        return run_report(
            lives,
            Costs(self._layers, self._view.parameter_bytes, self.config.compensation),
            effective_executor(self.executor, steps, lives),
            copies,
            USER_MASKS if self._by_hand else self.config.method,
            self.config.target if self._tracer.selector.asks_total and not self._by_hand else None,
            self._proxy_errors,
        )

    @property
    def asks_for_pruning(self) -> bool:
        """False where nothing can be removed: sparsity 0, a table of ones, masks of everything."""
        if self._given is not None:
            return any(mask is not None for mask in self._given)
        return not self._tracer.selector.removes_nothing

    def export(self, folder: str | Path) -> Path:
        """Write the newest mask as a dense, narrower checkpoint that ``from_pretrained`` loads.

        Raises ``ConfigError`` unless every layer keeps the same number of neurons, and for low-rank
        compensation, which has no place there; ``AttachError`` before the first mask.
        """
        from dart_llm.session.export import export

        masks = plain_masks(self._newest_masks())
        return export(self.model, self._view.blocks, masks, Path(folder))


def prune(
    model: nn.Module,
    method: str | PruneConfig = "dart",
    *,
    sparsity: float | None = None,
    masks: Ids | None = None,
    remove: Ids | None = None,
    on_remask: Callable[[Remask], None] | None = None,
    **settings: Any,
) -> Run:
    """Prune the FFN neurons of ``model`` while it decodes.

    ``method``: a name (``dart-llm methods`` lists them) or a ``PruneConfig``.  ``sparsity``:
    fraction of all FFN neurons to remove, [0, 1).  ``masks``: {layer: neuron ids to keep}, or
    ``remove``: {layer: ids to remove}, applies the given neurons.  ``on_remask`` is called with
    every new mask's record.  ``settings``: any field of ``PruneConfig``.  Nothing is changed before
    the block is entered, or ``attach`` is called.

    Raises ``ConfigError`` for settings that do not fit (``UnknownName`` for names), and
    ``UnsupportedModel`` for a model that cannot be pruned.

    >>> with prune(model, sparsity=0.5) as run:             # doctest: +SKIP
    ...     model.generate(**inputs, max_new_tokens=200)
    >>> print(run.report())                                 # doctest: +SKIP
    """
    if sparsity is not None and (masks is not None or remove is not None):
        raise ConfigError("masks= and remove= name the neurons themselves: drop the sparsity")
    config = PruneConfig.build(method, sparsity=sparsity, **settings)
    return Run(model, config, masks, remove, on_remask)
