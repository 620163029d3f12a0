"""Every command: its settings and what runs it; ``help.yaml`` has its help and its examples."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from typer.core import TyperCommand

from dart_llm.cli import info
from dart_llm.cli.chat_settings import ChatSettings
from dart_llm.cli.export import ExportSettings, export
from dart_llm.cli.options import Config, Fresh, Json, Plugin, with_settings
from dart_llm.errors import CellsFailed, ConfigError
from dart_llm.files import finite, write_text
from dart_llm.pruning import plugins
from dart_llm.pruning.config import DEFAULT_METHOD
from dart_llm.server.settings import ServeSettings
from dart_llm.settings import Settings, merge
from dart_llm.studies.bench.settings import SpeedSettings, TuneSettings
from dart_llm.studies.drift.settings import DetectSettings, DriftSettings
from dart_llm.studies.generate.settings import RunSettings, check_elsewhere
from dart_llm.studies.inspection.settings import TEXTS, InspectSettings
from dart_llm.studies.quality.settings import QualitySettings
from dart_llm.studies.sweep.settings import (
    CompareSettings,
    EvalSettings,
    PerplexitySettings,
    SummarizeSettings,
    SweepSettings,
)

if TYPE_CHECKING:
    from dart_llm.reporting.console import Ui

HELP: dict[str, Any] = yaml.safe_load(
    (files("dart_llm.cli") / "help.yaml").read_text(encoding="utf-8")
)
"""Help and examples of every command."""


@dataclass(frozen=True)
class Command:
    """One command, ``bench quality`` being one of a group.

    ``function``: what runs it.  A name stands for a ``Study``, "module:class" below
    ``dart_llm.studies``, which answers ``--json`` itself.  ``kind``: what parses its arguments.
    """

    name: str
    function: Callable[..., None] | str
    settings: type[Settings] | None = None
    kind: type[TyperCommand] = TyperCommand

    @property
    def examples(self) -> tuple[str, ...]:
        return tuple(HELP[self.name]["examples"])

    @property
    def text(self) -> str:
        """Help and examples."""
        one = len(self.examples) == 1
        told = [f"Example: {self.examples[0]}"] if one else ["Examples:", *self.examples]
        return "\n\n".join((HELP[self.name]["help"], *told))

    def callback(self) -> Callable[..., None]:
        """The function with its options in its signature."""
        function = self._run_study if isinstance(self.function, str) else self.function
        return function if self.settings is None else with_settings(function, self.settings)

    def _run_study(
        self,
        flags: dict[str, Any],
        config: Config = None,
        fresh: Fresh = False,
        as_json: Json = False,
    ) -> None:
        assert self.settings is not None
        settings, name = merge(self.settings, flags, config), str(self.function)
        _tell(lambda ui: _finished(name, fresh, settings, ui).answer(), as_json)


def _finished(name: str, fresh: bool, *arguments: Any) -> Any:
    """The study ``name``, as of ``Command.function``, after its work."""
    from dart_llm.experiments.study import run_study

    module, _, kind = name.partition(":")
    study = getattr(import_module(f"dart_llm.studies.{module}"), kind)
    return run_study(study(*arguments), fresh)


def _tell(compute: Callable[[Ui], Any], as_json: bool) -> None:
    """Print the study's JSON; where cells failed print the partial result, then raise.

    ``compute`` imports what it needs: the terminal is there first.
    """
    from dart_llm.reporting.console import Ui

    try:
        with Ui.started(as_json) as ui:
            document = compute(ui)
    except CellsFailed as failed:
        if as_json:
            _print_json(failed.document)
        raise
    if as_json:
        _print_json(document)


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(finite(document)))


# run and demo


class RunCommand(TyperCommand):
    """Names the command to use for a flag that ``run`` does not have and another command has."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for argument in args:
            if argument.startswith("--"):
                check_elsewhere(argument.partition("=")[0])
        return super().parse_args(ctx, args)


