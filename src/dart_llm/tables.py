"""The tables that end a job, each followed by one plain sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def report_table(report: dict[str, Any], timing: dict[str, Any]) -> Table:
    """Accounting of the pruned generation, with its speed beside dense."""
    table = Table(
        title=f"{report['method']}: accounting of the generated text", title_justify="left"
    )
    table.add_column("quantity")
    table.add_column("value", justify="right")
    asked = report["requested_sparsity"]
    causes = ", ".join(f"{cause} {count}" for cause, count in report["remask_causes"].items())
    rows = [
        ("sparsity asked for", "set by the table" if asked is None else f"{asked:.1%}"),
        ("achieved sparsity (dense tokens count 0)", f"{report['achieved_sparsity']:.1%}"),
        ("sparsity while pruned", f"{report['sparsity_while_pruned']:.1%}"),
        ("decoded tokens", str(report["decoded_tokens"])),
        ("of them dense", f"{report['dense_token_share']:.1%}"),
        ("masks built", causes or "none"),
        ("executor", str(report["executor"])),
        ("FFN bytes per token over dense", f"{report['ffn_bytes_share']:.3f}"),
        ("FFN FLOPs per token over dense", f"{report['ffn_flops_share']:.3f}"),
        ("memory held beside the model", f"{report['extra_memory_bytes'] / 2**20:.1f} MiB"),
    ]
    if report.get("proxy_bytes_share"):
        rows[-1:-1] = [
            ("of the bytes, low-bit copies", f"{report['proxy_bytes_share']:.3f}"),
            ("of the FLOPs, low-bit copies", f"{report['proxy_flops_share']:.3f}"),
        ]
    each = timing.get("seconds_per_token", {})
    for variant in ("dense", "pruned"):
        if each.get(variant):
            rows.append((f"mean time per token, {variant}", f"{1000 * each[variant]:.1f} ms"))
    if "speed_up" in timing:
        rows.append(("speed-up (one run; bytes allow)", _speed(timing)))
    for name, value in rows:
        table.add_row(name, value)
    return table


def _speed(timing: dict[str, Any]) -> str:
    return f"{timing['speed_up']:.2f} x ({timing['bytes_limit']:.2f} x)"


def perplexity_table(document: dict[str, Any]) -> Table:
    """Perplexity of every method on the same slices or windows."""
    title = (
        f"perplexity on {document['text']}: {windows(document)}, protocol {document['protocol']}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    partly = any(0 < row.get("pruned_tokens", 0) < row["tokens"] for row in document["rows"])
    heads = ["asked", "achieved", "dense tokens", "re-masks", "perplexity", "x dense", "95 %"]
    for name in (*heads, *(("pruned tokens only", "x dense there") if partly else ())):
        table.add_column(name, justify="right")
    for row in document["rows"]:
        report = row["accounting"]
        interval = row["interval"]
        asked = row["sparsity"]
        table.add_row(
            row["method"],
            "table" if asked is None else f"{asked:.0%}",
            f"{report['achieved_sparsity']:.1%}" if report else "0.0%",
            f"{report['dense_token_share']:.1%}" if report else "100.0%",
            str(report["remasks"]) if report else "0",
            f"{row['perplexity']:.2f}",
            f"{row['ratio_to_dense']:.2f}",
            f"{interval[0]:.2f}-{interval[1]:.2f}" if interval else "",
            *(_where_pruned(row) if partly else ()),
        )
    return table


def windows(document: dict[str, Any]) -> str:
    """Which tokens of the text a perplexity document speaks of."""
    if "window" in document:
        stride = document["stride"]
        return f"{document['slices']} windows of {document['window']} tokens, stride {stride}"
    return (
        f"{document['slices']} slices of {document['prompt_tokens']} prompt + "
        f"{document['scored_tokens']} scored tokens"
    )


def _where_pruned(row: dict[str, Any]) -> tuple[str, str]:
    """Perplexity over the tokens that ran pruned, and over dense on the same tokens."""
    own, dense = row["perplexity_pruned_tokens"], row["dense_perplexity_pruned_tokens"]
    return ("", "") if own is None else (f"{own:.2f}", f"{own / dense:.2f}")


def conclusion(accounting: dict[str, Any] | None, documents: Sequence[dict[str, Any]]) -> list[str]:
    """One plain sentence per table."""
    from dart_llm import sentences

    found = []
    if accounting:
        found.append(sentences.bytes_sentence(accounting))
    for document in documents:
        found.append(sentences.perplexity_sentence(document))
    return found
