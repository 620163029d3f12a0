"""Executors native and slim where others have a hand in: builds, memory, hooks, gradients."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import l1_unstructured
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dart_llm.errors import AttachError, ConfigError
from dart_llm.models.llama import slim_unsupported_reason as why_not_slim
from dart_llm.native import build
from dart_llm.session.run import prune
from steps import apart, decode, shared_model
from tiny import CONFIGS, tiny, tokens

CLOSE = 3e-6
PROMPT, DECODED = 66, 6


pytestmark = pytest.mark.usefixtures("native")


def _ids() -> Tensor:
    return tokens(1, PROMPT + DECODED, seed=3)


def test_what_an_interrupted_build_left_behind_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DART_CACHE", str(tmp_path))
    folder = build.cache_folder() / "native"
    (folder / ".tmp-killed").mkdir(parents=True)
    (folder / ".tmp-killed" / "lock").touch()
    os.utime(folder / ".tmp-killed", (0, 0))
    seen: list[Path] = []

    def load(name: str, files: list[str], build_directory: str, **settings: object) -> None:
        seen.append(Path(build_directory))
        (seen[0] / f"{name}.so").write_text("whole", encoding="utf-8")
        assert list(folder.glob("*.so")) == []  # nobody loads what is half written

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    build.why_not.cache_clear()
    assert build.why_not() == ""
    (built,) = folder.iterdir()
    assert built.name.startswith(build.built_name()) and built.suffix == ".so"
    assert built.read_text(encoding="utf-8") == "whole"
    assert seen[0] != folder and not seen[0].exists()


def test_what_torch_says_of_cuda_is_not_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    theirs = logging.getLogger("torch.utils.cpp_extension")
    with build._silent_about_cuda():
        theirs.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local")
        theirs.warning("the compiler is old")
    theirs.warning("CUDA again")
    assert [one.getMessage() for one in caplog.records] == ["the compiler is old", "CUDA again"]


def _after_hooking(executor: str) -> Tensor:
    model = tiny("llama")
    added = torch.linspace(-1, 1, 32)
    with prune(model, "griffin", sparsity=0.5, executor=executor):
        handle = model.model.layers[1].register_forward_hook(lambda module, args, out: out + added)
        steered = decode(model, _ids(), PROMPT)
        handle.remove()
        return torch.stack([steered, decode(model, _ids(), PROMPT)])


def test_hooks_inside_the_model_still_run() -> None:
    expected, found = _after_hooking("compact"), _after_hooking("slim")
    assert apart(found[0], expected[0]) < CLOSE
    assert apart(found[1], expected[1]) < CLOSE
    assert apart(expected[0], expected[1]) > 0.1


def test_heads_wider_than_the_stream_stay_in_their_memory() -> None:
    settings = {**CONFIGS["qwen3"][1], "head_dim": 128}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3"](**settings)).eval()
    logits = {}
    for executor in ("compact", "slim"):
        with prune(model, "griffin", sparsity=0.5, executor=executor):
            logits[executor] = decode(model, _ids(), PROMPT)
    assert apart(logits["slim"], logits["compact"]) < CLOSE


def _gradient(executor: str) -> Tensor:
    """Of a key projection, after a prompt with gradients and a step without."""
    model, ids, cache = tiny("llama"), _ids(), DynamicCache()
    with prune(model, "griffin", sparsity=0.5, executor=executor):
        model(ids[:, :PROMPT], past_key_values=cache)
        with torch.no_grad():
            model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache)
        assert not cache.layers[0].keys.requires_grad
        model(ids[:, PROMPT + 1 : PROMPT + 2], past_key_values=cache).logits.sum().backward()
    return model.model.layers[1].self_attn.k_proj.weight.grad


def test_a_step_without_gradients_cuts_them_off() -> None:
    assert apart(_gradient("slim"), _gradient("compact")) < 1e-4


def test_a_cache_of_two_rows_is_not_one_of_one() -> None:
    model, ids, cache = shared_model("llama"), tokens(2, 20), DynamicCache()
    with prune(model, "griffin", sparsity=0.5, executor="slim"), torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(RuntimeError):
            model(ids[:1, :1], past_key_values=cache)


def test_autocast_and_outputs_asked_for_by_the_configuration() -> None:
    model, ids, cache = tiny("llama"), _ids(), DynamicCache()
    with prune(model, "griffin", sparsity=0.5, executor="slim") as run, torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decode(model, ids, PROMPT)
        model.config.output_hidden_states = True
        model(ids[:, :PROMPT], past_key_values=cache)
        out = model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache)
    assert run.executor == "slim" and len(out.hidden_states) == 5


def _resized(width: int):
    """A model whose second layer has an FFN of another width."""
    model = tiny("llama")
    mlp, hidden = model.model.layers[1].mlp, model.config.hidden_size
    torch.manual_seed(0)
    mlp.gate_proj, mlp.up_proj = (torch.nn.Linear(hidden, width, bias=False) for _ in range(2))
    mlp.down_proj = torch.nn.Linear(width, hidden, bias=False)
    return model


@pytest.mark.parametrize("width", [24, 96])
def test_layers_of_different_widths_are_not_read_past_their_ends(width: int) -> None:
    model, misfit = _resized(width), "has weights of other shapes or layouts than its kind"
    assert model.model.layers[0].mlp.down_proj.in_features == 48
    assert why_not_slim(model) == misfit
    with pytest.raises(ConfigError, match=misfit):
        prune(model, "griffin", sparsity=0, executor="slim").attach()
    found = {}
    for executor in ("compact", "auto"):
        with prune(model, "griffin", sparsity=0.5, executor=executor) as run:
            found[executor] = decode(model, _ids(), PROMPT)
    assert run.executor == "native"
    assert apart(found["auto"], found["compact"]) < CLOSE


def _by_inputs(module: torch.nn.Linear) -> None:
    """The same weight, stored the other way round."""
    module.weight = torch.nn.Parameter(module.weight.detach().t().contiguous().t())


@pytest.mark.parametrize(
    ("place", "executor"),
    [("self_attn.q_proj", "native"), ("mlp.gate_proj", "compact"), ("mlp.up_proj", "compact")],
)
def test_weights_that_are_stored_by_inputs(place: str, executor: str) -> None:
    model = tiny("llama")
    _by_inputs(model.model.layers[1].get_submodule(place))
    with prune(model, "griffin", sparsity=0.5) as run:
        found = decode(model, _ids(), PROMPT)
    assert run.executor == executor
    with prune(shared_model("llama"), "griffin", sparsity=0.5, executor="compact"):
        assert apart(found, decode(shared_model("llama"), _ids(), PROMPT)) < CLOSE


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_weights_that_torch_computes_from_others_run_by_compact(name: str) -> None:
    model = tiny("llama")
    masked = getattr(model.model.layers[1].mlp, name)
    l1_unstructured(masked, "weight", 0.3)
    assert prune(model, "griffin", sparsity=0.5).executor == "compact"
    with pytest.raises(ConfigError, match="layer 1 has weights that are computed from others"):
        prune(model, "griffin", sparsity=0.5, executor="native").attach()


def test_parametrized_weights_are_not_read_once_for_all() -> None:
    model = tiny("llama")
    weight_norm(model.model.layers[1].self_attn.q_proj)
    assert why_not_slim(model) == "has a forward of its own in a ParametrizedLinear"
    assert prune(model, "griffin", sparsity=0.5).executor == "native"


def test_hooks_on_all_modules_still_run() -> None:
    seen: list[str] = []
    with prune(shared_model("llama"), "griffin", sparsity=0.5, executor="slim"):
        handle = register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
        try:
            decode(shared_model("llama"), _ids(), PROMPT)
        finally:
            handle.remove()
    assert seen.count("LlamaDecoderLayer") == 4 * (1 + DECODED)


def test_a_mask_for_every_kind_of_layer_is_left_to_the_model() -> None:
    model, ids = shared_model("qwen3"), _ids()
    with prune(model, "griffin", sparsity=0.5, executor="slim"), torch.no_grad():
        expected = decode(model, ids[:, : PROMPT + 1], PROMPT)
        cache = DynamicCache()
        model(ids[:, :PROMPT], past_key_values=cache)
        given = {"full_attention": None}
        out = model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache, attention_mask=given)
    assert apart(out.logits, expected[:, -1:]) < CLOSE


def test_dropout_is_left_to_the_model() -> None:
    model = tiny("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    found = {}
    for executor in ("compact", "slim"):
        torch.manual_seed(0)
        with prune(model, "griffin", sparsity=0.5, executor=executor):
            found[executor] = decode(model, _ids(), PROMPT)
    assert apart(found["slim"], found["compact"]) < CLOSE


@pytest.mark.parametrize("executor", ["native", "slim"])
def test_weights_that_were_moved_are_not_read_where_they_lay(executor: str) -> None:
    moves = (
        lambda model: model.to(torch.bfloat16),
        lambda model: model.share_memory(),
        lambda model: model.resize_token_embeddings(130),
        lambda model: model.load_state_dict(tiny("llama", seed=5).state_dict(), assign=True),
    )
    for move in moves:
        model = tiny("llama")
        with prune(model, "griffin", sparsity=0.5, executor=executor):
            decode(model, _ids(), PROMPT)
            move(model)
            with pytest.raises(AttachError, match="replaced or moved"):
                decode(model, _ids(), PROMPT)
        assert model.model.layers[0].mlp.down_proj.weight.is_contiguous()
        decode(model, _ids(), PROMPT)
