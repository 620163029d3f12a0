"""A model that stays patched while requests come and go; what is kept of named conversations."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dart_llm.calibration.head import learn_screen
from dart_llm.calibration.learn import cached_calibration, self_calibrate
from dart_llm.errors import AttachError, ConfigError
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length, describe
from dart_llm.models.screen import Screen
from dart_llm.patching.executors import check_executor, choose_executor
from dart_llm.patching.patch import ModelPatch
from dart_llm.pruning.config import HeadConfig, PruneConfig
from dart_llm.pruning.controller import PruningController
from dart_llm.pruning.records import RunReport
from dart_llm.session.prepare import prepare
from dart_llm.session.run import MethodOnModel, PatchCosts

logger = logging.getLogger("dart_llm")

DENSE = PruneConfig.build("dense")

KNOWN = 32
"""Configurations that stay ready."""


class PatchHost:
    """Keeps the model attached; not for several threads at a time.

    ``executor``: what runs the pruned FFNs, as in ``PruneConfig``; it is chosen once.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        executor: str = "auto",
        calibration: str | None = None,
        cache_dir: str | None = None,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        if model.training:
            raise ConfigError("this model is in training mode: call model.eval() first")
        self.model, self.tokenizer = model, tokenizer
        self.calibration, self.cache_dir, self.say = calibration, cache_dir, say
        self.view = describe(model)
        probe = PruneConfig.build("griffin", sparsity=0.5, executor=executor)
        selector = MethodOnModel.of(self.view, probe).selector
        check_executor(self.view.blocks, selector, model, chooses=True)
        self.executor = choose_executor(selector, self.view.blocks, model)
        self.context = context_length(model)
        self.name = str(checkpoint_facts(model).get("name") or type(model).__name__)
        self._ready: OrderedDict[str, MethodOnModel] = OrderedDict()
        self._head = HeadConfig()
        self._screen: Screen | None = None
        """Of the newest screened head that was asked for: one at a time."""
        self.idle = self._make(DENSE)
        self._attach()

    def _attach(self) -> None:
        self.patch = ModelPatch(
            self.model, self.view, self.idle.controller(), self.executor, True, self._screen
        )
        self.patch.install()

    @contextlib.contextmanager
    def _detached(self) -> Iterator[None]:
        """The model as it was, for learning: gradients and texts of its own go through it."""
        self.patch.remove()
        try:
            yield
        finally:
            self._attach()

    def ready(self, config: PruneConfig | None) -> MethodOnModel:
        """What ``config`` (None: dense) needs, learnt or calibrated where it is not known yet.

        Raises ``ConfigError`` for what cannot run here, and what ``prepare.prepare`` raises.
        """
        if config is None:
            return self.idle
        key = config.model_dump_json()
        known = self._ready.pop(key, None) or self._make(config)
        self._ready[key] = known
        while len(self._ready) > KNOWN:
            self._ready.popitem(last=False)
        if config.screens and config.head != self._head:
            self._learn_screen(known)
        return known

    def _learn_screen(self, method: MethodOnModel) -> None:
        """Make the head ready that ``method`` has decoded tokens scored by."""
        given = self.model, method.config, method.layers
        with self._detached():
            self._screen = learn_screen(*given, self.cache_dir, self.say, self.tokenizer)
        self._head = method.config.head

    def _make(self, config: PruneConfig) -> MethodOnModel:
        if config.executor not in ("auto", self.executor):
            raise ConfigError(
                f'this model is served by executor "{self.executor}", so no request can have '
                f'"{config.executor}": leave it out'
            )
        if config.weight_bits is not None:
            raise ConfigError(
                f'method "{config.method}" is another model, with weights of {config.weight_bits} '
                "bits: it cannot be served beside this one"
            )
        if config.screens and self.executor == "graph":
            raise ConfigError(
                'this model is served by executor "graph", which records steps with the whole '
                'head: leave head.kind at "full"'
            )
        method = MethodOnModel.of(self.view, config)
        if method.selector.removes_nothing:
            return method
        method = self._known(method)
        chooses = method.fixed_masks is None
        check_executor(self.view.blocks, method.selector, self.model, chooses)
        return method

    def _known(self, method: MethodOnModel) -> MethodOnModel:
        """``method`` with what the model teaches, found or learnt."""
        config = method.config
        if config.calibration is not None:
            with self._detached():
                made = prepare(
                    self.model, self.tokenizer, config, self.calibration, self.cache_dir, self.say
                )
            return MethodOnModel.of(self.view, config, made.held, made.prior, method.layers)
        learnt = cached_calibration(self.model, config, method.layers, self.cache_dir)
        if learnt is None:
            with self._detached():
                learnt = self_calibrate(
                    self.model, config, method.layers, self.cache_dir, self.say, self.tokenizer
                )
        return MethodOnModel.of(self.view, config, layers=learnt)

    def serve(self, controller: PruningController) -> None:
        """The next forwards are those of ``controller``; raises ``AttachError`` when detached."""
        if not self.patch.installed:
            raise AttachError("this model was detached by dart_llm.restore: make another engine")
        self.patch.serve(controller)

    def rest(self) -> None:
        """No request runs: the model is dense, and nothing of the last one is held."""
        self.patch.loop = None
        self.patch.serve(self.idle.controller())

    def report(self, method: MethodOnModel, controller: PruningController) -> RunReport:
        """Accounting of what ``controller`` counted; while it is served."""
        controller.flush()
        patch, held = self.patch, self.patch.nbytes()
        head = None
        if patch.head is not None and method.config.screens:
            head = patch.head.report()
        elif patch.head is not None:
            held -= patch.head.nbytes()
        by_token = method.config.token is not None
        if not by_token:  # the low-bit copies are those of other requests
            copies = (layer.token for layer in patch.layers)
            held -= sum(copy.nbytes() for copy in copies if copy is not None)
        errors = patch.proxy_errors if by_token else None
        costs = PatchCosts(held, patch.steps, errors, head)
        return method.report(self.view, controller, self.executor_of(method.config), costs)

    def executor_of(self, config: PruneConfig) -> str:
        """What runs the FFNs of a request.

        Rows with masks of their own, and choices of tokens that no kernel knows, are multiplied by
        0.
        """
        known = config.token is None or config.token.native
        return self.executor if known and config.batch != "per_row" else "masked"

    def close(self) -> None:
        """Detach: the model is exactly what it was."""
        self.patch.remove()


