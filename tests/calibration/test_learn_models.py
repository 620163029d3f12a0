"""Learning leaves no trace on a model, whatever state it and its caller are in; or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from accelerate_cases import dispatched, on_the_host
from dart_llm.calibration.calibrate import observing
from dart_llm.errors import AttachError, ConfigError, DartError
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import prune
from prior_cases import CONFIG, PARTS, attached, equal, files, learnt, tensors
from steps import CACHE, Same, decode, forward_lengths, new_cache, same_masks
from tiny import tiny, tokens

IDS = tokens(1, 30, seed=3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, which ``prune`` finds too."""
    monkeypatch.setenv("DART_CACHE", str(tmp_path))
    return tmp_path


# whatever state the model and the caller are in


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_of_the_caller(cache: Path, mode: Callable[[], Any]) -> None:
    """What is learnt, and what is read from the disk, serves later forwards of any mode."""
    wanted = tensors(learnt(tiny(), cache / "other"))
    for _ in range(2):  # learnt, then found on disk
        model = tiny()
        with mode(), prune(model, CONFIG) as run:
            decode(model, IDS, 20)
            assert run.report().achieved_sparsity == pytest.approx(0.5)
        assert equal(tensors(run.layers), wanted)
        assert not any(t.is_inference() for t in tensors(run.layers))
        with torch.enable_grad(), prune(model, CONFIG, executor="masked"):
            cache_of = new_cache(model)
            model(IDS[:, :20], **{CACHE: cache_of})
            model(IDS[:, 20:21], **{CACHE: cache_of}).logits.sum().backward()
        assert all(p.grad is not None for p in model.model.layers[0].mlp.parameters())
    assert len(files(cache)) == PARTS


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_training_model_goes_on_training(name: str) -> None:
    """Dropout neither draws from the user's random numbers nor enters what is learnt."""
    model, calm = tiny(name).train(), tiny(name)
    state = torch.get_rng_state()
    run = prune(model, CONFIG)
    assert len(forward_lengths(model, run.attach)) == 25
    run.detach()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert forward_lengths(calm, attached(calm)) == [], "the same was learnt as by a calm model"


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = tiny(name)
    with Same(model):
        attached(model)()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_an_interrupted_lesson_leaves_its_text_alone(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    model = tiny("gpt2").train()

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dart_llm.calibration.collect.gradients", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(model, CONFIG).attach()
    assert all(module.training for module in model.modules())
    assert len(files(cache)) == 1, "the text is written, and is not written again"
    model.eval()
    with Same(model):
        assert forward_lengths(model, attached(model)) == [24, 24]


def test_nested_blocks_are_refused_before_anything_is_learnt(cache: Path) -> None:
    model = tiny()
    with prune(model, "griffin", sparsity=0.5):
        for inner in (model, model.model):
            run = prune(inner, CONFIG)
            handle = model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
            with pytest.raises(AttachError, match=r"dart_llm\.restore\(model\)"):
                run.attach()
            handle.remove()
    assert files(cache) == []


def test_models_that_accelerate_has_hooked() -> None:
    model = dispatched(tiny(), None)
    with prune(model, CONFIG) as run:
        decode(model, IDS, 20)
    plain = tiny()
    with prune(plain, CONFIG) as wanted:
        decode(plain, IDS, 20)
    assert same_masks(list(run.masks().values()), list(wanted.masks().values()))


def test_another_default_dtype() -> None:
    model, masks = tiny(), []
    try:
        for dtype in (torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            with prune(model, CONFIG) as run:
                decode(model, IDS, 20)
            masks.append(list(run.masks().values()))
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_masks(*masks)


# models that cannot be learnt from


def test_an_offloaded_model_is_refused() -> None:
    model = on_the_host(tiny(), None)
    with pytest.raises(ConfigError, match="layer 0 is offloaded"):
        prune(model, CONFIG)
    config = PruneConfig(
        method="mine", sparsity=0.5, prior={"sequences": 2, "length": 24, "opening": 0}
    )
    run = prune(model, config)
    with pytest.raises(ConfigError) as caught:
        run.attach()
    assert str(caught.value) == (
        'method "mine" learns from its own text, which an offloaded model does not write: load it '
        "whole, or use griffin"
    )


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = tiny()
    with pytest.raises(
        ConfigError, match=r'"x" learns .* torch\.inference_mode\(\) have not: load'
    ):
        prune(model, CONFIG).attach()
    with prune(model, "griffin", sparsity=0.5):
        decode(model, IDS, 20)


@pytest.mark.parametrize("where", ["lm_head", "model.layers.1.mlp.down_proj"])
def test_weights_that_are_not_finite(cache: Path, where: str) -> None:
    model = tiny()
    with torch.no_grad():
        model.get_submodule(where).weight[5, 3] = float("nan")
    with pytest.raises(DartError, match="not finite"):
        prune(model, CONFIG).attach()
    assert files(cache) == []


def test_calibration_has_no_use_for_a_score_that_learns() -> None:
    config = PruneConfig.build("wanda", sparsity=0.5, score="fisher", prior={})
    with pytest.raises(ConfigError, match='score "fisher" learns from the model itself'):
        observing(config)
