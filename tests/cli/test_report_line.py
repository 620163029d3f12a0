"""The report in one line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve_cases import report

LINE = (
    "griffin: 40.0% of the FFN neurons removed of 50% asked, mean over 9 decoded tokens (20.0% of "
    "them dense; 50.0% while pruned), {}, masked executor, 0.60 of the dense FFN bytes{}, 1.5 MiB "
    "held"
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"remasks": 0}, ("0 re-masks", "")),
        ({"remasks": 1}, ("1 re-mask", "")),
        ({"remasks": 2}, ("2 re-masks", "")),
        ({"proxy_bytes_share": 0.21}, ("0 re-masks", " (0.21 of it low-bit copies)")),
    ],
)
def test_the_line(changes: dict[str, float], words: tuple[str, str]) -> None:
    facts = {"achieved_sparsity": 0.4, "dense_token_share": 0.2, "ffn_bytes_share": 0.6}
    found = replace(report("griffin", 0.5, 9), **facts, extra_memory_bytes=3 * 2**19, **changes)
    assert str(found) == LINE.format(*words)
