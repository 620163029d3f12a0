"""``prune(model, ...)``, ``Run``, and ``BoundMethod``: a method bound to a model."""

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
from dart_llm.patching.executors.token_ffn import winner_rows
from dart_llm.patching.patch import ModelPatch
from dart_llm.pruning.accounting import Costs, known_bytes, run_report
from dart_llm.pruning.clamp import ClampValues, make_clamp
from dart_llm.pruning.config import DEFAULT_METHOD, USER_MASKS, PruneConfig
from dart_llm.pruning.controller import PruningController, RemaskHook, TokensHook
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
    """Costs of a patch: allocated bytes, whole steps, the report of a screened head."""

    nbytes: int = 0
    steps: int = 0
    head: HeadReport | None = None

    @classmethod
    def from_patch(cls, patch: ModelPatch) -> PatchCosts:
        head = None if patch.head is None else patch.head.report()
        return cls(patch.nbytes(), patch.steps, head)


def likelihood_config(config: PruneConfig) -> PruneConfig:
    """``config`` for likelihood tasks: masks right after the prompt, no re-masks."""
    return config.replace({"masking_step": 0, "min_evidence": 0, "drift": {"rule": "never"}})


@dataclass(frozen=True)
class BoundMethod:
    """A configuration bound to a model's weights, statistics and fixed masks.

    ``config`` None: the untouched model.  ``masks``: the user's, {layer: kept ids}.
    ``fixed_masks``: one per layer (None: dense), calibrated or the user's; None: masks are chosen.
    ``prior``: calibrated scores, [I] per layer, for ``prior_weight``.  ``learned``: the layers with
    learned statistics; None: without.  ``notes``: remarks for readers of its results.  ``facts``:
    further numbers for tables, such as ``weight_bytes``.
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
    by_hand: bool = False  # whether ``fixed_masks`` are the user's

    @property
    def label(self) -> str:
        """``dense``, or method and sparsity as in ``dart@0.5``."""
        if self.name or self.config is None:
            return self.name or "dense"
        if self.masks is not None:
            return USER_MASKS
        amount = "table" if self.requested is None else f"{self.requested:g}"
        return f"{self.config.method}@{amount}"

    @property
    def method(self) -> str:
        """Name of the method; for the untouched model or the user's masks, the label."""
        return self.label if self.config is None or self.masks is not None else self.config.method

    @property
    def requested(self) -> float | None:
        """The requested sparsity; None if a table, ``auto`` or masks set the counts."""
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
        """The weights of every FFN, with learned statistics and prior."""
        score, layers = self.settings.score, self.learned
        layers = layers or self.view.weights(score.proxy_embedding, self.settings.seed)
        return layers if self.prior is None else with_parts(layers, prior=self.prior)

    @cached_property
    def selector(self) -> MaskSelector:
        """The mask selector; raises ``ConfigError`` if config or clamp do not fit the layers."""
        return MaskSelector(self.settings, self.layers, make_clamp(self.layers, self.clamp or {}))

    @property
    def dense(self) -> bool:
        """Whether nothing is removed: sparsity 0, a table of ones, masks that keep everything."""
        fixed = self.fixed_masks
        return self.selector.removes_nothing if fixed is None else not any(fixed)

    def with_fixed_masks(self, remove: Ids | None = None) -> BoundMethod:
        """A copy whose ``fixed_masks`` come from the user's masks or ``remove``, with the clamp.

        If no neurons are selected, the clamp alone becomes fixed masks.
        """
        fixed, clamp = self.fixed_masks, self.selector.clamp
        users = self.masks is not None or remove is not None
        if users:
            fixed = user_masks(self.layers, self.masks, remove)
        if clamp.layers and (fixed is not None or self.selector.removes_nothing):
            fixed = clamp.of(fixed or (None,) * len(self.layers))
        return replace(self, masks=None, fixed_masks=fixed, by_hand=self.by_hand or users)

    def run(self, likelihood: bool = False, make: Callable[..., Run] | None = None) -> Run | None:
        """A new, detached run; None for the untouched model.  ``make``: instead of ``Run``.

        ``likelihood``: with the settings of ``likelihood_config``.
        """
        if self.config is None:
            return None
        config = likelihood_config(self.config) if likelihood else self.config
        build: Callable[..., Run] = make or Run
        chosen = {"masks": self.masks, "fixed_masks": self.fixed_masks, "prior": self.prior}
        return build(self.model, config, **chosen)

    def controller(
        self, on_remask: RemaskHook | None = None, on_tokens: TokensHook | None = None
    ) -> PruningController:
        """A new controller for this method."""
        chosen = self.settings, self.layers, self.fixed_masks, on_remask, on_tokens
        return PruningController(*chosen, self.selector.clamp)

    def report(self, controller: PruningController, executor: str, costs: PatchCosts) -> RunReport:
        """The report of what ``controller`` counted."""
        sequences, config, view = controller.all_sequences(), self.settings, self.view
        executor = effective_executor(executor, costs.steps, sequences)
        requested = self.selector.total_requested and not self.by_hand
        blocks = all(in_blocks(layer.stored_up) for layer in self.layers)
        return run_report(
            sequences,
            Costs(self.layers, view.parameter_bytes, config.compensation, traffic=view.traffic),
            executor,
            costs.nbytes + known_bytes(self.layers, self.prior),
            USER_MASKS if self.by_hand else config.method,
            config.target if requested else None,
            costs.head,
            winner_rows(config.token, executor, blocks),
        )


