"""Matrices in low-bit blocks: what gguf reads in them, and products with inputs of 8 bits."""

import itertools

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from torch.nn import functional as F

from dart_llm.errors import ConfigError
from dart_llm.models import packed as packed_weights
from dart_llm.models.gguf_file import BLOCKS, ROUNDED
from dart_llm.models.packed import pack
from dart_llm.native.build import ops
from dart_llm.patching.executors.native_ffn import ACTS
from dart_llm.pruning.token_level import contribution_estimate, winner_places
from packed_cases import KINDS, SMALL, differ, drawn_blocks, kernels, packed, rounded
from tiny import drawn

pytestmark = pytest.mark.usefixtures("native")

CLOSE = 1e-6
"""Of the sum of the terms' sizes: what float32 sums in another order differ by."""

ORDERS = (*packed_weights.ORDERS, "neurons")


def shapes(name):
    """Rows and columns: whole units of 64, a last half of one, a last unit without its pair."""
    if name not in SMALL:
        return [(1, 256), (7, 768), (130, 256), (5, 512)]
    return [(1, 32), (5, 64), (7, 96), (5, 160), (100, 576), (130, 128), (7, 736), (1, 768)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_weights_are_those_of_the_file(name, kind):
    for rows, columns in shapes(name):
        for order in ORDERS:
            neurons = order == "neurons"
            matrix, dense = packed(name, rows, columns, order)
            wanted = dense.t() if neurons else dense
            assert matrix.shape() == list(wanted.shape) and matrix.order() == order
            with kernels(kind):
                weights = ops().packed_span(matrix, 0, len(wanted), torch.float32)
                narrow = ops().packed_span(matrix, 0, len(wanted), torch.bfloat16)
                ids = torch.tensor([len(wanted) - 1, 0, len(wanted) // 2])
                some = ops().packed_rows(matrix, ids, torch.float32)
                for begin, end in ((0, 0), (3, 5), (15, 33), (16, 48), (1, 70), (69, 70)):
                    if end <= len(wanted):  # from anywhere in a tile
                        part = ops().packed_span(matrix, begin, end, torch.float32)
                        torch.testing.assert_close(part, wanted[begin:end], rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(weights, wanted, rtol=1e-6, atol=1e-8)
            assert torch.equal(narrow, weights.bfloat16()) and torch.equal(some, weights[ids])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_products(name, kind):
    """In every order of the rows, against float64; each vector of a batch has its own numbers."""
    long = (40, 1120 if name in SMALL else 1280)  # more columns than are unpacked at a time
    for (rows, columns), order in itertools.product([*shapes(name), long], ORDERS):
        matrix, dense = packed(name, rows, columns, order)
        by_rows, case = order != "neurons", (order, rows, columns)
        alone = ops().packed_linear if by_rows else ops().packed_down
        group = 16 if name == "q6_k" and not by_rows else 32
        x = drawn(7, columns, seed=columns)
        x[1, ::3] = 0
        x[-1] = 0
        with kernels(kind):
            product, halves = alone(x, matrix), x.bfloat16()
            assert differ(product, rounded(x, group), dense.t()) < CLOSE, case
            assert torch.equal(alone(halves, matrix), alone(halves.float(), matrix).bfloat16())
            for count in (2, 3, 5, 7):
                product = ops().packed_product(x[-count:], matrix, by_rows, count)
                near = rounded(x[-count:]) if by_rows else x[-count:]  # of dequantised neurons
                assert differ(product, near, dense.t()) < CLOSE, (*case, count)
                if count > 2 and by_rows:
                    some = ops().packed_product(x[1 - count :], matrix, by_rows, count)
                    assert torch.equal(some, product[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("inner", "outer"), [("q4_1", "q8_0"), ("q5_1", "q6_k"), ("q4_k", "q4_0")])
def test_ffn(inner, outer, gated, kind):
    """Kept neurons alone, with biases, compensation and every activation; blocks of any mixture."""
    hidden, width, rank = 256, 512, 3
    up, dense_up = packed(inner, width, hidden)
    gate, dense_gate = packed(inner, width, hidden, seed=1)
    downs = [packed(outer, hidden, width, order, seed=2) for order in ORDERS]
    x, biases, bias = drawn(2, hidden), drawn(2, width, seed=1), drawn(hidden, seed=2)
    basis, adds = drawn(rank, hidden, seed=3), drawn(rank, hidden, seed=4)
    ids = torch.tensor([0, 3, 4, 7, 20, 21, 22, 31, 32, 49, 255, 256, 300, 511])
    for (act, activate), (down, dense_down) in itertools.product(ACTS.items(), downs):
        gates = (gate, biases[0]) if gated else (None, None)
        parts = x, gates[0], up, down, gates[1], biases[1]
        with kernels(kind):
            some = ops().packed_ffn(*parts, ids.int(), bias, basis, adds, None, act)
            whole = ops().packed_ffn(*parts, None, None, None, None, None, act)
        near = rounded(x)
        u = near @ dense_up.double().t() + biases[1]
        u = activate(near @ dense_gate.double().t() + biases[0]) * u if gated else activate(u)
        for keep, z in ((ids, some - bias - F.linear(x, basis) @ adds), (slice(None), whole)):
            kept = torch.zeros_like(u)
            kept[:, keep] = u[:, keep]
            group = 16 if outer == "q6_k" and down.order() == "neurons" else 32
            kept = rounded(kept, group)
            # a level may fall to the other side where an activation is near the middle
            assert differ(z, kept, dense_down.t()) < 4e-3, act


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize("name", ["q8_0", "q4_1", "q5_0"])
def test_tokens_choose_by_their_activations(name, some, gated, kind):
    """Each row its own, out of all neurons or of candidates; the others stand at their mean."""
    hidden, width = 96, 352
    order = "rows" if some else "tiles"
    (up, dense_up), (gate, dense_gate) = (
        packed(name, width, hidden, order, seed=s) for s in (0, 1)
    )
    by_outputs, dense_down = packed(name, hidden, width, "tiles", seed=2)
    by_neurons = ops().packed_turned(by_outputs, "neurons", True)
    x, biases, worth = drawn(3, hidden), drawn(2, width, seed=1), drawn(width, seed=3).abs()
    candidates = torch.arange(3, width, 2) if some else torch.arange(width)
    near = rounded(x)
    u = near @ dense_up.double().t() + biases[1]
    u = F.silu(near @ dense_gate.double().t() + biases[0]) * u if gated else F.silu(u)
    for keep, mean in ((100, None), (1, drawn(width, seed=4) / 9), (len(candidates), None)):
        gates = (gate, biases[0]) if gated else (None, None)
        ids = candidates.int() if some else None
        results = []
        for skip, down in enumerate((by_outputs, by_neurons)):  # the others are masked, or skipped
            numbers = [hidden, 4, 32, keep, skip]
            choice = torch.classes.dart_llm.Choice(None, None, None, None, worth, mean, numbers)
            parts = gates[0], up, down, gates[1], biases[1], ids, None, None, None, choice, 0
            with kernels(kind):
                results.append(ops().packed_ffn(x, *parts))
                single = ops().packed_ffn(x[1:2], *parts)
            assert torch.equal(results[-1][1:2], single)
        z, skipped = results
        places = winner_places(contribution_estimate(u, worth)[:, candidates], keep)
        kept = torch.zeros_like(u)
        winners = candidates[places]
        kept.scatter_(1, winners, (u if mean is None else u - mean).gather(1, winners))
        # a level beside the middle; weights of 0 are levels less a bias, and sums of these rounded
        assert differ(z, rounded(kept), dense_down.t(), least=1e-3) < 4e-3
        torch.testing.assert_close(skipped, z, rtol=1e-5, atol=1e-5 * float(z.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_copy_of_kept_neurons_gives_what_they_give_where_they_lie(name, kind):
    """Down to sums in another order; of every layout, in memory that is taken over, or new."""
    hidden, width = (96, 352) if name in SMALL else (256, 512)
    tiles = [packed(name, width, hidden, "tiles", seed=seed)[0] for seed in (0, 1)]
    down, _ = packed(name, hidden, width, "tiles", seed=2)
    rows = [ops().packed_turned(one, "rows", True) for one in tiles]
    x, biases = drawn(3, hidden), drawn(2, width, seed=1)
    old, room = [], torch.classes.dart_llm.HugeRoom(0)
    for ids in (torch.arange(5, width, 3), torch.arange(0, width, 2), torch.tensor([width - 1])):
        parts = (biases[0], biases[1], ids.int(), drawn(hidden), None, None, None, 0)
        places = [one.parts()[0].data_ptr() for one in old]
        copies = ops().packed_kept(tiles, down, ids.int(), old, room)
        old, now = copies, [one.parts()[0].data_ptr() for one in copies]
        # the second takes more room than the first, the third less than the second
        assert (now == places) == (len(ids) == 1)
        with kernels(kind):
            z = ops().packed_ffn(x, *copies, *parts)
            wanted = ops().packed_ffn(x, *rows, down, *parts)
        torch.testing.assert_close(z, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        if len(ids) > 1:
            share = (len(ids) + 15) // 16 * 16 / width
            assert all(c.nbytes() <= share * tiles[0].nbytes() + 512 for c in copies[:2])
            each = 16 if name == "q6_k" else 64 if "4" in name else 32  # columns that share fours
            fours = sum(-(-_fullest(ids, first, each) // 4) for first in range(0, width, each))
            levels = copies[2].nbytes() - 64
            assert hidden * 4 * fours <= levels <= hidden * 4.5 * fours


def _fullest(ids, first, size):
    """The most ``ids`` of a block of 16 or 32, or of one of the two blocks of a unit of 64."""
    half = size // 2 if size == 64 else size
    return max(
        int(((ids >= at) & (ids < at + half)).sum()) for at in range(first, first + size, half)
    )


@pytest.mark.parametrize("order", ["rows", "tiles"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_copy_by_neurons_is_that_of_the_file(name, order):
    """Level for level, and factor for factor."""
    matrix, _ = packed(name, 130, 768, order)
    wanted, _ = packed(name, 130, 768, "neurons")
    copy = ops().packed_turned(matrix, "neurons", True)
    assert copy.order() == "neurons" and copy.shape() == [768, 130] and matrix.order() == order
    assert all(map(torch.equal, copy.parts(), wanted.parts()))


@pytest.mark.parametrize("name", BLOCKS)
def test_rows_turn_into_tiles_and_back(name):
    """In their own memory, to the bit."""
    matrix, dense = packed(name, 33, 512, "tiles")
    before = [(part.data_ptr(), part.clone()) for part in matrix.parts()]
    turned = ops().packed_turned(matrix, "rows", False)
    assert matrix.order() == turned.order() == "rows"
    assert [part.data_ptr() for part in turned.parts()] == [place for place, _ in before]
    weights = ops().packed_span(matrix, 0, 33, torch.float32)
    torch.testing.assert_close(weights, dense, rtol=1e-6, atol=1e-8)
    ops().packed_turned(matrix, "tiles", False)
    assert all(
        torch.equal(part, old) for part, (_, old) in zip(matrix.parts(), before, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_no_number_gives_none(name, kind):
    """In its own vector alone; the smallest numbers, whose inverse is infinite, do no harm."""
    matrices = [packed(name, 7, 256, order)[0] for order in ORDERS]
    by_rows, tiles, down = matrices
    for odd in (float("nan"), -float("inf")):
        x = drawn(3, 256)
        x[1, 37] = odd
        with kernels(kind):
            every = [ops().packed_linear(x, by_rows), ops().packed_down(x, down)]
            every += [ops().packed_product(x, one, True, len(x)) for one in (by_rows, tiles)]
        for product in every:
            assert product[1].isnan().all() and product[::2].isfinite().all(), odd
    small = 2.0**-140 * torch.linspace(-1, 1, 256)[None]
    with kernels(kind):
        for product in (ops().packed_linear(small, by_rows), ops().packed_down(small, down)):
            assert float(product.abs().max()) < 1e-30


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_is_that_of_gguf(name):
    """Bit for bit, of sizes that weights have and have not; whatever dtype they come in."""
    weights = drawn(40, 576) * 10.0 ** torch.linspace(-9, 4, 40)[:, None]
    weights[3] = 0
    weights[4, ::2] = 0
    weights[5] = weights[5].abs()
    weights[6] = 1.5
    weights[7] = torch.arange(576) % 32 - 15.5
    narrow = weights.bfloat16()
    kind = Kind[name.upper()]
    wanted = quants.dequantize(quants.quantize(weights.numpy(), kind), kind)
    for order in packed_weights.ORDERS:
        dense = pack(weights, name, order).dequantise()
        assert torch.equal(dense, torch.from_numpy(wanted))
    parts = [pack(one, name).matrix.parts() for one in (narrow, narrow.float())]
    assert all(map(torch.equal, *parts))
    weights[20, 20] = float("inf")
    for given, kind, problem in (
        (weights, name, "inf or NaN cannot be rounded"),
        (torch.zeros(2, 256), "q4_k", "cannot be rounded to q4_k; choose q8_0, q4_0, q4_1"),
        (torch.zeros(2, 48), name, f"rows of 48 weights do not divide into {name}'s blocks of 32"),
    ):
        with pytest.raises(ConfigError, match=problem):
            pack(given, kind)


def test_the_number_of_threads_changes_no_bit():
    """Work is divided alike; by dequantised rows, in several pieces, products come near."""
    hidden, width = 576, 2080
    up, dense_up = packed("q4_0", width, hidden)
    down, dense_down = packed("q4_0", hidden, width, "tiles")
    neurons = ops().packed_turned(down, "neurons", True)
    x, u, ids = drawn(3, hidden), drawn(3, width), torch.arange(0, width, 3)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        kept = None, None, ids.int(), *[None] * 4, 3
        parts = [ops().packed_ffn(x, None, up, one, *kept) for one in (down, neurons)]
        many = [ops().packed_product(x, up, True, 3), ops().packed_product(u, down, True, 3)]
        results.append((*parts, ops().packed_linear(x, up), ops().packed_down(u, neurons), *many))
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])
    assert differ(ops().packed_product(x, up, True, 0), x, dense_up.t()) < CLOSE
    assert differ(ops().packed_product(u, down, True, 0), u, dense_down.t()) < CLOSE
    assert differ(ops().packed_product(u, neurons, False, 0), u, dense_down.t()) < CLOSE


def test_what_does_not_fit_is_refused_and_not_read():
    run, room = ops(), torch.classes.dart_llm.HugeRoom(0)
    matrix, tiles = packed("q4_0", 5, 64)[0], packed("q4_0", 64, 32, "tiles")[0]
    shapes = (5, 64), (32, 64), (32, 96)
    down, neurons, more = (packed("q4_0", *shape, "tiles")[0] for shape in shapes)
    turned = run.packed_turned(neurons, "neurons", True)
    some, weights = torch.arange(3, dtype=torch.int32), torch.zeros(4, 64)

    def made(*shape):
        return run.packed_from_blocks(drawn_blocks("q4_0", 5, 64)[0], *shape, "tiles")

    def copied(matrices, down, ids, old=()):
        return run.packed_kept(matrices, down, ids, list(old), room)

    def ffn(up, down, ids):
        return run.packed_ffn(torch.zeros(1, 32), None, up, down, None, None, ids, *[None] * 4, 0)

    def rounded_to(kind, rows=0, weights=weights):
        return run.packed_round(run.packed_zeros(kind, 4, 64, "rows"), rows, weights)

    kept = copied([tiles], neurons, some)
    wide = torch.zeros(1, 32)
    for sentence, call, *cases in (
        ("180 bytes do not hold", made, ("q4_0", 5, 96), ("q4_0", -5, -64), ("q8_0", 5, 64)),
        ("there are no blocks of type q2_k", made, ("q2_k", 5, 64)),
        ("nothing rounds to q5_0", rounded_to, ("q5_0",)),
        ("rows of 48 weights of q4_0", run.packed_zeros, ("q4_0", 4, 48, "rows")),
        ("by rows, tiles or neurons, not by", run.packed_zeros, ("q4_0", 4, 64, "columns")),
        ("row 5 is outside the 5", run.packed_rows, (matrix, torch.tensor([5]), torch.float32)),
        ("row -1 is outside the 5", run.packed_rows, (matrix, torch.tensor([-1]), torch.float32)),
        ("no such rows", run.packed_span, (matrix, 3, 6, torch.float32)),
        ("float32 or bfloat16", run.packed_span, (matrix, 0, 1, torch.float16)),
        ("read of rows alone", ffn, (tiles, neurons, some)),
        ("neurons here and there are", ffn, (*kept, None)),
        ("copied", copied, ([matrix], None, some), ([tiles], kept[1], some)),
        ("copied", copied, ([tiles], None, some.long()), ([], None, some), ([], turned, some)),
        ("copied", copied, ([tiles], neurons, some, kept[:1]), ([tiles], more, some)),
        ("such neurons", copied, ([tiles], None, some + 62), ([], neurons, some.flip(0))),
        ("this matrix has one order", run.packed_turned, (turned, "rows", False)),
        ("this matrix has one order", run.packed_turned, (neurons, "neurons", False)),
        ("shapes do not fit", run.packed_linear, (wide, matrix), (wide[0], matrix), (wide, turned)),
        ("shapes do not fit", run.packed_down, (torch.zeros(1, 64), down), (wide, turned)),
        ("shapes do not fit", ffn, (kept[0], neurons, some), (*kept, some[:2])),
        ("shapes do not fit", ffn, (tiles, down, None), (tiles, more, None)),
        ("shapes do not fit", ffn, (turned, neurons, None), (tiles, tiles, None)),
        ("shapes do not fit", rounded_to, ("q4_0", 2), ("q4_0", 0, weights[:, :32])),
    ):
        for arguments in cases:
            with pytest.raises((RuntimeError, IndexError), match=sentence):
                call(*arguments)
    assert run.packed_linear(torch.zeros(0, 64), matrix).shape == (0, 5)
