"""Where a result comes from: versions, git, machine, digests of weights, texts and data.

A digest of every file that a run only names: a changed file makes it another run.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dart_llm.data import documents
from dart_llm.data.datasets import LOCAL_MMLU
from dart_llm.errors import ConfigError
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.tasks import SLICED, slice_sources
from dart_llm.experiments.cell import Cell
from dart_llm.files import file_sha256
from dart_llm.pruning import plugins
from dart_llm.pruning.setting_file import path_of

TASK_FILES = (".yaml", ".yml", ".py")
"""The files of an lm-eval task folder that define a task."""

DENSE_WEIGHTS = "dense"
"""The usual weight format, which is not recorded as an input."""

_NAMED = ("text", "data", "slices")
"""Inputs that a task names: an empty name is one that does not exist."""


class Digests:
    """sha256 of local models, texts, data and task folders, each read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], str | None] = {}
        self._models: dict[str, dict[str, str]] = {}

    def of(self, cell: Cell) -> dict[str, str]:
        """By name of the input; what is not a local file has no entry.

        Raises ``ConfigError`` when a file cannot be read.
        """
        files = self.of_files(cell.method, cell.calibration, cell.masks)
        files |= self.of_task(cell.task, cell.options)
        return {**self.of_model(cell), **files, **plugins.digest()}

    def of_task(self, task: str, options: MeasureOptions) -> dict[str, str]:
        """The local texts, documents and task files that ``task`` reads."""
        kind, _, data = task.partition(":")
        if kind in SLICED:
            return self._digests({"slices": data})
        if kind == "summarize":
            return self._digests({"data": data})
        named = {"text": data} if kind == "perplexity" else {"tasks": options.include_path or ""}
        if kind == "mmlu" or (kind == "perplexity" and data.partition(":")[0] == documents.MMLU):
            named["mmlu"] = LOCAL_MMLU.as_posix()
        return self._digests(named)

    def of_files(
        self, method: str, calibration: str | None, masks: str | None = None, table: str = ""
    ) -> dict[str, str]:
        """The local files that a method reads; ``table``: a layer table, ``@FILE``."""
        named = {
            "calibration": calibration or "",
            "setting": str(path_of(method) or ""),
            "masks": masks or "",
            "layer_topk": table[1:] if table.startswith("@") else "",
        }
        return self._digests(named)

    def of_model(self, options: Any) -> dict[str, str]:
        """``model``, the weights of a local one; ``model_files``, what else is loaded of it.

        And ``weights``, their format unless it is dense.  ``options``: has the fields of
        ``ModelOptions``.  A model of the hub, which id and revision identify, and the default have
        no digests.
        """
        from dart_llm.experiments.model_facts import requested_format  # which loads torch

        model = options.model
        if model not in self._models:
            from dart_llm.models.checkpoint import contents
            from dart_llm.models.loading import is_default

            path, known = Path(model).expanduser(), is_default(model)
            with _readable(model):
                single = path.is_file() and not known
                digests = {"model": file_sha256(path)} if single else {}
                self._models[model] = contents(path) if path.is_dir() and not known else digests
        weights = requested_format(options)
        stored = {} if weights == DENSE_WEIGHTS else {"weights": weights}
        return {**self._models[model], **stored}

    def of_settings(self, settings: Any) -> dict[str, Any]:
        """What a run of ``settings`` reads: the model, the files of its method, plug-ins."""
        calibration, table = getattr(settings, "calibration", None), settings.layer_topk or ""
        files = self.of_files(settings.method, calibration, settings.masks, table)
        return {**self.of_model(settings), **files, **plugins.digest()}

    def _digests(self, named: Mapping[str, str]) -> dict[str, str]:
        wanted = {name: value for name, value in named.items() if value or name in _NAMED}
        digests = {name: self._digest(name, value) for name, value in wanted.items()}
        return {name: digest for name, digest in digests.items() if digest}

    def _digest(self, name: str, value: str) -> str | None:
        if (name, value) not in self._known:
            with _readable(value):
                self._known[name, value] = _read(name, value)
        return self._known[name, value]


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot read {what}: {error.strerror or error}") from None