class Run:
    """A model and a method to prune it, as returned by ``prune``: use it as a context manager.

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
                f'method "{config.method}" takes its {config.calibration.purpose} from '
                "calibration, which prune does not do: use dart_llm.session.run.prepare("
                f"model, tokenizer, config), or dart-llm eval --method {config.method}"
            )

    @property
    def layers(self) -> tuple[FfnWeights, ...]:
        """The weights of every FFN, with learned statistics."""
        return self._method.layers

    @property
    def fixed_masks(self) -> Masks | None:
        """Fixed masks, one per layer; None if masks are chosen."""
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
        def on_tokens(*settled: Any) -> None:
            if self.tracing is not None:
                self.tracing.take(*settled)

        return self._method.controller(self._notify, on_tokens)

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
            raise AttachError("this run is being traced: leave that block before you attach it")
        if not self.controller.sequence_count:  # the model may have moved since this run was made
            method = self._method = replace(self._method, learned=None)
            # ``hold`` may end fixed masks later, except those given at the start
            if self._first_masks is None and not method.selector.removes_nothing:
                learned = self_calibrate(self.model, self.config, method.layers)
                self._method = replace(method, learned=learned)
            self.controller = self._new_controller()
        method = self._method
        screen = learn_screen(self.model, self.config, method.layers)
        patch = ModelPatch(self.model, method.view, self.controller, self.executor, screen=screen)
        self.patch = patch  # before ``install``, so that ``detach`` finds it after an error
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
            if self.patch is not before:  # interrupted after attaching: the block is not entered
                self.detach()
            raise

    def __exit__(self, *error: object) -> None:
        self.detach()

    def reset(self) -> None:
        """Forget all sequences, masks and records; the next forward starts a new sequence.

        Raises ``AttachError`` while the run is traced: sequence numbers would repeat in the file.
        """
        if self.tracing is not None:
            raise AttachError("this run is being traced: leave that block before it is reset")
        self.controller = self._new_controller()
        if self.patch is not None:
            self.patch.controller = self.controller

    def _attached(self, name: str) -> ModelPatch:
        if self.patch is None or not self.patch.installed:
            raise AttachError(f"{name}() needs an attached run: use it inside the with block")
        return self.patch

    @contextmanager
    def decoding(self, prompt: bool = False) -> Iterator[None]:
        """In this block, every forward that continues a cache counts as decode, at any length.

        ``prompt``: so do forwards that start a sequence and the prompt step of ``generate``; fixed
        masks (``hold``) then apply to the prompt too.  Raises ``AttachError`` if detached.
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
        """In this block, record which neurons each layer runs for each token; write it to ``path``.

        The trace is kept in memory until the block is left, even by an error, and then written
        (docs/trace.md).  Raises ``AttachError`` if detached or traced already; ``ConfigError`` for
        methods that select inputs instead of neurons (``teal``, ...); ``ResultsError`` if the file
        cannot be written.
        """
        patch = self._attached("trace")
        if self.tracing is not None:
            raise AttachError("this run is being traced already: leave that block first")
        check_traceable(self.config)
        self.controller.flush()
        trace = Trace(patch, Path(path))
        try:
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

    def select(self) -> Masks:
        """Masks and compensation from the tokens observed so far; None per dense layer.

        Changes nothing.  Raises ``AttachError`` if the configuration needs observed tokens and
        there are none.
        """
        fixed = self._method.fixed_masks
        masks = fixed if fixed is not None else self.controller.select()
        if self.on_masks is not None:
            self.on_masks(sequence_masks(masks))
        return masks

    def hold(self, masks: Masks | None) -> None:
        """``reset``, then apply ``masks`` (from ``select``) from now on; None: choose masks."""
        choose = masks is None or self._method.selector.removes_nothing
        masks = self._first_masks if choose else masks
        self._method = replace(self._method, fixed_masks=masks)
        self.reset()

    def branch(self) -> None:
        """Keep the tokens decoded so far in the report, even if the next cache is shorter."""
        self.controller.branch()

    def tokens_until_change(self) -> int | None:
        """Most tokens in one decode forward before the masks can change; None: no bound.

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
        """Kept neuron ids of the newest mask, [k] int64 on the host, by layer; no dense layers.

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
            raise AttachError("nothing is removed: give a sparsity above 0")
        seen, left = 0.0, max(1, selector.config.min_evidence)
        if states:
            seen, left = states[-1].evidence_tokens, states[-1].tokens_to_mask
        raise AttachError(
            f"no mask has been built yet: {seen:.0f} tokens were seen and {seen + left:.0f} are "
            f"needed, so decode at least {left + 1} more"
        )

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
        if not self._generating:  # generate may still roll the newest forward back
            self.controller.flush()

    def report(self) -> RunReport:
        """Sparsity, bytes and re-masks so far, in total and per sequence."""
        self._catch_up()
        costs = self._costs if self.patch is None else PatchCosts.from_patch(self.patch)
        return self._method.report(self.controller, self.executor, costs)

    @property
    def asks_for_pruning(self) -> bool:
        """Whether the run can remove any neuron."""
        return not self._method.dense

    def export(self, folder: str | Path) -> Path:
        """Write the newest mask as a narrower checkpoint, with the tokenizer if there is one.

        Raises ``ConfigError`` unless every layer keeps the same number of neurons, and for low-rank
        compensation, which a checkpoint cannot express; ``AttachError`` before the first mask.
        """
        masks, path = plain_masks(self._newest_masks()), Path(folder)
        if path.is_file():
            raise ConfigError(f"export writes a folder, and {folder} is a file: give another name")
        written = export(self.model, self._method.view.blocks, masks, path)
        if (tokenizer := tokenizer_of(self.model)) is not None:
            tokenizer.save_pretrained(written)
        return written


