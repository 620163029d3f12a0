"""One Python file of scores, budgets, rules and methods, named by ``--plugin`` or a variable.

The variable is how processes that a study starts know the file too.
"""

from __future__ import annotations

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from dart_llm.errors import ConfigError
from dart_llm.files import file_sha256

VARIABLE = "DART_PLUGIN"

_digests: dict[str, str] = {}
"""sha256 of the files that were loaded, or are being loaded, by their path."""


def use(path: Path) -> None:
    """Load ``path``, here and in processes that are started from here.

    Raises ``ConfigError`` for a file that is missing or fails.
    """
    os.environ[VARIABLE] = str(path.expanduser().resolve())
    load()


def load() -> None:
    """Load the file that the variable names, once; raises as ``use``."""
    path = os.environ.get(VARIABLE, "")
    if not path or path in _digests:
        return
    name = f"dart_llm_plugin_{Path(path).stem}"
    try:
        _digests[path] = file_sha256(Path(path))
        spec = spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ConfigError("its name must end in .py")
        module = sys.modules[name] = module_from_spec(spec)  # its classes can be pickled
        spec.loader.exec_module(module)
    except Exception as error:
        _digests.pop(path, None)
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the plug-in {path} cannot be loaded: {what}") from error


def hint() -> str:
    """What a message about an unknown name adds where no file was given; else ""."""
    return "" if os.environ.get(VARIABLE) else "one of your own: --plugin FILE"


def digest() -> dict[str, str]:
    """``plugin``: sha256 of the files that were loaded, for what depends on them."""
    load()
    return {"plugin": " ".join(sorted(_digests.values()))} if _digests else {}
