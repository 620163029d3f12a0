"""`tune`: the loss of every candidate, the time of those that are left, one recommended setting.

A unit is a slice by a candidate, then a repetition of all that is timed, in an order of its own.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dart_llm import __version__
from dart_llm.data.documents import check_disjoint
from dart_llm.errors import ConfigError, DartError
from dart_llm.evaluation.divergence import read_prompt, reference_logits
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.held import Held, own_file
from dart_llm.experiments.llama_bench import LLAMA_CPP, PROGRAM, VARIABLE, ReferenceFile, find_bench
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.study import Study, Unit, load_model
from dart_llm.experiments.timed_cases import Format
from dart_llm.experiments.timing import (
    WARM,
    Make,
    Sample,
    reference_turn,
    repetition,
    shuffled,
)
from dart_llm.files import write_lines
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length
from dart_llm.native import build
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.setting_file import KeptSetting
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.reporting.words import count
from dart_llm.session.kept import held_words, identity
from dart_llm.session.prepare import prepare
from dart_llm.session.run import Run
from dart_llm.studies.tune import choice, report
from dart_llm.studies.tune.candidates import Candidate, Formats, candidates, quick_candidates
from dart_llm.studies.tune.dry_run import estimate, parameters
from dart_llm.studies.tune.quality import (
    OWN_TEXT,
    Part,
    Slice,
    first_of,
    needs_prompt,
    score,
    slices_of,
    users,
    write_text,
)
from dart_llm.studies.tune.settings import OWN, TuneSettings

WRITING, FURTHER = "own text", "further own text"
"""The units of the text that the model writes: of the slices of ``--quick``, and of the others."""

WARMUP_TOKENS = 4

ENOUGH, FAR = 8, 2
"""After so many slices a candidate whose loss is clearly over so many times what may be lost is
scored no further."""

SETTING_FILE = "setting.yaml"


class TuneStudy(Study[TuneSettings]):
    """``given``: a model and its tokenizer that are loaded already: its own format alone is tried.

    Raises ``ConfigError`` and ``UnknownName`` before a model is loaded where that is possible.
    """

    kind = "tune"
    document = "tune.json"
    shown = Study.shown | {"quick"}

    def __init__(
        self, settings: TuneSettings, ui: Ui, given: tuple[Any, Any] | None = None
    ) -> None:
        super().__init__(settings, ui)
        self.given = given
        own = (Format(OWN),)
        self.formats = Formats.of(settings) if given is None else Formats(own, own)
        self.candidates = candidates(settings, self.formats)
        """All that the whole study measures: what makes two runs the same."""
        self.tried = self.candidates
        if settings.quick:
            self.tried = quick_candidates(self.candidates, settings, self.formats)
        if any(one.config.calibration is not None for one in self.candidates):
            check_disjoint(settings.calibration, {settings.text: None})
        self.held: dict[str, Held] = {}
        """The models, by the name of their format."""
        self.makers: dict[str, Make] = {}
        """What makes a candidate's run, by label; what cannot run has none."""
        self.configs: dict[str, PruneConfig] = {}
        self.left_out: dict[str, str] = {}
        """Why candidates cannot run, by label."""
        self.notes: list[str] = []
        self.own: dict[int, list[int]] = {}
        """What the model wrote, ids by number of the slice."""
        self.slices: list[Slice] = []
        self.users: list[Slice] = []
        self.timed: list[str] = []
        self.repetitions: list[dict[str, Any]] = []
        self.files: dict[str, ReferenceFile] = {}
        """What llama.cpp reads, by label."""
        self.bench = find_bench() if settings.reference else None
        if settings.reference and self.bench is None:
            self.notes.append(
                f"no row of {LLAMA_CPP}: its {PROGRAM} is not at hand (name it in {VARIABLE})"
            )
        self._prompts: dict[str, tuple[str, Any]] = {}
        """Caches of the newest slice's prompt, by format."""
        self._logits: tuple[str, Tensor] = ("", torch.empty(0))
        self.advance: Callable[[int], Any]

    @property
    def model_name(self) -> str:
        return self.settings.name

    @property
    def partial(self) -> bool:
        return self.settings.quick

    @property
    def base(self) -> str:
        """Label of the dense model as it is loaded: what times are compared with."""
        return self.candidates[0].label

    @property
    def reference(self) -> Held:
        """The dense model in its own dtype, from which losses are counted."""
        return self.held[self.formats.reference.name]

    def inputs(self) -> Mapping[str, Any]:
        settings = self.settings
        cell = Cell("", "dense", f"perplexity:{settings.text}", calibration=settings.calibration)
        digests = Digests()
        found = {name: digest for name, digest in digests.of(cell).items() if name != "weights"}
        if self.given is not None:
            return {**found, **identity(self.given[0])}
        return {**found, **digests.of_model(settings.model_copy(update={"weights": "dense"}))}

    def asked(self) -> dict[str, Any]:
        left_out = {*self.shown, *self.settings.UNUSED, "save"}
        return self.settings.model_dump(mode="json", exclude=left_out)

    def identify(self) -> dict[str, Any]:
        tried = {one.label: one.config.to_dict() for one in self.candidates}
        return {**super().identify(), "candidates": tried}

    def config_extra(self) -> dict[str, Any]:
        cells = [
            {"model": self.settings.name, "method": one.label, "task": "tune"}
            for one in self.candidates
        ]
        return {"cells": cells}

    # models

    def load(self) -> None:
        """The formats and the reference; raises ``ConfigError`` for slices that are too long."""
        settings, began = self.settings, time.perf_counter()
        self._announce()
        if self.given is not None:
            self.held = {OWN: Held(Format(OWN), *self.given)}
        else:
            every = dict.fromkeys((*self.formats.every, self.formats.reference))
            tried = {self.formats.reference.name, *(one.form for one in self.tried)}
            for name, form in ((one.name, one) for one in every if one.name in tried):
                one = settings.model_copy(update={"weights": form.weights})
                self.held[name] = Held(form, *load_model(one, self.ui)[:2])
                self._read_text()  # refused, if it is, before the others are loaded
        self._read_text()
        own = self.held[self.formats.every[0].name]
        self.model, self.tokenizer = own.model, own.tokenizer
        self.timing["load_s"] = time.perf_counter() - began
        longest = context_length(self.model)
        wanted_tokens = settings.prompt_tokens + max(settings.tokens, settings.timed_tokens + WARM)
        if longest is not None and wanted_tokens > longest:
            raise ConfigError(
                f"{wanted_tokens} tokens are longer than the context of {settings.name}, "
                f"{longest}: give fewer --prompt-tokens, --tokens or --timed-tokens"
            )
        if self.bench:
            self._find_reference()

    def _announce(self) -> None:
        """How long it takes and how much memory, before it starts."""
        if self.given is None:
            size = parameters(self.settings)
        else:
            size = sum(one.numel() for one in self.given[0].parameters()) / 1e9
        told = estimate(self.settings, self.tried, size)
        self.ui.say(f"{count(len(self.tried), 'candidate')}: {told}")

    def _read_text(self) -> None:
        """The slices of the user's text, once a tokenizer is there."""
        if not self.users:
            settings, tokenizer = self.settings, next(iter(self.held.values())).tokenizer
            sizes = settings.slices, settings.prompt_tokens, settings.tokens
            self.users = users(settings.text, tokenizer, *sizes)

    def _find_reference(self) -> None:
        settings = self.settings
        path = None if self.given else own_file(settings.model, settings.cache_dir, self.ui.say)
        if path is None:
            self.notes.append(f"no row of {LLAMA_CPP}: {settings.name} is no GGUF file")
            return
        file = ReferenceFile.of(path)
        self.files = {f"{LLAMA_CPP} {file.kind}": file}

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.settings.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            write_lines(self.path / "results.jsonl", self.lines)

    def _make_ready(self) -> None:
        """What makes each candidate's run; what cannot run is left out, and why is kept."""
        for one in self.tried:
            try:
                self.makers[one.label] = self._maker(one)
            except DartError as error:
                self.left_out[one.label] = str(error)
                self.ui.say(f"{one.label} is left out: {error}")

    def _maker(self, one: Candidate) -> Make:
        """Raises ``DartError`` where there can be no run."""
        held = self.held[one.form]
        if one.dense:
            self.configs[one.label] = config = own_dense(held.model, one.config)
            return lambda: Run(held.model, config)
        Run(held.model, one.config)  # before anything is learnt for it
        where = (self.settings.calibration, self.settings.cache_dir, self.ui.say)
        prepared = prepare(held.model, held.tokenizer, one.config, *where)
        self.configs[one.label] = one.config
        return prepared.run

    # units

    def units(self) -> Iterator[Unit]:
        settings = self.settings
        first = first_of(settings.slices)
        yield Unit(WRITING, data=first)
        if not settings.quick and len(first) < settings.slices:
            yield Unit(FURTHER, data=[n for n in range(settings.slices) if n not in first])
        users = self.users
        if settings.quick:
            users = [users[place] for place in first_of(len(users))]
        self.slices = slices_of(self.own, users, settings.prompt_tokens)
        self._make_ready()
        ready = [one for one in self.tried if one.label in self.makers]
        total = len(self.slices) * (1 + len(ready))
        with self.ui.progress("slices by candidates", total) as self.advance:
            for one in self.slices:
                for candidate in (None, *ready):
                    label = choice.REFERENCE if candidate is None else candidate.label
                    if not self._hopeless(label):
                        yield Unit(f"{one.id}/{self._key(label, candidate)}", data=(one, candidate))
                    self.advance(1)
        self._choose_timed(ready)
        kind = "quick repetition" if settings.quick else "repetition"
        units = [Unit(f"{kind} {n}", data=n) for n in range(settings.repeats)]
        turns = [*self.timed, *self.files]
        fresh = any(self.finished(unit) is None for unit in units)
        with self.ui.progress("decoding", len(turns) * settings.repeats) as self.advance:
            for label in self.timed if fresh else ():
                self._turn(label, WARMUP_TOKENS, 0)
            yield from units

    def _key(self, label: str, candidate: Candidate | None) -> str:
        """Of what learned less than the whole study lets it, a key of its own."""
        return label if candidate is None or candidate in self.candidates else f"{label}, quick"

    def _hopeless(self, label: str) -> bool:
        """Whether the slices so far show that a candidate loses far too much."""
        own = [line for line in self.lines if line["candidate"] == label]
        if label in (choice.REFERENCE, self.base) or len(own) < ENOUGH:
            return False
        row = choice.quality_row(label, self.lines, self.settings.seed)
        return choice.clearly_over(row, FAR * self.settings.max_loss)

    def _choose_timed(self, ready: Sequence[Candidate]) -> None:
        """What is not clearly over the loss; the model as it is loaded always."""
        settings = self.settings
        for one in ready:
            row = choice.quality_row(one.label, self.lines, settings.seed)
            if one.label == self.base or not choice.clearly_over(row, settings.max_loss):
                self.timed.append(one.label)
        over = len(ready) - len(self.timed)
        self.ui.say(f"{len(self.timed)} candidates are timed, {over} lose clearly too much")

    def compute(self, unit: Unit) -> Any:
        settings = self.settings
        if unit.key in (WRITING, FURTHER):
            length = settings.prompt_tokens + settings.tokens
            skip = 0 if unit.key == WRITING else len(first_of(settings.slices))
            with self.ui.status("the model writes a text to be judged by"):
                return write_text(self.model, len(unit.data), length, settings.seed, skip)
        if not isinstance(unit.data, int):
            return self._score(*unit.data)
        samples = {}
        order = shuffled([*self.timed, *self.files], settings.seed, unit.data)
        for label in order:
            samples[label] = self._turn(label, settings.turn_tokens, unit.data)
            self.advance(1)
        return {"order": order, "samples": samples, "process": os.getpid()}

    def _score(self, one: Slice, candidate: Candidate | None) -> Part:
        logits = self._reference_logits(one)
        if candidate is None:
            loss = torch.nn.functional.cross_entropy(logits, one.scored.to(logits.device))
            return {"loss": float(loss), "kl": 0.0, "tokens": len(logits), "accounting": None}
        run = self.makers[candidate.label]()
        assert run is not None
        model = self.held[candidate.form].model
        shared = None if needs_prompt(candidate.config) else self._prompt(candidate.form, one)
        return score(model, run, one, logits, shared)

    def _prompt(self, form: str, one: Slice) -> Any:
        """A copy of the cache of a slice's prompt, read once per format."""
        if self._prompts.get(form, ("", None))[0] != one.id:
            self._prompts[form] = one.id, read_prompt(self.held[form].model, one.window)
        return copy.deepcopy(self._prompts[form][1])

    def _reference_logits(self, one: Slice) -> Tensor:
        """Of one slice at a time: they are large."""
        if self._logits[0] != one.id:
            form = self.reference.form.name
            prompt = self._prompt(form, one)
            self._logits = one.id, reference_logits(self.held[form].model, one.window, prompt)
        return self._logits[1]

    def _turn(self, label: str, tokens: int, number: int) -> Sample:
        """After the prompts of both texts in turn: what a screened head reads hangs on the text."""
        settings = self.settings
        if label in self.files:
            assert self.bench is not None
            path, threads = self.files[label].path, torch.get_num_threads()
            return reference_turn(self.bench, path, threads, settings.prompt_tokens, tokens)
        candidate = next(one for one in self.candidates if one.label == label)
        held = self.held[candidate.form]
        window = self.slices[number % len(self.slices)].window
        ids = window.ids[None, : window.first].to(held.model.device)
        return repetition(held.model, ids, tokens, self.makers[label])

    def take(self, unit: Unit, value: Any) -> None:
        if unit.key in (WRITING, FURTHER):
            self.own |= dict(zip(unit.data, value, strict=True))
        elif isinstance(unit.data, int):
            self.repetitions.append(value)
        else:
            one, candidate = unit.data
            label = choice.REFERENCE if candidate is None else candidate.label
            self.lines.append({"candidate": label, "text": one.text, "slice": one.id, **value})

    @property
    def has_results(self) -> bool:
        return bool(self.own)

    # what is made of them

    def summarise(self) -> dict[str, Any]:
        settings = self.settings
        quality = {
            one.label: choice.quality_row(one.label, self.lines, settings.seed)
            for one in self.tried
            if one.label in self.makers
        }
        rows = [self._row(one, quality) for one in self.tried if one.label in quality]
        allowed = settings.max_loss, settings.noise
        best = choice.recommend(rows, self.base, *allowed)
        left = choice.undecided(rows, self.base, best, *allowed) if settings.quick else []
        best = self.base if left else best
        beaten = choice.pareto(rows)
        for row in rows:
            row["recommended"], row["pareto"] = row["row"] == best, row["row"] in beaten
        about = {
            "model": settings.name,
            "checkpoint": {k: v for k, v in checkpoint_facts(self.model).items() if k != "path"},
            "formats": {name: one.words for name, one in self.held.items()},
            "kernels": None if build.why_not() else build.kernels_in_use(),
            "machine": self.config["machine"],
            "versions": self.config["versions"],
            **{name: getattr(settings, name) for name in report.ASKED},
            "timed_tokens": settings.turn_tokens,
            "slices": sum(one.text == OWN_TEXT for one in self.slices),
            "quick": settings.quick,
            "further": len(self.candidates) - len(self.tried),
            "base": self.base,
            "recommended": best,
            "undecided": left,
            "rows": rows,
            "reference_rows": [self._reference_row(label) for label in self.files],
            "left_out": self.left_out,
            "notes": self.notes,
            "definitions": report.DEFINITIONS,
        }
        self._save(about)
        return about

    def _samples(self, label: str) -> list[Sample]:
        return [one["samples"][label] for one in self.repetitions]

    def _row(self, one: Candidate, quality: Mapping[str, choice.Row]) -> choice.Row:
        row = quality[one.label]
        timed = one.label in self.timed
        base = self._samples(self.base)
        times: choice.Row = dict.fromkeys(choice.TIMES)
        if timed:
            times = choice.time_row(self._samples(one.label), base, self._limit(one, quality))
        return {
            "row": one.label,
            "method": one.config.method,
            "asked": one.config.target,
            "weights": one.form,
            "head": one.config.head.kind,
            "dense": one.dense,
            **{name: row[name] for name in row if name != "texts"},
            **times,
            "config": self.configs[one.label].to_dict(),
            "texts": row["texts"],
        }

    def _limit(self, one: Candidate, quality: Mapping[str, choice.Row]) -> float | None:
        """Bytes that a token of the base reads over those of ``one``."""
        shares = quality[self.base]["bytes_share"], quality[one.label]["bytes_share"]
        if None in shares:
            return None
        forms = self.held[self.candidates[0].form], self.held[one.form]
        return float(shares[0] * forms[0].width / (shares[1] * forms[1].width))

    def _reference_row(self, label: str) -> choice.Row:
        file = self.files[label]
        times = choice.time_row(self._samples(label), self._samples(self.base))
        return {"row": label, "file": file.path.name, "bytes": file.bytes, **times}

    def kept(self, about: Mapping[str, Any]) -> KeptSetting:
        """The recommended setting, as its file says it."""
        row = next(one for one in about["rows"] if one["row"] == about["recommended"])
        held = self.held[row["weights"]]
        model = {**identity(held.model), "held": held_words(held.model), "dtype": held.dtype}
        return KeptSetting(
            PruneConfig.from_mapping(row["config"]),
            held.form.weights,
            model,
            report.measured(about, row),
            {
                "date": self.config["started"][:10],
                "by": f"dart-llm {__version__}",
            },
        )

    def _save(self, about: Mapping[str, Any]) -> None:
        kept = self.kept(about)
        kept.save(self.path / SETTING_FILE)
        self.setting_file = self.path / SETTING_FILE
        if self.settings.save:
            self.setting_file = kept.save(Path(self.settings.save).expanduser())

    def tables(self) -> Sequence[Table]:
        return [report.table(self.summary)]

    def sentences(self) -> Sequence[str]:
        notes = [f"note: {note}" for note in self.notes]
        return [
            *notes,
            *report.sentences(self.summary),
            f"setting: {self.setting_file}",
            f"use it: dart-llm run --model {shlex.quote(self.settings.model)} --method "
            f"{shlex.quote(f'file:{self.setting_file}')} --prompt 'The sky is blue because'",
        ]

    def markdown(self) -> str:
        return report.markdown(self.summary)

    def figures(self) -> Iterable[Plot]:
        return report.make(self.summary)

    def write_page(self) -> Path:
        return report.write(self.path, self.summary)

    def answer(self) -> dict[str, Any]:
        return {**super().answer(), "setting": str(self.setting_file)}


def own_dense(model: Any, config: PruneConfig) -> PruneConfig:
    """Our own dense path: by whole native steps where they can run, else as transformers does."""
    try:
        steps = config.replace({"executor": "slim"})
        Run(model, steps)
    except DartError:
        return config
    return steps