@dataclass
class Conversation:
    """A cache, the tokens in it, and the controller that saw them.

    ``answer``: where the last answer begins in ``ids``; what lies before is never rolled back.
    """

    ready: MethodOnModel
    controller: PruningController
    cache: Any
    ids: list[int]
    answer: int

    def shared(self, ids: Sequence[int]) -> int:
        """Leading tokens of ``ids`` that need not be read again; 0 where this cannot go on.

        A prompt may leave out the end of the last answer (a stop string), or spell it otherwise.
        """
        same = 0
        for old, new in zip(self.ids, ids, strict=False):
            if old != new:
                break
            same += 1
        same = min(same, len(ids) - 1)  # the last token's logits are wanted
        fits = all(getattr(layer, "is_croppable", False) for layer in self.cache.layers)
        return same if same >= self.answer and (fits or same == len(self.ids)) else 0

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        if gone := len(self.ids) - length:
            self.cache.crop(-gone)
            self.ids = self.ids[:length]

    def forget_accounts(self) -> None:
        """The next turn is counted for itself."""
        controller = self.controller
        controller.branch()
        controller.finished, controller.checks = [], []
        for state in controller.sequences:
            state.mask_spans, state.remasks, state.prompt_tokens = [], [], 0.0


class ConversationCache:
    """At most ``limit`` conversations, those used last.

    Who has the most of them loses one first: nobody who comes with many drops those of others.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[str, tuple[str, Conversation]] = OrderedDict()

    def take(self, name: str | None) -> Conversation | None:
        """What is kept under ``name``, which is then held no more."""
        return None if name is None else self._held.pop(name, ("", None))[1]

    def put(self, name: str, conversation: Conversation, owner: str = "") -> None:
        """Keep it as the one used last."""
        self._held[name] = (owner, conversation)
        while len(self._held) > self._limit:
            counts = Counter(owner for owner, _ in self._held.values())
            most = max(counts.values())
            del self._held[next(n for n, (own, _) in self._held.items() if counts[own] == most)]

    def clear(self) -> None:
        self._held.clear()

    def __len__(self) -> int:
        return len(self._held)


def trim_heap() -> None:
    """Return free pages, where the C library can.

    Between the many small blocks of a request glibc keeps what its large ones have left: a program
    that frees everything after every request grows all the same.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)
