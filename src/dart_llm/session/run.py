"""``prune(model, ...)`` and ``Run``: a context manager that joins policy, model and accounting."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dart_llm.calibration.head import learn_screen
from dart_llm.calibration.learn import self_calibrate
from dart_llm.errors import AttachError, ConfigError
from dart_llm.models.checkpoint import tokenizer_of
from dart_llm.models.describe import ModelView, describe
from dart_llm.models.float32_products import note_slow_prompts
from dart_llm.patching.executors import check_executor, choose_executor, effective_executor
from dart_llm.patching.patch import ModelPatch
from dart_llm.pruning.accounting import Costs, known_bytes, run_report
from dart_llm.pruning.clamp import Given, make_clamp
from dart_llm.pruning.config import DEFAULT_METHOD, PruneConfig, check_prepared
from dart_llm.pruning.controller import PruningController, RemaskHook, TokensHook
from dart_llm.pruning.forward import PendingForward
from dart_llm.pruning.masks import USER_MASKS, LayerMask, Masks, masks_on_devices
from dart_llm.pruning.records import DriftCheck, HeadReport, Remask, RunReport
from dart_llm.pruning.selection import MaskSelector, check_fits
from dart_llm.pruning.sequence import SequenceState
from dart_llm.pruning.token_level import plain_masks, sequence_masks
from dart_llm.pruning.weights import FfnWeights, with_prior
from dart_llm.session.kept import other_model
from dart_llm.session.trace import Trace, open_trace

logger = logging.getLogger("dart_llm")


@dataclass(frozen=True)
class PatchCosts:
    """What a patch holds and did: bytes beside the model, whole steps, errors of low-bit copies.

    ``head``: of a screened output head.
    """

    nbytes: int = 0
    steps: int = 0
    proxy_errors: tuple[float, float] | None = None
    head: HeadReport | None = None


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
        clamp: Given | None = None,
    ) -> MethodOnModel:
        """``layers``: what learning made of the weights; None: the weights as they are.

        Raises ``ConfigError`` where the configuration or the clamp does not fit the layers.
        """
        if layers is None:
            layers = view.weights(config.score.proxy_embedding, config.seed)
        if prior is not None:
            layers = with_prior(layers, prior=prior)
        ranks = None if prior is None else tuple(prior)
        selector = check_fits(config, layers, make_clamp(layers, clamp or {}))
        return cls(config, layers, selector, fixed_masks, ranks, by_hand)

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

    def controller(
        self, on_remask: RemaskHook | None = None, on_tokens: TokensHook | None = None
    ) -> PruningController:
        """One that has seen nothing."""
        clamp = self.selector.clamp
        hooks = on_remask, on_tokens
        return PruningController(self.config, self.layers, self.fixed_masks, *hooks, clamp)

    def report(
        self, view: ModelView, controller: PruningController, executor: str, costs: PatchCosts
    ) -> RunReport:
        """Accounting of what ``controller`` counted."""
        sequences = controller.all_sequences()
        return run_report(
            sequences,
            Costs(
                self.layers, view.parameter_bytes, self.config.compensation, traffic=view.traffic
            ),
            effective_executor(executor, costs.steps, sequences),
            costs.nbytes + known_bytes(self.layers, self.prior),
            USER_MASKS if self.by_hand else self.config.method,
            self.asked,
            costs.proxy_errors,
            costs.head,
        )


Ids = Mapping[int, Sequence[int] | Tensor]


def newest_masks(
    states: Sequence[SequenceState], selector: MaskSelector
) -> tuple[LayerMask | None, ...]:
    """Of the newest mask, per layer; None: dense.  Raises ``AttachError`` before the first."""
    for state in reversed(states):
        if state.selection is not None:
            return state.selection.masks
    if selector.removes_nothing:
        raise AttachError("no mask is built where nothing is removed: ask for a sparsity above 0")
    seen, left = 0.0, max(1, selector.config.min_evidence)
    if states:
        seen, left = states[-1].evidence_tokens, states[-1].tokens_to_mask
    raise AttachError(
        f"no mask has been built yet: {seen:.0f} tokens were seen and {seen + left:.0f} are "
        f"needed, so decode at least {left + 1} more"
    )


class Run:
    """A model and how it is pruned.  Use it as a context manager, or ``attach``/``detach``.

    Not made directly: ``prune`` returns it.  ``controller`` and ``patch`` (None while detached)
    are there to be looked at, not changed.
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
        clamp: Given | None = None,
    ) -> None:
        """As ``prune``; ``held``: masks chosen by calibration, ``prior``: [I] per layer.

        Both come from ``dart_llm.session.prepare``.
        """
        self.model = model
        self.config = config
        self.on_remask = on_remask
        self.on_selection: Callable[[Remask, SequenceState], None] | None = None
        self.on_masks: Callable[[Masks], None] | None = None
        self._view, self._clamp = describe(model), clamp
        self.tracing: Trace | None = None
        by_hand = masks is not None or remove is not None
        method = MethodOnModel.of(self._view, config, held, prior, by_hand=by_hand, clamp=clamp)
        if by_hand:
            method = replace(method, fixed_masks=masks_on_devices(method.layers, masks, remove))
        method = _clamp_fixed(method)
        self._method = method
        self._first_masks = method.fixed_masks
        self.controller = self._new_controller()
        self.patch: ModelPatch | None = None
        self._costs = PatchCosts()
        check_prepared(config, method.chooses, prior is not None)
        check_executor(self._view.blocks, method.selector, model, method.chooses)

    @property
    def layers(self) -> tuple[FfnWeights, ...]:
        """The weights of every FFN, with what was learnt of them."""
        return self._method.layers

    @property
    def fixed_masks(self) -> Masks | None:
        """Masks that are given or held, one per layer; None where they are chosen."""
        return self._method.fixed_masks

    def _notify(self, remask: Remask, state: SequenceState) -> None:
        if self.on_remask is not None:
            self.on_remask(remask)
        if self.on_selection is not None:
            self.on_selection(remask, state)
        if self.on_masks is not None and state.masks is not None:
            self.on_masks(sequence_masks(state.masks))
        if self.tracing is not None:
            self.tracing.remask(remask, state)

    def _take_tokens(
        self, pending: PendingForward, accepted: int, states: list[SequenceState]
    ) -> None:
        if self.tracing is not None:
            self.tracing.take(pending, accepted, states)

    def _new_controller(self) -> PruningController:
        return self._method.controller(self._notify, self._take_tokens)

    @property
    def executor(self) -> str:
        """What runs the pruned FFNs; ``auto`` is the fastest that can run this model here."""
        return choose_executor(self._method.selector, self._view.blocks, self.model)

    def attach(self) -> Run:
        """Start pruning the model, and learn first what the method wants to know of it.

        Raises ``AttachError`` when it is pruned already.
        """
        if self.patch is not None and self.patch.installed:
            raise AttachError("this run is attached already")
        if self.tracing is not None:
            raise AttachError("this run is being traced: leave that block before it attaches anew")
        note_slow_prompts(self.model, logger.warning)
        if not self.controller.sequence_count:  # the model may have moved since this run was made
            self._method = self._learnt()
            self.controller = self._new_controller()
        screen = learn_screen(self.model, self.config, self._method.layers)
        patch = ModelPatch(self.model, self._view, self.controller, self.executor, screen=screen)
        self.patch = patch  # first, so that ``detach`` knows of it however this ends
        patch.install()
        return self

    def _learnt(self) -> MethodOnModel:
        """The method with what it wants to know of the model."""
        old = self._method
        method = MethodOnModel.of(
            self._view,
            self.config,
            old.fixed_masks,
            old.prior,
            by_hand=old.by_hand,
            clamp=self._clamp,
        )
        # masks that are held now may be let go later, those given from the start never
        if self._first_masks is not None or method.selector.removes_nothing:
            return method
        layers = self_calibrate(self.model, self.config, method.layers)
        known = old.fixed_masks, old.prior, layers
        return MethodOnModel.of(self._view, self.config, *known, clamp=self._clamp)

    def detach(self) -> None:
        """Stop pruning; the model is exactly what it was.  Safe to call twice."""
        patch = self.patch
        if patch is None:
            return
        try:
            self.controller.flush()
        finally:
            patch.remove()
            self._costs = _costs_of(patch)
            self.patch = None

    def __enter__(self) -> Run:
        before = self.patch
        try:
            return self.attach()
        except BaseException:
            if self.patch is not before:  # interrupted when all was done: no block is entered
                self.detach()
            raise

    def __exit__(self, *error: object) -> None:
        self.detach()

    def reset(self) -> None:
        """Forget all sequences, masks and records; the next forward starts anew.

        Raises ``AttachError`` while it is traced: sequences would be numbered anew in one file.
        """
        if self.tracing is not None:
            raise AttachError("this run is being traced: leave that block before it is reset")
        self.controller = self._new_controller()
        if self.patch is not None:
            self.patch.controller = self.controller

    @contextlib.contextmanager
    def decoding(self, prompt: bool = False) -> Iterator[None]:
        """Inside, every forward that continues a cache counts as decode, whatever its length.

        ``prompt``: forwards that start a sequence, or that are ``generate``'s prompt step, too;
        held masks (``hold``) then serve the prompt too.  Raises ``AttachError`` when detached.
        """
        patch = self.patch
        if patch is None or not patch.installed:
            raise AttachError("decoding() needs an attached run: use it inside the with block")
        patch.forced_decode += 1
        patch.forced_prompt += prompt
        try:
            yield
        finally:
            patch.forced_decode -= 1
            patch.forced_prompt -= prompt

    def trace(
        self, path: str | Path, activations: bool = False
    ) -> contextlib.AbstractContextManager[Trace]:
        """A block whose tokens are written to ``path``: which neurons each layer ran for each.

        ``activations``: and what these were, which needs executor ``masked``.  The file is there
        when the block is left, also by an error; ``read_trace`` reads it, and docs/trace.md says
        what it holds.  Memory holds some hundred tokens at a time, the rest lies beside ``path``.

        Raises ``AttachError`` when detached, or traced already; ``ConfigError`` for activations
        under another executor, and for methods whose tokens choose no neurons (``teal`` and others
        of ``token.rule`` ``inputs``); ``ResultsError`` where nothing can be written.
        """
        return open_trace(self, Path(path), activations)

    def select(self) -> Masks:
        """The masks that the tokens observed so far give, compensation included; None: dense.

        Changes nothing.  With masks of the user's own: those.  Raises ``AttachError`` when the
        configuration needs observed tokens and there are none.
        """
        fixed = self._method.fixed_masks
        masks = fixed if fixed is not None else self.controller.select()
        if self.on_masks is not None:
            self.on_masks(sequence_masks(masks))
        return masks

    def hold(self, masks: Masks | None) -> None:
        """From now on apply ``masks`` (as of ``select``) and choose none; None: choose again.

        Forgets all sequences, as ``reset`` does.
        """
        choose = masks is None or self._method.selector.removes_nothing
        masks = self._first_masks if choose else masks
        self._method = replace(self._method, fixed_masks=masks)
        self.reset()

    def branch(self) -> None:
        """What was decoded so far stays counted when the next forward goes back in the cache.

        For several continuations of one prompt; a plain shorter cache means rolled-back tokens.
        """
        self.controller.branch()

    def tokens_until_change(self) -> int | None:
        """Tokens that one decode forward may hold before the masks can change; None: no bound.

        For forwards of your own: raises ``AttachError`` while ``generate`` runs.
        """
        if self._generating:
            raise AttachError("generate is running: it decides itself how long a forward is")
        return self.controller.tokens_until_change()

    @property
    def phase(self) -> str:
        """Phase in which the newest forward ran: prefill, observe, pruned or released."""
        return str(self.controller.last_phase)

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
        if self._method.fixed_masks is not None:
            return self._method.fixed_masks
        return newest_masks(self.controller.all_sequences(), self.controller.selector)

    @property
    def remasks(self) -> tuple[Remask, ...]:
        """Every mask that was built, in order."""
        return tuple(r for state in self.controller.all_sequences() for r in state.remasks)

    @property
    def drift_checks(self) -> tuple[DriftCheck, ...]:
        """Every window that the drift detector completed, in order."""
        self._catch_up()
        return tuple(self.controller.checks)

    @property
    def _generating(self) -> bool:
        return self.patch is not None and self.patch.loop is not None

    def _catch_up(self) -> None:
        """Account for the newest forward, unless ``generate`` may still roll it back."""
        if not self._generating:
            self.controller.flush()

    def report(self) -> RunReport:
        """Accounting so far, in total and per sequence."""
        self._catch_up()
        costs = self._costs if self.patch is None else _costs_of(self.patch)
        return self._method.report(self._view, self.controller, self.executor, costs)

    @property
    def asks_for_pruning(self) -> bool:
        """False where nothing can be removed: sparsity 0, a table of ones, masks of everything."""
        return not self._method.dense

    def export(self, folder: str | Path) -> Path:
        """Write the newest mask as a dense, narrower checkpoint that ``from_pretrained`` loads.

        The tokenizer too, where it is known.
        ``folder``: where to; a name that ends in ``.gguf`` is a file for llama.cpp, made of the
        one whose blocks the model holds (``dart_llm.export_gguf`` chooses masks for many texts).

        Raises ``ConfigError`` unless every layer keeps the same number of neurons (a GGUF of
        Llama's architecture may hold any), and for low-rank compensation, which has no place
        there; ``AttachError`` before the first mask.
        """
        from dart_llm.session.export import export

        masks = plain_masks(self._newest_masks())
        if Path(folder).suffix == ".gguf":
            from dart_llm.session.gguf_export import source_file, write_masks

            return write_masks(source_file(self.model), masks, folder).path
        if Path(folder).is_file():
            raise ConfigError(f"export writes a folder, and {folder} is a file: give another name")
        written = export(self.model, self._view.blocks, masks, Path(folder))
        if (tokenizer := tokenizer_of(self.model)) is not None:
            tokenizer.save_pretrained(written)
        return written


