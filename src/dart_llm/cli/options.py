"""Command-line options made from the settings table, so that the two cannot differ."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from dart_llm.errors import ConfigError
from dart_llm.pruning import plugins
from dart_llm.settings import Settings

Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Read settings from a YAML file.")
]

Fresh = Annotated[bool, typer.Option("--fresh", metavar="", help="Start again, do not resume.")]

Plugin = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Python file that registers your own scores or methods."),
]

Json = Annotated[bool, typer.Option("--json", metavar="", help="One JSON document on stdout only.")]

ALIASES: dict[str, tuple[str, ...]] = {
    "generation": ("--max-new-tokens",),
    "method": ("-m",),
    "models": ("--model",),
    "prompt": ("-p",),
    "shape": ("--model-config",),
}

METAVARS: dict[Any, str] = {str: "TEXT", list[str]: "TEXT", int: "N", float: "X", bool: ""}


def _plain(annotation: Any) -> Any:
    """``X`` of ``X | None``."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def parameters(settings: type[Settings]) -> list[inspect.Parameter]:
    """One keyword parameter per setting; None means "not given".

    Settings in ``settings.UNUSED``, which come from a base class, are not flags.
    """
    found = []
    for name, field in settings.model_fields.items():
        if name in settings.UNUSED:
            continue
        flag = "--" + name.replace("_", "-")
        kind = _plain(field.annotation)
        kind = str if get_origin(kind) is tuple else kind  # a list that is written with commas
        names = [flag, *ALIASES.get(name, ())]
        if kind is bool:
            names = [f"{flag}/--no-{flag[2:]}", *ALIASES.get(name, ())]
        text = field.description or ""
        default = field.default
        if default not in (None, False, ()):
            shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else default
            # in brackets it would be read as markup, and vanish
            text = f"{text.removesuffix('.')} (default: {shown})."
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        option = typer.Option(
            *names,
            help=text,
            rich_help_panel=str(extra.get("panel", "")),
            hidden=bool(extra.get("hidden")),
            show_default=False,
            metavar=METAVARS.get(kind),
            parser=_sparsity if name == "sparsity" else None,
        )
        found.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, option],
            )
        )
    return found


def _sparsity(text: str) -> float:
    """A number; typer's own message for a percentage does not mention fractions."""
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            raise ConfigError(f"write --sparsity {share:g}: a fraction, not a percentage")
        return float(text)
    except ValueError:
        raise ConfigError(
            f'--sparsity "{text}" is not a number: write a fraction, e.g. 0.5'
        ) from None


def with_settings(function: Callable[..., None], settings: type[Settings]) -> Callable[..., None]:
    """Give ``function(flags, ...)`` one option per setting; they arrive as the dict ``flags``."""
    signature = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True)  # names of the function's own module
    own = [
        p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for p in signature.parameters.values()
        if p.name != "flags"
    ]

    def command(plugin: Plugin = None, **values: Any) -> None:
        if plugin is not None:
            plugins.use(plugin)
        names = settings.model_fields
        flags = {k: None if v == [] else v for k, v in values.items() if k in names}
        rest = {key: value for key, value in values.items() if key not in names}
        function(flags, **rest)

    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    added = inspect.Parameter(
        "plugin", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Plugin
    )
    every = [*parameters(settings), added, *own]
    command.__signature__ = signature.replace(parameters=every)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in every}
    return command
