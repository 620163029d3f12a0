"""What can happen to a kept file: damages by name, each a function of its path."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load, save


def flip(path: Path) -> None:
    """One bit, in the middle of the content."""
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


def zero_page(path: Path) -> None:
    """A page that never reached the disk: the last one of up to 4 KiB."""
    data = path.read_bytes()
    hole = min(4096, len(data) // 2)
    path.write_bytes(data[:-hole] + bytes(hole))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def random(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "something").touch()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flip": flip,
    "zero page": zero_page,
    "cut": cut,
    "empty": empty,
    "random": random,
    "folder": folder,
}


def without_a_tensor(path: Path) -> None:
    """A valid file that lacks the last tensor and its weight."""
    tensors = load(path.read_bytes())
    stem = sorted(tensors)[-1].rpartition(".")[0]
    path.write_bytes(save({k: v for k, v in tensors.items() if not k.startswith(stem)}))


def another_shape(path: Path) -> None:
    tensors = {k: v[..., :-1] if v.dim() else v for k, v in load(path.read_bytes()).items()}
    path.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}))


def not_numbers(path: Path) -> None:
    tensors = load(path.read_bytes())
    spoilt = {
        k: torch.full_like(v, float("nan")) for k, v in tensors.items() if v.is_floating_point()
    }
    path.write_bytes(save({**tensors, **spoilt}))


TENSOR_DAMAGES = {
    "without a tensor": without_a_tensor,
    "another shape": another_shape,
    "not numbers": not_numbers,
}
"""Of files that are whole safetensors, but not those that were kept."""
