"""``dart-llm demo``: what this project does, in a minute or two.

A prompt dense and by the default method, beside plain transformers, and llama.cpp on the same file
where its ``llama-bench`` is at hand; then perplexity: dense, the default, and sequence masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dart_llm.errors import DartError
from dart_llm.evaluation.measurement import Measurement, MeasureOptions
from dart_llm.evaluation.tasks import count, measure, split
from dart_llm.experiments.comparison import scores
from dart_llm.experiments.llama_bench import LLAMA_CPP, ReferenceFile, decode_row, find_bench
from dart_llm.experiments.store import ResultLine
from dart_llm.experiments.study import Unit, load_model, run_study
from dart_llm.experiments.timing import WARM
from dart_llm.files import finite, write_json
from dart_llm.models.checkpoint import blocks_file
from dart_llm.models.describe import describe
from dart_llm.models.loading import is_default
from dart_llm.pruning.config import DEFAULT_METHOD, DEFAULT_SPARSITY, PruneConfig
from dart_llm.pruning.registry import SETTING
from dart_llm.reporting import words
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.reporting.words import TRANSFORMERS
from dart_llm.session.run import BoundMethod
from dart_llm.studies.generate import pace, report
from dart_llm.studies.generate.plots import RunView
from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.generate.study import RunStudy

SETTINGS = {"prompt": "sky", "chat": None, "generation": 64, "experiment_name": "demo"}

COMPARED = (("dart", DEFAULT_SPARSITY),)
"""Methods and sparsities whose perplexity is measured beside the default's."""

TASK = "perplexity:embedded"

OPTIONS = MeasureOptions(limit=6, prompt_tokens=128, scored_tokens=128)

Row = Mapping[str, Any]


