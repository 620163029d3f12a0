"""Which device a model goes to: ``0``, ``0,1``, ``cuda:0``, ``cpu``, ``mps``, ``auto``."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from typing import Any

from dart_llm.errors import ConfigError, LoadError, chain

logger = logging.getLogger("dart_llm")

FORMS = "write 0, 0,1, cuda:0, cpu, mps or auto"

GPU_SHARE = 0.9
"""Fraction of a GPU's free memory that weights may take when a model is spread over several."""


@dataclass(frozen=True)
class DeviceChoice:
    """One device, or several GPUs that share a model."""

    kind: str
    indices: tuple[int, ...] = ()

    @property
    def first(self) -> str:
        """The device that inputs go to, as torch spells it."""
        return f"{self.kind}:{self.indices[0]}" if self.indices else self.kind


def parse_device(text: str | None) -> DeviceChoice:
    """What ``text`` means on this machine.

    ``None``, ``""`` and ``auto`` are GPU 0 if there is one, else the CPU.  A requested GPU on a
    machine without GPUs logs a warning and becomes the CPU.  Anything malformed, and an
    index that this machine's GPUs do not reach, raises ``ConfigError``.
    """
    word = (text or "auto").strip().lower()
    if word == "cpu":
        return DeviceChoice("cpu")
    if word == "mps":
        return DeviceChoice("mps") if _has_mps() else _fall_back(word, "no MPS device")
    count = _gpu_count()
    if word == "auto":
        return DeviceChoice("cuda", (0,)) if count else DeviceChoice("cpu")
    indices = _indices(word)
    if not count:
        return _fall_back(word, "no GPU that PyTorch can use")
    for index in indices:
        if index >= count:
            raise ConfigError(
                f"GPU {index} of device {text!r} does not exist: this machine has {count} "
                f"(0 to {count - 1})"
            )
    return DeviceChoice("cuda", indices)


def placement(device: str | None, device_map: str | dict[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments that make ``from_pretrained`` put a model on the requested device.

    ``device=None`` with ``device_map=None`` leaves the model on the CPU, as transformers does, so
    that the tokenizer's tensors can be handed to it unchanged.
    """
    if device and device_map:
        raise ConfigError("device and device_map exclude each other; give one of them")
    if device_map:
        return {"device_map": _parse_map(device_map)}
    if not device:
        return {}
    choice = parse_device(device)
    if choice.kind == "cpu":
        return {}
    if len(choice.indices) < 2:
        return {"device_map": {"": choice.first}}
    import torch

    free = {index: torch.cuda.mem_get_info(index)[0] for index in choice.indices}
    most = {index: int(GPU_SHARE * size) for index, size in free.items()}
    return {"device_map": "auto", "max_memory": most}


def memory_failure(error: BaseException, model: str, dtype: str) -> LoadError | None:
    """A sentence with next steps when ``error`` means that memory ran out, else ``None``."""
    import torch

    for cause in chain(error):
        text = str(cause).lower()
        if isinstance(cause, torch.OutOfMemoryError | MemoryError) or (
            isinstance(cause, RuntimeError)
            and ("out of memory" in text or "can't allocate memory" in text)
        ):
            return LoadError(
                f"{model} does not fit in memory as {dtype}; try --dtype bfloat16, a smaller "
                "batch, a shorter --prompt-length, or --device-map auto to spread it over "
                "several devices"
            )
    return None


def _indices(word: str) -> tuple[int, ...]:
    indices: list[int] = []
    for part in map(str.strip, word.split(",")):
        match = re.fullmatch(r"cuda|(?:cuda:)?(\d+)", part)
        if match is None:
            raise ConfigError(f"{part!r} in device {word!r} is not a device; {FORMS}")
        indices.append(int(match[1] or 0))
    if len(set(indices)) < len(indices):
        raise ConfigError(f"device {word!r} names a GPU twice; {FORMS}")
    return tuple(indices)


def _parse_map(value: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(value, dict) or not value.lstrip().startswith("{"):
        return value
    try:
        parsed: dict[str, Any] = json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"device map {value!r} is not JSON ({error.msg} at character {error.pos}); write "
            'auto, or a table such as {"model.layers.0": 0, "": "cpu"}'
        ) from None
    return parsed


def _fall_back(word: str, reason: str) -> DeviceChoice:
    logger.warning("device %s was asked for, but this machine has %s: using the CPU", word, reason)
    return DeviceChoice("cpu")


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _has_mps() -> bool:
    import torch

    return torch.backends.mps.is_available()
