"""Columns of a matrix in blocks, moved without rounding most of them.

A block holds 32 neighbouring columns of a row as levels between two ends.  Fewer columns make fewer
blocks: the blocks that keep most of their columns stay, levels and ends, and take in the columns of
the others, which alone are rounded to the ends that they find.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32


@dataclass(frozen=True)
class Levels:
    """How a type stores 32 values ``scale * (level - zero) + least``; least is 0 where not stored.

    ``bits`` of a level; of 5, the fifth ones lie before the others.
    """

    bits: int
    zero: int
    has_least: bool

    @property
    def head(self) -> int:
        """Bytes before the levels."""
        return 4 if self.has_least else 2

    def read(self, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and least [..., 1] and levels [..., 32], float32, of blocks [..., bytes]."""
        ends = data[..., : self.head].contiguous().view(torch.float16).float()
        scale, least = ends[..., :1], ends[..., 1:] if self.has_least else 0 * ends[..., :1]
        body = data[..., self.head :]
        if self.bits == 8:
            return scale, least, body.contiguous().view(torch.int8).float()
        low = body[..., -BLOCK // 2 :]
        levels = torch.cat([low & 15, low >> 4], -1)
        if self.bits == 5:
            places = torch.arange(8, dtype=torch.uint8)
            fifth = (body[..., :4, None] >> places) & 1
            levels = levels | (fifth.flatten(-2) << 4)
        return scale, least, levels.float()

    def written(self, data: Tensor, levels: Tensor) -> Tensor:
        """Blocks with the ends of ``data`` and other levels."""
        head = data[..., : self.head]
        if self.bits == 8:
            return torch.cat([head, levels.to(torch.int8).view(torch.uint8)], -1)
        whole = levels.to(torch.uint8)
        low = (whole[..., : BLOCK // 2] & 15) | ((whole[..., BLOCK // 2 :] & 15) << 4)
        if self.bits == 4:
            return torch.cat([head, low], -1)
        places = torch.arange(8, dtype=torch.uint8)
        fifth = ((whole >> 4).reshape(*whole.shape[:-1], 4, 8) << places).sum(-1, dtype=torch.uint8)
        return torch.cat([head, fifth, low], -1)

    @property
    def most(self) -> tuple[int, int]:
        """The least and the largest level."""
        return (-128, 127) if self.bits == 8 else (0, 2**self.bits - 1)


LEVELS = {
    "q8_0": Levels(8, 0, False),
    "q4_0": Levels(4, 8, False),
    "q4_1": Levels(4, 0, True),
    "q5_0": Levels(5, 16, False),
    "q5_1": Levels(5, 0, True),
}


def homes(ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Where columns ``ids`` go in ``width`` of them: slots [width], -1: empty; and the blocks
    [width / 32] that stay.  Columns of these keep their places in them.
    """
    own = torch.bincount(ids // BLOCK, minlength=width // BLOCK)
    stay = own.argsort(descending=True, stable=True)[: width // BLOCK].sort().values
    slots = torch.full((len(stay), BLOCK), -1)
    at_home = torch.isin(ids // BLOCK, stay)
    place = torch.searchsorted(stay, ids[at_home] // BLOCK)
    slots[place, ids[at_home] % BLOCK] = ids[at_home]
    slots = slots.flatten()
    guests = ids[~at_home]
    slots[(slots < 0).nonzero().flatten()[: len(guests)]] = guests
    return slots, stay


def moved_columns(data: Tensor, values: Tensor, kind: str, slots: Tensor, stay: Tensor) -> Tensor:
    """Blocks [D, bytes] of the columns ``slots``; data [D, I / 32, bytes], values [D, I] float32.

    A block of which rounding all anew comes nearer is rounded so.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    how, rows = LEVELS[kind], len(values)
    there = slots.reshape(-1, BLOCK) >= 0
    wanted = values[:, slots.clamp_min(0)].reshape(rows, -1, BLOCK) * there
    host = data[:, stay]
    scale, least, levels = how.read(host)
    home = (slots.reshape(-1, BLOCK) // BLOCK == stay[:, None]) | ~there
    near = ((wanted - least) / torch.where(scale == 0, 1, scale)).round() + how.zero
    kept = how.written(host, torch.where(home, levels, near.clamp(*how.most)))
    anew = quantize(wanted.flatten(1).contiguous().numpy(), GGMLQuantizationType[kind.upper()])
    fresh = torch.from_numpy(anew).reshape(kept.shape)
    apart = [((_values(how, one) - wanted) * there).square().sum(-1) for one in (kept, fresh)]
    return torch.where((apart[0] <= apart[1])[..., None], kept, fresh).flatten(1)


def _values(how: Levels, data: Tensor) -> Tensor:
    scale, least, levels = how.read(data)
    return scale * (levels - how.zero) + least
