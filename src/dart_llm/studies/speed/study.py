"""`bench speed`: every row in interleaved repetitions; what is finished is not repeated.

A repetition runs every row once, in an order of its own: what drifts in a machine over minutes then
meets all rows alike.  The results are pooled over the repetitions.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dart_llm.data.documents import check_disjoint
from dart_llm.errors import ConfigError, DartError
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.held import Held
from dart_llm.experiments.llama_bench import ReferenceFile
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.study import Study, Unit
from dart_llm.experiments.timed_cases import OWN, TRANSFORMERS, Case, dense_cases
from dart_llm.experiments.timing import (
    WARM,
    Make,
    Sample,
    cache_bytes,
    everything,
    prefill,
    prompt_ids,
    read_bandwidth,
    reference_turn,
    repetition,
    shuffled,
)
from dart_llm.files import file_sha256
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length, describe
from dart_llm.native import build
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.session.prepare import prepare
from dart_llm.session.run import Run
from dart_llm.studies.speed import reference, summary
from dart_llm.studies.speed.model import plain_of, prepare_all
from dart_llm.studies.speed.settings import SpeedSettings

PREFILL = "--prefill-tokens"

WARMUP_TOKENS = 4
"""Timed tokens of a warm-up, whose times nobody reads."""

BRIEF = (
    "row",
    "tg_ms",
    "pp_tokens_per_second",
    "achieved_sparsity",
    "times_transformers",
    "times_own_dense",
    "disturbed",
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
        self.bench = reference.require_bench() if settings.reference else ""
        """llama.cpp's own benchmark."""
        self.files: dict[str, ReferenceFile] = {}
        """What it reads, by label."""
        self.held: dict[str, Held] = {}
        """The models, by the name of their format."""
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
    def several(self) -> bool:
        """Whether our rows come in several formats, which their labels name."""
        return len(self.settings.format_list()) > 1

    @property
    def compares(self) -> bool:
        """Whether there are formats or programs to compare, beside methods."""
        return bool(len(self.held) > 1 or self.bench or any(o.blocks for o in self.held.values()))

    @property
    def main(self) -> str:
        """The format that all others are compared with: dense where that was asked for."""
        names = [one.form.name for one in self.held.values() if one.asked]
        return "dense" if "dense" in names else names[0]

    @property
    def own(self) -> str:
        """Label of our own dense path; the untouched model's where there is none."""
        return self.own_on(self.main)

    def own_on(self, form: str) -> str:
        """The same on weights in a format."""
        labels = [case.label for case in self.cases if case.form == form and case.config]
        starts = [label for own in OWN for label in labels if label.startswith(own)]
        return starts[0] if starts else TRANSFORMERS

    @property
    def notes(self) -> list[str]:
        """One sentence per reason why rows are missing, and on rows that no kernel serves."""
        tokens = [(case.label, case.config.token) for case in self.cases if case.config]
        plain = [label for label, token in tokens if token is not None and not token.native]
        found = [
            f"{'; '.join(labels)} {'is' if len(labels) == 1 else 'are'} left out: {reason}"
            for reason, labels in self.left_out.items()
        ]
        if plain:
            found.append(
                f"{'; '.join(plain)}: plain PyTorch under any executor, all neurons computed; for "
                "quality at equal bytes, not for speed"
            )
        return found

    def inputs(self) -> Mapping[str, Any]:
        settings = self.settings
        named = [one.file for one in settings.format_list() if one.file is not None]
        named += [Path(name).expanduser() for name in settings.reference_file or ()]
        files = {f"file {path}": file_sha256(path) for path in dict.fromkeys(named)}
        if settings.shape is not None:
            return {"shape": hashlib.sha256(Path(settings.shape).read_bytes()).hexdigest(), **files}
        formats = settings.format_list()
        weights = formats[0].weights if len(formats) == 1 else "dense"  # the settings name several
        cell = Cell(settings.model, "dense", "speed", calibration=settings.calibration)
        cell = replace(cell, dtype=settings.dtype, device=settings.device, weights=weights)
        return {**Digests().of(cell), **files}

    def asked(self) -> dict[str, Any]:
        left_out = {name for name in self.settings.LATER if getattr(self.settings, name) is None}
        left_out |= {*self.shown, *self.settings.UNUSED}
        return self.settings.model_dump(mode="json", exclude=left_out)

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
        """Models and prompt; raises ``ConfigError`` for one longer than the model's context."""
        settings, began = self.settings, time.perf_counter()
        self.held = {one.form.name: one for one in prepare_all(settings, self.ui)}
        if self.bench:
            files = reference.reference_files(settings, self.ui)
            self.files = reference.reference_cases(files)
        own = self.held[self.main]
        self.model, self.tokenizer = own.model, own.tokenizer
        self.timing["load_s"] = time.perf_counter() - began
        generated = settings.prompt_tokens + settings.tokens + WARM
        wanted = max(generated, settings.prefill)
        longest = context_length(self.model)
        if longest is not None and wanted > longest:
            raise ConfigError(
                f"{wanted} tokens are longer than the context of {settings.name}, {longest}: give "
                f"fewer {'--prompt-tokens or --tokens' if wanted == generated else PREFILL}"
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
        """The untouched model, the best dense path of our own, and all methods that can run.

        Our own on every format that was asked for; llama.cpp after all.
        """
        plain, *candidates = dense_cases()
        place = plain_of(list(self.held.values())).form
        self.cases, self.makers = [plain.on(place)], {plain.label: lambda: None}
        for held in (one for one in self.held.values() if one.asked):
            suffix = held.suffix if self.several else ""
            for case in candidates:
                if case.executor == "graph" and torch.device(self.model.device).type != "cuda":
                    break  # graphs are recorded on a GPU alone
                if self._takes(case.on(held.form, suffix)):
                    break  # the others are slower
            for case in self.settings.case_list():
                self._takes(case.on(held.form, suffix))
        self.cases += [reference.case_of(label, file) for label, file in self.files.items()]

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
        held, settings, config = self.held[case.form], self.settings, case.config
        model = held.model
        assert config is not None
        if case.whole:

            def make() -> Run:
                return Run(model, config, held=everything(model))

            make()
            return make
        if config.calibration is None:
            Run(model, config)  # before anything is learnt for it
        where = (settings.calibration, settings.cache_dir, self.ui.say)
        prepared = prepare(model, held.tokenizer, config, *where)
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
                if case.file is None:  # llama-bench warms up by itself
                    self._turn(case, WARMUP_TOKENS)
                self.advance(1)
            for unit in units:
                if self.finished(unit) is not None:
                    self.advance(len(self.cases))
                yield unit

    def compute(self, unit: Unit) -> dict[str, Any]:
        settings, samples = self.settings, {}
        order = shuffled([case.label for case in self.cases], settings.seed, unit.data)
        speed = read_bandwidth(torch.device(self.model.device), self.bandwidth_mib)
        cases = {case.label: case for case in self.cases}
        for label in order:
            samples[label] = self._turn(cases[label], settings.tokens)
            self.advance(1)
        sitting = {"order": order, "sitting": self.sitting, "read_bandwidth": speed}
        return {**sitting, "samples": samples}

    def _turn(self, case: Case, tokens: int) -> Sample:
        settings = self.settings
        if case.file is not None:
            sizes = settings.prompt_tokens, settings.tokens, settings.prefill
            return reference_turn(self.bench, case.file, torch.get_num_threads(), *sizes)
        model, make = self.held[case.form].model, self.makers[case.label]
        found = repetition(model, self.ids, tokens, make)
        if settings.prefill and case.variant is None:
            tokenizer = self.held[case.form].tokenizer
            ids = prompt_ids(model, tokenizer, settings.prefill, settings.seed)
            found["prefill_s"] = prefill(model, ids, make)
        return found

    # what is made of them

    def summarise(self) -> dict[str, Any]:
        settings = self.settings
        facts = {key: v for key, v in checkpoint_facts(self.model).items() if key != "path"}
        about = {
            "model": settings.name,
            "checkpoint": facts,
            "prompt_tokens": settings.prompt_tokens,
            "tokens": settings.tokens,
            "repeats": settings.repeats,
            "seed": settings.seed,
            "kernels": build.kernels_in_use() if self.own.startswith(OWN[:2]) else None,
            "machine": self.config["machine"],
            "versions": self.config["versions"],
            "weights": self._sizes(self.model),
            "variants": {one.label: one.config.to_dict() for one in self.variants},
            "left_out": self.left_out,
            "notes": self.notes,
            **(self._compared() if self.compares else {}),
        }
        return summary.summarise(self.cases, self.own, self.lines, about)

    def _sizes(self, model: Any) -> dict[str, float]:
        share = Run(model, PruneConfig.build("dense")).report().ffn_share_of_bytes
        weights = describe(model).parameter_bytes
        found = {
            "ffn_bytes": share * weights,
            "weight_bytes": weights,
            "cache_bytes_per_position": cache_bytes(model, self.ids),
        }
        if any(one.config.screens for one in self.variants):
            found["head_bytes"] = model.get_output_embeddings().weight.nbytes
        return found

    def _compared(self) -> dict[str, Any]:
        """What else is known where formats, or llama.cpp, are compared."""
        formats = {
            name: {
                "held": one.words,
                "own_dense": self.own_on(name) if one.asked else None,
                "weights": self._sizes(one.model),
            }
            for name, one in self.held.items()
        }
        own = {name: one for name, one in self.held.items() if formats[name]["own_dense"]}
        cache, width = cache_bytes(self.model, self.ids), self.model.dtype.itemsize
        files = {
            label: {
                "file": one.path.name,
                "kind": one.kind,
                "bytes": one.bytes,
                "form": reference.same_weights(one, own, self.settings, self.ui),
                "cache_bytes_per_position": cache * reference.CACHE_BYTES / width,
            }
            for label, one in self.files.items()
        }
        found = {"formats": formats, "prefill_tokens": self.settings.prefill or None}
        return found | ({"reference": files} if files else {})

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
        names = (*BRIEF, *summary.COMPARED) if self.compares else BRIEF
        rows = [{name: row[name] for name in names} for row in self.summary["rows"]]
        return {"folder": str(self.path), "model": self.summary["model"], "rows": rows}
