"""A model that stays patched between requests, and conversations with its caches."""

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

BOUND = 32  # configurations that stay bound to the model


class PatchHost:
    """Keeps the model attached.  For one thread at a time; arguments as in ``Engine``."""

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
        """Screen of the screened head that was requested last: only one is kept."""
        self.idle = self._bind(DENSE)
        self._attach()

    def _attach(self) -> None:
        self.patch = ModelPatch(
            self.model, self.view, self.idle.controller(), self.executor, True, self._screen
        )
        self.patch.install()

    @contextlib.contextmanager
    def _detached(self) -> Iterator[None]:
        """In this block the model is the original one, to learn gradients and generate texts."""
        self.patch.remove()
        try:
            yield
        finally:
            self._attach()

    def bind(self, config: PruneConfig | None) -> BoundMethod:
        """Bind ``config`` (None: dense) to the model; learns or calibrates what it needs.

        Raises ``ConfigError`` for settings that cannot run here, and the errors of ``prepare``.
        """
        if config is None:
            return self.idle
        key = config.model_dump_json()
        method = self._bound.pop(key, None) or self._bind(config)
        self._bound[key] = method
        while len(self._bound) > BOUND:
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
                f'this model is served by executor "{self.executor}", so no request can have '
                f'"{config.executor}": leave it out'
            )
        method = BoundMethod(self.model, self.tokenizer, config)
        if not method.selector.removes_nothing:
            method = self._calibrated(method)
            chooses = method.fixed_masks is None
            check_executor(self.view.blocks, method.selector, self.model, chooses)
        return method

    def _calibrated(self, method: BoundMethod) -> BoundMethod:
        """``method`` with its statistics, from the cache or learned now."""
        config, where = method.settings, (self.cache_dir, self.say)
        if config.calibration is not None:
            with self._detached():
                return prepare(self.model, self.tokenizer, config, self.calibration, *where)
        learned = cached_calibration(self.model, config, method.layers, self.cache_dir)
        if learned is None:
            with self._detached():
                learned = self_calibrate(self.model, config, method.layers, *where, self.tokenizer)
        return replace(method, learned=learned)

    def serve(self, controller: PruningController) -> None:
        """Use ``controller`` for the next forwards; raises ``AttachError`` if detached."""
        if not self.patch.installed:
            raise AttachError("this model was detached by dart_llm.restore: make another engine")
        self.patch.serve(controller)

    def rest(self) -> None:
        """After a request: run dense, and drop everything of the request."""
        self.patch.loop = None
        self.patch.serve(self.idle.controller())

    def report(self, method: BoundMethod, controller: PruningController) -> RunReport:
        """The report of what ``controller`` counted; it must be the one in use."""
        controller.flush()
        patch, extra_bytes = self.patch, self.patch.nbytes()
        head = None
        if patch.head is not None and method.settings.screens:
            head = patch.head.report()
        elif patch.head is not None:
            extra_bytes -= patch.head.nbytes()
        by_token = method.settings.token is not None
        if not by_token:  # low-bit proxies belong to other requests
            proxies = (layer.token for layer in patch.layers)
            extra_bytes -= sum(proxy.nbytes() for proxy in proxies if proxy is not None)
        costs = PatchCosts(extra_bytes, patch.steps, head)
        return method.report(controller, self.executor_of(method.settings), costs)

    def executor_of(self, config: PruneConfig) -> str:
        """The executor for a request; ``masked`` for masks per row and rules without a kernel."""
        has_kernel = config.token is None or TOKEN_RULES.get(config.token.rule).native
        return self.executor if has_kernel and config.batch != "per_row" else "masked"


@dataclass
class Conversation:
    """A cache, the tokens in it, and the controller that observed them.

    ``answer``: start of the last answer in ``ids``; the cache is never cropped before it.
    """

    method: BoundMethod
    controller: PruningController
    cache: Any
    ids: list[int]
    answer: int

    def continues(self, config: PruneConfig, ids: Sequence[int]) -> bool:
        """Whether a request with these settings and this prompt can use the cache."""
        return self.method.settings == config and self.shared(ids) > 0

    def shared(self, ids: Sequence[int]) -> int:
        """Number of leading tokens of ``ids`` to take from the cache; 0 if it cannot be used.

        A prompt may lack the end of the last answer (a stop string), or have other tokens for it.
        """
        pairs = enumerate(zip(self.ids, ids, strict=False))
        differs = (index for index, (old, new) in pairs if old != new)
        same = next(differs, min(len(self.ids), len(ids)))
        same = min(same, len(ids) - 1)  # the last token's logits are needed
        fits = all(getattr(layer, "is_croppable", False) for layer in self.cache.layers)
        return same if same >= self.answer and (fits or same == len(self.ids)) else 0

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        if removed := len(self.ids) - length:
            self.cache.crop(-removed)
            self.ids = self.ids[:length]

    def reset_accounting(self) -> None:
        """Start the accounting of the next answer at 0."""
        controller = self.controller
        controller.branch()
        controller.finished, controller.checks = [], []
        for state in controller.sequences:
            state.mask_spans, state.remasks, state.prompt_tokens = [], [], 0.0
