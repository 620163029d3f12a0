"""``tune``: find the fastest setting for a model within a loss budget.

A candidate is a weight format of the model together with a pruning configuration.  The study scores
the loss of every candidate on slices of two texts.  It then times the candidates that do not
clearly exceed the budget, and recommends one of them.  It runs in units, each of which can be
resumed: the first generate one of the texts, then each scores one slice with one candidate, and
each of the last measures the speed of all remaining candidates, in random order.  The function
``tune`` runs the study from Python.
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

from dart_llm.calibration.collect import opening_ids, sample_continuations, start_tokens
from dart_llm.data import documents
from dart_llm.errors import ConfigError
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.perplexity import compare_window, reference_logits
from dart_llm.evaluation.windows import Window, slice_windows
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.study import Unit, load_model, run_study
from dart_llm.experiments.timing import WARM
from dart_llm.files import write_lines
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.pruning.config import PruneConfig, SelfStatsConfig
from dart_llm.pruning.setting_file import KeptSetting
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.words import count
from dart_llm.session.run import Run, identity, stored_as
from dart_llm.studies.bench import report, rows
from dart_llm.studies.bench.rows import REFERENCE, Row, quality_row, time_columns
from dart_llm.studies.bench.settings import (
    LOADED,
    Candidate,
    Formats,
    TuneSettings,
    estimate,
    first_slices,
    model_billions,
    quick_grid,
    tune_grid,
)
from dart_llm.studies.bench.study import BenchStudy, LoadedModel

# The texts: self-generated, and the user's.

OWN_TEXT = "own"
"""The label of the self-generated text."""

SEED_OFFSET = 1_000_003
"""Added to the seed, so that scored texts differ from the texts used to learn statistics."""

REPORT_FIELDS = (
    *("decoded_tokens", "achieved_sparsity", "dense_token_share", "remasks"),
    *("token_bytes_share", "extra_memory_bytes"),
)
"""The fields of a run's report that are stored for a slice."""


@dataclass(frozen=True, eq=False)
class Slice:
    """A slice of a text.  ``text``: the text's label; ``window``: the slice's tokens."""

    text: str
    window: Window

    @property
    def id(self) -> str:
        """A name that is unique among the slices of a run."""
        return f"{self.text}/{self.window.number}"


def generate_text(model: Any, count: int, length: int, seed: int, skip: int = 0) -> list[list[int]]:
    """Sample ``count`` sequences of ``length`` tokens from ``model``, as self-calibration does.

    ``skip``: the number of sequences that earlier calls returned; this call returns others.  Raises
    ``ConfigError`` for a model without an output head.
    """
    sampling = SelfStatsConfig()
    generator = torch.Generator().manual_seed(seed + SEED_OFFSET + skip)
    begin = opening_ids(model, skip + count, min(sampling.opening, length - 1))
    if begin is not None:
        begin = begin[skip:]
    else:
        vocabulary = int(model.config.get_text_config().vocab_size)
        begin = torch.randint(vocabulary, (count, 1), generator=generator)
        if start := start_tokens(model):
            begin[:] = start[0]
    sequences: list[list[int]] = sample_continuations(
        model, begin, length, generator, lambda text: None, sampling.temperature, sampling.top_p
    ).tolist()
    return sequences


def all_slices(
    generated: Mapping[int, Sequence[int]], user: Sequence[Slice], prompt: int
) -> list[Slice]:
    """Slices of ``generated`` (ids by slice number) and of the user's text, sorted by number."""
    self_generated = [
        Slice(OWN_TEXT, Window(torch.tensor(ids), prompt, n)) for n, ids in generated.items()
    ]
    return sorted([*self_generated, *user], key=lambda piece: piece.window.number)