class DemoStudy(RunStudy):
    """A run, timed beside other programs, and one table of perplexity."""

    perplexity: Sequence[Row] = ()
    """Rows of perplexity.json."""

    def units(self) -> Iterator[Unit]:
        yield from super().units()
        yield Unit("perplexity")

    def compute(self, unit: Unit) -> Any:
        return self._perplexity() if unit.key == "perplexity" else super().compute(unit)

    def take(self, unit: Unit, value: Any) -> None:
        if unit.key != "perplexity":
            super().take(unit, value)
            return
        self.perplexity = value
        write_json(self.path / "perplexity.json", self._document())

    def _perplexity(self) -> list[Row]:
        """Dense, the compared methods and the run's own, on the same slices."""
        compared = [PruneConfig.build(name, sparsity=share) for name, share in COMPARED]
        if self.settings.method.startswith(SETTING):  # it was measured when it was tuned
            compared = []
        candidates = [self.prepare(config) for config in (None, *compared)]
        candidates = list({one.label: one for one in (*candidates, self.bound)}.values())
        total = len(candidates) * count(TASK, OPTIONS, self.tokenizer, self.model)
        with self.ui.progress(f"perplexity on {split(TASK)[1]}", total) as advance:
            measured = [measure(one, TASK, OPTIONS, self.folder, advance) for one in candidates]
        pairs = zip(candidates, measured, strict=True)
        return [_row(candidate, found, measured[0]) for candidate, found in pairs]

    def _document(self) -> dict[str, Any]:
        return {
            "protocol": OPTIONS.protocol,
            "text": split(TASK)[1],
            "slices": OPTIONS.limit,
            "prompt_tokens": OPTIONS.prompt_tokens,
            "scored_tokens": OPTIONS.scored_tokens,
            "rows": list(self.perplexity),
        }

    def add_clocks(
        self, clocks: dict[str, pace.Clock], sizes: dict[str, int], ids: Tensor, tokens: int
    ) -> str:
        plain = self._transformers(ids)
        name = f"{TRANSFORMERS} {str(plain.dtype).removeprefix('torch.')}"
        clocks[name] = partial(pace.Decoding(plain).seconds, ids, tokens)
        sizes[name] = describe(plain).parameter_bytes
        self._add_llama_cpp(clocks, sizes, ids.shape[1], tokens)
        return name

    def _transformers(self, ids: Tensor) -> Any:
        """The model as transformers runs it, in the dtype in which it decodes fastest here."""
        settings = self.settings.model_copy(update={"weights": "dense"})
        in_blocks = blocks_file(self.model) is not None
        models = pace.untouched(self.model, in_blocks, lambda: load_model(settings, self.ui)[0])
        return pace.fastest(models, ids)

    def _add_llama_cpp(
        self, clocks: dict[str, pace.Clock], sizes: dict[str, int], depth: int, tokens: int
    ) -> None:
        """llama.cpp on the model's file, where it is at hand and runs."""
        path, bench = blocks_file(self.model), find_bench()
        if path is None or bench is None:
            return
        threads = torch.get_num_threads()

        def clock() -> float:
            row = decode_row(bench, path, threads, tokens, depth + WARM)
            return float(row["avg_ns"]) / 1e9 / tokens

        try:
            file = ReferenceFile.of(path)
            clock()
        except DartError as error:
            self.ui.say(f"note: {error}")
        else:
            name = f"{LLAMA_CPP} {file.kind}"
            clocks[name], sizes[name] = clock, file.bytes

    def result_lines(self) -> list[ResultLine]:
        lines = [*super().result_lines()]
        for row in self.perplexity:
            counted = row["accounting"] or {}
            facts = {
                "label": words.row_name(row),
                "method": row["method"],
                "task": TASK,
                "requested": row["sparsity"],
                "achieved": counted.get("achieved_sparsity"),
                "dense_share": counted.get("dense_token_share"),
                "remasks": counted.get("remasks"),
            }
            line = self.line(row["label"], "perplexity", row["perplexity"])
            lines.append(line.model_copy(update=facts))
            if row["interval"]:
                low, high = row["interval"]
                ratio = {"metric": "perplexity_over_dense", "value": row["ratio_to_dense"]}
                lines.append(lines[-1].model_copy(update={**ratio, "low": low, "high": high}))
        return lines

    def tables(self) -> list[Table]:
        texts = report.side_by_side(self.generations, self.ui.err.width) if self.ui.live else []
        tables = [*texts, report.pace_table(self.timing)]
        return [*tables, report.perplexity_table(self._document())]

    def sentences(self) -> list[str]:
        row = next((row for row in self.perplexity if row["label"] == self.bound.label), None)
        if self.accounting is None:
            return []
        over = None if row is None else row["ratio_to_dense"]
        default = is_default(self.settings.model)
        return [report.verdict(self.timing, over, self.accounting, default)]

    def view(self) -> RunView:
        return replace(super().view(), perplexity=finite(self._document()))

    def figures(self) -> Iterable[Plot]:
        return ()

    def answer(self) -> dict[str, Any]:
        return {**super().answer(), "perplexity": self._document()}


def _row(candidate: BoundMethod, measured: Measurement, dense: Measurement) -> Row:
    """One row of perplexity.json; ``interval``: 95 % of the ratio to dense, paired by slice."""
    own, base = (scores(one.to_dict()) for one in (measured, dense))
    interval = None if measured is dense else own.against(base)
    perplexity = measured.metrics["perplexity"]
    base_perplexity = dense.metrics["perplexity"]
    ratio = perplexity / base_perplexity if perplexity and base_perplexity else None
    return {
        "method": candidate.method,
        "label": candidate.label,
        "sparsity": candidate.requested,
        "perplexity": perplexity,
        "mean_loss": measured.metrics["mean_loss"],
        "ratio_to_dense": ratio,
        "interval": interval and interval.ends,
        "no_interval": words.too_few(len(own.sample)),
        "accounting": measured.accounting,
    }


def run_demo(ui: Ui, **given: Any) -> DemoStudy:
    """The demo; ``given``: settings of a run that win, such as model, device and results_dir."""
    settings = RunSettings(**{**SETTINGS, "method": DEFAULT_METHOD, **given}).fitted()
    return run_study(DemoStudy(settings, ui))
