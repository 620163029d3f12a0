"""Which device a text means, on machines with two GPUs, with MPS, and with neither."""

import logging

import pytest
import torch

from dart_llm.errors import ConfigError
from dart_llm.models import devices
from dart_llm.models.loading import DeviceChoice, memory_failure, parse_device, placement
from steps import refused

CPU = DeviceChoice("cpu")


def machine(patch, gpus=0, mps=False):
    """Pretend to run where there are ``gpus`` GPUs of 10 GB, 20 GB, ... free."""
    patch.setattr(devices, "_gpu_count", lambda: gpus)
    patch.setattr(devices, "_has_mps", lambda: mps)
    patch.setattr(torch.cuda, "mem_get_info", lambda index: (10**10 * (index + 1), 10**11))


CHOICES = {
    **dict.fromkeys((None, "", "auto", "cuda", "0"), (0,)),
    "CUDA:1": (1,),
    **dict.fromkeys(("0,1", "cuda:0,cuda:1"), (0, 1)),
    " 1, 0 ": (1, 0),
}
REFUSED = ("0,5", "gpu", "0,,1", "-1", "0,0")
TABLE = '{"model": 0, "lm_head": "cpu"}'
SPREAD = {"device_map": "auto", "max_memory": {0: 9 * 10**9, 1: 18 * 10**9}}
PLACES = [
    (None, None, {}),
    ("cpu", None, {}),
    ("1", None, {"device_map": {"": "cuda:1"}}),
    ("0,1", None, SPREAD),
    (None, "balanced", {"device_map": "balanced"}),
    (None, {"": 1}, {"device_map": {"": 1}}),
    ("", TABLE, {"device_map": {"model": 0, "lm_head": "cpu"}}),
]


def test_with_two_gpus(monkeypatch, snapshot):
    machine(monkeypatch, gpus=2)
    for text, indices in CHOICES.items():
        assert parse_device(text) == DeviceChoice("cuda", indices), text
    assert parse_device("cpu") == CPU
    assert (DeviceChoice("cuda", (1, 0)).first, CPU.first) == ("cuda:1", "cpu")
    for device, device_map, expected in PLACES:
        assert placement(device, device_map) == expected
    assert refused(parse_device, REFUSED) == snapshot
    with pytest.raises(ConfigError, match="device and device_map exclude each other"):
        placement("cpu", "auto")
    with pytest.raises(ConfigError, match=r"is not JSON \(.* at character 1\); write auto"):
        placement(None, "{model: 0}")


def test_without_gpus_a_warning_and_the_cpu(monkeypatch, caplog):
    machine(monkeypatch)
    for text in (None, "auto", "cpu"):  # none was asked for: nothing is said
        assert parse_device(text) == CPU
    gpus = [(text, "no GPU that PyTorch can use") for text in ("0", "0,1", "cuda:3")]
    asked = [*gpus, ("mps", "no MPS device")]
    with caplog.at_level(logging.WARNING, logger="dart_llm"):
        assert [parse_device(text) for text, _ in asked] == [CPU] * 4
    assert caplog.messages == [
        f"device {text} was asked for, but this machine has {lack}: using the CPU"
        for text, lack in asked
    ]
    machine(monkeypatch, mps=True)
    assert parse_device("mps") == DeviceChoice("mps")
    assert placement("mps", None) == {"device_map": {"": "mps"}}


def test_memory_failure_names_the_next_steps():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ):
        outer = ValueError("loading failed")
        outer.__cause__ = error
        assert str(memory_failure(outer, "big/model", "float32")) == (
            "big/model does not fit in memory as float32; try --dtype bfloat16, a smaller batch, a "
            "shorter --prompt-length, or --device-map auto to spread it over several devices"
        )
    assert memory_failure(RuntimeError("shapes differ"), "m", "float32") is None