def run(
    flags: dict[str, Any],
    config: Config = None,
    save_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the merged settings to a YAML file.")
    ] = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """``dart-llm run``: a prompt may also come through a pipe."""
    settings = merge(RunSettings, flags, config)
    piped = sys.stdin is not None and not sys.stdin.isatty()
    if piped and not settings.tokens and settings.generation is None:
        settings = merge(RunSettings, {**flags, "prompt_file": "-"}, config)
    if save_config is not None:
        written = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
        write_text(save_config, written)
    if not settings.tokens:
        raise ConfigError(
            "nothing to do: give --prompt TEXT and --generation N (in the scripts GENERATION=N); "
            "dart-llm perplexity, eval and summarize measure a model without a prompt"
        )

    def compute(ui: Ui) -> Any:
        from dart_llm.studies.generate.study import run_each

        answers = [study.answer() for study in run_each(settings, ui, fresh)]
        return answers[0] if len(answers) == 1 else {"runs": answers}

    _tell(compute, as_json)


def demo(
    model: Annotated[
        str, typer.Option(help="Hub id, local folder, .gguf file, or smollm2-135m.")
    ] = "smollm2-135m",
    method: Annotated[
        str, typer.Option("--method", "-m", help="Preset, or file:SETTING.yaml of tune.")
    ] = DEFAULT_METHOD,
    device: Annotated[
        str | None, typer.Option(help="0, cuda:0, cpu or mps (default: GPU 0, else CPU).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16 (default: the checkpoint's).")
    ] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Where the model is kept.")] = None,
    results_dir: Annotated[str, typer.Option(help="Folder for results.")] = "results",
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """``dart-llm demo``."""
    if plugin is not None:
        plugins.use(plugin)
    given = {"model": model, "method": method, "device": device, "dtype": dtype}
    given |= {"cache_dir": cache_dir, "results_dir": results_dir}

    def compute(ui: Ui) -> Any:
        from dart_llm.studies.generate.demo import run_demo

        return run_demo(ui, **given).answer()

    _tell(compute, as_json)


# compare and sweep


GridFile = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="A YAML file with the grid.")
]

DryRun = Annotated[
    bool,
    typer.Option("--dry-run", metavar="", help="Print cells, downloads, disk, time; run nothing."),
]

FreshCells = Annotated[bool, typer.Option("--fresh", metavar="", help="Compute every cell anew.")]


def _grid_command(settings_kind: type[SweepSettings]) -> Callable[..., None]:
    """``compare`` or ``sweep``."""

    def measure_grid(
        flags: dict[str, Any],
        file: GridFile = None,
        dry_run: DryRun = False,
        fresh: FreshCells = False,
        as_json: Json = False,
    ) -> None:
        settings = merge(settings_kind, flags, file)
        if file is not None and settings.experiment_name is None:
            settings = settings.noted({"experiment_name": file.stem})

        def compute(ui: Ui) -> Any:
            if not dry_run:
                return _finished("sweep.study:MeasureStudy", fresh, settings, ui).answer()
            from dart_llm.studies.sweep.study import plan

            return plan(settings, ui, fresh)

        _tell(compute, as_json)

    return measure_grid


# inspect and bench speed


What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar=f"[{'|'.join(TEXTS)}]...", help="What to look at (default: all the texts allow)."
    ),
]


