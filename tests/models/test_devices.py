"""Which device a text means, on machines with two GPUs, with MPS, and with neither."""

from __future__ import annotations

import logging

import pytest
import torch

from dart_llm.errors import ConfigError
from dart_llm.models import devices
from dart_llm.models.devices import DeviceChoice, memory_failure, parse_device, placement

CPU = DeviceChoice("cpu")


def machine(patch: pytest.MonkeyPatch, gpus: int = 0, mps: bool = False) -> None:
    """Pretend to run where there are ``gpus`` GPUs of 10 GB, 20 GB, ... free."""
    patch.setattr(devices, "_gpu_count", lambda: gpus)
    patch.setattr(devices, "_has_mps", lambda: mps)
    patch.setattr(torch.cuda, "mem_get_info", lambda index: (10**10 * (index + 1), 10**11))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, DeviceChoice("cuda", (0,))),
        ("", DeviceChoice("cuda", (0,))),
        ("auto", DeviceChoice("cuda", (0,))),
        ("cuda", DeviceChoice("cuda", (0,))),
        ("0", DeviceChoice("cuda", (0,))),
        ("1", DeviceChoice("cuda", (1,))),
        ("CUDA:1", DeviceChoice("cuda", (1,))),
        ("0,1", DeviceChoice("cuda", (0, 1))),
        (" 1, 0 ", DeviceChoice("cuda", (1, 0))),
        ("cuda:0,cuda:1", DeviceChoice("cuda", (0, 1))),
        ("cpu", CPU),
    ],
)
def test_with_two_gpus(
    monkeypatch: pytest.MonkeyPatch, text: str | None, expected: DeviceChoice
) -> None:
    machine(monkeypatch, gpus=2)
    assert parse_device(text) == expected


@pytest.mark.parametrize("text", [None, "auto", "cpu"])
def test_without_gpus_nothing_is_said_when_none_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str | None
) -> None:
    machine(monkeypatch)
    assert parse_device(text) == CPU
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("text", "lack"),
    [
        ("0", "no GPU that PyTorch can use"),
        ("0,1", "no GPU that PyTorch can use"),
        ("cuda:3", "no GPU that PyTorch can use"),
        ("mps", "no MPS device"),
    ],
)
def test_without_gpus_a_warning_and_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str, lack: str
) -> None:
    machine(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="dart_llm"):
        assert parse_device(text) == CPU
    assert caplog.messages == [
        f"device {text} was asked for, but this machine has {lack}: using the CPU"
    ]


def test_mps_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, mps=True)
    assert parse_device("mps") == DeviceChoice("mps")
    assert placement("mps", None) == {"device_map": {"": "mps"}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("2", "GPU 2 of device '2' does not exist: this machine has 2 (0 to 1)"),
        ("0,5", "GPU 5 of device '0,5' does not exist: this machine has 2 (0 to 1)"),
        ("gpu", "'gpu' in device 'gpu' is no device; " + devices.FORMS),
        ("0,,1", "'' in device '0,,1' is no device; " + devices.FORMS),
        ("-1", "'-1' in device '-1' is no device; " + devices.FORMS),
        ("0,0", "device '0,0' names a GPU twice; " + devices.FORMS),
    ],
)
def test_refused(monkeypatch: pytest.MonkeyPatch, text: str, sentence: str) -> None:
    machine(monkeypatch, gpus=2)
    with pytest.raises(ConfigError) as caught:
        parse_device(text)
    assert str(caught.value) == sentence


def test_a_malformed_device_is_refused_without_gpus_too(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    with pytest.raises(ConfigError, match="is no device"):
        parse_device("gpu0")


def test_names_of_a_choice() -> None:
    assert (DeviceChoice("cuda", (1, 0)).first, str(DeviceChoice("cuda", (1, 0)))) == (
        "cuda:1",
        "cuda:1,cuda:0",
    )
    assert (CPU.first, str(CPU)) == ("cpu", "cpu")


def test_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=2)
    assert placement(None, None) == {}
    assert placement("cpu", None) == {}
    assert placement("1", None) == {"device_map": {"": "cuda:1"}}
    assert placement("0,1", None) == {
        "device_map": "auto",
        "max_memory": {0: 9 * 10**9, 1: 18 * 10**9},
    }
    assert placement(None, "balanced") == {"device_map": "balanced"}
    assert placement(None, {"": 1}) == {"device_map": {"": 1}}
    assert placement("", '{"model": 0, "lm_head": "cpu"}') == {
        "device_map": {"model": 0, "lm_head": "cpu"}
    }


def test_placement_refuses_two_answers_and_broken_json() -> None:
    with pytest.raises(ConfigError, match="device and device_map exclude each other"):
        placement("cpu", "auto")
    with pytest.raises(ConfigError, match=r"is not JSON \(.* at character 1\); write auto"):
        placement(None, "{model: 0}")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_memory_failure_names_the_next_steps(error: Exception) -> None:
    outer = ValueError("loading failed")
    outer.__cause__ = error
    sentence = str(memory_failure(outer, "big/model", "float32"))
    assert sentence == (
        "big/model does not fit in memory as float32; try --dtype bfloat16, a smaller batch, a "
        "shorter --prompt-length, or --device-map auto to spread it over several devices"
    )


def test_other_failures_are_not_about_memory() -> None:
    assert memory_failure(RuntimeError("shapes differ"), "m", "float32") is None
