"""Where a result comes from: digests of weights, texts and data; versions, git, machine.

A run's identity includes digests of the files that its settings name.  If a file changed, an
interrupted run is therefore not resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dart_llm.cache import processor
from dart_llm.data import documents
from dart_llm.data.datasets import LOCAL_MMLU
from dart_llm.errors import ConfigError
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.tasks import SLICED, slice_sources
from dart_llm.experiments.cell import Cell, requested_format
from dart_llm.files import file_sha256
from dart_llm.pruning import registry
from dart_llm.pruning.setting_file import path_of

_NAMED_BY_TASKS = ("text", "data", "slices")
"""The kinds of inputs that tasks name.  For any other kind, an empty name means no input."""


class Digests:
    """SHA-256 of local models, texts, data and task folders, each read only once."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, str], str | None] = {}
        self._models: dict[str, dict[str, str]] = {}

    def of(self, cell: Cell) -> dict[str, str]:
        """The digests of a cell's inputs, by kind of input; only local files have a digest.

        Raises ``ConfigError`` if a file cannot be read.
        """
        return {
            **self.of_model(cell),
            **self.of_files(cell.method, cell.calibration, cell.masks),
            **self.of_task(cell.task, cell.options),
            **registry.plugin_digest(),
        }

    def of_task(self, task: str, options: MeasureOptions) -> dict[str, str]:
        """Digests of the local texts, documents and task files that ``task`` reads."""
        kind, _, data = task.partition(":")
        if kind in SLICED:
            return self._digests({"slices": data})
        if kind == "summarize":
            return self._digests({"data": data})
        files = {"text": data} if kind == "perplexity" else {"tasks": options.include_path or ""}
        if kind == "mmlu" or (kind == "perplexity" and data.partition(":")[0] == documents.MMLU):
            files["mmlu"] = LOCAL_MMLU.as_posix()
        return self._digests(files)

    def of_files(
        self, method: str, calibration: str | None, masks: str | None = None, table: str = ""
    ) -> dict[str, str]:
        """Digests of a method's local files; ``table``: a layer table, or ``@FILE``."""
        files = {
            "calibration": calibration or "",
            "setting": str(path_of(method) or ""),
            "masks": masks or "",
            "layer_topk": table[1:] if table.startswith("@") else "",
        }
        return self._digests(files)

    def of_model(self, options: Any) -> dict[str, str]:
        """For a local model, two digests: ``model`` (weights) and ``model_files`` (other files).

        The default model and models on the hub have no digests: ID and revision identify them.
        Quantised weights add ``weights``, the weight format.  ``options`` has the fields of
        ``ModelOptions``.
        """
        model = options.model
        if model not in self._models:
            from dart_llm.models.checkpoint import contents
            from dart_llm.models.loading import is_default

            path, digests = Path(model).expanduser(), dict[str, str]()
            with _readable(model):
                if path.is_dir() and not is_default(model):
                    digests = contents(path)
                elif path.is_file() and not is_default(model):
                    digests = {"model": file_sha256(path)}
            self._models[model] = digests
        weights = requested_format(options)
        weight_format = {} if weights == "dense" else {"weights": weights}
        return {**self._models[model], **weight_format}

    def of_settings(self, settings: Any) -> dict[str, Any]:
        """Digests of a run's inputs: the model, the method's files, and plug-ins."""
        calibration, table = getattr(settings, "calibration", None), settings.layer_topk or ""
        files = self.of_files(settings.method, calibration, settings.masks, table)
        return {**self.of_model(settings), **files, **registry.plugin_digest()}

    def _digests(self, files: Mapping[str, str]) -> dict[str, str]:
        digests = {}
        for entry in files.items():
            if not entry[1] and entry[0] not in _NAMED_BY_TASKS:
                continue
            if entry not in self._read:
                with _readable(entry[1]):
                    self._read[entry] = _digest(*entry)
            if digest := self._read[entry]:
                digests[entry[0]] = digest
        return digests


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror or error}") from None


