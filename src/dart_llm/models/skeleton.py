"""A model without its weights, and whether a file's tensors fit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dart_llm.errors import LoadError
from dart_llm.models.ffn import is_by_inputs
from dart_llm.models.gguf_file import StoredTensor


def empty_model(config: Any, **arguments: Any) -> nn.Module:
    """The model without its weights; its buffers are there, and what it ties is tied."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        make: Any = AutoModelForCausalLM.from_config
        model: nn.Module = make(config, **arguments)
    tie_embeddings(model, config)
    return model


def tie_embeddings(model: Any, config: Any) -> None:
    """Make the output head the input embedding, where the configuration says so."""
    if config.get_text_config().tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


def check_fit(file: str, model: nn.Module, found: Mapping[str, StoredTensor]) -> None:
    """Raise ``LoadError`` where the tensors are not the model's, before any is read."""
    for target, tensor in found.items():
        wanted = tuple(model.get_parameter(target).shape)
        if len(wanted) == 2 and is_by_inputs(model.get_submodule(target.rpartition(".")[0])):
            wanted = wanted[::-1]
        if tensor.shape != wanted:
            raise LoadError(
                f"{file}: tensor {tensor.name} is {list(tensor.shape)}, and the model's {target} "
                f"is {list(wanted)}"
            )
        if not tensor.is_known:
            raise LoadError(
                f"{file}: tensor {tensor.name} is of type {tensor.kind.upper()}, in which no "
                "weights are read; give a file of another quantisation"
            )
    if missing := [name for name, _ in model.named_parameters() if name not in found]:
        raise LoadError(f"{file} lacks {len(missing)} of the model's weights, such as {missing[0]}")