def _read(name: str, value: str) -> str | None:
    if name == "slices":
        sources = documents.sources(slice_sources(value)[0])
        return hashlib.sha256("".join(source.digest for source in sources).encode()).hexdigest()
    if name == "tasks":
        return _folder(Path(value))
    if name == "mmlu":  # read instead of the hub's where there are any
        return _sums(Path(value), Path(value).glob("*.jsonl"))
    if name == "text":  # raises at once for a name that does not exist
        if documents.resolve(value).path is None:
            return None
        return hashlib.sha256(documents.read(value).encode()).hexdigest()
    if name == "data":
        documents.check(value)
    if name in ("setting", "masks", "layer_topk"):
        return file_sha256(Path(value))
    path = documents.find_file(value)
    return None if path is None else file_sha256(path)


def _folder(folder: Path) -> str | None:
    if not folder.is_dir():
        raise ConfigError(f"the task folder {folder} does not exist: correct include_path")
    files = [path for path in folder.rglob("*") if path.suffix in TASK_FILES]
    data = sorted({one for path in files if path.suffix != ".py" for one in _data_files(path)})
    lines = [f"{file_sha256(path)}  {path.as_posix()}\n" for path in data]
    own = _sums(folder, files)
    return hashlib.sha256("".join([own, *lines]).encode()).hexdigest() if own and lines else own


def _data_files(task: Path) -> Iterator[Path]:
    """The local files under ``data_files`` of a task file, as ``datasets`` looks for them."""
    import yaml

    try:  # BaseLoader: the tags of lm-eval are of no interest here
        waiting = [(yaml.load(task.read_text(encoding="utf-8"), yaml.BaseLoader), False)]
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # lm-eval says what is wrong with it
    while waiting:
        node, inside = waiting.pop()
        if isinstance(node, dict):
            waiting += [(value, inside or key == "data_files") for key, value in node.items()]
        elif isinstance(node, list):
            waiting += [(value, inside) for value in node]
        elif inside and Path(node).is_file():
            yield Path(node)


def _sums(folder: Path, files: Iterable[Path]) -> str | None:
    """One digest of several files and of their names within ``folder``; None of none."""
    found = sorted(files)
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in found]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


# Process helpers: temporary changes of the environment, silencing stdout.


logger = logging.getLogger("dart_llm")


class _Stdout:
    """A stream that logs what threads print whose names begin with ``prefix``."""

    def __init__(self, inner: Any, prefix: str) -> None:
        self._inner = inner
        self._prefix = prefix

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith(self._prefix):
            if text.strip():
                logger.debug("%s", text.strip())
            return len(text)
        return int(self._inner.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@contextlib.contextmanager
def keep_off_stdout(prefix: str) -> Iterator[None]:
    """Send what threads called ``prefix...`` print to the log; others print as ever."""
    with contextlib.redirect_stdout(_Stdout(sys.stdout, prefix)):
        yield


def silent() -> contextlib.AbstractContextManager[None]:
    """Send what any thread prints to the log."""
    return keep_off_stdout("")


@contextlib.contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Variables for the processes that are started inside; as before afterwards."""
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
    """The handler of SIGTERM as it was; only the main thread can set it."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


# Where a result came from: versions, git state, machine.


PACKAGES = (
    "dart-llm",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "gguf",
    "numpy",
    "lm-eval",
    "datasets",
    "rouge-score",
    "scipy",
    "sacrebleu",
)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a result."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and whether there are changes; None outside a repository."""

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if commit is None:
        return None
    return {
        "commit": commit,
        "branch": ask("rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": bool(ask("status", "--porcelain", "--untracked-files=no")),
    }


def machine(device: str | None = None) -> dict[str, Any]:
    """System, processor, cores and memory of this machine, and the device that was used."""
    torch = sys.modules.get("torch")
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": None if torch is None else int(torch.get_num_threads()),
        "memory_gib": memory_gib(),
        "device": device,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
    }


def origin(device: str | None) -> dict[str, Any]:
    """What config.json says of where results come from."""
    return {
        "command": sys.argv,
        "process": os.getpid(),
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
        "machine": machine(device),
    }


def memory_gib() -> float | None:
    """Physical memory in GiB; None where the system does not report it."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return round(size / 2**30, 1)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
