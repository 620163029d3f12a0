"""Features of vLLM that pruning does not support are refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from dart_vllm import frontend
from dart_vllm.worker import check_engine

from dart_llm.errors import ConfigError


def config(**changes: Any) -> Any:
    """A configuration that is supported, with ``changes``: GROUP__NAME=value."""
    none = SimpleNamespace(name="NONE")
    groups: dict[str, Any] = {
        "parallel_config": {f"{kind}_parallel_size": 1 for kind in ("tensor", "pipeline", "data")},
        "compilation_config": {"mode": none, "cudagraph_mode": none},
        "model_config": {
            "quantization": None,
            "enable_sleep_mode": False,
            "runner_type": "generate",
            "is_encoder_decoder": False,
        },
        "cache_config": {"kv_sharing_fast_prefill": False},
        "speculative_config": None,
        "lora_config": None,
        "kv_transfer_config": None,
        "weight_transfer_config": None,
    }
    for name, value in changes.items():
        group, _, key = name.partition("__")
        if key:
            groups[group][key] = value
        else:
            groups[group] = value
    return SimpleNamespace(
        **{k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in groups.items()}
    )


@pytest.fixture(autouse=True)
def registered() -> None:
    frontend.register()


def test_the_plain_engine_is_supported() -> None:
    check_engine(config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel_config__tensor_parallel_size": 2}, "tensor parallelism: use a size of 1"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__data_parallel_size": 2}, "data parallelism"),
        ({"parallel_config__enable_dbo": True}, "dual batch overlap"),
        ({"compilation_config__mode": SimpleNamespace(name="VLLM_COMPILE")}, "--enforce-eager"),
        ({"compilation_config__cudagraph_mode": SimpleNamespace(name="FULL")}, "CUDA graphs"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"lora_config": object()}, "LoRA"),
        ({"kv_transfer_config": object()}, "KV cache transfer"),
        ({"weight_transfer_config": object()}, "replacing weights"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv-sharing-fast-prefill"),
        ({"model_config__quantization": "awq"}, r"quantised weights \(awq\)"),
        ({"model_config__enable_sleep_mode": True}, "sleep mode"),
        ({"model_config__runner_type": "pooling"}, "run as 'pooling'"),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_features(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_engine(config(**changes))


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(ConfigError, match=r"vLLM 0\.33\.0: it was tested with 0\.32"):
        check_engine(config())


def test_without_the_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dart_vllm.worker.is_registered", lambda: False)
    with pytest.raises(ConfigError, match="VLLM_PLUGINS"):
        check_engine(config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_features": ["an image"]}, "images or sound"),
        ({"prompt_embeds": torch.zeros(2, 4)}, "embeddings"),
        ({"resumable": True}, "streamed"),
    ],
)
def test_inputs_that_are_not_text(change: dict[str, Any], message: str) -> None:
    fields = {"resumable": False, "prompt_embeds": None, "mm_features": None, "cache_salt": "mine"}
    fields["sampling_params"] = SimpleNamespace(skip_reading_prefix_cache=None)
    request = SimpleNamespace(**fields)
    frontend._prepare(request)
    assert request.sampling_params.skip_reading_prefix_cache is True
    assert request.cache_salt == f"{frontend.SALT}mine"
    with pytest.raises(ConfigError, match=message):
        frontend._prepare(SimpleNamespace(**{**fields, **change}))
