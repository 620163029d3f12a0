"""``prune(model, ...)``, ``Run`` and what it runs: a method bound to a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dart_llm.calibration.self_calibration import learn_screen, self_calibrate
from dart_llm.errors import AttachError, ConfigError
from dart_llm.models.capture import capture_activations
from dart_llm.models.checkpoint import tokenizer_of
from dart_llm.models.describe import ModelView, describe
from dart_llm.patching.executors import check_executor, choose_executor, effective_executor
from dart_llm.patching.executors.token_ffn import winner_rows
from dart_llm.patching.patch import ModelPatch
from dart_llm.pruning.accounting import Costs, known_bytes, run_report
from dart_llm.pruning.clamp import ClampValues, make_clamp
from dart_llm.pruning.config import DEFAULT_METHOD, USER_MASKS, PruneConfig
from dart_llm.pruning.controller import PruningController, RemaskHook, TokensHook
from dart_llm.pruning.forward import PendingForward
from dart_llm.pruning.masks import Ids, LayerMask, Masks, masks_on_devices
from dart_llm.pruning.records import DriftCheck, HeadReport, Remask, RunReport
from dart_llm.pruning.selection import MaskSelector, check_fits
from dart_llm.pruning.sequence import SequenceState
from dart_llm.pruning.token_level import plain_masks, sequence_masks
from dart_llm.pruning.weights import FfnWeights, in_blocks, with_parts
from dart_llm.session.export import export
from dart_llm.session.gguf_file import source_file, write_masks
from dart_llm.session.kept import other_model
from dart_llm.session.trace import Trace, check_traceable

logger = logging.getLogger("dart_llm")


@dataclass(frozen=True)
class PatchCosts:
    """What a patch allocated and did: bytes beside the model, whole steps, errors of proxies.

    ``head``: of a screened output head.
    """

    nbytes: int = 0
    steps: int = 0
    proxy_errors: tuple[float, float] | None = None
    head: HeadReport | None = None


def likelihood_config(config: PruneConfig) -> PruneConfig:
    """The configuration under which likelihood tasks run: masks at once, never a re-mask."""
    return config.replace({"masking_step": 0, "min_evidence": 0, "drift": {"rule": "never"}})


@dataclass(frozen=True)
class BoundMethod:
    """A configuration bound to a model's weights, statistics and fixed masks.

    ``config`` None: the untouched model.  ``masks``: the user's, {layer: kept ids}.
    ``fixed_masks``: one per layer (None: dense), calibrated or the user's; None: masks are chosen.
    ``prior``: calibrated ranks, [I] per layer, for scores that mix it in.  ``learned``: the layers
    with learned statistics; None: without.  ``notes``: what a reader of its numbers must know.
    ``facts``: further numbers for tables, such as ``weight_bytes``.
    """

    model: Any
    tokenizer: Any
    config: PruneConfig | None
    masks: Ids | None = None
    fixed_masks: Masks | None = None
    prior: tuple[Tensor, ...] | None = None
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    learned: tuple[FfnWeights, ...] | None = None
    clamp: ClampValues | None = None
    by_hand: bool = False
    """Whether ``fixed_masks`` are the user's."""

    @property
    def label(self) -> str:
        """``dense``, or method and sparsity as in ``dart@0.5``."""
        if self.name:
            return self.name
        if self.config is None:
            return "dense"
        if self.masks is not None:
            return USER_MASKS
        amount = "table" if self.requested is None else f"{self.requested:g}"
        return f"{self.config.method}@{amount}"

    @property
    def method(self) -> str:
        """Name of the method; of the untouched model and of the user's masks, their label."""
        return self.label if self.config is None or self.masks is not None else self.config.method

    @property
    def requested(self) -> float | None:
        """The requested sparsity; None where a table, ``auto`` or masks set the counts."""
        if self.config is None:
            return 0.0
        fixed = self.config.budget.table is not None or self.config.score.strategy == "auto"
        if self.masks is not None or (fixed and self.config.sparsity is None):
            return None
        return self.config.target

    @property
    def settings(self) -> PruneConfig:
        """``config``, where there is one."""
        assert self.config is not None
        return self.config

    @cached_property
    def view(self) -> ModelView:
        """The model's parts."""
        return describe(self.model)

    @cached_property
    def layers(self) -> tuple[FfnWeights, ...]:
        """The weights of every FFN, with learned statistics and prior."""
        config, layers = self.settings, self.learned
        if layers is None:
            layers = self.view.weights(config.score.proxy_embedding, config.seed)
        return layers if self.prior is None else with_parts(layers, prior=self.prior)

    @cached_property
    def selector(self) -> MaskSelector:
        """Raises ``ConfigError`` where the configuration or the clamp does not fit the layers."""
        return check_fits(self.settings, self.layers, make_clamp(self.layers, self.clamp or {}))

    @property
    def selects(self) -> bool:
        """Whether it selects masks by itself."""
        return self.fixed_masks is None and not self.selector.removes_nothing

    @property
    def dense(self) -> bool:
        """Whether it can remove nothing: sparsity 0, a table of ones, masks of everything."""
        if self.fixed_masks is not None:
            return all(mask is None for mask in self.fixed_masks)
        return self.selector.removes_nothing

    def with_fixed_masks(self, remove: Ids | None = None) -> BoundMethod:
        """The same, with the user's masks on the layers' devices, clamped.

        ``remove``: {layer: ids} in place of ``masks``.  Where nothing is selected, a clamp is a
        fixed mask itself.
        """
        fixed, clamp = self.fixed_masks, self.selector.clamp
        if self.masks is not None or remove is not None:
            fixed = masks_on_devices(self.layers, self.masks, remove)
        if clamp.layers and (fixed is not None or self.selector.removes_nothing):
            fixed = clamp.of(fixed or (None,) * len(self.layers))
        by_hand = self.by_hand or self.masks is not None or remove is not None
        return replace(self, masks=None, fixed_masks=fixed, by_hand=by_hand)

    def check_prepared(self) -> None:
        """Raise ``ConfigError`` for a method that needs what only ``prepare`` makes."""
        calibration = self.settings.calibration
        if calibration is None or not self.selects or self.prior is not None:
            return
        text = calibration.source == "text"
        argument, option = (", calibration=FILE", " --calibration FILE") if text else ("", "")
        raise ConfigError(
            f'method "{self.method}" takes its {calibration.purpose} from calibration, which prune '
            "does not do: use dart_llm.session.prepare.prepare(model, tokenizer, config"
            f"{argument}), or dart-llm eval --method {self.method}{option}"
        )

    def run(self, likelihood: bool = False, make: Callable[..., Run] | None = None) -> Run | None:
        """A new run, not attached; None for the untouched model.

        ``likelihood``: with the settings of likelihood tasks (masks at once, never a re-mask).
        ``make``: called as ``Run`` is, for another kind of run.
        """
        if self.config is None:
            return None
        config = likelihood_config(self.config) if likelihood else self.config
        return (make or Run)(
            self.model,
            config,
            masks=self.masks,
            fixed_masks=self.fixed_masks,
            prior=self.prior,
        )

    def controller(
        self, on_remask: RemaskHook | None = None, on_tokens: TokensHook | None = None
    ) -> PruningController:
        """A new one."""
        clamp = self.selector.clamp
        hooks = on_remask, on_tokens
        return PruningController(self.settings, self.layers, self.fixed_masks, *hooks, clamp)

    def report(self, controller: PruningController, executor: str, costs: PatchCosts) -> RunReport:
        """Accounting of what ``controller`` counted."""
        sequences, config, view = controller.all_sequences(), self.settings, self.view
        executor = effective_executor(executor, costs.steps, sequences)
        by_hand = self.by_hand
        blocks = all(in_blocks(layer.stored_up) for layer in self.layers)
        return run_report(
            sequences,
            Costs(self.layers, view.parameter_bytes, config.compensation, traffic=view.traffic),
            executor,
            costs.nbytes + known_bytes(self.layers, self.prior),
            USER_MASKS if by_hand else config.method,
            config.target if self.selector.total_requested and not by_hand else None,
            costs.proxy_errors,
            costs.head,
            winner_rows(config.token, executor, blocks),
        )


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
        fixed_masks: Masks | None = None,
        prior: Sequence[Tensor] | None = None,
        clamp: ClampValues | None = None,
    ) -> None:
        """As ``prune``; ``fixed_masks``: chosen by calibration, ``prior``: [I] per layer.

        Both come from ``dart_llm.session.prepare``.
        """
        self.model = model
        self.config = config
        self.on_remask = on_remask
        self.on_selection: Callable[[Remask, SequenceState], None] | None = None
        self.on_masks: Callable[[Masks], None] | None = None
        self.tracing: Trace | None = None
        ranks = None if prior is None else tuple(prior)
        method = BoundMethod(model, None, config, masks, fixed_masks, ranks, clamp=clamp)
        self._method = method = method.with_fixed_masks(remove)
        self._first_masks = method.fixed_masks
        self.controller = self._new_controller()
        self.patch: ModelPatch | None = None
        self._costs = PatchCosts()
        method.check_prepared()
        check_executor(method.view.blocks, method.selector, model, method.selects)

    @property
    def layers(self) -> tuple[FfnWeights, ...]:
        """The weights of every FFN, with learned statistics."""
        return self._method.layers

    @property
    def fixed_masks(self) -> Masks | None:
        """Fixed masks, one per layer; None where they are chosen."""
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
        return choose_executor(self._method.selector, self._method.view.blocks, self.model)

    def attach(self) -> Run:
        """Start pruning the model; what the method needs of it is learned first.

        Raises ``AttachError`` when it is pruned already.
        """
        if self.patch is not None and self.patch.installed:
            raise AttachError("this run is attached already")
        if self.tracing is not None:
            raise AttachError("this run is being traced: leave that block before it attaches anew")
        if not self.controller.sequence_count:  # the model may have moved since this run was made
            self._method = self._with_statistics()
            self.controller = self._new_controller()
        method = self._method
        screen = learn_screen(self.model, self.config, method.layers)
        patch = ModelPatch(self.model, method.view, self.controller, self.executor, screen=screen)
        self.patch = patch  # first, so that ``detach`` finds it however this ends
        patch.install()
        return self

    def _with_statistics(self) -> BoundMethod:
        """The method with the statistics that it needs of the model."""
        method = replace(self._method, learned=None)
        # fixed masks may be let go later (``hold``), those of the start never
        if self._first_masks is not None or method.selector.removes_nothing:
            return method
        return replace(method, learned=self_calibrate(self.model, self.config, method.layers))

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

    @contextmanager
    def decoding(self, prompt: bool = False) -> Iterator[None]:
        """Inside, every forward that continues a cache counts as decode, whatever its length.

        ``prompt``: forwards that start a sequence, or that are ``generate``'s prompt step, too;
        fixed masks (``hold``) then apply to the prompt too.  Raises ``AttachError`` when detached.
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

    @contextmanager
    def trace(self, path: str | Path, activations: bool = False) -> Iterator[Trace]:
        """A block whose tokens are written to ``path``: which neurons each layer ran for each.

        ``activations``: and what these were, which needs executor ``masked``.  The file is there
        when the block is left, also by an error; ``read_trace`` reads it, and docs/trace.md
        describes it.  Memory has some hundred tokens at a time, the rest is beside ``path``.

        Raises ``AttachError`` when detached, or traced already; ``ConfigError`` for activations
        under another executor, and for methods that select inputs and not neurons (``teal``, ...);
        ``ResultsError`` where nothing can be written.
        """
        patch = self.patch
        if patch is None or not patch.installed:
            raise AttachError("trace() needs an attached run: use it inside the with block")
        if self.tracing is not None:
            raise AttachError("this run is being traced already: leave that block first")
        check_traceable(self.config)
        self.controller.flush()
        trace = Trace(patch, Path(path), activations)
        capture = capture_activations(self.model, trace.see) if activations else nullcontext()
        try:
            with capture:
                self.tracing = trace
                patch.watch(trace.begin)
                yield trace
        finally:
            try:
                report = self.report()  # which accounts for the newest forward first
                trace.finish(self.model, report)
            finally:
                self.tracing = None
                patch.watch(None)
                trace.close()

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

        Raises ``AttachError`` before the first, ``ConfigError`` with per-token selection.
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
        return self._method.report(self.controller, self.executor, costs)

    @property
    def asks_for_pruning(self) -> bool:
        """False where nothing can be removed: sparsity 0, a table of ones, masks of everything."""
        return not self._method.dense

    def export(self, folder: str | Path) -> Path:
        """Write the newest mask as a dense, narrower checkpoint that ``from_pretrained`` loads.

        The tokenizer too, where there is one.
        ``folder``: where to; a name that ends in ``.gguf`` is a file for llama.cpp, made of the
        one whose blocks the model holds (``dart_llm.export_gguf`` chooses masks for many texts).

        Raises ``ConfigError`` unless every layer keeps the same number of neurons (a GGUF of
        Llama's architecture may hold any), and for low-rank compensation, which has no place
        there; ``AttachError`` before the first mask.
        """
        masks, path = plain_masks(self._newest_masks()), Path(folder)
        if path.suffix == ".gguf":
            return write_masks(source_file(self.model), masks, path).path
        if path.is_file():
            raise ConfigError(f"export writes a folder, and {folder} is a file: give another name")
        written = export(self.model, self._method.view.blocks, masks, path)
        if (tokenizer := tokenizer_of(self.model)) is not None:
            tokenizer.save_pretrained(written)
        return written


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
    clamp: ClampValues | None = None,
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
    if isinstance(method, str) and (note := other_model(method, model, weights=True)):
        logger.warning(note)
    return Run(model, config, masks, remove, on_remask, clamp=clamp)
