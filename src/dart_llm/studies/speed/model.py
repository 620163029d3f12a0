"""The model of ``dart-llm bench speed``: a checkpoint, or its shape alone with random weights.

With arch.py a place that knows transformers: it makes models, and looks into their caches.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dart_llm.cache import hub_cache
from dart_llm.data import texts
from dart_llm.errors import LoadError
from dart_llm.experiments.study import load_model
from dart_llm.hub import plain
from dart_llm.models.checkpoint import Checkpoint, remember
from dart_llm.models.devices import parse_device
from dart_llm.models.loading import parse_dtype, resolve
from dart_llm.reporting.console import Ui
from dart_llm.studies.speed.settings import SpeedSettings


def prepare_model(settings: SpeedSettings, ui: Ui) -> tuple[Any, Any]:
    """Model and tokenizer, None for random weights; raises ``LoadError`` for what cannot be had."""
    if not settings.is_random:
        model, tokenizer, _ = load_model(settings, ui)
        return model, tokenizer
    with ui.status(f"making random weights of the shape of {settings.name}"):
        return _random(settings, ui), None


def _random(settings: SpeedSettings, ui: Ui) -> Any:
    from transformers import AutoModelForCausalLM

    config = _shape_file(Path(settings.shape)) if settings.shape else _of_checkpoint(settings, ui)
    dtype = parse_dtype(settings.dtype)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    attention = settings.attn_implementation
    chosen = {"attn_implementation": attention} if attention else {}
    torch.manual_seed(settings.seed)
    try:
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, dtype=dtype, **chosen)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise LoadError(f"no model can be made of {settings.name}: {plain(error)}") from None
    model = model.eval().to(parse_device(settings.device).first)
    about = f"{settings.name} (random weights)"
    remember(model, Checkpoint(about, "random weights", settings.name, None, "none"))
    return model


def _shape_file(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoadError(f"{path} holds no model's configuration: {plain(error)}") from None


def _of_checkpoint(settings: SpeedSettings, ui: Ui) -> Any:
    from transformers import AutoConfig

    found = resolve(
        settings.model, revision=settings.revision, cache_dir=settings.cache_dir, say=ui.say
    )
    file = found.arguments.get("gguf_file")
    try:
        return AutoConfig.from_pretrained(
            found.reference,
            revision=settings.revision or "main",
            cache_dir=hub_cache(settings.cache_dir),
            trust_remote_code=settings.trust_remote_code,
            **({"gguf_file": file} if file else {}),
        )
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(
            f"the configuration of {settings.model} could not be read: {plain(error)}"
        ) from None


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
