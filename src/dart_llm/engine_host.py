"""A model that stays attached while requests come and go, and what their configurations need."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dart_llm.accounting import Costs, known_bytes, run_report
from dart_llm.arch import context_length, describe
from dart_llm.attach import Attachment
from dart_llm.checkpoint import checkpoint_facts
from dart_llm.config import PruneConfig
from dart_llm.errors import AttachError, ConfigError
from dart_llm.executor import check_executor, choose_executor
from dart_llm.learn import learn, recall
from dart_llm.masks import LayerMask
from dart_llm.prepare import prepare
from dart_llm.records import RunReport
from dart_llm.select import Selector, check_fits
from dart_llm.slim_run import executor_ran
from dart_llm.tracer import RemaskHook, Tracer
from dart_llm.weights import FfnWeights, knowing

logger = logging.getLogger("dart_llm")

DENSE = PruneConfig.build("dense")
KNOWN = 32
"""Configurations that stay ready."""


@dataclass(frozen=True)
class Ready:
    """A configuration and what it knows of this model."""

    config: PruneConfig
    layers: tuple[FfnWeights, ...]
    selector: Selector
    held: tuple[LayerMask | None, ...] | None = None
    prior: tuple[Tensor, ...] | None = None

    @property
    def dense(self) -> bool:
        """Whether it can remove nothing."""
        if self.held is not None:
            return all(mask is None for mask in self.held)
        return self.selector.removes_nothing

    @property
    def asked(self) -> float | None:
        """The sparsity asked for; None where it is not one of the whole model."""
        return self.config.target if self.selector.asks_total else None

    def tracer(self, on_remask: RemaskHook | None = None) -> Tracer:
        """One that has seen nothing."""
        return Tracer(self.config, self.layers, self.held, on_remask)


class Host:
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
        selector = check_fits(probe, self._weights(probe))
        check_executor(self.view.blocks, selector, model, chooses=True)
        self.executor = choose_executor(selector, self.view.blocks, model)
        self.context = context_length(model)
        self.name = str(checkpoint_facts(model).get("name") or type(model).__name__)
        self._ready: OrderedDict[str, Ready] = OrderedDict()
        self.idle = self._make(DENSE)
        self._attach()

    def _weights(self, config: PruneConfig) -> tuple[FfnWeights, ...]:
        return self.view.weights(config.score.proxy_embedding, config.seed)

    def _attach(self) -> None:
        self.attachment = Attachment(
            self.model, self.view, self.idle.tracer(), self.executor, many=True
        )
        self.attachment.install()

    @contextlib.contextmanager
    def _detached(self) -> Iterator[None]:
        """The model as it was, for learning: gradients and texts of its own go through it."""
        self.attachment.remove()
        try:
            yield
        finally:
            self._attach()

    def ready(self, config: PruneConfig | None) -> Ready:
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
        return known

    def _make(self, config: PruneConfig) -> Ready:
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
        layers = self._weights(config)
        selector = check_fits(config, layers)
        if selector.removes_nothing:
            return Ready(config, layers, selector)
        found = self._known(config, layers)
        check_executor(self.view.blocks, found.selector, self.model, found.held is None)
        return found

    def _known(self, config: PruneConfig, layers: tuple[FfnWeights, ...]) -> Ready:
        """``config`` with what the model teaches, found or learnt."""
        if config.calibration is not None:
            with self._detached():
                made = prepare(
                    self.model, self.tokenizer, config, self.calibration, self.cache_dir, self.say
                )
            if made.prior is not None:
                layers = knowing(layers, prior=made.prior)
            return Ready(config, layers, check_fits(config, layers), made.held, made.prior)
        learnt = recall(self.model, config, layers, self.cache_dir)
        if learnt is None:
            with self._detached():
                learnt = learn(self.model, config, layers, self.cache_dir, self.say, self.tokenizer)
        return Ready(config, learnt, check_fits(config, learnt))

    def serve(self, tracer: Tracer) -> None:
        """The next forwards are those of ``tracer``; raises ``AttachError`` when detached."""
        if not self.attachment.installed:
            raise AttachError("this model was detached by dart_llm.restore: make another engine")
        self.attachment.serve(tracer)

    def rest(self) -> None:
        """No request runs: the model is dense, and nothing of the last one is held."""
        self.attachment.loop = None
        self.attachment.serve(self.idle.tracer())

    def report(self, ready: Ready, tracer: Tracer) -> RunReport:
        """Accounting of what ``tracer`` counted; while it is served."""
        tracer.flush()
        attachment, config = self.attachment, ready.config
        copies = attachment.nbytes()
        if config.token is None:  # those of other requests
            tokens = (layer.token for layer in attachment.layers)
            copies -= sum(token.nbytes() for token in tokens if token is not None)
        copies += known_bytes(ready.layers, ready.prior)
        lives = tracer.all_lives()
        return run_report(
            lives,
            Costs(ready.layers, self.view.parameter_bytes, config.compensation),
            executor_ran(self.executor_of(config), attachment.steps, lives),
            copies,
            config.method,
            ready.asked,
            None if config.token is None else attachment.proxy_errors,
        )

    def executor_of(self, config: PruneConfig) -> str:
        """What runs the FFNs of a request: rows with masks of their own are multiplied by 0."""
        return "masked" if config.batch == "per_row" else self.executor

    def close(self) -> None:
        """Detach: the model is exactly what it was."""
        self.attachment.remove()
