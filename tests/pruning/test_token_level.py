"""Token-level selection: copies by hand, every token's winners by other means, what it costs."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from dart_llm.errors import AttachError, ConfigError
from dart_llm.models.describe import describe
from dart_llm.pruning import token_level
from dart_llm.pruning.token_level import contribution_estimate, low_bit, winner_places
from dart_llm.pruning.token_rules import low_bit as low_bit_rule
from dart_llm.pruning.token_rules.low_bit import LowBit
from dart_llm.reporting.words import bytes_sentence
from dart_llm.session.run import prune
from products import SHAPES, in_turn
from steps import apart, decode, pruned, shared_model
from tiny import drawn, tokens
from token_cases import LEARNT, PLAIN, best, lost_u, oracle

PROMPT = 12


def by_hand(w, bits, group):
    """Round-to-nearest, group by group; halves to even, as IEEE does."""
    most, result = 2 ** (bits - 1) - 1, []
    for row in w.float().numpy():
        values = []
        for start in range(0, len(row), group):
            part = row[start : start + group]
            largest = torch.tensor(np.abs(part).max() / np.float32(most))
            scale = np.float32(largest.to(torch.bfloat16).item())
            levels = np.rint(part / scale) if scale else 0 * part
            values += (np.clip(levels, -most, most) * scale).tolist()
        result.append(values)
    return result


@pytest.mark.parametrize(
    ("bits", "group", "inputs"), [(4, 4, 12), (4, 5, 13), (4, 32, 7), (8, 4, 12), (8, 3, 10)]
)
def test_the_grid(bits, group, inputs):
    w = drawn(6, inputs, seed=1).to(torch.bfloat16 if group == 4 else torch.float32)
    w[2] = 0  # a group without any weight
    copy = low_bit(w, bits, group)
    assert copy.shape == (6, inputs) and copy.dense().tolist() == by_hand(w, bits, group)
    groups = math.ceil(inputs / group)
    assert copy.nbytes() == 6 * (math.ceil(inputs * bits / 8) + 2 * groups)
    transposed = low_bit(w.t().contiguous().t(), bits, group)
    assert torch.equal(transposed.dense(), copy.dense())


def test_products_of_all_rows_and_of_some(monkeypatch):
    w, x, rows = drawn(9, 20, seed=3), drawn(2, 3, 20, seed=4), torch.tensor([1, 4, 8])
    whole = low_bit(w, 4, 8)
    assert whole.product(x.bfloat16()).dtype == torch.float32
    monkeypatch.setattr(token_level, "CHUNK", 40)  # two rows at a time
    parts = low_bit(w, 4, 8)
    assert torch.equal(parts.levels, whole.levels) and torch.equal(parts.scales, whole.scales)
    wanted = x @ torch.tensor(by_hand(w, 4, 8)).t()
    for copy in (whole, parts):
        assert torch.allclose(copy.product(x), wanted, atol=1e-5)
        assert torch.allclose(copy.product(x, rows), wanted[..., rows], atol=1e-5)


@examples(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_winners_are_the_largest_and_ties_go_to_the_lower(values, data):
    keep = data.draw(st.integers(1, len(values)))
    result = winner_places(torch.tensor([[values, values[::-1]]]).float(), keep)
    assert result.tolist() == [[best(values, keep), best(values[::-1], keep)]]


def test_estimates():
    u, worth = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, -1.0]]), torch.tensor([3.0, 1.0, 5.0])
    assert contribution_estimate(u, worth).tolist() == [[3.0, 2.0, 0.0], [1.5, 0.0, 5.0]]


@pytest.mark.parametrize(("name", "learns"), in_turn(SHAPES, (True, False)))
def test_winners_by_independent_computation(name, learns, monkeypatch):
    """x, the grid by hand and the block's own modules; no code of the method."""
    model, calls, choose = shared_model(name), [], LowBit.winners

    def winners(self, fed, u, mask):
        calls.append((self, fed, mask, choose(self, fed, u, mask)))
        return calls[-1][-1]

    monkeypatch.setattr(LowBit, "winners", winners)
    run = prune(model, LEARNT if learns else PLAIN, sparsity=0.75, token={"group": 8})
    with run:
        decode(model, tokens(1, PROMPT + 2), PROMPT)
    assert len(calls) == 8
    for token, x, mask, ids in calls:
        block = token.block
        gate, up, down = block.matrices()
        parts = [up] if gate is None else [gate, up]
        u = [x.reshape(-1) @ torch.tensor(by_hand(p.detach(), 4, 8)).t() for p in parts]
        modules = [m for m in (block.gate, block.up) if m is not None]
        biases = [m.bias.detach() for m in modules if getattr(m, "bias", None) is not None]
        if biases:
            u = [a + b for a, b in zip(u, biases, strict=True)]
        estimate = block.act(u[0]) if gate is None else block.act(u[0]) * u[1]
        fisher = run.layers[block.index].fisher
        assert (fisher is not None) == learns
        worth = down.detach().norm(dim=0) if fisher is None else fisher**0.5
        assert mask.winners == round(0.25 * mask.width) == ids.shape[-1]
        assert ids.flatten().tolist() == best((estimate.abs() * worth).tolist(), mask.winners)


