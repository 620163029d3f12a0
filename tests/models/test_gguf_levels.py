"""Blocks of columns that move: levels as gguf reads them, and which of them are rounded."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from dart_llm.models.gguf_write import BLOCK, LEVELS, homes, moved_columns

ROWS, WIDTH = 12, 256


def drawn(kind):
    """Blocks [rows, 8, bytes] and their values [rows, 256]."""
    weights = np.random.default_rng(0).standard_normal((ROWS, WIDTH), dtype=np.float32)
    weights[0, :BLOCK] = 0  # a block without a scale
    blocks = quantize(weights, Kind[kind.upper()])
    values = torch.from_numpy(dequantize(blocks, Kind[kind.upper()]))
    return torch.from_numpy(blocks).reshape(ROWS, WIDTH // BLOCK, -1), values


def values_of(blocks, kind):
    return torch.from_numpy(dequantize(blocks.numpy(), Kind[kind.upper()]))


@pytest.mark.parametrize("kind", LEVELS)
def test_levels_are_those_that_gguf_reads(kind):
    blocks, values = drawn(kind)
    how = LEVELS[kind]
    scale, least, levels = how.read(blocks)
    torch.testing.assert_close((scale * (levels - how.zero) + least).flatten(1), values)
    assert torch.equal(how.written(blocks, levels), blocks)
    assert how.most[0] <= float(levels.min()) and float(levels.max()) <= how.most[1]


@pytest.mark.parametrize("kind", LEVELS)
def test_columns_that_stay_keep_their_values_and_the_others_lose_little(kind):
    blocks, values = drawn(kind)
    ids = torch.from_numpy(np.random.default_rng(1).permutation(WIDTH)[:170]).sort().values
    slots, stay = homes(ids, 192)
    found = values_of(moved_columns(blocks, values, kind, slots, stay), kind)
    real = slots >= 0
    home = real & (slots // BLOCK == stay.repeat_interleave(BLOCK))
    assert int(home.sum()) == 134
    same = (found[:, home] - values[:, slots[home]]).abs() < 1e-6
    assert float(same.float().mean()) > 0.75  # but where rounding all of a block comes nearer
    kept = torch.nn.functional.pad(values[:, ids], (0, 22)).contiguous().numpy()
    anew = values_of(torch.from_numpy(quantize(kept, Kind[kind.upper()])), kind)[:, :170]
    lost = (found[:, real] - values[:, slots[real]]).square().sum()
    assert float(lost) < 0.65 * float((anew - values[:, ids]).square().sum())


def test_blocks_that_keep_most_are_homes():
    ids = torch.tensor([0, 1, 33, 34, 35, 64, 65, 66, 67, 99])
    slots, stay = homes(ids, 64)
    assert stay.tolist() == [1, 2]
    assert slots[1:4].tolist() == [33, 34, 35] and slots[32:36].tolist() == [64, 65, 66, 67]
    assert slots[0] == 0 and slots[4:6].tolist() == [1, 99] and int((slots < 0).sum()) == 54
    slots, stay = homes(torch.arange(3), 96)  # more room than there are neurons
    assert stay.tolist() == [0, 1, 2] and slots[:3].tolist() == [0, 1, 2]
    assert int((slots >= 0).sum()) == 3
