"""``PatchHost`` keeps a model patched between requests; ``Conversation`` keeps a KV cache."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dart_llm.calibration.self_calibration import cached_calibration, learn_screen, self_calibrate
from dart_llm.errors import AttachError, ConfigError
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length, describe
from dart_llm.models.screen import Screen
from dart_llm.patching.executors import check_executor, choose_executor
from dart_llm.patching.patch import ModelPatch
from dart_llm.pruning.config import HeadConfig, PruneConfig
from dart_llm.pruning.controller import PruningController
from dart_llm.pruning.records import RunReport
from dart_llm.pruning.registry import TOKEN_RULES
from dart_llm.session.run import BoundMethod, PatchCosts, prepare

DENSE = PruneConfig.build("dense")

MAX_BOUND = 32  # maximum number of configurations that are kept as a ``BoundMethod``


class PatchHost:
    """Keeps the model patched; one thread at a time may use it.  For arguments, see ``Engine``."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        executor: str,
        calibration: str | None,
        cache_dir: str | None,
        say: Callable[[str], None],
    ) -> None:
        if model.training:
            raise ConfigError("this model is in training mode: call model.eval() first")
        self.model, self.tokenizer = model, tokenizer
        self.calibration, self.cache_dir, self.say = calibration, cache_dir, say
        self.view = describe(model)
        probe = PruneConfig.build("griffin", sparsity=0.5, executor=executor)
        selector = BoundMethod(model, tokenizer, probe).selector
        check_executor(self.view.blocks, selector, model, chooses=True)
        self.executor = choose_executor(selector, self.view.blocks, model)
        self.context = context_length(model)
        self.name = str(checkpoint_facts(model).get("name") or type(model).__name__)
        self._bound: OrderedDict[str, BoundMethod] = OrderedDict()
        self._head = HeadConfig()
        self._screen: Screen | None = None
        """The screen of the screened output head (``models/screen.py``) that was requested last."""
        self.idle = self._bind(DENSE)
        self._attach()

    def _attach(self) -> None:
        self.patch = ModelPatch(
            self.model, self.view, self.idle.controller(), self.executor, True, self._screen
        )
        self.patch.install()

    @contextlib.contextmanager
    def _detached(self) -> Iterator[None]:
        """Unpatch the model during this block, which computes gradients or generates texts."""
        self.patch.remove()
        try:
            yield
        finally:
            self._attach()

    def bind(self, config: PruneConfig | None) -> BoundMethod:
        """Return ``config`` bound to the model, with the statistics that it needs; None is dense.

        Statistics that are not cached are computed now.  Raises ``ConfigError`` for settings that
        cannot run here, and the errors of ``session.run.prepare``.
        """
        if config is None:
            return self.idle
        key = config.model_dump_json()
        method = self._bound.pop(key, None) or self._bind(config)
        self._bound[key] = method
        while len(self._bound) > MAX_BOUND:
            self._bound.popitem(last=False)
        if config.screens and config.head != self._head:
            with self._detached():
                self._screen = learn_screen(
                    self.model, config, method.layers, self.cache_dir, self.say, self.tokenizer
                )
            self._head = config.head
        return method

    def _bind(self, config: PruneConfig) -> BoundMethod:
        if config.executor not in ("auto", self.executor):
            raise ConfigError(
                f'this model is served by executor "{self.executor}", so a request cannot use '
                f'"{config.executor}": leave the executor out'
            )
        method = BoundMethod(self.model, self.tokenizer, config)
        if not method.selector.removes_nothing:
            method = self._calibrated(method)
            chooses = method.fixed_masks is None
            check_executor(self.view.blocks, method.selector, self.model, chooses)
        return method

    def _calibrated(self, method: BoundMethod) -> BoundMethod:
        """Return ``method`` with its statistics: from the cache if possible, else computed now."""
        config, options = method.settings, (self.cache_dir, self.say)
        if config.calibration is not None:
            with self._detached():
                return prepare(self.model, self.tokenizer, config, self.calibration, *options)
        learned = cached_calibration(self.model, config, method.layers, self.cache_dir)
        if learned is None:
            with self._detached():
                layers, tokenizer = method.layers, self.tokenizer
                learned = self_calibrate(self.model, config, layers, *options, tokenizer)
        return replace(method, learned=learned)

    def serve(self, controller: PruningController) -> None:
        """Use ``controller`` for the next forwards; raises ``AttachError`` for a detached model."""
        if not self.patch.installed:
            raise AttachError("this model was detached by dart_llm.restore: create another engine")
        self.patch.serve(controller)

    def rest(self) -> None:
        """End a request: later forwards run dense, and the patch keeps nothing of the request."""
        self.patch.loop = None
        self.patch.serve(self.idle.controller())

    def report(self, method: BoundMethod, controller: PruningController) -> RunReport:
        """Return the report of a request; ``controller`` must be the one passed to ``serve``."""
        controller.flush()
        patch, extra_bytes = self.patch, self.patch.nbytes()
        head = None
        if patch.head is not None and method.settings.screens:
            head = patch.head.report()
        elif patch.head is not None:
            extra_bytes -= patch.head.nbytes()
        by_token = method.settings.token is not None
        if not by_token:  # this request uses no low-bit proxies: they belong to other requests
            proxies = (layer.token for layer in patch.layers)
            extra_bytes -= sum(proxy.nbytes() for proxy in proxies if proxy is not None)
        costs = PatchCosts(extra_bytes, patch.steps, head, patch.layout.selection)
        return method.report(controller, self.executor_of(method.settings), costs)

    def executor_of(self, config: PruneConfig) -> str:
        """Return the executor to use: ``masked`` for masks per row or rules without a kernel."""
        has_kernel = config.token is None or TOKEN_RULES.get(config.token.rule).native
        return self.executor if has_kernel and config.batch != "per_row" else "masked"


@dataclass
class Conversation:
    """The KV cache of a conversation, and the controller that observed the tokens in this cache.

    ``ids``: the ids of these tokens.  ``answer``: index in ``ids`` at which the last answer starts;
    the cache is never cropped to fewer tokens than that.
    """

    method: BoundMethod
    controller: PruningController
    cache: Any
    ids: list[int]
    answer: int

    def continues(self, config: PruneConfig, ids: Sequence[int]) -> bool:
        """True if a request with these settings and this prompt can use the cache."""
        return self.method.settings == config and self.shared(ids) > 0

    def shared(self, ids: Sequence[int]) -> int:
        """Return how many leading tokens of ``ids`` the cache can provide; 0 if it cannot be used.

        This can be fewer tokens than the cache contains: a prompt may lack the end of the last
        answer (a stop string), or that answer may be tokenised differently in the prompt.
        """
        pairs = enumerate(zip(self.ids, ids, strict=False))
        differs = (index for index, (old, new) in pairs if old != new)
        count = next(differs, min(len(self.ids), len(ids)))
        count = min(count, len(ids) - 1)  # the model must run the last token, for its logits
        can_crop = all(getattr(layer, "is_croppable", False) for layer in self.cache.layers)
        return count if count >= self.answer and (can_crop or count == len(self.ids)) else 0

    def crop(self, length: int) -> None:
        """Keep only the first ``length`` tokens, in the cache and in ``ids``."""
        if removed := len(self.ids) - length:
            self.cache.crop(-removed)
            self.ids = self.ids[:length]

    def reset_accounting(self) -> None:
        """Clear all counts and records, so that the next report covers only the next answer."""
        controller = self.controller
        controller.branch()
        controller.finished, controller.checks = [], []
        for state in controller.sequences:
            state.mask_spans, state.remasks, state.prompt_tokens = [], [], 0.0
