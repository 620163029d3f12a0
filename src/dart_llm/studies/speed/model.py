"""The models of ``dart-llm bench speed``: a checkpoint, or its shape alone with random weights.

One model for every format in which the weights are held.

With arch.py a place that knows transformers: it makes models, and looks into their caches.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dart_llm.data import texts
from dart_llm.errors import ConfigError, LoadError
from dart_llm.experiments.model_facts import configuration
from dart_llm.experiments.study import load_model
from dart_llm.hub import plain
from dart_llm.models.checkpoint import Checkpoint, checkpoint_facts, remember
from dart_llm.models.devices import parse_device
from dart_llm.models.gguf import ROUNDED
from dart_llm.models.loading import parse_dtype
from dart_llm.models.packed_loading import random_packed
from dart_llm.reporting.console import Ui
from dart_llm.studies.speed.cases import Format
from dart_llm.studies.speed.settings import SpeedSettings

KINDS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""What GGUF calls a dtype."""

PLAIN = Format("dense", "dense")
"""What plain transformers runs on."""


@dataclass(frozen=True)
class Held:
    """A model whose weights are held in one format; ``tokenizer`` None: random weights."""

    form: Format
    model: Any
    tokenizer: Any
    asked: bool = True
    """Whether our own rows are wanted of it, too."""

    @property
    def blocks(self) -> str | None:
        """How it is held in blocks, in words; None where it is dense."""
        held: str | None = checkpoint_facts(self.model).get("weights")
        return held

    @property
    def words(self) -> str:
        """How it is held: in blocks, or in a dtype."""
        return self.blocks or str(checkpoint_facts(self.model)["dtype"])

    @property
    def suffix(self) -> str:
        """What labels call it."""
        return self.form.name if self.blocks else self.words

    @property
    def kind(self) -> str:
        """GGUF's name for what it holds: Q8_0, BF16; of a file what ``load`` says of it."""
        if self.form.weights in ROUNDED:
            return str(self.form.weights).upper()
        return (
            str(checkpoint_facts(self.model)["file_quantisation"])
            if self.blocks
            else (KINDS.get(self.words, self.words))
        )


def prepare_all(settings: SpeedSettings, ui: Ui) -> list[Held]:
    """A model for every format, in the order that was asked for.

    Where none is dense a dense one follows, for plain transformers.  Raises ``LoadError`` for what
    cannot be had, and ``ConfigError`` for files that hold another model.
    """
    every = [_held(settings, form, ui) for form in settings.format_list()]
    kinds = [one.kind for one in every if one.form.file]
    every = [
        replace(one, form=replace(one.form, name=f"file {one.kind}"))
        if one.form.file and kinds.count(one.kind) == 1
        else one
        for one in every
    ]
    found = list({one.form.name: one for one in every}.values())
    if all(one.blocks for one in found):
        found.append(replace(_held(settings, PLAIN, ui), asked=False))
    sizes = [one.model.config.get_text_config().vocab_size for one in found]
    if len(set(sizes)) > 1:
        names = ", ".join(
            f"{one.form.name} ({size:,})" for one, size in zip(found, sizes, strict=True)
        )
        raise ConfigError(f"these differ in their vocabularies: {names}; give files of one model")
    return found


def _held(settings: SpeedSettings, form: Format, ui: Ui) -> Held:
    changes: dict[str, Any] = {"weights": form.weights}
    if form.file is not None:
        changes["model"] = str(form.file)
    return _named(Held(form, *prepare_model(settings.model_copy(update=changes), ui)))


def _named(held: Held) -> Held:
    """What ``auto`` became, by its name."""
    if held.form.name != "auto":
        return held
    return replace(held, form=replace(held.form, name="file" if held.blocks else "dense"))


def plain_of(models: Sequence[Held]) -> Held:
    """The model that plain transformers runs on: the first that is dense."""
    return next((one for one in models if not one.blocks), models[-1])


def prepare_model(settings: SpeedSettings, ui: Ui) -> tuple[Any, Any]:
    """Model and tokenizer, None for random weights; raises ``LoadError`` for what cannot be had."""
    if not settings.is_random:
        model, tokenizer, _ = load_model(settings, ui)
        return model, tokenizer
    with ui.status(f"making random weights of the shape of {settings.name}"):
        return _random(settings, ui), None


def _random(settings: SpeedSettings, ui: Ui) -> Any:
    from transformers import AutoModelForCausalLM

    shape = settings.shape
    config = _shape_file(Path(shape)) if shape else configuration(settings, ui.say)
    dtype = parse_dtype(settings.dtype)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    device, attention = parse_device(settings.device).first, settings.attn_implementation
    chosen = {"attn_implementation": attention} if attention else {}
    torch.manual_seed(settings.seed)
    try:
        make: Any = AutoModelForCausalLM.from_config
        if settings.weights in ROUNDED:
            if device != "cpu":
                raise ConfigError("weights in blocks lie on a CPU alone: give --device cpu")
            make = functools.partial(random_packed, kind=settings.weights)
        model = make(config, dtype=dtype, **chosen)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise LoadError(f"no model can be made of {settings.name}: {plain(error)}") from None
    model = model.eval().to(device)
    about = f"{settings.name} (random weights)"
    remember(model, Checkpoint(about, "random weights", settings.name, None, "none"))
    return model


def _shape_file(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoadError(f"{path} holds no model's configuration: {plain(error)}") from None


def prompt_ids(model: Any, tokenizer: Any, length: int, seed: int) -> Tensor:
    """[1, length] int64 on the model's device: shipped text, over and over, or random tokens."""
    if tokenizer is None:
        vocabulary = int(model.config.get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocabulary, (1, length), generator=generator)
    else:
        known = tokenizer(texts.all_text(), return_tensors="pt", verbose=False).input_ids
        ids = known.repeat(1, -(-length // known.shape[1]))[:, :length]
    return ids.to(model.device)


@torch.inference_mode()
def cache_bytes(model: Any, ids: Tensor) -> float:
    """Bytes of keys and values of one position, all layers together, after ids [1, T]."""
    cache = model(ids, use_cache=True, logits_to_keep=1).cache
    length = int(cache.get_seq_length())
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)) / length
