"""The command line: thin shells over the library."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from dart_llm import __version__
from dart_llm.cli import commands, info
from dart_llm.cli.chat_settings import ChatSettings
from dart_llm.cli.options import Config, Fresh, Json, with_settings
from dart_llm.errors import ConfigError, DartError
from dart_llm.server.settings import ServeSettings
from dart_llm.studies.detection.settings import DetectSettings
from dart_llm.studies.drift.settings import DriftSettings
from dart_llm.studies.evaluate.settings import EvalSettings, PerplexitySettings, SummarizeSettings
from dart_llm.studies.generate.settings import RunSettings, collect
from dart_llm.studies.inspection.settings import InspectSettings
from dart_llm.studies.sweep.settings import SweepFlags

EPILOG = "Settings: defaults < --config FILE < DART_* environment < flags.  Docs: README.md"

app = typer.Typer(
    name="dart-llm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prune FFN neurons of language models while they generate, and trace which they need.",
    epilog=EPILOG,
)

INTERRUPTED = 130

RESUMING = "run eval perplexity summarize compare sweep drift detect inspect bench demo".split()
"""Commands that keep what is finished in a results folder and go on there."""


def run() -> None:
    """Run the command line; an error of ours is one sentence and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show all characters
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except SystemExit as error:
        if error.code == INTERRUPTED:  # typer turns Ctrl-C into this exit code
            resumes = next(iter(sys.argv[1:]), "") in RESUMING
            sys.stderr.write(f"interrupted{'; the same command resumes' if resumes else ''}\n")
        raise
    except DartError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(2) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _terminated(number: int, frame: FrameType | None) -> None:
    """A scheduler's polite end is an interruption: what is finished is kept, and said."""
    raise KeyboardInterrupt


def _version(value: bool) -> None:
    if value:
        typer.echo(f"dart-llm {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    return


def _run(
    flags: dict[str, Any],
    config: Config = None,
    save_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the merged settings to a YAML file.")
    ] = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Prune a model while it generates from a prompt, evaluate it, and write a report.

    Examples:

    dart-llm run --prompt "Why is the sky blue?" --sparsity 0.5

    dart-llm run --method griffin --sparsity 0.5 --perplexity --ppl-max-samples 4

    dart-llm run --model Qwen/Qwen2.5-0.5B-Instruct --prompt-file question.txt --chat

    dart-llm run --prompt two_topics --drift paper --generation 400
    """
    settings = collect(flags, config)
    piped = sys.stdin is not None and not sys.stdin.isatty()
    idle = not settings.tokens and not settings.evaluates
    if piped and idle and settings.generation is None:
        settings = collect({**flags, "prompt_file": "-"}, config)
        idle = False
    if save_config is not None:
        _save_settings(settings, save_config)
    if idle:
        raise ConfigError(
            "nothing to do: give --prompt TEXT and --generation N, or an evaluation: --perplexity, "
            "--eval-mmlu, --eval-general-nlp, --eval-summarization (in the scripts GENERATION=N or "
            "EVAL_PERPLEXITY, EVAL_MMLU, EVAL_GENERAL_NLP, EVAL_SUMMARIZATION=true)"
        )
    from dart_llm.reporting.console import Ui
    from dart_llm.studies.generate.study import run_job

    job = run_job(settings, Ui(quiet=as_json), fresh)
    if as_json:
        typer.echo(json.dumps(_document(job)))


_run.__name__ = "run"

app.command(name="run")(with_settings(_run, RunSettings))

app.command(name="chat")(with_settings(commands.chat, ChatSettings))

app.command(name="eval")(with_settings(commands.evaluate, EvalSettings))

app.command(name="perplexity")(with_settings(commands.perplexity, PerplexitySettings))

app.command(name="summarize")(with_settings(commands.summarize, SummarizeSettings))

app.command(name="compare")(with_settings(commands.compare, SweepFlags))

app.command(name="sweep")(with_settings(commands.sweep, SweepFlags))

app.command(name="drift")(with_settings(commands.drift, DriftSettings))

app.command(name="detect")(with_settings(commands.detect, DetectSettings))

app.command(name="inspect")(with_settings(commands.inspect, InspectSettings))

commands.register(app)

app.command(name="serve")(with_settings(commands.serve, ServeSettings))

app.command(name="replay")(commands.replay)

app.command(name="results")(commands.results)

info.register(app)


def _save_settings(settings: RunSettings, path: Path) -> None:
    import yaml

    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write the settings file {path}: {error.strerror or error}"
        ) from None


def _document(job: Any) -> dict[str, Any]:
    from dart_llm.files import finite

    document: dict[str, Any] = finite(
        {
            "folder": str(job.path),
            "config": job.config,
            "generation": list(job.generations.values()),
            "perplexity": job.perplexity,
            **job.evaluations,
            "timing": job.timing,
        }
    )
    return document


@app.command()
def demo(
    model: Annotated[
        str, typer.Option(help="Hub id, local folder, .gguf file, or smollm2-135m.")
    ] = "smollm2-135m",
    method: Annotated[str, typer.Option("--method", "-m", help="Preset.")] = "dart",
    device: Annotated[
        str | None, typer.Option(help="0, 0,1, cuda:0, cpu or mps (default: GPU 0, else CPU).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16 (default: the checkpoint's).")
    ] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Where the model is kept.")] = None,
    results_dir: Annotated[str, typer.Option(help="Folder for results.")] = "results",
    as_json: Json = False,
) -> None:
    """The main job on one model: dense, 20 % and 50 % side by side, and a report.

    Example: dart-llm demo
    """
    from dart_llm.reporting.console import Ui
    from dart_llm.studies.generate.study import run_demo

    job = run_demo(
        Ui(quiet=as_json),
        model=model,
        method=method,
        device=device,
        dtype=dtype,
        cache_dir=cache_dir,
        results_dir=results_dir,
    )
    if as_json:
        typer.echo(json.dumps(_document(job)))


@app.command()
def methods(as_json: Json = False) -> None:
    """List methods, scores, budgets and drift rules with their sources.

    Example: dart-llm methods --json
    """
    from dart_llm.cli.info import print_listing
    from dart_llm.pruning.methods import listing

    if as_json:
        typer.echo(json.dumps(listing()))
    else:
        print_listing()


@app.command()
def doctor(
    cache_dir: Annotated[str | None, typer.Option(help="Cache to look at.")] = None,
    as_json: Json = False,
) -> None:
    """Say what this installation has: Python, torch, devices, cache, disk, token, extras.

    Example: dart-llm doctor
    """
    from dart_llm.cli.info import examine, print_report

    found = examine(cache_dir)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        print_report(found)
