"""Every row of ``dart-llm bench speed``, interleaved; whole repetitions are what is resumed."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dart_llm.arch import describe
from dart_llm.candidate import Parts
from dart_llm.config import PruneConfig
from dart_llm.errors import DartError
from dart_llm.masks import LayerMask
from dart_llm.news import News
from dart_llm.prepare import prepare
from dart_llm.session import Run
from dart_llm.speed_cases import OWN, TRANSFORMERS, Case, Variant, cost_cases, dense_cases
from dart_llm.speed_clock import Sample, repetition
from dart_llm.speed_machine import read_bandwidth
from dart_llm.speed_model import cache_bytes
from dart_llm.speed_turns import in_turns
from dart_llm.ui import Ui

WARMUP_TOKENS = 4
"""Timed tokens of a warm-up, whose times nobody reads."""


@dataclass(frozen=True)
class Plan:
    """What is measured.  ``cases``: methods; dense rows and costs are added to them."""

    cases: tuple[Case, ...]
    variants: tuple[Variant, ...]
    sparsities: tuple[float, ...]
    executors: tuple[str, ...]
    tokens: int
    repeats: int
    seed: int
    warmup: bool = True
    costs: bool = True
    calibration: str | None = None
    cache_dir: str | None = None
    bandwidth_mib: int = 512


@dataclass(frozen=True)
class Ready:
    """A case that this model and this machine can run; ``make`` gives a run, not attached."""

    case: Case
    make: Callable[[], Run | None]


@dataclass
class Study:
    """One loaded model.  ``ids``: the prompt, [1, P]."""

    model: Any
    tokenizer: Any
    plan: Plan
    ids: Tensor
    parts: Parts
    ui: Ui
    ready: list[Ready] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Labels by the reason why they cannot run."""
    repetitions: list[dict[str, Any]] = field(default_factory=list)
    """``samples`` by label, ``order``, ``sitting`` and ``read_bandwidth`` of each repetition."""
    sitting: str = field(default_factory=lambda: f"{os.getpid()} {time.time_ns()}")
    """Tells the repetitions of one process from those of others."""

    def run(self) -> None:
        """Measure everything that can run; raises what the untouched model raises."""
        self.ready = self._find()
        for line in self.sentences():
            self.ui.say(f"note: {line}")
        todo = [n for n in range(self.plan.repeats) if self.parts.part(_key(n)) is None]
        warm = len(self.ready) if todo and self.plan.warmup else 0
        total = warm + self.plan.repeats * len(self.ready)
        news = News(self.ui.say if not self.ui.live else lambda text: None, total, "runs")
        with self.ui.progress("decoding", total, told=True) as advance:

            def done() -> None:
                news.done()
                advance(1)

            for one in self.ready[:warm]:
                repetition(self.model, self.ids, WARMUP_TOKENS, one.make)
                done()
            for number in range(self.plan.repeats):
                self.repetitions.append(self._repeat(number, done))

    def _repeat(self, number: int, done: Callable[[], None]) -> dict[str, Any]:
        known = self.parts.part(_key(number))
        if known is not None:
            for _ in self.ready:
                done()
            return dict(known)
        samples: dict[str, Sample] = {}
        order = shuffled([one.case.label for one in self.ready], self.plan.seed, number)
        by_label = {one.case.label: one for one in self.ready}
        found: dict[str, Any] = {
            "order": order,
            "sitting": self.sitting,
            "read_bandwidth": read_bandwidth(
                torch.device(self.model.device), self.plan.bandwidth_mib
            ),
        }
        for label in order:
            samples[label] = self._sample(by_label[label], by_label)
            done()
        found["samples"] = samples
        self.parts.save_part(_key(number), found)
        return found

    def _sample(self, one: Ready, by_label: Mapping[str, Ready]) -> Sample:
        tokens, against = self.plan.tokens, one.case.against
        if against in by_label:
            return in_turns(self.model, self.ids, tokens, one.make, by_label[against].make)
        return repetition(self.model, self.ids, tokens, one.make)

    @property
    def own(self) -> str:
        """Label of our own dense path; the untouched model's where there is none."""
        labels = [one.case.label for one in self.ready]
        return next((label for label in OWN if label in labels), TRANSFORMERS)

    def _find(self) -> list[Ready]:
        plain, *candidates = dense_cases()
        found = [Ready(plain, lambda: None)]
        for case in candidates:
            if case.executor == "graph" and torch.device(self.model.device).type != "cuda":
                break  # graphs are recorded on a GPU alone
            one = self._ready(case)
            if one is not None:
                found.append(one)
                break  # the others are slower
        own = found[-1].case.label
        methods = [one for one in map(self._ready, self.plan.cases) if one is not None]
        found += methods
        if self.plan.costs and methods:
            first, sparsity = self.plan.variants[0], self.plan.sparsities[0]
            wanted = {one.case.executor for one in methods}
            executors = [name for name in self.plan.executors if name in wanted]
            costs = cost_cases(first, sparsity, own, executors, self.plan.tokens)
            found += [one for one in map(self._ready, costs) if one is not None]
        return found

    def _ready(self, case: Case) -> Ready | None:
        """None, with the reason kept, for what cannot run."""
        assert case.config is not None
        try:
            return Ready(case, self._maker(case, case.config))
        except DartError as error:
            self.left_out.setdefault(str(error), []).append(case.label)
            return None

    def _maker(self, case: Case, config: PruneConfig) -> Callable[[], Run | None]:
        if case.whole:
            Run(self.model, config, held=everything(self.model))  # raises for what cannot run
            return lambda: Run(self.model, config, held=everything(self.model))
        if config.calibration is None:
            Run(self.model, config)  # before anything is learnt for it
        plan = self.plan
        candidate = prepare(
            self.model, self.tokenizer, config, plan.calibration, plan.cache_dir, self.ui.say
        )
        candidate.run()
        return candidate.run

    def sentences(self) -> list[str]:
        """One sentence per reason why rows are missing."""
        found = []
        for reason, labels in self.left_out.items():
            verb = "is" if len(labels) == 1 else "are"
            found.append(f"{'; '.join(labels)} {verb} left out: {reason}")
        return found


def _key(number: int) -> str:
    return f"repetition {number}"


def shuffled(labels: Sequence[str], seed: int, number: int) -> list[str]:
    """The order of repetition ``number``: it follows from the seed and the number alone."""
    return random.Random(f"{seed} {number}").sample(list(labels), len(labels))


def everything(model: Any) -> tuple[LayerMask, ...]:
    """Masks that keep every neuron."""
    return tuple(
        LayerMask(torch.arange(layer.width, device=layer.device), layer.width)
        for layer in describe(model).weights("output", 0)
    )


@torch.inference_mode()
def bytes_of_position(model: Any, ids: Tensor) -> float:
    """Bytes of keys and values of one position."""
    return cache_bytes(model(ids, use_cache=True, logits_to_keep=1).cache)
