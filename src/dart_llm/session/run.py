"""``prune(model, ...)``, the ``Run`` that it returns, and ``BoundMethod``: a method and its model.

A mask says which FFN neurons a layer keeps.  Masks are fixed in advance, or chosen from activations
while the model runs; replacing chosen masks by new ones is a re-mask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dart_llm.calibration.self_calibration import calibrate, learn_screen, self_calibrate
from dart_llm.errors import AttachError, ConfigError
from dart_llm.models.checkpoint import checkpoint_facts, fingerprint, tokenizer_of
from dart_llm.models.describe import ModelView, describe, weight_facts
from dart_llm.patching.executors import check_executor, choose_executor, effective_executor
from dart_llm.patching.executors.native_ffn import SelectionTimes
from dart_llm.patching.executors.token_ffn import max_selecting_rows
from dart_llm.patching.patch import ModelPatch
from dart_llm.pruning.accounting import Costs, known_bytes, run_report
from dart_llm.pruning.clamp import ClampValues, make_clamp
from dart_llm.pruning.config import DEFAULT_METHOD, USER_MASKS, PruneConfig
from dart_llm.pruning.controller import PruningController, RemaskHook
from dart_llm.pruning.masks import Ids, Masks, user_masks
from dart_llm.pruning.records import DriftCheck, HeadReport, Remask, RunReport
from dart_llm.pruning.selection import MaskSelector
from dart_llm.pruning.sequence import SequenceState
from dart_llm.pruning.setting_file import kept_setting, path_of
from dart_llm.pruning.token_level import plain_masks, sequence_masks
from dart_llm.pruning.weights import FfnWeights, in_blocks, with_parts
from dart_llm.session.export import export
from dart_llm.session.trace import Trace, check_traceable

logger = logging.getLogger("dart_llm")


@dataclass(frozen=True)
class PatchCosts:
    """Costs of a patched model.

    ``nbytes``: extra memory.  ``steps``: number of whole steps (decode steps in one native call).
    ``head``: report of the screened head, or None.  ``selection``: how down rows are read after
    per-token selection; None if no kernel does this.
    """

    nbytes: int = 0
    steps: int = 0
    head: HeadReport | None = None
    selection: SelectionTimes | None = None

    @classmethod
    def from_patch(cls, patch: ModelPatch) -> PatchCosts:
        head = None if patch.head is None else patch.head.report()
        return cls(patch.nbytes(), patch.steps, head, patch.layout.selection)


def likelihood_config(config: PruneConfig) -> PruneConfig:
    """Return ``config`` for likelihood tasks: masks come right after the prompt and stay."""
    return config.replace({"masking_step": 0, "min_evidence": 0, "drift": {"rule": "never"}})


@dataclass(frozen=True)
class BoundMethod:
    """A configuration bound to a model's weights, statistics and fixed masks.

    ``config``: None for the untouched model.  ``masks``: masks from the user, {layer: ids to keep}.
    ``fixed_masks``: one mask per layer (None for a dense layer), calibrated or from the user; None
    if masks are chosen while the model runs.  ``prior``: calibrated scores, [I] per layer, with
    weight ``prior_weight``.  ``learned``: the layers' weights with learned statistics, or None.
    ``notes``: remarks to show with the method's results.  ``facts``: further numbers for tables,
    such as ``weight_bytes``.  ``name``: used as the label, if not empty.  ``from_user``: True if
    ``fixed_masks`` come from the user.
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
    from_user: bool = False

    @property
    def label(self) -> str:
        """``name``, or ``dense``, or the method and the requested sparsity, as in ``dart@0.5``."""
        if self.name or self.config is None:
            return self.name or "dense"
        if self.masks is not None:
            return USER_MASKS
        amount = "table" if self.requested is None else f"{self.requested:g}"
        return f"{self.config.method}@{amount}"

    @property
    def method(self) -> str:
        """Name of the method; for the untouched model and for the user's masks, the label."""
        return self.label if self.config is None or self.masks is not None else self.config.method

    @property
    def requested(self) -> float | None:
        """The requested sparsity; None if a table, strategy ``auto`` or masks set kept counts."""
        if self.config is None:
            return 0.0
        fixed = self.config.budget.table is not None or self.config.score.strategy == "auto"
        unset = self.masks is not None or (fixed and self.config.sparsity is None)
        return None if unset else self.config.target

    @property
    def settings(self) -> PruneConfig:
        """``config``, which must not be None."""
        assert self.config is not None
        return self.config

    @cached_property
    def view(self) -> ModelView:
        return describe(self.model)

    @cached_property
    def layers(self) -> tuple[FfnWeights, ...]:
        """The weights of every FFN, with learned statistics and calibrated scores, if any."""
        score, layers = self.settings.score, self.learned
        layers = layers or self.view.weights(score.proxy_embedding, self.settings.seed)
        return layers if self.prior is None else with_parts(layers, prior=self.prior)

    @cached_property
    def selector(self) -> MaskSelector:
        """The mask selector; raises ``ConfigError`` if config or clamp do not fit the layers."""
        return MaskSelector(self.settings, self.layers, make_clamp(self.layers, self.clamp or {}))

    @property
    def dense(self) -> bool:
        """True if no neuron is removed: sparsity 0, a table of ones, or masks that keep all."""
        fixed = self.fixed_masks
        return self.selector.removes_nothing if fixed is None else not any(fixed)

    def with_fixed_masks(self, remove: Ids | None = None) -> BoundMethod:
        """Return a copy whose fixed masks come from ``masks`` or ``remove``, if any, and the clamp.

        If the method removes no neurons, the clamp alone becomes fixed masks.
        """
        fixed, clamp = self.fixed_masks, self.selector.clamp
        from_user = self.masks is not None or remove is not None
        if from_user:
            fixed = user_masks(self.layers, self.masks, remove)
        if clamp.layers and (fixed is not None or self.selector.removes_nothing):
            fixed = clamp.of(fixed or (None,) * len(self.layers))
        return replace(self, masks=None, fixed_masks=fixed, from_user=self.from_user or from_user)

    def run(self, likelihood: bool = False, make: Callable[..., Run] | None = None) -> Run | None:
        """Return a new, detached run; None for the untouched model.

        ``likelihood``: use ``likelihood_config``.  ``make``: call this instead of ``Run``.
        """
        if self.config is None:
            return None
        config = likelihood_config(self.config) if likelihood else self.config
        build: Callable[..., Run] = make or Run
        chosen = {"masks": self.masks, "fixed_masks": self.fixed_masks, "prior": self.prior}
        return build(self.model, config, **chosen)

    def controller(self, on_remask: RemaskHook | None = None) -> PruningController:
        """Return a new controller for this method."""
        chosen = self.settings, self.layers, self.fixed_masks, on_remask
        return PruningController(*chosen, self.selector.clamp)

    def report(self, controller: PruningController, executor: str, costs: PatchCosts) -> RunReport:
        """Return the report of the tokens and masks that ``controller`` counted."""
        sequences, config, view = controller.all_sequences(), self.settings, self.view
        executor = effective_executor(executor, costs.steps, sequences)
        requested = self.selector.total_requested and not self.from_user
        selection = None if config.token is None else costs.selection
        reads_all = selection is not None and not selection.skips
        quantized = all(in_blocks(layer.stored_up) for layer in self.layers)
        return run_report(
            sequences,
            Costs(
                self.layers,
                view.parameter_bytes,
                config.compensation,
                traffic=view.traffic,
                reads_all=reads_all,
            ),
            executor,
            costs.nbytes + known_bytes(self.layers, self.prior),
            USER_MASKS if self.from_user else config.method,
            config.target if requested else None,
            costs.head,
            max_selecting_rows(config.token, executor, quantized),
            None if selection is None else str(selection),
        )