def _clamp_fixed(method: MethodOnModel) -> MethodOnModel:
    """The same, whose masks are clamped; where nothing is chosen a clamp is a fixed mask itself."""
    fixed, clamp = method.fixed_masks, method.selector.clamp
    if not clamp.layers or method.chooses:
        return method
    return replace(method, fixed_masks=clamp.of(fixed or (None,) * len(method.layers)))


def _costs_of(patch: ModelPatch) -> PatchCosts:
    head = None if patch.head is None else patch.head.report()
    return PatchCosts(patch.nbytes(), patch.steps, patch.proxy_errors, head)


def prune(
    model: nn.Module,
    method: str | PruneConfig = DEFAULT_METHOD,
    *,
    sparsity: float | None = None,
    masks: Ids | None = None,
    remove: Ids | None = None,
    clamp: Given | None = None,
    on_remask: Callable[[Remask], None] | None = None,
    **settings: Any,
) -> Run:
    """Prune the FFN neurons of ``model`` while it decodes.

    ``method``: a name (``dart-llm methods`` lists them), a ``PruneConfig``, or
    ``file:setting.yaml``, what ``tune`` kept: a warning says where that was found for another
    model.  ``sparsity``: fraction of all FFN neurons to remove, [0, 1).  ``masks``: {layer: neuron
    ids to keep}, or ``remove``: {layer: ids to remove}, applies the given neurons.  ``clamp``:
    {layer: {neuron id: activation}} fixes neurons of decoded tokens beside all that, whatever the
    masks (0.0: as if removed; ``sparsity=0`` for nothing but the clamp).  ``on_remask``
    is called with every new mask's record.  ``settings``: any field of ``PruneConfig``.  Nothing is
    changed before the block is entered, or ``attach`` is called.

    Raises ``ConfigError`` for settings that do not fit (``UnknownName`` for names), and
    ``UnsupportedModel`` for a model that cannot be pruned.

    >>> with prune(model, sparsity=0.5) as run:             # doctest: +SKIP
    ...     model.generate(**inputs, max_new_tokens=200)
    >>> print(run.report())                                 # doctest: +SKIP
    """
    if sparsity is not None and (masks is not None or remove is not None):
        raise ConfigError("masks= and remove= name the neurons themselves: drop the sparsity")
    config = PruneConfig.build(method, sparsity=sparsity, **settings)
    if isinstance(method, str) and (said := other_model(method, model, held=True)):
        logger.warning(said)
    return Run(model, config, masks, remove, on_remask, clamp=clamp)
