"""What can happen to a kept file: damages by name, each a function of its path."""

import os

import torch
from safetensors.torch import load, save


def changed(change):
    def damage(path):
        path.write_bytes(change(path.read_bytes()))

    return damage


def flip(data):
    """One bit, in the middle of the content."""
    place = len(data) * 3 // 4
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def folder(path):
    path.unlink()
    (path / "something").mkdir(parents=True)


DAMAGES = {
    "flip": changed(flip),
    "zero page": changed(lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2)),
    "cut": changed(lambda data: data[:-3]),
    "empty": changed(lambda data: b""),
    "random": changed(lambda data: os.urandom(len(data))),
    "folder": folder,
}


def tensors(change):
    return changed(lambda data: save(change(load(data))))


def each(change):
    return tensors(lambda kept: {key: change(t) for key, t in kept.items()})


def without_the_last(kept):
    """Without its weight either."""
    stem = sorted(kept)[-1].rpartition(".")[0]
    return {key: t for key, t in kept.items() if not key.startswith(stem)}


TENSOR_DAMAGES = {
    "without a tensor": tensors(without_the_last),
    "another shape": each(lambda t: (t[..., :-1] if t.dim() else t).contiguous()),
    "not numbers": each(lambda t: t * torch.nan if t.is_floating_point() else t),
}
"""Of files that are whole safetensors, but not those that were kept."""
