"""One Python file of scores, budgets, rules and methods, named by ``--plugin`` or a variable.

The variable is how processes that a study starts know the file too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from dart_llm.errors import ConfigError
from dart_llm.files import file_sha256

VARIABLE = "DART_PLUGIN"

_digests: dict[str, str] = {}
"""Of the files that were loaded, or are being loaded, by their path."""

_owned: dict[tuple[str, str], str] = {}
"""Path of the file that registered a name of a kind."""

_loading: list[str] = []


def use(path: Path) -> None:
    """Load ``path``, here and in processes that are started from here.

    Raises ``ConfigError`` for a file that is missing, fails or registers nothing.
    """
    os.environ[VARIABLE] = str(path.expanduser().resolve())
    load()


def load() -> None:
    """Load the file that the variable names, once; raises as ``use``."""
    path = os.environ.get(VARIABLE, "")
    if not path or path in _digests:
        return
    try:
        _digests[path] = file_sha256(Path(path))
    except OSError as error:
        raise ConfigError(f"cannot read the plug-in {path}: {error.strerror}") from None
    _loading.append(path)
    try:
        _run(path)
    except Exception as error:
        del _digests[path]
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the plug-in {path} cannot be loaded: {what}") from error
    finally:
        _loading.remove(path)
    if path not in _owned.values():
        raise ConfigError(
            f'the plug-in {path} registers nothing: call SCORES.register("my-score", my_score), or '
            "the same of METHODS, BUDGETS, DRIFT_RULES or TOKEN_RULES"
        )


def _run(path: str) -> None:
    name = f"dart_llm_plugin_{Path(path).stem}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError("its name must end in .py")
    module = sys.modules[name] = module_from_spec(spec)  # classes of it can be pickled
    spec.loader.exec_module(module)


def hint() -> str:
    """What a message about an unknown name adds where no file was given; else ""."""
    return "" if os.environ.get(VARIABLE) else "one of your own: --plugin FILE"


def registered(kind: str, name: str) -> None:
    """``name`` was registered, as a ``kind``: by the file that is being loaded, if one is."""
    if _loading:
        _owned[kind, name] = _loading[-1]


def digest(names: Iterable[tuple[str, str]] | None = None) -> dict[str, str]:
    """``plugin``: sha256 of the file behind any (kind, name) of ``names``; None: of any loaded."""
    load()
    paths = set(_digests)
    if names is not None:
        paths = {_owned[entry] for entry in names if entry in _owned}
    return {"plugin": " ".join(_digests[path] for path in sorted(paths))} if paths else {}