class Run:
    """A model and a method that prunes it, as returned by ``prune``; use it as a context manager.

    ``controller`` and ``patch`` (None while detached) are read-only.
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
        """See ``prune``; ``fixed_masks`` and ``prior`` come from ``prepare``."""
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
        selects = method.fixed_masks is None and not method.selector.removes_nothing
        check_executor(method.view.blocks, method.selector, model, selects)
        if selects and config.calibration is not None and prior is None:
            raise ConfigError(
                f'method "{config.method}" gets its {config.calibration.purpose} from '
                "calibration, and prune does not calibrate: use dart_llm.session.run.prepare("
                f"model, tokenizer, config), or dart-llm eval --method {config.method}"
            )

    @property
    def layers(self) -> tuple[FfnWeights, ...]:
        """The weights of every FFN, with learned statistics."""
        return self._method.layers

    @property
    def fixed_masks(self) -> Masks | None:
        """Fixed masks, one per layer; None if masks are chosen while the model runs."""
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

    def _new_controller(self) -> PruningController:
        return self._method.controller(self._notify)

    @property
    def executor(self) -> str:
        """The executor of pruned FFNs; ``auto`` is resolved to the fastest that can run here."""
        return choose_executor(self._method.selector, self._method.view.blocks, self.model)

    def attach(self) -> Run:
        """Start pruning the model, after learning the statistics that the method needs.

        Raises ``AttachError`` if the model is pruned already.
        """
        if self.patch is not None and self.patch.installed:
            raise AttachError("this run is attached already")
        if self.tracing is not None:
            raise AttachError("this run is being traced: leave the trace block before attaching")
        if not self.controller.sequence_count:  # the model may have moved since this run was made
            method = self._method = replace(self._method, learned=None)
            # also while ``hold`` fixes masks, because choosing them after ``hold(None)`` needs this
            if self._first_masks is None and not method.selector.removes_nothing:
                learned = self_calibrate(self.model, self.config, method.layers)
                self._method = replace(method, learned=learned)
            self.controller = self._new_controller()
        method = self._method
        screen = learn_screen(self.model, self.config, method.layers)
        patch = ModelPatch(self.model, method.view, self.controller, self.executor, screen=screen)
        self.patch = patch  # set before ``install``, so that ``detach`` removes it after an error
        patch.install()
        return self

    def detach(self) -> None:
        """Stop pruning and restore the exact original model.  Safe to call twice."""
        patch = self.patch
        if patch is None:
            return
        try:
            self.controller.flush()
        finally:
            patch.remove()
            self._costs = PatchCosts.from_patch(patch)
            self.patch = None

    def __enter__(self) -> Run:
        before = self.patch
        try:
            return self.attach()
        except BaseException:
            if self.patch is not before:  # interrupted after attaching: no ``__exit__`` will follow
                self.detach()
            raise

    def __exit__(self, *error: object) -> None:
        self.detach()

    def reset(self) -> None:
        """Forget all sequences, masks and records; the next forward starts a new sequence.

        Raises ``AttachError`` while the run is traced: sequence numbers would repeat in the file.
        """
        if self.tracing is not None:
            raise AttachError("this run is being traced: leave the trace block before resetting")
        self.controller = self._new_controller()
        if self.patch is not None:
            self.patch.controller = self.controller

    def _attached(self, name: str) -> ModelPatch:
        if self.patch is None or not self.patch.installed:
            raise AttachError(f"{name}() needs an attached run: use it inside the with block")
        return self.patch

    @contextmanager
    def decoding(self, prompt: bool = False) -> Iterator[None]:
        """A context in which all forwards that continue a cache count as decode forwards.

        They may have any number of tokens.  With ``prompt``, forwards that start a sequence also
        count as decode forwards, even the first forward of ``generate``, so that fixed masks
        (``hold``) apply to the prompt.  Raises ``AttachError`` if the run is detached.
        """
        patch = self._attached("decoding")
        patch.forced_decode += 1
        patch.forced_prompt += prompt
        try:
            yield
        finally:
            patch.forced_decode -= 1
            patch.forced_prompt -= prompt

    @contextmanager
    def trace(self, path: str | Path) -> Iterator[Trace]:
        """A context that records in ``path`` which neurons run in each layer for each token.

        The trace (docs/trace.md) is kept in memory, and written when the block is left, even by an
        error.  Raises ``AttachError`` if the run is detached or already traced, ``ConfigError`` for
        methods that select inputs instead of neurons (``teal``, ...), and ``ResultsError`` if the
        file cannot be written.
        """
        patch = self._attached("trace")
        if self.tracing is not None:
            raise AttachError("this run is being traced already: leave that trace block first")
        check_traceable(self.config)
        self.controller.flush()
        trace = Trace(patch, Path(path))
        try:
            self.tracing = trace
            self.controller.on_tokens = trace.record
            patch.watch(trace.begin)
            yield trace
        finally:
            try:
                report = self.report()  # first, because this also traces the newest forward
                trace.finish(self.model, report)
            finally:
                self.tracing = self.controller.on_tokens = None
                patch.watch(None)

    def select(self) -> Masks:
        """Choose a mask per layer (None: dense), with compensation, from the observed tokens.

        Returns the masks without applying them (see ``hold``); fixed masks are returned as they
        are.  Raises ``AttachError`` if observed tokens are needed and there are none.
        """
        fixed = self._method.fixed_masks
        masks = fixed if fixed is not None else self.controller.select()
        if self.on_masks is not None:
            self.on_masks(sequence_masks(masks))
        return masks

    def hold(self, masks: Masks | None) -> None:
        """Call ``reset``, then apply ``masks`` (from ``select``) until ``hold(None)`` is called."""
        choose = masks is None or self._method.selector.removes_nothing
        masks = self._first_masks if choose else masks
        self._method = replace(self._method, fixed_masks=masks)
        self.reset()

    def branch(self) -> None:
        """Make the count of decoded tokens final, even if the next forward has a shorter cache."""
        self.controller.branch()

    def tokens_until_change(self) -> int | None:
        """Return how many tokens the next decode forward may have before masks change; None: any.

        Raises ``AttachError`` while ``generate`` runs.
        """
        if self._generating:
            raise AttachError("generate is running and decides the length of each forward")
        return self.controller.tokens_until_change()

    @property
    def phase(self) -> str:
        """Phase of the newest forward: prefill, observe, pruned or released."""
        return str(self.controller.last_phase)

    def masks(self) -> dict[int, Tensor]:
        """Return {pruned layer: neurons that the newest mask keeps}: ids [k] int64 on the CPU.

        Raises ``AttachError`` before the first mask, ``ConfigError`` with per-token selection.
        """
        masks = enumerate(plain_masks(self._newest_masks()))
        return {layer: mask.ids.cpu() for layer, mask in masks if mask is not None}

    def _newest_masks(self) -> Masks:
        if self._method.fixed_masks is not None:
            return self._method.fixed_masks
        selector, states = self.controller.selector, self.controller.all_sequences()
        for state in reversed(states):
            if state.selection is not None:
                return state.selection.masks
        if selector.removes_nothing:
            raise AttachError("this run removes no neurons: give a sparsity above 0")
        seen, left = 0.0, max(1, selector.config.min_evidence)
        if states:
            seen, left = states[-1].evidence_tokens, states[-1].tokens_to_mask
        raise AttachError(
            f"no mask has been built yet: {seen:.0f} tokens were seen and {seen + left:.0f} are "
            f"needed, so decode at least {left + 1} more"
        )

    @property
    def remasks(self) -> tuple[Remask, ...]:
        """One record each time masks were built (the first time included), in order."""
        return tuple(r for state in self.controller.all_sequences() for r in state.remasks)

    @property
    def drift_checks(self) -> tuple[DriftCheck, ...]:
        """One record for each window that the drift detector has completed, in order."""
        self._catch_up()
        return tuple(self.controller.checks)

    @property
    def _generating(self) -> bool:
        return self.patch is not None and self.patch.loop is not None

    def _catch_up(self) -> None:
        if self._generating:  # and may still roll back a forward of several tokens
            self.controller.count_repeats()
        else:
            self.controller.flush()

    def report(self) -> RunReport:
        """Return the report so far: sparsity, bytes and re-masks, in total and per sequence."""
        self._catch_up()
        costs = self._costs if self.patch is None else PatchCosts.from_patch(self.patch)
        return self._method.report(self.controller, self.executor, costs)

    @property
    def asks_for_pruning(self) -> bool:
        """True if the run can remove neurons."""
        return not self._method.dense

    def export(self, folder: str | Path) -> Path:
        """Write a checkpoint with only the neurons that the newest mask keeps, and the tokenizer.

        Raises ``ConfigError`` if layers keep different numbers of neurons, and for low-rank
        compensation, which a checkpoint cannot express.  Raises ``AttachError`` before the first
        mask.
        """
        masks, path = plain_masks(self._newest_masks()), Path(folder)
        if path.is_file():
            raise ConfigError(f"export writes a folder, and {folder} is a file: give another name")
        written = export(self.model, self._method.view.blocks, masks, path)
        if (tokenizer := tokenizer_of(self.model)) is not None:
            tokenizer.save_pretrained(written)
        return written


def identity(model: Any) -> dict[str, Any]:
    """Return facts that identify ``model``'s checkpoint, with a digest or else a fingerprint."""
    facts = checkpoint_facts(model)
    names = ("name", "sha256", "file_quantisation", "parameters")
    marks = {name: facts.get(name) for name in names}
    return marks if marks["sha256"] else {**marks, "fingerprint": fingerprint(model)}


