"""What requests ask for, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from dart_vllm.settings import Requests, ServerSettings, shapes_of

from dart_llm.errors import ConfigError

TEXT = SimpleNamespace(num_hidden_layers=2, hidden_size=4, intermediate_size=8)


def requests(model_type: str = "llama", **settings: object) -> Requests:
    server = ServerSettings.from_additional_config({"dart": settings})
    return Requests(server, shapes_of(TEXT), model_type)


def test_defaults_apply_to_their_method_only() -> None:
    read = requests(method="griffin", sparsity=0.4, settings={"masking_step": 3}).read
    for extra in (None, {}, {"other": 1}, {"dart": "griffin"}):
        asked = read(extra)
        assert asked is not None
        assert (asked.config.target, asked.config.masking_step) == (0.4, 3)
    asked = read({"dart": "static"})
    assert asked is not None
    assert (asked.config.target, asked.config.masking_step) == (0.3, 0)
    for extra in ({"dart": "dense"}, {"dart_sparsity": 0}):
        assert read(extra) is None


def test_learned_statistics_must_be_those_that_were_learned() -> None:
    read = requests(learn=["dart"]).read
    for sparsity in (0.3, 0.6):
        asked = read({"dart": "dart", "dart_sparsity": sparsity})
        assert asked is not None
        assert asked.config.target == sparsity
    with pytest.raises(ConfigError, match="did not learn"):
        read({"dart": "dart", "dart_settings": {"compensation_rank": 8}})


def test_the_residual_stream_must_be_known() -> None:
    assert requests("gemma2").read({"dart": "dart-prompt"}) is not None
    with pytest.raises(ConfigError, match="not known in models of type 'olmo2'"):
        requests("olmo2").read({"dart": "dart-prompt"})


def test_named_masks_stand_alone() -> None:
    read = requests(shared={"topic": "masks.safetensors"}).read
    asked = read({"dart_masks": "topic"})
    assert asked is not None
    assert asked.shared == "topic"
    with pytest.raises(ConfigError, match="leave out the other dart arguments"):
        read({"dart_masks": "topic", "dart": "griffin"})
    with pytest.raises(ConfigError, match="did you mean topic"):
        read({"dart_masks": "topik"})


def test_widths_of_each_layer() -> None:
    text = SimpleNamespace(num_hidden_layers=2, hidden_size=4, intermediate_size=[8, 6])
    assert [(layer.width, layer.hidden) for layer in shapes_of(text)] == [(8, 4), (6, 4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.5}, "need a method"),
        ({"methods": []}, "did you mean"),
        ({"masks": "a", "method": "griffin"}, "drop method, shared and learn"),
    ],
)
def test_settings_of_the_server(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        requests(**settings)
