"""What token-level selection is said to cost, by hand, and what its doors say of it."""

import pytest

from dart_llm.reporting.words import bytes_sentence
from steps import pruned, shared_model
from tiny import tokens
from token_cases import LEARNT, PLAIN

L, I, D, K = 4, 48, 32, 12  # noqa: E741 - the method's own names
DENSE_BYTES = L * I * 3 * D * 4
PROXY_BYTES = L * I * (2 * (D // 2 + 2) + 4)
"""Half a byte per weight, one group of 32 with a scale per row; 4 for norm(w)."""
BYTES = PROXY_BYTES / DENSE_BYTES


def _run(rows=1, count=5, name="llama-bias", **settings):
    given = {"method": PLAIN, "sparsity": 0.75, **settings}
    return pruned(shared_model(name), tokens(rows, 12 + count), 12, **given)[0]


def _report(*arguments, **settings):
    return _run(*arguments, **settings).report()


@pytest.mark.contract("accounting equals a count by hooks")
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("executor", ["native", "masked", "compact"])
def test_what_a_token_costs(executor):
    """The native kernels read a token's winners where they lie; the others compute all neurons."""
    report = _report(executor=executor)
    share = K / I if executor == "native" else 1
    assert report.executor.startswith(executor) and report.achieved_sparsity == 0.75
    assert report.ffn_bytes_share == pytest.approx(share + BYTES)
    assert report.proxy_bytes_share == pytest.approx(BYTES)
    assert report.ffn_bytes_share_if_compact == pytest.approx(K / I + BYTES)
    limit = 1 / (1 - report.ffn_share_of_bytes * (0.75 - report.proxy_bytes_share))
    assert report.bytes_limit == pytest.approx(limit)
    assert f"at most {limit:.2f} x faster" in bytes_sentence(report.to_dict())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("executor", ["native", "compact"])
def test_a_batch_reads_each_rows_winners_or_runs_dense(executor):
    report = _report(rows=3, executor=executor)
    share = 3 * K / I if executor == "native" else 1
    assert report.executor.startswith(executor)
    assert report.ffn_bytes_share == pytest.approx(share + BYTES)
    assert report.ffn_bytes_share_if_compact == pytest.approx(3 * K / I + BYTES)
    most = _report(rows=5, executor=executor)
    assert most.ffn_bytes_share_if_compact == pytest.approx(1 + BYTES), "at most all"


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
