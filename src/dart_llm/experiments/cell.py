"""A cell of a grid of measurements: one method on one model and task, as plain data.

A cell contains everything that determines its result.  It is sent as JSON (``to_dict``,
``from_dict``), so that any process on any machine can compute it.  The functions at the end inspect
a cell's model before the weights are loaded; they import PyTorch only when called.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dart_llm.errors import LoadError
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.pruning.config import USER_MASKS, PruneConfig
from dart_llm.pruning.registry import METHODS
from dart_llm.settings import load_arguments

DEFAULT_LAYERS = 30
"""Number of layers of the default model; a constant, because that model never changes."""


@dataclass(frozen=True)
class Cell:
    """A model, pruned in one way and measured on one task.

    ``overrides``: changes to the method's preset, passed to ``PruneConfig.build``.  Sweeps over
    layers set ``layers`` (the pruned layers), ``keep`` (the share of neurons kept in these layers)
    and ``base_keep`` (the share kept in all other layers).  ``calibration``: name of the
    calibration text; None means the method's default.  ``masks``: a file with the masks to use.
    ``name``: the label in the results; "" means a label made from method and sparsity.  ``inputs``:
    SHA-256 digests of the files that the cell names.
    """

    model: str
    method: str
    task: str
    sparsity: float | None = None
    seed: int = 0
    layers: str = ""
    keep: float | None = None
    base_keep: float | None = None
    options: MeasureOptions = field(default_factory=MeasureOptions)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    masks: str | None = None
    name: str = ""
    dtype: str | None = None
    weights: str | None = None
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    cache_dir: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A readable name and a hash of everything that determines the result."""
        # cache_dir determines where files are stored, not the result
        data = {k: v for k, v in self.to_dict().items() if k != "cache_dir" and v is not None}
        text = json.dumps(data, sort_keys=True, ensure_ascii=True)
        model = Path(self.model.rstrip("/")).name
        name = "-".join((model, self.label, self.short_task, self.options.protocol)).lower()
        slug = re.sub(r"[^a-z0-9.@_]+", "-", name)[:56].strip("-.")
        return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    @property
    def label(self) -> str:
        """The method's label: ``dense``, ``dart@0.5`` or ``griffin layers 0-3 keep 0.5``."""
        if self.name:
            return self.name
        if self.masks:
            return USER_MASKS
        if self.layers:
            return f"{self.method} layers {self.layers} keep {self.keep:g}"
        return self.method if self.sparsity is None else f"{self.method}@{self.sparsity:g}"

    @property
    def short_task(self) -> str:
        """The task; a file's path is shortened to the file's name."""
        return short_task(self.task)

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``dart_llm.load``; cells with equal arguments share a model."""
        return load_arguments(self)

    def config(self) -> PruneConfig:
        """The preset with the cell's overrides; raises ``ConfigError`` if they are invalid."""
        overrides = {**self.overrides, "sparsity": self.sparsity, "seed": self.seed}
        return PruneConfig.build(self.method, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable data; ``from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cell:
        return cls(**{**data, "options": MeasureOptions(**data["options"])})


def removes_nothing(method: str) -> bool:
    """Whether a method removes no neurons, whatever the sparsity (``dense`` and its variants)."""
    return bool(METHODS.get(method).sparsity == 0)


def short_task(task: str) -> str:
    """The task; a file's path is shortened to the file's name."""
    return ":".join(Path(part).name for part in task.split(":"))


# What can be learned about a model before its weights are loaded.


def layer_count(cell: Cell) -> int:
    """The number of decoder layers of the cell's model, from its configuration.

    Raises ``LoadError`` if the configuration cannot be read.
    """
    from dart_llm.models.gguf_file import read_gguf
    from dart_llm.models.loading import is_default

    if is_default(cell.model):
        return DEFAULT_LAYERS
    path = Path(cell.model).expanduser()
    if path.is_file():
        layers = read_gguf(path).fact("block_count")
        if not isinstance(layers, int):
            raise LoadError(f"the metadata of {path} lacks the number of layers (block_count)")
        return layers
    return int(configuration(cell).get_text_config(decoder=True).num_hidden_layers)


def configuration(options: Any, say: Callable[[str], None] = lambda text: None) -> Any:
    """A model's transformers configuration; ``options``: a cell or an object with the same fields.

    Raises ``LoadError`` if the configuration cannot be read.
    """
    from transformers import AutoConfig

    from dart_llm.cache import hub_cache
    from dart_llm.hub import hub_failure, plain
    from dart_llm.models.loading import resolve

    model = resolve(options.model, revision=options.revision, cache_dir=options.cache_dir, say=say)
    file = model.arguments.get("gguf_file")
    try:
        return AutoConfig.from_pretrained(
            model.reference,
            revision=options.revision or "main",
            cache_dir=hub_cache(options.cache_dir),
            trust_remote_code=options.trust_remote_code,
            **({"gguf_file": file} if file else {}),
        )
    except Exception as error:
        raise hub_failure(error, options.model, options.revision) or LoadError(
            f"the configuration of {options.model} could not be read: {plain(error)}"
        ) from error


def requested_format(options: Any) -> str:
    """The weight format after loading; ``options``: an object with ``ModelOptions``' fields."""
    from dart_llm.models.loading import placement, weight_format

    arguments = load_arguments(options)
    placed = placement(arguments["device"], arguments["device_map"])
    has_dtype, off_cpu = options.dtype is not None, "device_map" in placed
    return weight_format(options.model, options.weights, chosen=has_dtype, away=off_cpu)


def download_size(cell: Cell) -> int | None:
    """Bytes still to be downloaded for the cell's model; None if the hub cannot be reached.

    Raises ``LoadError`` if the model does not exist or the disk lacks space for it.
    """
    from huggingface_hub import try_to_load_from_cache

    from dart_llm.cache import cache_folder, hub_cache
    from dart_llm.hub import check_download, weight_files
    from dart_llm.models import cached
    from dart_llm.models.loading import is_default, resolve

    model, revision, cache = cell.model, cell.revision, hub_cache(cell.cache_dir)
    if is_default(model):
        folder = cached.converted_folder(cache_folder(cell.cache_dir), cached.MODEL_SHA256)
        return 0 if cached.is_intact(folder, cached.MODEL_SHA256) else cached.MODEL_WHEEL_BYTES
    if Path(model).expanduser().is_file():
        return 0
    if resolve(model, revision=revision, cache_dir=cell.cache_dir, say=lambda _: None).path:
        return 0
    config = try_to_load_from_cache(model, "config.json", cache_dir=cache, revision=revision)
    if isinstance(config, str) and weight_files(p.name for p in Path(config).parent.iterdir()):
        return 0
    return check_download(model, revision, cache)
