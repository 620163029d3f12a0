"""`bench speed`: every row in interleaved repetitions; what is finished is not repeated.

A repetition runs every row once, in an order of its own: what drifts in a machine over minutes then
meets all rows alike.  The results are pooled over the repetitions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dart_llm.data import texts
from dart_llm.data.documents import check_disjoint
from dart_llm.errors import ConfigError, DartError, LoadError
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.model_facts import configuration
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.study import Study, Unit, load_model
from dart_llm.hub import plain
from dart_llm.models.checkpoint import Checkpoint, checkpoint_facts, remember
from dart_llm.models.describe import context_length, describe
from dart_llm.models.devices import parse_device
from dart_llm.models.loading import parse_dtype
from dart_llm.native import build
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import LayerMask
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.session.prepare import prepare
from dart_llm.session.run import Run
from dart_llm.studies.speed import summary
from dart_llm.studies.speed.settings import OWN, TRANSFORMERS, Case, SpeedSettings, dense_cases
from dart_llm.studies.speed.timing import Make, read_bandwidth, repetition

WARMUP_TOKENS = 4
"""Timed tokens of a warm-up, whose times nobody reads."""

BRIEF = (
    "row",
    "tg_ms",
    "pp_tokens_per_second",
    "achieved_sparsity",
    "times_transformers",
    "times_own_dense",
    "limit",
    "share_of_limit",
)
"""What the last line holds of a row."""


class SpeedStudy(Study[SpeedSettings]):
    """A unit is a repetition: ``samples`` by label, ``order``, ``sitting``, ``read_bandwidth``.

    ``bandwidth_mib``: size of the buffer by which the read bandwidth is measured.  Raises
    ``ConfigError`` and ``UnknownName`` before the model is loaded where that is possible.
    """

    kind = "speed"
    document = "speed.json"

    def __init__(self, settings: SpeedSettings, ui: Ui, bandwidth_mib: int = 512) -> None:
        super().__init__(settings, ui)
        self.variants = settings.variant_list()
        if any(variant.config.calibration is not None for variant in self.variants):
            check_disjoint(settings.calibration, {})
        self.bandwidth_mib = bandwidth_mib
        self.ids = torch.empty(0)
        """The prompt, [1, P]."""
        self.cases: list[Case] = []
        """What this model and this machine can run, in the order of the rows."""
        self.makers: dict[str, Make] = {}
        """By label."""
        self.left_out: dict[str, list[str]] = {}
        """Labels by the reason why they cannot run."""
        self.sitting = f"{os.getpid()} {time.time_ns()}"
        """Tells the repetitions of one process from those of others."""
        self.advance: Callable[[int], Any]
        """To be called after every row."""

    @property
    def model_name(self) -> str:
        return self.settings.name

    @property
    def own(self) -> str:
        """Label of our own dense path; the untouched model's where there is none."""
        return next((label for label in OWN if label in self.makers), TRANSFORMERS)

    @property
    def notes(self) -> list[str]:
        """One sentence per reason why rows are missing."""
        return [
            f"{'; '.join(labels)} {'is' if len(labels) == 1 else 'are'} left out: {reason}"
            for reason, labels in self.left_out.items()
        ]

    def inputs(self) -> Mapping[str, Any]:
        settings = self.settings
        if settings.shape is not None:
            return {"shape": hashlib.sha256(Path(settings.shape).read_bytes()).hexdigest()}
        cell = Cell(settings.model, "dense", "speed", calibration=settings.calibration)
        return Digests().of(cell)

    def asked(self) -> dict[str, Any]:
        return self.settings.model_dump(mode="json", exclude=set(self.settings.UNUSED))

    def identify(self) -> dict[str, Any]:
        presets = {variant.label: variant.config.to_dict() for variant in self.variants}
        return {**super().identify(), "presets": presets}

    def config_extra(self) -> dict[str, Any]:
        name, sparsities = self.settings.name, self.settings.sparsity_list()
        cells = [
            {"model": name, "method": variant.label, "sparsity": sparsity, "task": "speed"}
            for variant in self.variants
            for sparsity in sparsities
        ]
        return {"cells": cells}

    def load(self) -> None:
        """Model and prompt; raises ``ConfigError`` for one longer than the model's context."""
        settings, began = self.settings, time.perf_counter()
        self.model, self.tokenizer = prepare_model(settings, self.ui)
        self.timing["load_s"] = time.perf_counter() - began
        wanted = settings.prompt_tokens + settings.tokens + summary.WARM
        longest = context_length(self.model)
        if longest is not None and wanted > longest:
            raise ConfigError(
                f"{wanted} tokens are longer than the context of {settings.name}, {longest}: give "
                "fewer --prompt-tokens or --tokens"
            )
        self.ids = prompt_ids(self.model, self.tokenizer, settings.prompt_tokens, settings.seed)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.settings.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    # rows

    def find_cases(self) -> None:
        """The untouched model, the best dense path of our own, and all methods that can run."""
        plain, *candidates = dense_cases()
        self.cases, self.makers = [plain], {plain.label: lambda: None}
        for case in candidates:
            if case.executor == "graph" and torch.device(self.model.device).type != "cuda":
                break  # graphs are recorded on a GPU alone
            if self._takes(case):
                break  # the others are slower
        for case in self.settings.case_list():
            self._takes(case)

    def _takes(self, case: Case) -> bool:
        """Whether the case can run; else the reason is kept."""
        try:
            self.makers[case.label] = self._maker(case)
        except DartError as error:
            self.left_out.setdefault(str(error), []).append(case.label)
            return False
        self.cases.append(case)
        return True

    def _maker(self, case: Case) -> Make:
        """What makes the case's run; raises ``DartError`` where there can be none."""
        model, settings, config = self.model, self.settings, case.config
        assert config is not None
        if case.whole:

            def make() -> Run:
                return Run(model, config, held=everything(model))

            make()
            return make
        if config.calibration is None:
            Run(model, config)  # before anything is learnt for it
        where = (settings.calibration, settings.cache_dir, self.ui.say)
        prepared = prepare(model, self.tokenizer, config, *where)
        prepared.run()
        return prepared.run

    # repetitions

    def units(self) -> Iterator[Unit]:
        """Every repetition; before the first one that is not finished, all rows once to warm up."""
        self.find_cases()
        for note in self.notes:
            self.ui.say(f"note: {note}")
        settings = self.settings
        units = [Unit(f"repetition {n}", data=n) for n in range(settings.repeats)]
        todo = any(self.finished(unit) is None for unit in units)
        warm = self.cases if todo and settings.warmup else []
        total = len(warm) + settings.repeats * len(self.cases)
        with self.ui.progress("decoding", total) as self.advance:
            for case in warm:
                repetition(self.model, self.ids, WARMUP_TOKENS, self.makers[case.label])
                self.advance(1)
            for unit in units:
                if self.finished(unit) is not None:
                    self.advance(len(self.cases))
                yield unit

    def compute(self, unit: Unit) -> dict[str, Any]:
        settings, samples = self.settings, {}
        order = shuffled([case.label for case in self.cases], settings.seed, unit.data)
        speed = read_bandwidth(torch.device(self.model.device), self.bandwidth_mib)
        for label in order:
            samples[label] = repetition(self.model, self.ids, settings.tokens, self.makers[label])
            self.advance(1)
        sitting = {"order": order, "sitting": self.sitting, "read_bandwidth": speed}
        return {**sitting, "samples": samples}

    # what is made of them

    def summarise(self) -> dict[str, Any]:
        settings = self.settings
        share = Run(self.model, PruneConfig.build("dense")).report().ffn_share_of_bytes
        weights = describe(self.model).parameter_bytes
        facts = {key: v for key, v in checkpoint_facts(self.model).items() if key != "path"}
        about = {
            "model": settings.name,
            "checkpoint": facts,
            "prompt_tokens": settings.prompt_tokens,
            "tokens": settings.tokens,
            "repeats": settings.repeats,
            "seed": settings.seed,
            "kernels": build.kernels_in_use() if self.own in OWN[:2] else None,
            "machine": self.config["machine"],
            "versions": self.config["versions"],
            "weights": {
                "ffn_bytes": share * weights,
                "weight_bytes": weights,
                "cache_bytes_per_position": cache_bytes(self.model, self.ids),
            },
            "variants": {one.label: one.config.to_dict() for one in self.variants},
            "left_out": self.left_out,
            "notes": self.notes,
        }
        return summary.summarise(self.cases, self.own, self.lines, about)

    def tables(self) -> Sequence[Table]:
        return [summary.table(self.summary)]

    def sentences(self) -> Sequence[str]:
        return [*summary.sentences(self.summary), *self.summary["notes"]]

    def markdown(self) -> str:
        return summary.markdown(self.summary)

    def figures(self) -> Iterable[Plot]:
        return summary.make(self.summary)

    def answer(self) -> dict[str, Any]:
        return {**super().answer(), "git": self.config["git"]}

    def last_line(self) -> dict[str, Any]:
        """What ends the output without ``--json``: each row in a few numbers."""
        rows = [{name: row[name] for name in BRIEF} for row in self.summary["rows"]]
        return {"folder": str(self.path), "model": self.summary["model"], "rows": rows}


