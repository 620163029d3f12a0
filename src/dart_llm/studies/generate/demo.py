"""``dart-llm demo``: show in a minute or two what this project does.

The demo decodes a prompt dense and with the default method, and times both against transformers
and, if ``llama-bench`` is installed, against llama.cpp on the same file.  It then measures the
perplexity of dense, of the default method, and of sequence masks (one mask for all tokens).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dart_llm.errors import DartError
from dart_llm.evaluation.measurement import Measurement, MeasureOptions
from dart_llm.evaluation.tasks import count, measure, split
from dart_llm.experiments.comparison import scores
from dart_llm.experiments.store import ResultLine
from dart_llm.experiments.study import Unit, load_model
from dart_llm.experiments.timing import (
    LLAMA_CPP,
    WARM,
    ReferenceFile,
    decode_row,
    find_bench,
    repetition,
)
from dart_llm.files import finite, write_json
from dart_llm.models.checkpoint import blocks_file
from dart_llm.models.describe import describe
from dart_llm.models.float32_products import can_copy
from dart_llm.models.loading import is_default
from dart_llm.pruning.config import DEFAULT_SPARSITY, PruneConfig
from dart_llm.pruning.registry import SETTING
from dart_llm.reporting import words
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.reporting.words import TRANSFORMERS
from dart_llm.session.run import BoundMethod
from dart_llm.studies.generate import report
from dart_llm.studies.generate.study import Clock, Decoding, RunStudy, accounting_fields

COMPARED = (("dart", DEFAULT_SPARSITY),)
"""Further methods and sparsities whose perplexity is measured."""

TASK = "perplexity:embedded"

OPTIONS = MeasureOptions(limit=6, prompt_tokens=128, scored_tokens=128)
"""How the demo measures perplexity."""

PROBE_TOKENS = 4
"""The number of tokens that are timed to find the faster of two dtypes."""

Row = Mapping[str, Any]


class DemoStudy(RunStudy):
    """The study ``run`` with two additions: times of other programs, and perplexities."""

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
        """Rows for dense, the methods in ``COMPARED`` and the run's method, on the same slices."""
        compared = [PruneConfig.build(name, sparsity=share) for name, share in COMPARED]
        if self.settings.method.startswith(SETTING):  # tuning has already compared it
            compared = []
        candidates = [self.prepare(config) for config in (None, *compared)]
        candidates = list({method.label: method for method in (*candidates, self.bound)}.values())
        total = len(candidates) * count(TASK, OPTIONS, self.tokenizer, self.model)
        with self.ui.progress(f"perplexity on {split(TASK)[1]}", total) as advance:
            measured = [measure(m, TASK, OPTIONS, self.folder, advance) for m in candidates]
        return [_row(*pair, measured[0]) for pair in zip(candidates, measured, strict=True)]

    def _document(self) -> dict[str, Any]:
        names = ("protocol", "prompt_tokens", "scored_tokens")
        options = {name: getattr(OPTIONS, name) for name in names}
        measured = {"text": split(TASK)[1], "slices": OPTIONS.limit, **options}
        return {**measured, "rows": list(self.perplexity)}

    def add_clocks(
        self, clocks: dict[str, Clock], sizes: dict[str, int], ids: Tensor, tokens: int
    ) -> str:
        plain = self.transformers(ids)
        name = f"{TRANSFORMERS} {str(plain.dtype).removeprefix('torch.')}"
        clocks[name] = Decoding(plain, ids, tokens)
        sizes[name] = describe(plain).parameter_bytes
        self._add_llama_cpp(clocks, sizes, ids.shape[1], tokens)
        return name

    def transformers(self, ids: Tensor) -> Any:
        """The untouched model in the dtype in which it decodes fastest after ids [1, T].

        Times the model's dtype and, on a CPU with enough memory, float32.  A GGUF file's quantised
        weights are dequantised, because transformers does not support them.
        """
        on_cpu = torch.device(self.model.device).type == "cpu"
        dtype = str(self.model.dtype).removeprefix("torch.")
        dtypes = dict.fromkeys((dtype, *(["float32"] if on_cpu and can_copy(self.model) else [])))
        timed = {}
        for name in dtypes:
            settings = self.settings.model_copy(update={"weights": "dense", "dtype": name})
            as_it_is = name == dtype and blocks_file(self.model) is None
            model = self.model if as_it_is else load_model(settings, self.ui)[0]
            sample = repetition(model, ids.to(model.device), PROBE_TOKENS, lambda: None)
            timed[min(sample["steps_s"])] = model
        return timed[min(timed)]

    def _add_llama_cpp(
        self, clocks: dict[str, Clock], sizes: dict[str, int], depth: int, tokens: int
    ) -> None:
        """Add llama.cpp on the model's file, if llama-bench is installed and runs."""
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
            fields = {"label": words.row_name(row), "method": row["method"], "task": TASK}
            fields |= {"requested": row["sparsity"], **accounting_fields(row["accounting"] or {})}
            line = self.line(row["label"], "perplexity", row["perplexity"])
            lines.append(line.model_copy(update=fields))
            if row["interval"]:
                low, high = row["interval"]
                ratio = {"metric": "perplexity_over_dense", "value": row["ratio_to_dense"]}
                lines.append(lines[-1].model_copy(update={**ratio, "low": low, "high": high}))
        return lines

    def tables(self) -> list[Table]:
        texts = report.side_by_side(self.generations, self.ui.err.width) if self.ui.live else []
        results = report.results_table(self.timing, self.accounting)
        return [*texts, results, report.perplexity_table(self._document())]

    def sentences(self) -> list[str]:
        if self.accounting is None:
            return []
        rows = [row for row in self.perplexity if row["label"] == self.bound.label]
        ratio = rows[0]["ratio_to_dense"] if rows else None
        default = is_default(self.settings.model)
        return [report.verdict(self.timing, ratio, self.accounting, default)]

    def view(self) -> report.RunView:
        return replace(super().view(), perplexity=finite(self._document()))

    def figures(self) -> Iterable[Plot]:
        return ()

    def answer(self) -> dict[str, Any]:
        return {**super().answer(), "perplexity": self._document()}


def _row(candidate: BoundMethod, measured: Measurement, dense: Measurement) -> Row:
    """A row of perplexity.json; ``interval``: of the ratio, None for dense or with few slices."""
    scored, base = (scores(result.to_dict()) for result in (measured, dense))
    interval = None if measured is dense else scored.against(base)
    perplexity = measured.metrics["perplexity"]
    base_perplexity = dense.metrics["perplexity"]
    return {
        "method": candidate.method,
        "label": candidate.label,
        "sparsity": candidate.requested,
        "perplexity": perplexity,
        "ratio_to_dense": perplexity / base_perplexity if perplexity and base_perplexity else None,
        "interval": interval and interval.ends,
        "accounting": measured.accounting,
    }