def stored_as(model: Any) -> str:
    """Return how ``model`` stores its weights: the quantization format, or else the dtype."""
    facts = checkpoint_facts(model)
    return str(facts.get("weights") or facts["dtype"])


def other_model(method: str, model: Any) -> str:
    """Return a warning if setting file ``method`` was measured on another checkpoint, else ""."""
    tuned, path = kept_setting(method), path_of(method)
    if tuned is None or path is None or not tuned.model:
        return ""
    facts = identity(model)
    names = ("sha256", "fingerprint", "parameters")  # compare the first that both have
    name = next((name for name in names if tuned.model.get(name) and facts.get(name)), None)
    if name is None or tuned.model[name] == facts[name]:
        return ""
    return (
        f"{path.name} was measured on {tuned.model.get('name')}, not on {facts['name']}: run "
        "dart-llm tune on this model before you trust it"
    )


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
    ``file:setting.yaml``, as ``tune`` writes it; a warning is logged if that setting was measured
    on another model.  ``sparsity``: fraction of all FFN neurons to remove, [0, 1).  ``masks``:
    {layer: ids of neurons to keep}; ``remove``: {layer: ids to remove}; with either, no masks are
    chosen.  ``clamp``: {layer: {neuron id: activation}} fixes the activations of these neurons for
    decoded tokens, whatever the masks (0.0 acts like removing a neuron; with ``sparsity=0`` only
    the clamp acts).  ``on_remask`` is called with the record of every new mask.  ``settings``: any
    field of ``PruneConfig``.  The model is changed only when the ``with`` block is entered or
    ``attach`` is called.

    Raises ``ConfigError`` for settings that do not fit (``UnknownName`` for names), and
    ``UnsupportedModel`` for a model that cannot be pruned.

    >>> with prune(model, sparsity=0.5) as run:             # doctest: +SKIP
    ...     model.generate(**inputs, max_new_tokens=200)
    >>> print(run.report())                                 # doctest: +SKIP
    """
    if sparsity is not None and (masks is not None or remove is not None):
        raise ConfigError("masks= and remove= already say what to remove: drop the sparsity")
    config = PruneConfig.build(method, sparsity=sparsity, **settings)
    if isinstance(method, str) and (note := other_model(method, model)):
        logger.warning(note)
    return Run(model, config, masks, remove, on_remask, clamp=clamp)


# Methods with their statistics, prepared for measurements on tasks.


def is_untouched(config: PruneConfig) -> bool:
    """Return True if ``config`` requests no pruning, no executor and no screened head."""
    plain = config.executor == "auto" and not config.screens
    return config.method == "dense" and config.target == 0 and plain


def prepare(
    model: Any,
    tokenizer: Any,
    config: PruneConfig | None,
    calibration: str | None = None,
    cache_dir: str | None = None,
    say: Callable[[str], None] = logger.info,
    masks: Ids | None = None,
) -> BoundMethod:
    """Calibrate and learn what ``config`` needs, and bind it to ``model``.

    ``config``: None, or ``dense`` without further settings, stands for the untouched model.
    ``calibration``: the text for static methods (see data/documents.py); None: C4 from the hub.
    ``cache_dir``: where calibrations and learned statistics are cached.  ``masks``: masks from the
    user, {layer: ids to keep}; if they are given, nothing is calibrated or learned.  ``say``:
    called with progress lines.

    Raises ``ConfigError`` for an unusable text, ``LoadError`` for a text that cannot be loaded.
    """
    method = BoundMethod(model, tokenizer, config, masks)
    if masks is not None:
        return method
    if config is None or is_untouched(config):
        return BoundMethod(model, tokenizer, None, facts=weight_facts(model))
    learn_screen(model, config, method.layers, cache_dir, say, tokenizer)
    if method.selector.removes_nothing:
        variant = "screened head" if config.screens else config.executor
        return replace(method, name=f"dense, {variant}" if config.method == "dense" else "")
    if config.calibration is None:  # attaching would learn too, but without say and tokenizer
        self_calibrate(model, config, method.layers, cache_dir, say, tokenizer)
        return method
    result = calibrate(model, tokenizer, config, calibration, cache_dir, say)
    fixed, prior = result.fixed_masks, result.prior
    return replace(method, fixed_masks=fixed, prior=prior, notes=(result.note,))
