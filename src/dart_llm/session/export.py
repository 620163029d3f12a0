"""A mask as a dense checkpoint of narrower width."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.errors import ConfigError
from dart_llm.models.ffn import FfnBlock
from dart_llm.pruning.masks import LayerMask


def export(
    model: nn.Module, blocks: Sequence[FfnBlock], masks: Sequence[LayerMask | None], folder: Path
) -> Path:
    """Write ``model`` with only the kept neurons; compensation goes into the output biases.

    Raises ``ConfigError`` when the layers keep different numbers of neurons, when the
    architecture's width is fixed, when a bias is needed for which it has no room, or when the masks
    come with low-rank compensation, which no plain checkpoint can carry.
    """
    check_plain(masks)
    kept = {
        block.down_width if mask is None else mask.kept
        for block, mask in zip(blocks, masks, strict=True)
    }
    if len(kept) != 1:
        raise ConfigError(
            f"export needs the same number of neurons in every layer, this mask keeps {min(kept)} "
            f'to {max(kept)}; use budget "uniform" and a sparsity that comes out even, such as 0.25'
        )
    key = blocks[0].width_key
    if key is None:
        raise ConfigError(f"{type(model).__name__} fixes its FFN width, so it cannot be narrowed")
    if any(block.offloaded for block in blocks):
        raise ConfigError("an offloaded model cannot be exported: load it without offloading")
    narrow = _narrow_model(model, key, kept.pop(), _needs_bias(blocks, masks))
    state = model.state_dict()
    names = {id(module): name for name, module in model.named_modules()}
    for block, mask in zip(blocks, masks, strict=True):
        if mask is not None:
            _slice(state, names, block, mask)
    missing, unexpected = narrow.load_state_dict(state, strict=False)
    if unexpected or any("mlp" not in name or "bias" not in name for name in missing):
        raise ConfigError(f"{type(model).__name__} cannot be exported: {missing or unexpected}")
    with torch.no_grad():
        for name in missing:  # gate and up biases that exist only to make room for the output's
            narrow.get_parameter(name).zero_()
    narrow.generation_config = model.generation_config
    narrow.save_pretrained(folder)
    return folder


def check_plain(masks: Sequence[LayerMask | None]) -> None:
    """Raise ``ConfigError`` for low-rank compensation."""
    if any(mask is not None and mask.low_rank is not None for mask in masks):
        raise ConfigError(
            "a plain checkpoint cannot have low-rank compensation: use compensation_rank=0 to "
            "export"
        )


def _needs_bias(blocks: Sequence[FfnBlock], masks: Sequence[LayerMask | None]) -> bool:
    return any(
        mask is not None and mask.bias is not None and getattr(block.down, "bias", None) is None
        for block, mask in zip(blocks, masks, strict=True)
    )


def _narrow_model(model: Any, key: str, width: int, bias: bool) -> Any:
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    setattr(text, key, width)
    if bias:
        if not hasattr(text, "mlp_bias"):
            raise ConfigError(
                f"{type(model).__name__} has no FFN biases to carry the compensation; "
                "use compensation=False to export"
            )
        text.mlp_bias = True
    with torch.random.fork_rng():  # the initial weights are replaced: draw nothing for them
        return type(model)(config).to(next(model.parameters()).dtype)


def _slice(
    state: dict[str, Tensor], names: dict[int, str], block: FfnBlock, mask: LayerMask
) -> None:
    ids = mask.ids
    for module in (block.up, block.gate):
        if module is None:
            continue
        rows = torch.cat([ids, ids + mask.width]) if block.fused else ids
        prefix = names[id(module)]
        dim = 1 if type(module).__name__ == "Conv1D" else 0
        state[f"{prefix}.weight"] = state[f"{prefix}.weight"].index_select(dim, rows)
        if f"{prefix}.bias" in state:
            state[f"{prefix}.bias"] = state[f"{prefix}.bias"].index_select(0, rows)
    prefix = names[id(block.down)]
    dim = 0 if type(block.down).__name__ == "Conv1D" else 1
    state[f"{prefix}.weight"] = state[f"{prefix}.weight"].index_select(dim, ids)
    if mask.bias is not None:
        old = state.get(f"{prefix}.bias")
        total = mask.bias if old is None else old.float() + mask.bias
        state[f"{prefix}.bias"] = total.to(state[f"{prefix}.weight"].dtype)