def user_slices(text: str, tokenizer: Any, count: int, prompt: int, scored: int) -> list[Slice]:
    """At most ``count`` slices of the text; raises ``ConfigError`` if it is too short for two."""
    ids: Tensor = tokenizer(documents.read(text), return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < 2 * (prompt + scored):
        raise ConfigError(
            f'the text "{text}" has {len(ids)} tokens, but two slices need '
            f"{2 * (prompt + scored)}: give a longer text, or a smaller --prompt-tokens or --tokens"
        )
    label = documents.resolve(text).label
    label = f"{label}, yours" if label == OWN_TEXT else label
    return [Slice(label, window) for window in slice_windows(ids, count, prompt, scored)]


def score(model: Any, run: Run, piece: Slice, reference: Tensor) -> dict[str, Any]:
    """Score a slice with ``run``, which must not be attached to the model yet.

    ``reference``: the dense model's logits for the C scored tokens, [C, V].  Returns ``loss`` and
    ``kl`` (means over the scored tokens, in nats), ``tokens`` (the number of scored tokens) and
    ``accounting`` (the report's ``REPORT_FIELDS``).  Raises ``ConfigError`` if all tokens ran dense
    although a sparsity was requested.
    """
    run.reset()
    with run:
        compared = compare_window(model, run, piece.window, reference)
    report = run.report().to_dict()
    if report["dense_token_share"] == 1 and run.asks_for_pruning:
        raise ConfigError(
            f"all {report['decoded_tokens']} decoded tokens of slice {piece.id} ran dense, so this "
            "would measure the untouched model; give more --prompt-tokens or --tokens"
        )
    return {**compared._asdict(), "accounting": {name: report[name] for name in REPORT_FIELDS}}


# The study.

TEXT, FURTHER = "self-generated text", "further self-generated text"
"""Keys of the units that generate text: for the slices of ``--quick``, and for the other slices."""

ENOUGH, FAR = 8, 2
"""After ``ENOUGH`` slices, a candidate whose loss is clearly over ``FAR`` times the budget is not
scored on further slices."""


class TuneStudy(BenchStudy[TuneSettings]):
    """The study ``tune``.

    ``loaded``: the caller's model and tokenizer, or None.  Of a caller's model, only the weight
    format in which it was loaded is tried.

    Raises ``ConfigError`` and ``UnknownName`` before a model is loaded, if possible.
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
        self.generated: dict[int, list[int]] = {}
        """Ids of self-generated text, by slice number."""
        self.slices: list[Slice] = []
        self._logits: tuple[str, Tensor] = ("", torch.empty(0))

    @property
    def partial(self) -> bool:
        return self.settings.quick

    @property
    def base(self) -> str:
        """The label of the dense model in the first format, with which times are compared."""
        return self.grid[0].label

    def inputs(self) -> Mapping[str, Any]:
        text = Digests().of_task(f"perplexity:{self.settings.text}", MeasureOptions())
        caller = identity(self.from_caller[0]) if self.from_caller else {}
        return {**super().inputs(), **text, **caller}

    def load(self) -> None:
        """Load all formats and the reference.  Raises ``ConfigError`` if a slice is too long."""
        settings, began = self.settings, time.perf_counter()
        size = model_billions(settings)
        models = {}
        if self.from_caller is not None:
            size = sum(weight.numel() for weight in self.from_caller[0].parameters()) / 1e9
            models = {LOADED: LoadedModel(None, *self.from_caller)}
        text = estimate(settings, self.tried, size)
        self.ui.say(f"{count(len(self.tried), 'candidate')}: {text}")
        tried = {self.formats.reference, *(row.weights for row in self.tried)}
        for name in dict.fromkeys((*self.formats.every, self.formats.reference)):
            if name in tried and name not in models:
                options = settings.model_copy(update={"weights": name})
                models[name] = LoadedModel(name, *load_model(options, self.ui, self.check)[:2])
        tokens = settings.prompt_tokens + max(settings.tokens, settings.timed_tokens + WARM)
        self.set_models(models, self.formats.every[0], tokens)
        self.timing["load_s"] = time.perf_counter() - began

    def check(self, tokenizer: Any, config: Any) -> None:
        self._read_text(tokenizer)

    def _read_text(self, tokenizer: Any) -> list[Slice]:
        settings = self.settings
        sizes = settings.slices, settings.prompt_tokens, settings.tokens
        return user_slices(settings.text, tokenizer, *sizes)

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
        ready = [row for row in self.tried if self.make_ready(row)]
        for label, why in self.left_out.items():
            self.ui.say(f"{label} is skipped: {why}")
        with self.ui.progress("slices", len(self.slices) * (1 + len(ready))) as self.advance:
            for piece in self.slices:
                yield Unit(f"{piece.id}/{REFERENCE}", data=(piece, None))
                self.advance(1)
                for candidate in ready:
                    if not self._is_hopeless(candidate.label):
                        yield Unit(f"{piece.id}/{self._key(candidate)}", data=(piece, candidate))
                    self.advance(1)
        timed = [row for row in ready if row.label == self.base or not self._is_over(row.label)]
        over = len(ready) - len(timed)
        self.ui.say(f"{len(timed)} candidates are timed, {over} clearly lose too much")
        yield from self.timed_units(timed, f"{'quick ' if settings.quick else ''}repetition")

    def _key(self, candidate: Candidate) -> str:
        """The candidate's label, as a part of a unit's key; marked if it learns from less text."""
        return candidate.label if candidate in self.grid else f"{candidate.label}, quick"

    def _is_over(self, label: str, times: float = 1) -> bool:
        """Whether a candidate clearly loses more than ``times`` the budget."""
        row = quality_row(label, self.lines, self.settings.seed)
        return rows.clearly_over(row, times * self.settings.max_loss)

    def _is_hopeless(self, label: str) -> bool:
        """Whether a candidate loses so much that no further slices are scored with it."""
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
        with self.ui.status("generating the text for scoring"):
            return generate_text(self.model, len(unit.data), length, settings.seed, skip)

    def _score(self, piece: Slice, candidate: Candidate | None) -> dict[str, Any]:
        if self._logits[0] != piece.id:  # logits are large, so keep those of one slice only
            model = self.models[self.formats.reference].model
            self._logits = piece.id, reference_logits(model, piece.window)
        logits = self._logits[1]
        if candidate is None:
            scored = piece.window.ids[piece.window.first :]
            loss = cross_entropy(logits, scored.to(logits.device))
            return {"loss": float(loss), "kl": 0.0, "tokens": len(logits), "accounting": None}
        run = self.makers[candidate.label]()
        assert run is not None
        return score(self.models[candidate.weights].model, run, piece, logits)

    def prompt(self, number: int) -> Tensor:
        """A prompt from alternating texts, because a screened head's bytes depend on the text."""
        window = self.slices[number % len(self.slices)].window
        return window.ids[None, : window.first].to(self.model.device)

    def take(self, unit: Unit, value: Any) -> None:
        if unit.key in (TEXT, FURTHER):
            self.generated |= dict(zip(unit.data, value, strict=True))
        elif isinstance(unit.data, int):
            self.repetitions.append(value)
        else:
            piece, candidate = unit.data
            label = REFERENCE if candidate is None else candidate.label
            self.lines.append({"candidate": label, "text": piece.text, "slice": piece.id, **value})

    # results

    def summarise(self) -> dict[str, Any]:
        settings = self.settings
        write_lines(self.path / "results.jsonl", self.lines)
        scores = {label: quality_row(label, self.lines, settings.seed) for label in self.makers}
        measured = [self._row(row, scores) for row in self.tried if row.label in scores]
        budget = settings.max_loss, settings.noise
        best = rows.recommend(measured, self.base, *budget)
        open_rows = rows.undecided(measured, self.base, best, *budget) if settings.quick else []
        best = self.base if open_rows else best
        names = ("text", "max_loss", "noise", "quick")
        document = {
            **self.facts(),
            **{name: getattr(settings, name) for name in names},
            "timed_tokens": settings.repetition_tokens,
            "slices": sum(piece.text == OWN_TEXT for piece in self.slices),
            "further": len(self.grid) - len(self.tried),
            "base": self.base,
            "recommended": best,
            "undecided": open_rows,
            "rows": measured,
        }
        for row in measured:
            row["recommended"] = row["row"] == best
            row["verdict"] = report.verdict(document, row)
        self._save(document)
        return document

    def _row(self, row: Candidate, scores: Mapping[str, Row]) -> Row:
        assert row.config is not None
        scored = dict(scores[row.label])
        texts = scored.pop("texts")
        samples = self.samples(row.label) if row in self.timed else []
        times = time_columns(samples, self.samples(self.base), self._limit(row, scores))
        return {
            "row": row.label,
            "method": row.config.method,
            "requested": row.config.target,
            "executor": self.configs[row.label].executor,
            "weights": row.weights,
            "head": row.config.head.kind,
            "dense": row.dense,
            **scored,
            **times,
            "config": self.configs[row.label].to_dict(),
            "texts": texts,
        }

    def _limit(self, row: Candidate, scores: Mapping[str, Row]) -> float | None:
        """Bytes per token of the base, divided by bytes per token of ``row``; None if unknown."""
        shares = scores[self.base]["bytes_share"], scores[row.label]["bytes_share"]
        if None in shares:
            return None
        formats = self.grid[0].weights, row.weights
        ratios = [self.models[name].byte_ratio for name in formats]
        return float(shares[0] * ratios[0] / (shares[1] * ratios[1]))

    def recommended_setting(self, document: Mapping[str, Any]) -> KeptSetting:
        """The recommended setting, in the form in which it is written to a file."""
        row = next(row for row in document["rows"] if row["recommended"])
        loaded = self.models[row["weights"]]
        stored = {"stored_as": stored_as(loaded.model), "dtype": loaded.dtype}
        model = {**identity(loaded.model), **stored}
        date = {"date": self.config["started"][:10], "by": f"dart-llm {version('dart-llm')}"}
        config = PruneConfig.from_mapping(row["config"])
        return KeptSetting(config, loaded.weights, model, report.measured(document, row), date)

    def _save(self, document: Mapping[str, Any]) -> None:
        setting = self.recommended_setting(document)
        self.setting_file = setting.save(self.path / "setting.yaml")
        if self.settings.save:
            self.setting_file = setting.save(Path(self.settings.save).expanduser())

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

    def answer(self) -> dict[str, Any]:
        return {**super().answer(), "setting": str(self.setting_file)}


# From Python


@dataclass(frozen=True)
class TuneResult:
    """The result of ``tune``; ``str(result)`` is a summary in sentences.

    ``rows``: a row per candidate, as in tune.json: ``row`` (the label), ``loss`` with
    ``loss_interval``, ``kl`` (nats per token), ``ms`` per token (None if not timed),
    ``times_dense``, ``bytes_share``, ``achieved_sparsity``, ``dense_token_share``, ``remasks``.
    ``recommended``: the recommended row.  ``setting``: the recommended setting, which ``save``
    writes to a file; ``prune`` accepts ``setting.config``.  ``folder``: the results folder.
    ``text``: the summary.
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
    """Find the fastest setting for ``model`` that loses at most ``max_loss``.

    ``model``: a loaded model or a name for ``load``.  A loaded model needs its ``tokenizer`` and is
    measured only in its own weight format; a named model is measured in several formats.
    ``max_loss``: the largest allowed loss; a loss is perplexity divided by dense perplexity, minus
    1.  ``settings``: any settings of ``dart-llm tune``, by name: ``text``, ``methods``,
    ``sparsities``, ``heads``, ``slices``, ``repeats``, ...  An interrupted study in ``results_dir``
    is resumed, unless ``fresh`` is True.  ``quiet``: if True, print nothing.

    Raises ``ConfigError`` and ``UnknownName`` for invalid settings, ``AttachError`` for a model
    that is being pruned.

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
    return TuneResult(rows, best, study.recommended_setting(document), study.path, text)