def identity(model: Any) -> dict[str, Any]:
    """Identifies the checkpoint of ``model``: by its file's digest, or else its fingerprint."""
    facts = checkpoint_facts(model)
    names = ("name", "sha256", "file_quantisation", "parameters")
    recorded = {name: facts.get(name) for name in names}
    return recorded if recorded["sha256"] else {**recorded, "fingerprint": fingerprint(model)}


def stored_as(model: Any) -> str:
    """How ``model`` stores its weights: in blocks, or in a dtype."""
    facts = checkpoint_facts(model)
    return str(facts.get("weights") or facts["dtype"])


def other_model(method: str, model: Any) -> str:
    """A warning if the setting ``file:...`` was measured on another checkpoint, else ""."""
    kept, path = kept_setting(method), path_of(method)
    if kept is None or path is None or not kept.model:
        return ""
    facts = identity(model)
    marks = ("sha256", "fingerprint", "parameters")  # compare the first that both have
    mark = next((name for name in marks if kept.model.get(name) and facts.get(name)), None)
    if mark is None or kept.model[mark] == facts[mark]:
        return ""
    return (
        f"{path.name} was measured on {kept.model.get('name')}, not on {facts['name']}: run "
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
    ``file:setting.yaml``, which ``tune`` wrote; a warning is logged if it was measured on another
    model.  ``sparsity``: fraction of all FFN neurons to remove, [0, 1).  ``masks``: {layer: neuron
    ids to keep}, or ``remove``: {layer: ids to remove}, instead of chosen masks.  ``clamp``:
    {layer: {neuron id: activation}} also fixes activations of decoded tokens, whatever the masks
    (0.0: as if removed; with ``sparsity=0`` the clamp alone acts).  ``on_remask`` is called with
    every new mask's record.  ``settings``: any field of ``PruneConfig``.  The model does not change
    before the block is entered or ``attach`` is called.

    Raises ``ConfigError`` for settings that do not fit (``UnknownName`` for names), and
    ``UnsupportedModel`` for a model that cannot be pruned.

    >>> with prune(model, sparsity=0.5) as run:             # doctest: +SKIP
    ...     model.generate(**inputs, max_new_tokens=200)
    >>> print(run.report())                                 # doctest: +SKIP
    """
    if sparsity is not None and (masks is not None or remove is not None):
        raise ConfigError("masks= and remove= name the neurons themselves: drop the sparsity")
    config = PruneConfig.build(method, sparsity=sparsity, **settings)
    if isinstance(method, str) and (note := other_model(method, model)):
        logger.warning(note)
    return Run(model, config, masks, remove, on_remask, clamp=clamp)


# Methods with their statistics, ready to be measured on tasks.


def is_untouched(config: PruneConfig) -> bool:
    """Whether ``config`` changes nothing about the model, not even its executor."""
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
    """Calibrate and learn what ``config`` needs; None, or an untouched ``dense``: the model itself.

    ``calibration``: the text for static methods (data/documents.py; None: C4 from the hub).
    ``cache_dir``: where calibrations and learned statistics are cached.  ``masks``: the user's,
    {layer: ids to keep}; nothing is calibrated then.  ``say`` is called with progress lines.

    Raises ``ConfigError`` for an unusable text, ``LoadError`` for one that cannot be loaded.
    """
    method = BoundMethod(model, tokenizer, config, masks)
    if masks is not None:
        return method
    if config is None or is_untouched(config):
        return BoundMethod(model, tokenizer, None, facts=weight_facts(model))
    learn_screen(model, config, method.layers, cache_dir, say, tokenizer)
    if method.selector.removes_nothing:
        how = "screened head" if config.screens else config.executor
        return replace(method, name=f"dense, {how}" if config.method == "dense" else "")
    if config.calibration is None:  # attaching would learn it, without progress or tokenizer
        self_calibrate(model, config, method.layers, cache_dir, say, tokenizer)
        return method
    ready = calibrate(model, tokenizer, config, calibration, cache_dir, say)
    fixed, prior = ready.fixed_masks, ready.prior
    return replace(method, fixed_masks=fixed, prior=prior, notes=(ready.note,))