def shuffled(labels: Sequence[str], seed: int, number: int) -> list[str]:
    """The order of repetition ``number``: it follows from the seed and the number alone."""
    return random.Random(f"{seed} {number}").sample(list(labels), len(labels))


def everything(model: Any) -> tuple[LayerMask, ...]:
    """Masks that keep every neuron."""
    return tuple(
        LayerMask(torch.arange(layer.width, device=layer.device), layer.width)
        for layer in describe(model).weights("output", 0)
    )


# The model: a checkpoint, or its shape alone with random weights.  Beside ``models`` a place that
# knows transformers: it makes models, and looks into their caches.


def prepare_model(settings: SpeedSettings, ui: Ui) -> tuple[Any, Any]:
    """Model and tokenizer, None for random weights; raises ``LoadError`` for what cannot be had."""
    if not settings.is_random:
        model, tokenizer, _ = load_model(settings, ui)
        return model, tokenizer
    with ui.status(f"making random weights of the shape of {settings.name}"):
        return _random(settings, ui), None


def _random(settings: SpeedSettings, ui: Ui) -> Any:
    from transformers import AutoModelForCausalLM

    shape = settings.shape
    config = _shape_file(Path(shape)) if shape else configuration(settings, ui.say)
    dtype = parse_dtype(settings.dtype)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    attention = settings.attn_implementation
    chosen = {"attn_implementation": attention} if attention else {}
    torch.manual_seed(settings.seed)
    try:
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, dtype=dtype, **chosen)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise LoadError(f"no model can be made of {settings.name}: {plain(error)}") from None
    model = model.eval().to(parse_device(settings.device).first)
    about = f"{settings.name} (random weights)"
    remember(model, Checkpoint(about, "random weights", settings.name, None, "none"))
    return model


def _shape_file(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoadError(f"{path} holds no model's configuration: {plain(error)}") from None


def prompt_ids(model: Any, tokenizer: Any, length: int, seed: int) -> Tensor:
    """[1, length] int64 on the model's device: shipped text, over and over, or random tokens."""
    if tokenizer is None:
        vocabulary = int(model.config.get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocabulary, (1, length), generator=generator)
    else:
        known = tokenizer(texts.all_text(), return_tensors="pt", verbose=False).input_ids
        ids = known.repeat(1, -(-length // known.shape[1]))[:, :length]
    return ids.to(model.device)


@torch.inference_mode()
def cache_bytes(model: Any, ids: Tensor) -> float:
    """Bytes of keys and values of one position, all layers together, after ids [1, T]."""
    cache = model(ids, use_cache=True, logits_to_keep=1).cache
    length = int(cache.get_seq_length())
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)) / length