class Exact:
    """Stands for a low-bit copy and loses nothing."""

    def __init__(self, matrix, bits, group):
        self.matrix, self.shape = matrix.float(), tuple(matrix.shape)

    def product(self, x, rows=slice(None)):
        return x.float() @ self.matrix[slice(None) if rows is None else rows].t()

    def nbytes(self):
        return 0


@pytest.mark.parametrize("name", SHAPES)
def test_exact_copies_give_the_oracle(name, monkeypatch):
    """Norms rank; the losers stand at 0 or at their mean; or both as learned."""
    monkeypatch.setattr(low_bit_rule, "low_bit", Exact)
    model, ids = shared_model(name), tokens(1, PROMPT + 4)
    keep, prompt = round(0.25 * describe(model).blocks[0].down_width), ids[:, :PROMPT]
    mean = {k: total / n.clamp_min(1) for k, (total, n) in lost_u(model, prompt, keep).items()}
    dense = decode(model, ids, PROMPT)
    for compensation in (False, True):
        with oracle(model, keep, PROMPT, mean if compensation else None):
            wanted = decode(model, ids, PROMPT)
        assert apart(wanted, dense) > 1e-2
        for executor in ("masked",) if name == "opt" else ("masked", "compact"):
            settings = {"executor": executor, "compensation": compensation}
            with prune(model, PLAIN, sparsity=0.75, **settings):
                assert apart(decode(model, ids, PROMPT), wanted) < 1e-5, executor
    with prune(model, LEARNT, sparsity=0.75) as run:
        pruned = decode(model, ids, PROMPT)
    # by roots of curvatures; the first four tokens, the sinks, leave no evidence of losers
    worth = {layer.index: layer.fisher**0.5 for layer in run.layers}
    whole, sinks = (lost_u(model, ids[:, :length], keep, worth) for length in (PROMPT, 4))
    for layer, (total, number) in whole.items():
        number = number - sinks[layer][1]
        mean[layer] = torch.where(number > 0, (total - sinks[layer][0]) / number, 0.0)
    with oracle(model, keep, PROMPT, mean, worth):
        assert apart(pruned, decode(model, ids, PROMPT)) < 1e-4
    with oracle(model, keep, PROMPT, mean):
        assert apart(pruned, decode(model, ids, PROMPT)) > 1e-2


def test_there_is_no_sequence_mask(tmp_path):
    model, seen = shared_model(), list[Any]()
    with prune(model, LEARNT, sparsity=0.5) as run:
        run.on_masks = seen.append
        with pytest.raises(AttachError, match="no mask has been built"):
            run.masks()
        decode(model, tokens(1, PROMPT + 2), PROMPT)
        for ask in (run.masks, lambda: run.export(tmp_path)):
            with pytest.raises(ConfigError, match=r"no sequence mask.*e\.g\. dart"):
                ask()
    assert seen == [(None,) * 4]


L, I, D, K = 4, 48, 32, 12  # noqa: E741 - the method's own names
DENSE_BYTES = L * I * 3 * D * 4
PROXY_BYTES = L * I * (2 * (D // 2 + 2) + 4)
"""Half a byte per weight, one group of 32 with a scale per row; 4 for norm(w)."""
BYTES = PROXY_BYTES / DENSE_BYTES


def _report(rows=1, count=5, name="llama-bias", **settings):
    settings = {"method": PLAIN, "sparsity": 0.75, **settings}
    return pruned(shared_model(name), tokens(rows, 12 + count), 12, **settings)[0].report()


@pytest.mark.contract("accounting equals a count by hooks")
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("executor", ["native", "masked", "compact"])
def test_what_tokens_cost(executor):
    """Native kernels read each row's winners, all neurons at most; others compute all neurons."""
    for rows, winners in ((1, K / I), (3, 3 * K / I), (5, 1)):
        report = _report(rows=rows, executor=executor)
        read = winners if executor == "native" else 1
        assert report.executor.startswith(executor) and report.achieved_sparsity == 0.75
        assert report.ffn_bytes_share == pytest.approx(read + BYTES)
        assert report.proxy_bytes_share == pytest.approx(BYTES)
        assert report.ffn_bytes_share_if_compact == pytest.approx(winners + BYTES)
        if rows == 1:
            limit = 1 / (1 - report.ffn_share_of_bytes * (0.75 - BYTES))
            assert report.bytes_limit == pytest.approx(limit)
            assert f"at most {limit:.2f} x faster" in bytes_sentence(report.to_dict())


def test_which_copies_are_read():
    """Of gate and up, of fc alone in plain FFNs, and none while tokens run dense."""
    report = _report(token={"bits": 8, "group": 12})
    each = 2 * (D + 2 * 3) + 4  # three groups of 12, the last of 8
    assert report.proxy_bytes_share == pytest.approx(L * I * each / DENSE_BYTES)
    plain = _report(name="gpt2", method=LEARNT, count=3)
    fc = L * I * (D // 2 + 2 + 4) / (L * I * 2 * D * 4)
    assert plain.proxy_bytes_share == pytest.approx(fc)
    report = _report(masking_step=2)
    assert report.dense_token_share == pytest.approx(0.4)
    assert report.proxy_bytes_share == pytest.approx(0.6 * BYTES)
    mean = _report(compensation=True).ffn_bytes_share - _report().ffn_bytes_share
    assert mean * 5 * DENSE_BYTES == pytest.approx(L * I * D * 4)  # down is read once
