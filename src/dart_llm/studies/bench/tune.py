"""`tune`: the loss of every candidate, the time of those that are left, one recommended setting.

A unit is a slice by a candidate, then a repetition of all that is timed, in an order of its own.
``tune`` is the study from Python.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dart_llm.errors import DartError
from dart_llm.evaluation.perplexity import reference_logits
from dart_llm.experiments.study import Unit, load_model, run_study
from dart_llm.experiments.timing import WARM, Make
from dart_llm.files import write_lines
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.setting_file import KeptSetting
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.words import count
from dart_llm.session.run import Run, identity, stored_as
from dart_llm.studies.bench import quality, report
from dart_llm.studies.bench.candidates import (
    LOADED,
    Candidate,
    Formats,
    estimate,
    model_billions,
    quick_grid,
    tune_grid,
)
from dart_llm.studies.bench.models import LoadedModel
from dart_llm.studies.bench.quality import (
    OWN_TEXT,
    Slice,
    all_slices,
    generate_text,
    score,
    user_slices,
)
from dart_llm.studies.bench.rows import Row, time_columns
from dart_llm.studies.bench.settings import TuneSettings, first_slices
from dart_llm.studies.bench.study import BenchStudy

TEXT, FURTHER = "self-generated text", "further self-generated text"
"""The units that generate text: for the slices of ``--quick``, and for the others."""

ENOUGH, FAR = 8, 2
"""After so many slices a candidate whose loss is clearly over so many times the budget is scored no
further."""

SETTING_FILE = "setting.yaml"


class TuneStudy(BenchStudy[TuneSettings]):
    """``loaded``: a model and its tokenizer; then its own weight format alone is tried.

    Raises ``ConfigError`` and ``UnknownName`` before a model is loaded where that is possible.
    """

    kind = "tune"
    document = "tune.json"
    shown = BenchStudy.shown | {"quick"}

    def __init__(
        self, settings: TuneSettings, ui: Ui, loaded: tuple[Any, Any] | None = None
    ) -> None:
        self.from_caller, only = loaded, (LOADED,)
        self.formats = Formats(only, only) if loaded else Formats.from_settings(settings)
        grid = tune_grid(settings, self.formats)
        super().__init__(settings, ui, grid, {settings.text: None})
        self.tried = quick_grid(grid, settings, self.formats) if settings.quick else grid
        self.configs: dict[str, PruneConfig] = {}
        self.generated: dict[int, list[int]] = {}
        """Ids of self-generated text by number of the slice."""
        self.slices: list[Slice] = []
        self._logits: tuple[str, Tensor] = ("", torch.empty(0))

    @property
    def partial(self) -> bool:
        return self.settings.quick

    @property
    def base(self) -> str:
        """Label of the dense model as it is loaded: what times are compared with."""
        return self.grid[0].label

    def inputs(self) -> Mapping[str, Any]:
        digests = self.digests(f"perplexity:{self.settings.text}", "dense")
        return {**digests, **identity(self.from_caller[0])} if self.from_caller else digests

    # models

    def load(self) -> None:
        """The formats and the reference; raises ``ConfigError`` for slices that are too long."""
        settings, began = self.settings, time.perf_counter()
        size = model_billions(settings)
        models = {}
        if self.from_caller is not None:
            size = sum(weight.numel() for weight in self.from_caller[0].parameters()) / 1e9
            models = {LOADED: LoadedModel(LOADED, None, *self.from_caller)}
        text = estimate(settings, self.tried, size)
        self.ui.say(f"{count(len(self.tried), 'candidate')}: {text}")
        tried = {self.formats.reference, *(one.weights for one in self.tried)}
        for name in dict.fromkeys((*self.formats.every, self.formats.reference)):
            if name in tried and name not in models:
                one = settings.model_copy(update={"weights": name})
                models[name] = LoadedModel(name, name, *load_model(one, self.ui, self.check)[:2])
        tokens = settings.prompt_tokens + max(settings.tokens, settings.timed_tokens + WARM)
        self.take_models(models, self.formats.every[0], tokens)
        if self.bench:
            self.find_files([])
        self.timing["load_s"] = time.perf_counter() - began

    def check(self, tokenizer: Any, config: Any) -> None:
        self._read_text(tokenizer)

    def _read_text(self, tokenizer: Any) -> list[Slice]:
        settings = self.settings
        sizes = settings.slices, settings.prompt_tokens, settings.tokens
        return user_slices(settings.text, tokenizer, *sizes)

    def maker(self, candidate: Candidate) -> Make:
        """As of its base; dense runs by whole native steps where it can."""
        assert candidate.config is not None
        config = candidate.config
        if candidate.dense:
            model = self.models[candidate.weights].model
            self.configs[candidate.label] = config = native_dense_config(model, config)
            return lambda: Run(model, config)
        make = super().maker(candidate)
        self.configs[candidate.label] = config
        return make

    # units

    def units(self) -> Iterator[Unit]:
        settings = self.settings
        first = first_slices(settings.slices)
        yield Unit(TEXT, data=first)
        if not settings.quick and len(first) < settings.slices:
            yield Unit(FURTHER, data=[n for n in range(settings.slices) if n not in first])
        user = self._read_text(self.tokenizer)
        if settings.quick:
            user = [user[number] for number in first_slices(len(user))]
        self.slices = all_slices(self.generated, user, settings.prompt_tokens)
        ready = [one for one in self.tried if self.make_ready(one)]
        for label, why in self.left_out.items():
            self.ui.say(f"{label} is left out: {why}")
        with self.ui.progress("slices", len(self.slices) * (1 + len(ready))) as self.advance:
            for one in self.slices:
                yield Unit(f"{one.id}/{quality.REFERENCE}", data=(one, None))
                self.advance(1)
                for candidate in ready:
                    if not self._is_hopeless(candidate.label):
                        yield Unit(f"{one.id}/{self._key(candidate)}", data=(one, candidate))
                    self.advance(1)
        timed = [one for one in ready if one.label == self.base or not self._is_over(one.label)]
        over = len(ready) - len(timed)
        self.ui.say(f"{len(timed)} candidates are timed, {over} lose clearly too much")
        timed += self.reference_candidates()
        yield from self.timed_units(timed, f"{'quick ' if settings.quick else ''}repetition")

    def _key(self, candidate: Candidate) -> str:
        """What learns from less text than in the whole study has a key of its own."""
        return candidate.label if candidate in self.grid else f"{candidate.label}, quick"

    def _is_over(self, label: str, times: float = 1) -> bool:
        """Whether a candidate clearly loses more than so many times the budget."""
        row = quality.quality_row(label, self.lines, self.settings.seed)
        return quality.clearly_over(row, times * self.settings.max_loss)

    def _is_hopeless(self, label: str) -> bool:
        """Whether a candidate need not be scored on further slices."""
        scored = [line for line in self.lines if line["candidate"] == label]
        return label != self.base and len(scored) >= ENOUGH and self._is_over(label, FAR)

    def compute(self, unit: Unit) -> Any:
        settings = self.settings
        if isinstance(unit.data, int):
            return self.repetition(unit.data, settings.repetition_tokens)
        if unit.key not in (TEXT, FURTHER):
            return self._score(*unit.data)
        length = settings.prompt_tokens + settings.tokens
        skip = 0 if unit.key == TEXT else len(first_slices(settings.slices))
        with self.ui.status("generating the text that candidates are scored on"):
            return generate_text(self.model, len(unit.data), length, settings.seed, skip)

    def _score(self, one: Slice, candidate: Candidate | None) -> dict[str, Any]:
        if self._logits[0] != one.id:  # of one slice at a time: they are large
            model = self.models[self.formats.reference].model
            self._logits = one.id, reference_logits(model, one.window)
        logits = self._logits[1]
        if candidate is None:
            scored = one.window.ids[one.window.first :]
            loss = cross_entropy(logits, scored.to(logits.device))
            return {"loss": float(loss), "kl": 0.0, "tokens": len(logits), "accounting": None}
        run = self.makers[candidate.label]()
        assert run is not None
        return score(self.models[candidate.weights].model, run, one, logits)

    def prompt(self, number: int) -> Tensor:
        """Of both texts by turns: the bytes that a screened head reads depend on the text."""
        window = self.slices[number % len(self.slices)].window
        return window.ids[None, : window.first].to(self.model.device)

    def take(self, unit: Unit, value: Any) -> None:
        if unit.key in (TEXT, FURTHER):
            self.generated |= dict(zip(unit.data, value, strict=True))
        elif isinstance(unit.data, int):
            self.repetitions.append(value)
        else:
            one, candidate = unit.data
            label = quality.REFERENCE if candidate is None else candidate.label
            self.lines.append({"candidate": label, "text": one.text, "slice": one.id, **value})

    # what is made of them

    def summarise(self) -> dict[str, Any]:
        settings = self.settings
        write_lines(self.path / "results.jsonl", self.lines)
        scores = {
            label: quality.quality_row(label, self.lines, settings.seed) for label in self.makers
        }
        rows = [self._row(one, scores) for one in self.tried if one.label in scores]
        budget = settings.max_loss, settings.noise
        best = quality.recommend(rows, self.base, *budget)
        undecided = quality.undecided(rows, self.base, best, *budget) if settings.quick else []
        best = self.base if undecided else best
        beaten_by_none = quality.pareto(rows)
        names = ("text", "max_loss", "noise", "quick")
        document = {
            **self.facts(),
            **{name: getattr(settings, name) for name in names},
            "timed_tokens": settings.repetition_tokens,
            "slices": sum(one.text == OWN_TEXT for one in self.slices),
            "further": len(self.grid) - len(self.tried),
            "base": self.base,
            "recommended": best,
            "undecided": undecided,
            "rows": rows,
            "reference_rows": [self._reference_row(one) for one in self.reference_candidates()],
        }
        for row in rows:
            row["recommended"] = row["row"] == best
            row["pareto"] = row["row"] in beaten_by_none
            row["verdict"] = report.verdict(document, row)
        self._save(document)
        return document

    def _row(self, one: Candidate, scores: Mapping[str, Row]) -> Row:
        assert one.config is not None
        scored = dict(scores[one.label])
        texts = scored.pop("texts")
        samples = self.samples(one.label) if one in self.timed else []
        times = time_columns(samples, self.samples(self.base), self._limit(one, scores))
        return {
            "row": one.label,
            "method": one.config.method,
            "requested": one.config.target,
            "executor": self.configs[one.label].executor,
            "weights": one.weights,
            "head": one.config.head.kind,
            "dense": one.dense,
            **scored,
            **times,
            "config": self.configs[one.label].to_dict(),
            "texts": texts,
        }

    def _limit(self, one: Candidate, scores: Mapping[str, Row]) -> float | None:
        """Bytes that a token of the base reads over those of ``one``."""
        shares = scores[self.base]["bytes_share"], scores[one.label]["bytes_share"]
        if None in shares:
            return None
        widths = [self.models[weights].width for weights in (self.grid[0].weights, one.weights)]
        return float(shares[0] * widths[0] / (shares[1] * widths[1]))

    def _reference_row(self, one: Candidate) -> Row:
        file = self.files[one.label]
        facts = {"row": one.label, "method": None, "executor": one.executor, "weights": one.weights}
        times = time_columns(self.samples(one.label), self.samples(self.base))
        return {**facts, "file": file.path.name, "bytes": file.bytes, **times}

    def kept(self, document: Mapping[str, Any]) -> KeptSetting:
        """The recommended setting, as its file states it."""
        row = next(one for one in document["rows"] if one["recommended"])
        loaded = self.models[row["weights"]]
        model = {
            **identity(loaded.model),
            "stored_as": stored_as(loaded.model),
            "dtype": loaded.dtype,
        }
        date = {"date": self.config["started"][:10], "by": f"dart-llm {version('dart-llm')}"}
        config = PruneConfig.from_mapping(row["config"])
        return KeptSetting(config, loaded.weights, model, report.measured(document, row), date)

    def _save(self, document: Mapping[str, Any]) -> None:
        kept = self.kept(document)
        self.setting_file = kept.save(self.path / SETTING_FILE)
        if self.settings.save:
            self.setting_file = kept.save(Path(self.settings.save).expanduser())

    def sentences(self) -> Sequence[str]:
        model, file = (shlex.quote(t) for t in (self.settings.model, f"file:{self.setting_file}"))
        return [
            *report.tune_sentences(self.summary),
            f"setting: {self.setting_file}",
            f"use it: dart-llm run --model {model} --method {file} --prompt "
            "'The sky is blue because'",
        ]

    def figures(self) -> Iterable[Plot]:
        return [report.tune_plot(self.summary)]

    def markdown(self) -> str:
        sentences = report.tune_sentences(self.summary)
        return report.markdown("Which setting for this model?", sentences, *self.tables())

    def write_page(self) -> Path:
        plots = [report.tune_plot(self.summary)]
        return report.write_page(self.path, self.config, self.summary, plots)

    def answer(self) -> dict[str, Any]:
        return {**super().answer(), "setting": str(self.setting_file)}


def native_dense_config(model: Any, config: PruneConfig) -> PruneConfig:
    """Dense (native): by whole native steps where they can run, else as transformers does."""
    try:
        steps = config.replace({"executor": "native"})
        Run(model, steps)
    except DartError:
        return config
    return steps


# From Python


@dataclass(frozen=True)
class TuneResult:
    """The result of ``tune``; ``str()`` gives it in words.

    ``rows``: one per candidate, as in tune.json: ``row`` (its name), ``loss`` with
    ``loss_interval``, ``kl`` (nats per token), ``ms`` per token (None: not timed), ``times_dense``,
    ``bytes_share``, ``achieved_sparsity``, ``dense_token_share``, ``remasks``.  ``recommended``:
    one of them.  ``setting``: what ``save`` writes; ``setting.config`` is for ``prune``.
    """

    rows: tuple[dict[str, Any], ...]
    recommended: dict[str, Any]
    setting: KeptSetting
    folder: Path
    text: str

    def save(self, path: str | Path) -> Path:
        """Write the setting for ``prune(model, "file:...")``; raises ``ConfigError``."""
        return self.setting.save(path)

    def __str__(self) -> str:
        return self.text


def tune(
    model: Any,
    tokenizer: Any = None,
    max_loss: float = 0.02,
    *,
    results_dir: str | Path = "results",
    fresh: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> TuneResult:
    """Find the setting for ``model``: the fastest that loses at most ``max_loss``.

    ``model``: loaded, with its ``tokenizer``, and measured in the weight format that it has; or a
    name, as ``load`` takes it, and measured in several.  ``max_loss``: perplexity over dense minus
    1.  ``settings``: those of ``dart-llm tune`` by their names: ``text``, ``methods``,
    ``sparsities``, ``heads``, ``slices``, ``repeats``, ...  Resumes in ``results_dir`` unless
    ``fresh``.  ``quiet``: nothing is shown.

    Raises ``ConfigError`` and ``UnknownName`` for settings that do not fit, ``AttachError`` for a
    model that is being pruned.

    >>> result = tune(model, tokenizer)                     # doctest: +SKIP
    >>> result.save("setting.yaml")                         # doctest: +SKIP
    >>> with prune(model, "file:setting.yaml") as run:      # doctest: +SKIP
    ...     model.generate(**inputs, max_new_tokens=200)
    """
    loaded = None if isinstance(model, str | Path) else (model, tokenizer)
    name = str(model) if loaded is None else str(checkpoint_facts(model)["name"])
    options = {"model": name, "max_loss": max_loss, "results_dir": str(results_dir)}
    study = TuneStudy(TuneSettings(**{**settings, **options}), Ui(quiet=quiet), loaded)
    document = run_study(study, fresh).summary
    rows = tuple(document["rows"])
    best = next(row for row in rows if row["recommended"])
    text = "\n".join(report.tune_sentences(document))
    return TuneResult(rows, best, study.kept(document), study.path, text)