def _digest(kind: str, name: str) -> str | None:
    """An input's digest, or None if it is not a local file; unknown names raise ``ConfigError``."""
    if kind == "slices":
        sources = documents.sources(slice_sources(name)[0])
        return _sha256("".join(source.digest for source in sources))
    if kind == "tasks":
        return _task_folder(Path(name))
    if kind == "mmlu":  # local files, if any, replace those on the hub
        return _sums(Path(name).glob("*.jsonl"))
    if kind == "text":
        return None if documents.resolve(name).path is None else _sha256(documents.read(name))
    if kind == "data":
        documents.check(name)
    path = Path(name) if kind in ("setting", "masks", "layer_topk") else documents.find_file(name)
    return None if path is None else file_sha256(path)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sums(files: Iterable[Path]) -> str | None:
    """A digest of several files and their names; None if there are no files."""
    lines = [f"{file_sha256(path)}  {path.as_posix()}\n" for path in sorted(files)]
    return _sha256("".join(lines)) if lines else None


def _task_folder(folder: Path) -> str | None:
    """Digest of a folder's task files, and of the local data files that these task files name."""
    if not folder.is_dir():
        raise ConfigError(f"the task folder {folder} does not exist: correct include_path")
    files = {path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml", ".py")}
    texts = (path.read_text("utf-8", "replace") for path in files if path.suffix != ".py")
    words = (word for text in texts for word in re.findall(r"[^\s'\"{}\[\],]{1,250}", text))
    return _sums(files.union(path for path in map(Path, words) if path.is_file()))


# Versions, git state, machine.

PACKAGES = (
    *("dart-llm", "torch", "transformers", "accelerate", "safetensors", "gguf", "numpy"),
    *("lm-eval", "datasets", "rouge-score", "scipy", "sacrebleu"),
)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that affect results."""
    packages: dict[str, str | None] = {"python": platform.python_version()}
    packages |= dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    return packages


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and ``dirty`` (True with uncommitted changes); None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def machine(device: str | None = None) -> dict[str, Any]:
    """System, processor, cores and memory of this machine, and the device used."""
    torch, memory = sys.modules.get("torch"), None
    with contextlib.suppress(AttributeError, ValueError, OSError):  # some systems do not report it
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": None if torch is None else int(torch.get_num_threads()),
        "memory_gib": memory,
        "device": device,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
    }


def origin(device: str | None) -> dict[str, Any]:
    """The entries of config.json that say where results come from."""
    return {
        "command": sys.argv,
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
        "machine": machine(device),
    }


# Process helpers: temporary changes to the environment, redirecting stdout.

logger = logging.getLogger("dart_llm")


class _Stdout:
    """A stream that logs the output of all threads whose names begin with ``prefix``.

    The output of other threads goes to the stream ``inner``.
    """

    def __init__(self, inner: Any, prefix: str) -> None:
        self._inner = inner
        self._prefix = prefix

    def write(self, text: str) -> int:
        if not threading.current_thread().name.startswith(self._prefix):
            return int(self._inner.write(text))
        if text.strip():
            logger.debug("%s", text.strip())
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@contextlib.contextmanager
def keep_off_stdout(prefix: str) -> Iterator[None]:
    """A context manager that logs the stdout of all threads whose names begin with ``prefix``."""
    with contextlib.redirect_stdout(_Stdout(sys.stdout, prefix)):
        yield


def silent() -> contextlib.AbstractContextManager[None]:
    """A context manager that logs the stdout of all threads instead of printing it."""
    return keep_off_stdout("")


@contextlib.contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """A context manager that sets environment variables, and restores their values at its end."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


@contextlib.contextmanager
def same_sigterm() -> Iterator[None]:
    """A context manager that restores the SIGTERM handler at its end (only in the main thread)."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
