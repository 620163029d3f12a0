"""Builds the options of a command from its settings class, so that both always agree."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from dart_llm.pruning import registry
from dart_llm.settings import Settings

Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Read settings from a YAML file.")
]
Fresh = Annotated[bool, typer.Option("--fresh", metavar="", help="Start over instead of resuming.")]
Plugin = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Load a Python file that registers scores or methods."),
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print only one JSON document, on stdout.")
]

NAMED = inspect.Parameter.KEYWORD_ONLY

ALIASES: dict[str, tuple[str, ...]] = {
    "generation": ("--max-new-tokens",),
    "method": ("-m",),
    "models": ("--model",),
    "prompt": ("-p",),
}
"""Maps a setting's name to further names of its flag."""


def _option_type(annotation: Any) -> Any:
    """The type of a flag: X for a setting of type ``X | None``; str for a comma-separated tuple."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return str if get_origin(annotation) is tuple else annotation


def parameters(
    settings: type[Settings], only: Collection[str] | None = None
) -> list[inspect.Parameter]:
    """One keyword parameter for each setting; if ``only`` is given, just for the settings it names.

    Every parameter defaults to None, which means that the flag was not given.
    """
    fields = settings.model_fields
    names = [n for n in fields if n not in settings.UNUSED and (only is None or n in only)]
    names.sort(key=lambda name: name not in ("model", "method"))  # the help lists these two first
    return [_parameter(name, fields[name]) for name in names]


def _parameter(name: str, field: Any) -> inspect.Parameter:
    flag, kind = "--" + name.replace("_", "-"), _option_type(field.annotation)
    flag = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    text, default = field.description or "", field.default
    if default not in (None, False, ()):
        shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else default
        # rich would treat square brackets as markup and hide them
        text = f"{text.removesuffix('.')} (default: {shown})."
    extra = field.json_schema_extra or {}
    option = typer.Option(
        flag,
        *ALIASES.get(name, ()),
        help=text,
        rich_help_panel=str(extra.get("panel", "")),
        show_default=False,
    )
    annotation: Any = Annotated[kind | None, option]
    return inspect.Parameter(name, NAMED, default=None, annotation=annotation)


def with_settings(
    function: Callable[..., None], settings: type[Settings], only: Collection[str] | None = None
) -> Callable[..., None]:
    """Wrap ``function(flags, ...)`` in a command with one option per setting.

    ``flags`` maps each setting's name to its option's value, or to None if no value was given.
    """
    signature = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True)  # evaluated in the function's module
    others = [
        p.replace(annotation=hints[p.name], kind=NAMED)
        for p in signature.parameters.values()
        if p.name != "flags"
    ]

    def command(plugin: Plugin = None, **values: Any) -> None:
        if plugin is not None:
            registry.use_plugin(plugin)
        names = settings.model_fields
        flags = {k: None if v == [] else v for k, v in values.items() if k in names}
        function(flags, **{key: value for key, value in values.items() if key not in names})

    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    plugin_option = inspect.Parameter("plugin", NAMED, default=None, annotation=Plugin)
    options = [*parameters(settings, only), plugin_option, *others]
    command.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in options}
    return command
