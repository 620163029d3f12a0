"""The Typer application, exit codes and signals.  The commands themselves: ``commands``."""

from __future__ import annotations

import io
import logging
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from dart_llm import __version__
from dart_llm.cli.commands import COMMANDS, GROUPS
from dart_llm.errors import DartError

INTERRUPTED = 130


def _version(value: bool) -> None:
    if value:
        typer.echo(f"dart-llm {__version__}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    return


def make_app() -> typer.Typer:
    """The application of all ``COMMANDS``."""
    app = typer.Typer(
        name="dart-llm",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Prune FFN neurons of language models while they generate, and trace which they need.",
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
        parent.command(name=name, help=command.text, cls=command.kind)(command.callback())
    for group_app in groups.values():
        app.add_typer(group_app)
    return app


app = make_app()


def run() -> None:
    """Run the command line; a ``DartError`` prints one sentence and exits with code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show all characters
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except SystemExit as error:
        if error.code == INTERRUPTED:  # typer turns Ctrl-C into this exit code
            sys.stderr.write("interrupted\n")
        raise
    except DartError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(2) from None


def _terminated(number: int, frame: FrameType | None) -> None:
    """SIGTERM, as a scheduler sends it, is an interruption: what is finished is kept."""
    raise KeyboardInterrupt
