"""Masks written as a dense checkpoint of narrower width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dart_llm.errors import ConfigError
from dart_llm.models.describe import describe
from dart_llm.session.run import prune
from steps import apart, decode, generate, picked, shared_model, state_of
from tiny import NAMES, tiny, tokens

EXPORTED = tuple(name for name in NAMES if name != "bloom")


def _zero_everywhere(model: Any, masks: dict[int, Tensor], ids: Tensor) -> tuple[Tensor, list]:
    """Logits and FFN outputs of ``model`` with the masks applied to all positions."""
    wanted = {layer: kept.tolist() for layer, kept in masks.items()}
    outputs: list[Tensor] = []
    blocks = describe(model).blocks
    handles = [b.down.register_forward_hook(lambda m, a, z: outputs.append(z)) for b in blocks]
    handles += [
        b.down.register_forward_pre_hook(
            lambda m, a, b=b: (
                a[0] * torch.zeros(b.down_width).index_fill(0, torch.tensor(wanted[b.index]), 1),
            )
        )
        for b in blocks
    ]
    try:
        with torch.no_grad():
            return model(ids).logits, outputs
    finally:
        for handle in handles:
            handle.remove()


def _outputs(model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    everything = {b.index: torch.arange(b.down_width) for b in describe(model).blocks}
    return _zero_everywhere(model, everything, ids)


@pytest.mark.parametrize("name", EXPORTED)
def test_export(name: str, tmp_path: Path) -> None:
    model, ids = shared_model(name), tokens(2, 20)
    with prune(model, "griffin", sparsity=0.5) as run:
        generate(model, tokens(), 4)
        assert run.export(tmp_path / "narrow") == tmp_path / "narrow"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow").eval()
    assert type(loaded) is type(model)
    assert {b.down_width for b in describe(loaded).blocks} == {24}
    wanted, wanted_z = _zero_everywhere(model, run.masks(), ids)
    got, got_z = _outputs(loaded, ids)
    assert apart(got, wanted) < 1e-5
    assert all(apart(a, b) < 1e-5 for a, b in zip(got_z, wanted_z, strict=True))
    saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in loaded.parameters())
    gated = describe(model).weights("output", 0)[0].gate is not None
    per_neuron = 32 * (3 if gated else 2)
    assert saved >= 4 * 24 * per_neuron
    with prune(loaded, "griffin", sparsity=0.5) as run:  # and it can be pruned again
        generate(loaded, tokens(), 4)
    assert run.report().layers[0].kept == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_export_keeps_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = shared_model("llama", dtype)
    with prune(model, "griffin", sparsity=0.5) as run:
        generate(model, tokens(), 4)
    run.export(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    kept = run.masks()[2]
    down = model.model.layers[2].mlp.down_proj.weight[:, kept]
    assert torch.equal(loaded.model.layers[2].mlp.down_proj.weight, down)


@pytest.mark.parametrize("name", ["llama", "llama-bias", "gpt2", "gpt_neox", "phi", "opt"])
def test_export_with_compensation(name: str, tmp_path: Path) -> None:
    """The constant goes into the output's bias, made where the architecture has room for it."""
    model, ids = shared_model(name), tokens(2, 20)
    with prune(model, "griffin", sparsity=0.5, compensation=True) as run:
        generate(model, tokens(), 4)
    run.export(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    first, plain = _outputs(loaded, ids)[1][0], _zero_everywhere(model, run.masks(), ids)[1][0]
    extra = state_of(run).selection.masks[0].bias
    assert float(extra.norm()) > 0
    assert apart(first.reshape(-1, 32), (plain + extra).reshape(-1, 32)) < 1e-5


@pytest.mark.parametrize("name", ["mistral", "qwen2", "phi3", "falcon", "olmo2"])
def test_export_without_room_for_compensation(name: str, tmp_path: Path) -> None:
    model = shared_model(name)
    with prune(model, "griffin", sparsity=0.5, compensation=True) as run:
        generate(model, tokens(), 4)
    with pytest.raises(ConfigError, match="compensation=False"):
        run.export(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_export_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    model = shared_model()
    with prune(model, "dart", sparsity=0.5) as run:
        decode(model, tokens(1, 76), 70)
    with pytest.raises(ConfigError, match="no place in a plain checkpoint: use compensation_rank"):
        run.export(tmp_path / "x")
    with prune(model, "dart-prompt", sparsity=0.5) as run:
        decode(model, tokens(1, 76), 70)
    with pytest.raises(ConfigError, match=r'keeps \d+ to \d+; use budget "uniform"'):
        run.export(tmp_path / "x")
    with prune(model, masks={0: range(24)}) as run:
        generate(model, tokens(), 4)
    with pytest.raises(ConfigError, match="keeps 24 to 48"):
        run.export(tmp_path / "x")
    bloom = shared_model("bloom")
    with prune(bloom, "griffin", sparsity=0.5) as run:
        generate(bloom, tokens(), 4)
    with pytest.raises(ConfigError, match="BloomForCausalLM fixes its FFN width"):
        run.export(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_export_of_given_masks_needs_no_text(tmp_path: Path) -> None:
    model, masks = shared_model(), picked()
    prune(model, masks=masks).export(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens(1, 12)
    given = {layer: torch.tensor(kept) for layer, kept in masks.items()}
    assert apart(_outputs(loaded, ids)[0], _zero_everywhere(model, given, ids)[0]) < 1e-5


def test_export_does_not_change_the_model(tmp_path: Path) -> None:
    model, ids = tiny("gpt2"), tokens(1, 12)
    before, config = decode(model, ids, 8), model.config.to_dict()
    prune(model, masks=picked(), compensation=True).export(tmp_path)
    assert torch.equal(decode(model, ids, 8), before) and model.config.to_dict() == config


def test_export_of_a_wrapper_and_of_tied_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny("qwen2").config
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config).eval()
    prune(model, masks=picked()).export(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    given = {layer: torch.tensor(kept) for layer, kept in picked().items()}
    ids = tokens(1, 12)
    assert apart(_outputs(loaded, ids)[0], _zero_everywhere(model, given, ids)[0]) < 1e-5
