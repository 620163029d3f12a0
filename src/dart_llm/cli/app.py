"""The Typer application; ``COMMANDS`` lists every command with its settings and its function.

``help.yaml`` has the help text and the examples of every command.  The entry point is ``run``,
which also handles signals and sets the exit code.
"""

from __future__ import annotations

import io
import json
import logging
import signal
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from dart_llm import __version__
from dart_llm.cli import info
from dart_llm.cli.chat import ChatSettings
from dart_llm.cli.export import ExportSettings, export
from dart_llm.cli.options import Config, Fresh, Json, with_settings
from dart_llm.errors import CellsFailed, ConfigError, DartError
from dart_llm.files import finite, write_text
from dart_llm.server.settings import ServeSettings
from dart_llm.settings import Settings, merge, setting
from dart_llm.studies.bench.settings import SpeedSettings, TuneSettings
from dart_llm.studies.drift.settings import DetectSettings, DriftSettings
from dart_llm.studies.generate.settings import DemoSettings, RunSettings
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
"""Maps a command's name to its help text and its examples."""

Flags = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """One command; the name "bench quality" means command ``quality`` in the group ``bench``.

    ``function``: the function that runs the command, or a string "module:class" that names a
    ``Study`` in ``dart_llm.studies`` to run.  ``only``: names of the settings that become flags;
    None means all.
    """

    name: str
    function: Callable[..., None] | str
    settings: type[Settings] | None = None
    only: Collection[str] | None = None

    @property
    def examples(self) -> tuple[str, ...]:
        return tuple(HELP[self.name]["examples"])

    @property
    def text(self) -> str:
        """The help text, followed by the examples."""
        return "\n\n".join((HELP[self.name]["help"], "Examples:", *self.examples))

    def callback(self) -> Callable[..., None]:
        """The function that Typer calls; it has a parameter for every option."""
        function = self._run_study if isinstance(self.function, str) else self.function
        settings = self.settings
        return function if settings is None else with_settings(function, settings, self.only)

    def _run_study(
        self, flags: Flags, config: Config = None, fresh: Fresh = False, as_json: Json = False
    ) -> None:
        assert self.settings is not None
        settings, name = merge(self.settings, flags, config), str(self.function)
        answer(lambda ui: run_named(name, fresh, settings, ui).answer(), as_json)


def run_named(name: str, fresh: bool, *arguments: Any) -> Any:
    """Run and return the study ``name``, which is "module:class" as in ``Command.function``."""
    from dart_llm.experiments.study import run_study

    module, _, class_name = name.partition(":")
    study = getattr(import_module(f"dart_llm.studies.{module}"), class_name)
    return run_study(study(*arguments), fresh)


def answer(compute: Callable[[Ui], Any], as_json: bool) -> None:
    """Run ``compute`` and, if ``as_json``, print its result as JSON.

    If some measurements failed, the JSON has the partial result, and ``CellsFailed`` is raised.
    """
    from dart_llm.reporting.console import Ui

    try:
        with Ui.started(as_json) as ui:
            document = compute(ui)
    except CellsFailed as failed:
        if as_json:
            print_json(failed.document)
        raise
    if as_json:
        print_json(document)


def print_json(document: Any) -> None:
    """Print ``document`` on stdout as one line of JSON; inf and NaN become null."""
    typer.echo(json.dumps(finite(document)))


GridFile = Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Read a grid from YAML.")]
DryRun = Annotated[bool, typer.Option("--dry-run", metavar="", help="Print the plan; run nothing.")]


def _grid_command(settings_kind: type[SweepSettings]) -> Callable[..., None]:
    """Return the function that runs ``compare`` or ``sweep``: it measures a grid of settings."""

    def measure_grid(
        flags: Flags,
        file: GridFile = None,
        dry_run: DryRun = False,
        fresh: Fresh = False,
        as_json: Json = False,
    ) -> None:
        settings = merge(settings_kind, flags, file)
        if file is not None and settings.experiment_name is None:
            settings = settings.noted({"experiment_name": file.stem})

        def compute(ui: Ui) -> Any:
            if not dry_run:
                return run_named("sweep.study:MeasureStudy", fresh, settings, ui).answer()
            from dart_llm.studies.sweep.study import plan

            return plan(settings, ui, fresh)

        answer(compute, as_json)

    return measure_grid


What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar=f"[{'|'.join(TEXTS)}]...", help="Show these (default: all that the texts allow)."
    ),
]


