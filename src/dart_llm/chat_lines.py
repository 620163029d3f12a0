"""What ``dart-llm chat`` says of its settings and of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from dart_llm.chat import Turn
from dart_llm.settings_chat import ChatSettings
from dart_llm.tables import report_table


def settings_line(settings: ChatSettings) -> str:
    """dart, 50% of the FFN neurons removed."""
    config = settings.served()
    if config is None:
        return "dense: nothing is removed"
    fixed = config.budget.table is not None or config.score.strategy == "auto"
    amount = "as many FFN neurons removed as the method says"
    if not (fixed and config.sparsity is None):
        amount = f"{config.target:.0%} of the FFN neurons removed"
    return f"{config.method}: {amount}, drift rule {config.drift.rule}"


def turn_line(turn: Turn, max_tokens: int) -> str:
    """Timings and accounting of one answer, in one short line."""
    result, report = turn.result, turn.result.report
    usage, timings = result.usage, result.timings.to_dict()
    parts = [f"{usage.completion_tokens} tokens"]
    if timings["predicted_per_second"]:
        each = timings["predicted_per_token_ms"]
        parts.append(f"{each:.1f} ms each ({timings['predicted_per_second']:.0f}/s)")
    known = f" of {usage.prompt_tokens}" if usage.cached_tokens else ""
    parts.append(f"{timings['prompt_n']}{known} read in {timings['prompt_ms']:.0f} ms")
    if report.method == "dense" or not report.requested_sparsity:
        parts.append(str(report.method) + (", nothing removed" if report.method != "dense" else ""))
    else:
        parts.append(
            f"{report.method}: {report.achieved_sparsity:.1%} removed of "
            f"{report.requested_sparsity:.0%}, {report.dense_token_share:.0%} of the tokens dense, "
            f"{_count(report.remasks, 're-mask')}"
        )
    if turn.finish == "length":
        parts.append(f"stopped at {max_tokens} tokens (--max-tokens)")
    elif turn.finish == "cancelled":
        parts.append("stopped")
    return "; ".join(parts)


SHORT_LOOP, LONGEST_PERIOD = 48, 64
"""Tokens that must repeat before an answer is called a loop, and those of one round."""


def loop_line(turn: Turn) -> str:
    """What to do about an answer that went round in circles to its end; "" for any other."""
    tokens = turn.result.tokens[0]
    if turn.finish != "length" or not loops(tokens):
        return ""
    asked = turn.result.report.requested_sparsity
    less = f" at {asked:.0%} sparsity: try a lower /sparsity, or" if asked else ": try"
    return f"the answer repeats itself{less} sampling (--temperature 0.7)"


def loops(tokens: Sequence[int]) -> bool:
    """Whether the end is one round of up to ``LONGEST_PERIOD`` tokens, three times or more."""
    return any(
        len(tokens) >= length and tokens[-length:-period] == tokens[-length + period :]
        for period in range(1, LONGEST_PERIOD + 1)
        for length in [max(SHORT_LOOP, 3 * period)]
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def last_table(turns: Sequence[Turn]) -> Table:
    """The last answer's accounting."""
    last = turns[-1].result
    each = last.timings.to_dict()["predicted_per_token_ms"]
    timing: dict[str, Any] = {}
    if each:
        name = "dense" if last.report.method == "dense" else "pruned"
        timing["seconds_per_token"] = {name: each / 1e3}
    report = replace(last.report, sequences=())
    return report_table(report.to_dict(), timing)