def inspect(
    flags: dict[str, Any],
    what: What = None,
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """``dart-llm inspect``: a study that is told what to look at."""
    settings, name = merge(InspectSettings, flags, config), "inspection.study:InspectionStudy"
    _tell(lambda ui: _finished(name, fresh, settings, what or (), ui).answer(), as_json)


def bench_speed(
    flags: dict[str, Any], config: Config = None, fresh: Fresh = False, as_json: Json = False
) -> None:
    """``dart-llm bench speed``: its last line is JSON whatever was asked."""
    from dart_llm.reporting.console import Ui

    settings = merge(SpeedSettings, flags, config)
    with Ui.started(as_json) as ui:
        study = _finished("bench.speed:SpeedStudy", fresh, settings, ui)
    _print_json(study.answer() if as_json else study.last_line())


def tune(
    flags: dict[str, Any],
    config: Config = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", metavar="", help="Print what would be measured, and how long."),
    ] = False,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """``dart-llm tune``."""
    settings = merge(TuneSettings, flags, config)

    def compute(ui: Ui) -> Any:
        if not dry_run:
            return _finished("bench.tune:TuneStudy", fresh, settings, ui).answer()
        from dart_llm.studies.bench.candidates import plan

        return plan(settings, ui)

    _tell(compute, as_json)


# chat, serve, replay, results


def chat(flags: dict[str, Any], config: Config = None) -> None:
    """``dart-llm chat``."""
    from dart_llm.reporting.console import Ui

    settings = merge(ChatSettings, flags, config)
    with Ui.started() as ui:
        from dart_llm.cli.chat import run_chat
    run_chat(settings, ui)


def serve(flags: dict[str, Any], config: Config = None) -> None:
    """``dart-llm serve``."""
    settings = merge(ServeSettings, flags, config)
    from dart_llm.reporting.console import Ui

    with Ui.started() as ui:
        from dart_llm.server.run import serve as serve_model

    if settings.verbose:
        logging.getLogger("dart_llm.serve").setLevel(logging.INFO)
    serve_model(settings, ui)


def replay(
    records: Annotated[
        str, typer.Argument(metavar="RECORDS", help="File with the records; - is standard input.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page to write (default: beside RECORDS, .html)."),
    ] = None,
) -> None:
    """``dart-llm replay``."""
    from dart_llm.server.window import page, read_records

    if out is None and records == "-":
        raise ConfigError("give --out FILE: standard input has no name beside which to write")
    place = Path(records).with_suffix(".html") if out is None else out
    if place.resolve() == Path(records).resolve():
        raise ConfigError(f"{place} is the recording itself: give --out FILE")
    write_text(place, page(read_records(records)))
    typer.echo(str(place))


Text = Annotated[str | None, typer.Option(metavar="TEXT", help="Runs whose name holds this.")]


def results(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="All results, one experiment or one run.")
    ] = Path("results"),
    model: Text = None,
    method: Text = None,
    task: Text = None,
    experiment: Text = None,
    status: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="complete, running, interrupted, failed, stopped."),
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="DATE", help="Runs from this day on, e.g. 2026-01-31.")
    ] = None,
    long: Annotated[
        bool, typer.Option("--long", metavar="", help="One row per task and method.")
    ] = False,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", metavar="", help="Comma-separated.")] = False,
) -> None:
    """``dart-llm results``."""
    from dart_llm.experiments import index
    from dart_llm.reporting.console import Ui

    asked = {"model": model, "method": method, "task": task, "status": status}
    runs = index.filter(index.find(folder), **asked, experiment=experiment, since=since)
    if as_json:
        typer.echo(index.to_json(runs).rstrip("\n"))
    elif as_csv:
        typer.echo(index.to_csv(runs).rstrip("\n"))
    elif not runs:
        typer.echo("no run matches")
    else:
        Ui().out.print(index.table(runs, long or (folder / "config.json").is_file()))


GROUPS = {
    "bench": "Fixed measures of the methods: quality, speed.",
    "prompts": "Two-topic prompts and passages: list, show.",
}
"""Commands of two words by their first one, with its help."""

COMMANDS = (
    Command("run", run, RunSettings, RunCommand),
    Command("chat", chat, ChatSettings),
    Command("eval", "sweep.study:MeasureStudy", EvalSettings),
    Command("perplexity", "sweep.study:MeasureStudy", PerplexitySettings),
    Command("summarize", "sweep.study:MeasureStudy", SummarizeSettings),
    Command("compare", _grid_command(CompareSettings), CompareSettings),
    Command("sweep", _grid_command(SweepSettings), SweepSettings),
    Command("drift", "drift.study:DriftStudy", DriftSettings),
    Command("detect", "drift.detect:DetectionStudy", DetectSettings),
    Command("inspect", inspect, InspectSettings),
    Command("bench quality", "quality.study:QualityStudy", QualitySettings),
    Command("bench speed", bench_speed, SpeedSettings),
    Command("tune", tune, TuneSettings),
    Command("export", export, ExportSettings),
    Command("serve", serve, ServeSettings),
    Command("replay", replay),
    Command("results", results),
    Command("prompts list", info.list_prompts),
    Command("prompts show", info.show_prompt),
    Command("demo", demo),
    Command("methods", info.show_methods),
    Command("doctor", info.show_installation),
)
"""In the order of ``dart-llm --help``."""
