"""Models in one weight format or several: a checkpoint, or its shape alone with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dart_llm.cache import cache_folder
from dart_llm.errors import ConfigError, LoadError
from dart_llm.experiments.cell import configuration
from dart_llm.experiments.study import load_model
from dart_llm.hub import plain
from dart_llm.models.cached import MEMBER, default_folder
from dart_llm.models.checkpoint import Checkpoint, checkpoint_facts, remember
from dart_llm.models.gguf_file import ROUNDED
from dart_llm.models.loading import is_default, parse_device, parse_dtype
from dart_llm.models.packed_loading import round_weights
from dart_llm.reporting.console import Ui
from dart_llm.studies.bench.settings import SpeedSettings, is_file

KINDS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""What GGUF calls a dtype."""


@dataclass(frozen=True)
class LoadedModel:
    """A model whose weights are in one format.

    ``weights``: as ``--weights`` names it; None: as the model was loaded.  ``tokenizer`` None:
    random weights.  ``requested``: whether our rows are measured on it, too.
    """

    name: str
    weights: str | None
    model: Any
    tokenizer: Any
    requested: bool = True

    @property
    def file(self) -> Path | None:
        """The GGUF file that replaces the model."""
        return Path(self.weights) if self.weights and is_file(self.weights) else None

    @property
    def blocks(self) -> str | None:
        """How the weights are packed in blocks, in words; None: they are not."""
        blocks: str | None = checkpoint_facts(self.model).get("weights")
        return blocks

    @property
    def dtype(self) -> str:
        """Of what is not in blocks."""
        return str(checkpoint_facts(self.model)["dtype"])

    @property
    def stored_as(self) -> str:
        """Blocks, or a dtype, in words."""
        return self.blocks or self.dtype

    @property
    def width(self) -> float:
        """Bytes of a weight that is not in blocks over those of bfloat16, as accounting counts."""
        return 1.0 if self.blocks else self.model.dtype.itemsize / 2

    @property
    def kind(self) -> str:
        """GGUF's name for the format: Q8_0, BF16; of a file what ``load`` reports."""
        if self.weights in ROUNDED:
            return str(self.weights).upper()
        if self.blocks:
            return str(checkpoint_facts(self.model)["file_quantisation"])
        return KINDS.get(self.dtype, self.dtype)


def load_formats(settings: SpeedSettings, ui: Ui) -> dict[str, LoadedModel]:
    """A model for every format by its name, in the order in which they were requested.

    Where none is dense a dense one follows, for plain transformers.  Raises ``LoadError`` for what
    cannot be loaded, and ``ConfigError`` for files of another model.
    """
    formats = settings.format_list() or ("auto",)
    models = {one.name: one for one in (_load(settings, weights, ui) for weights in formats)}
    if len(models) < len(formats):
        raise ConfigError(f"--weights {settings.weights} has formats of one name: rename a file")
    if all(one.blocks for one in models.values()):
        models["dense"] = replace(_load(settings, "dense", ui), requested=False)
    sizes = {name: one.model.config.get_text_config().vocab_size for name, one in models.items()}
    if len(set(sizes.values())) > 1:
        names = ", ".join(f"{name} ({size:,})" for name, size in sizes.items())
        raise ConfigError(f"these differ in their vocabularies: {names}; give files of one model")
    return models


def _load(settings: SpeedSettings, weights: str, ui: Ui) -> LoadedModel:
    changes = {"weights": "file", "model": weights} if is_file(weights) else {"weights": weights}
    model = prepare_model(settings.model_copy(update=changes), ui)
    loaded = LoadedModel(Path(weights).stem if is_file(weights) else weights, weights, *model)
    if weights != "auto":
        return loaded
    return replace(loaded, name="file" if loaded.blocks else "dense")


def prepare_model(settings: SpeedSettings, ui: Ui) -> tuple[Any, Any]:
    """Model and tokenizer, None for random weights; raises ``LoadError``."""
    if not settings.is_random:
        model, tokenizer, _ = load_model(settings, ui)
        return model, tokenizer
    with ui.status(f"making random weights of the shape of {settings.name}"):
        return _random(settings, ui), None


def _random(settings: SpeedSettings, ui: Ui) -> Any:
    from transformers import AutoModelForCausalLM

    config = _read_shape(settings.shape) if settings.shape else configuration(settings, ui.say)
    dtype = parse_dtype(settings.dtype)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    device, attention = parse_device(settings.device), settings.attn_implementation
    arguments = {"attn_implementation": attention} if attention else {}
    torch.manual_seed(settings.seed)
    try:
        make: Any = AutoModelForCausalLM.from_config
        if settings.weights in ROUNDED and device != "cpu":
            raise ConfigError("weights in blocks need a CPU: give --device cpu")
        with torch.device(device):  # billions of weights are drawn there at once
            model = make(config, dtype=dtype, **arguments)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise LoadError(f"no model can be made of {settings.name}: {plain(error)}") from None
    model = model.eval().to(device)
    if settings.weights in ROUNDED:
        round_weights(model, settings.weights)
    name = f"{settings.name} (random weights)"
    remember(model, Checkpoint(name, "random weights", settings.name, None, "none"))
    return model


def _read_shape(path: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoadError(f"{path} is not a model's configuration: {plain(error)}") from None


def gguf_path(model: str, cache_dir: str | None, say: Callable[[str], None]) -> Path | None:
    """The model's own GGUF file, if it is one; the default's lies in the cache."""
    if is_default(model):
        return default_folder(cache_folder(cache_dir), progress=say) / Path(MEMBER).name
    path = Path(model).expanduser()
    return path if path.is_file() else None