def inspect(
    flags: Flags,
    what: What = None,
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """``dart-llm inspect``."""
    settings, name = merge(InspectSettings, flags, config), "inspection.study:InspectionStudy"
    answer(lambda ui: run_named(name, fresh, settings, what or (), ui).answer(), as_json)


def chat(flags: Flags, config: Config = None) -> None:
    """``dart-llm chat``."""
    from dart_llm.reporting.console import Ui

    settings = merge(ChatSettings, flags, config)
    with Ui.started() as ui:
        from dart_llm.cli.chat import run_chat
    run_chat(settings, ui)


def serve(flags: Flags, config: Config = None) -> None:
    """``dart-llm serve``."""
    settings = merge(ServeSettings, flags, config)
    from dart_llm.reporting.console import Ui

    with Ui.started() as ui:
        from dart_llm.server.run import serve as serve_model

    if settings.verbose:
        logging.getLogger("dart_llm.serve").setLevel(logging.INFO)
    serve_model(settings, ui)


def replay(
    records: Annotated[str, typer.Argument(metavar="RECORDS", help="Read this file; - is stdin.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write this page (default: RECORDS.html).")
    ] = None,
) -> None:
    """``dart-llm replay``."""
    from dart_llm.server.window import page, read_records

    if out is None and records == "-":
        raise ConfigError("give --out FILE: records from standard input have no file name")
    path = Path(records).with_suffix(".html") if out is None else out
    if path.resolve() == Path(records).resolve():
        raise ConfigError(f"{path} is the file with the records: give another name with --out")
    write_text(path, page(read_records(records)))
    typer.echo(str(path))


class ResultsFilter(Settings):
    """Settings that select the runs that ``results`` shows."""

    model: str | None = setting("Filter", "Show runs whose model's name contains this.")
    method: str | None = setting("Filter", "Show runs whose method's name contains this.")
    task: str | None = setting("Filter", "Show runs whose task's name contains this.")
    experiment: str | None = setting("Filter", "Show runs whose experiment's name contains this.")
    status: str | None = setting(
        "Filter", "Show runs that are complete, running, interrupted, failed or stopped."
    )
    since: str | None = setting("Filter", "Show runs since this day, e.g. 2026-01-31.")


def results(
    flags: Flags,
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Folder of all runs, an experiment or a run.")
    ] = Path("results"),
    long: Annotated[
        bool, typer.Option("--long", metavar="", help="Print one row per number.")
    ] = False,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", metavar="", help="Print CSV.")] = False,
) -> None:
    """``dart-llm results``."""
    from dart_llm.experiments import index
    from dart_llm.reporting.console import Ui

    selection = merge(ResultsFilter, flags, environment={})
    runs = index.filter(index.find(folder), **selection.model_dump())
    if as_json:
        typer.echo(index.to_json(runs).rstrip("\n"))
    elif as_csv:
        typer.echo(index.to_csv(runs).rstrip("\n"))
    elif not runs:
        typer.echo("no matching runs")
    else:
        long = long or len(runs) == 1
        Ui().out.print(index.table(runs, long))


GROUPS = {
    "bench": "Benchmark the quality or the speed of methods.",
    "prompts": "List or show two-topic prompts and passages.",
}
"""Maps the first word of two-word commands, such as ``bench``, to its help text."""

DEMO = ("model", "method", "device", "dtype", "cache_dir", "results_dir")
"""The settings that become flags of ``demo``."""

COMMANDS = (
    Command("run", "generate.study:RunStudy", RunSettings),
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
    Command("bench speed", "bench.study:SpeedStudy", SpeedSettings),
    Command("tune", "bench.tune:TuneStudy", TuneSettings),
    Command("export", export, ExportSettings),
    Command("serve", serve, ServeSettings),
    Command("replay", replay),
    Command("results", results, ResultsFilter),
    Command("prompts list", info.list_prompts, info.PromptFilter),
    Command("prompts show", info.show_prompt),
    Command("demo", "generate.demo:DemoStudy", DemoSettings, DEMO),
    Command("methods", info.show_methods),
    Command("doctor", info.show_installation),
)
"""All commands, in the order of ``dart-llm --help``."""


def _version(value: bool) -> None:
    if value:
        typer.echo(f"dart-llm {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Show version."),
]


def _main(version: Version = False) -> None:
    return


def make_app() -> typer.Typer:
    """Build the application from ``COMMANDS``."""
    app = typer.Typer(
        name="dart-llm",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Prune FFN neurons of language models during generation, and trace which ones run.",
        epilog="Settings: defaults < --config FILE < DART_* environment < flags.  Docs: README.md",
    )
    app.callback()(_main)
    groups = {
        name: typer.Typer(no_args_is_help=True, help=text, name=name)
        for name, text in GROUPS.items()
    }
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        parent = groups[group] if group else app
        parent.command(name=name, help=command.text)(command.callback())
    for group_app in groups.values():
        app.add_typer(group_app)
    return app


app = make_app()


def run() -> None:
    """Run the command line; on a ``DartError``, print the error's message and exit with code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show all characters
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except SystemExit as error:
        if error.code == 130:  # typer turns Ctrl-C into this exit code
            sys.stderr.write("interrupted\n")
        raise
    except DartError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(2) from None


def _terminated(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM, which job schedulers send, like Ctrl-C, so that finished work is kept."""
    raise KeyboardInterrupt
