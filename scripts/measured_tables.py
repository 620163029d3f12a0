"""Markdown tables made from the JSON files under benchmarks/results/; used by check_docs.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from table_head import above, linked, read, table, today


def budgets(root: Path, name: str) -> str:
    """Perplexity by budget and sparsity."""
    data = read(root, name)
    rows = data["rows"]
    sparsities = sorted({row["sparsity"] for row in rows if row["sparsity"]})
    names = list(dict.fromkeys(row["method"] for row in rows if row["sparsity"]))
    header = ["method", *(f"{s:.0%} removed" for s in sparsities)]
    lines = [header, ["---"] * len(header)]
    lines.append(["dense", *[f"{rows[0]['perplexity']:.2f}"] * len(sparsities)])
    for method in names:
        cells = []
        for sparsity in sparsities:
            row = next(r for r in rows if (r["method"], r["sparsity"]) == (method, sparsity))
            low, high = row["interval"]
            cells.append(
                f"{row['perplexity']:.1f} (x {row['ratio_to_dense']:.2f}, {low:.2f}-{high:.2f})"
            )
        lines.append([today(data, method), *cells])
    worst = max(abs(r["achieved_sparsity"] - r["sparsity"]) for r in rows if r["sparsity"])
    dense = max(r["dense_token_share"] for r in rows if r["sparsity"])
    masks = max(r["remasks"] for r in rows if r["sparsity"])
    note = (
        f"Perplexity (ratio to dense, 95 % interval over slices) on {data['text']['file']}, "
        f"{data['slices']} slices of {data['prompt']} prompt + {data['scored']} scored tokens, "
        f"protocol {data['protocol']}. Achieved sparsity is the requested one to "
        f"{worst:.2%}, dense tokens {dense:.0%}, re-masks {masks}."
    )
    return f"{above(root, name)}\n\n{table(lines)}\n\n{note}"


def speed(root: Path, name: str) -> str:
    """Decode time per token by case."""
    data = read(root, name)
    lines = [["case", "ms per token", "5-95 %", "x dense", "bytes allow"], ["---"] * 5]
    for row in data["rows"]:
        low, high = row["p5_p95_ms"]
        lines.append(
            [
                today(data, row["case"]),
                f"{row['ms_per_token']:.1f}",
                f"{low:.1f}-{high:.1f}",
                f"{row['speed_up']:.2f}",
                f"{row['limit']:.2f}",
            ]
        )
    machine = data["machine"]
    note = (
        f"Medians over groups of 16 tokens, {data['repeats']} x {data['tokens']} decoded tokens "
        f"after a prompt of {data['prompt']}, one run, cases interleaved in random order, "
        f"{data['threads']} threads of {machine['processor']}."
    )
    return f"{above(root, name)}\n\n{table(lines)}\n\n{note}"


def shift(root: Path, name: str) -> str:
    """Loss after a topic change, live against never re-masking."""
    data = read(root, name)
    lines = [
        [
            "method",
            "achieved sparsity",
            "dense tokens",
            "re-masks",
            "loss after the change",
            today(data, "dart, never re-masked, at that sparsity"),
        ],
        ["---"] * 6,
    ]
    for row in data["rows"]:
        lines.append(
            [
                today(data, row["method"]),
                f"{row['achieved_sparsity']:.1%}",
                f"{row['dense_token_share']:.1%}",
                str(row["remasks"]),
                f"{row['loss_after_change']:.3f}",
                f"{row['never_at_equal_sparsity']:.3f}",
            ]
        )
    note = (
        f"Nats per token over the 640 tokens after the change, {data['passages']} passages, "
        f"{data['rows'][0]['sparsity']:.0%} asked for; dense loses "
        f"{data['dense_loss_after_change']:.3f}."
    )
    return f"{above(root, name)}\n\n{table(lines)}\n\n{note}"


def cost(root: Path, names: tuple[str, ...]) -> str:
    """What tracing holds and computes, by method."""
    files = [read(root, name) for name in names]
    lines = [
        ["quantity", *(today(data, data["method"]) for data in files)],
        ["---"] * (1 + len(files)),
    ]
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "held while observing, MB": lambda d: f"{d['bytes_while_observing'] / 1e6:.1f}",
        "held while pruned, MB": lambda d: f"{d['bytes_while_pruned'] / 1e6:.1f}",
        "FLOPs of observing a token, share of a dense token": lambda d: (
            f"{d['flops_observe_share_of_token']:.3%}"
        ),
        "FLOPs of building masks, share of a dense token": lambda d: (
            f"{d['flops_build_masks'] / d['flops_dense_token']:.2%}"
        ),
        "all of it over 256 tokens with one re-mask from 32": lambda d: (
            f"{d['share_per_256_tokens_with_one_remask_of_32']:.4%}"
        ),
    }
    lines += [[text, *(cell(data) for data in files)] for text, cell in rows.items()]
    shapes = files[0]["shapes"]
    note = (
        f"{shapes['layers']} layers of {shapes['hidden']} x {shapes['width']} (Llama-3.1-8B), a "
        f"prompt of {files[0]['prompt_tokens']} tokens, beside the compact copies of the weights. "
        "The paper claims under 10 MB and 0.1 % of the FLOPs."
    )
    return f"{above(root, *names)}\n\n{table(lines)}\n\n{note}"


def tables(root: Path) -> dict[str, tuple[Path, str]]:
    """Block name -> the page that holds it and its content."""
    page = root / "docs/measurements.md"
    smollm2 = "budgets-smollm2-wikitext2-valid"
    blocks = {
        "budgets-smollm2": (page, budgets(root, smollm2)),
        "budgets-qwen": (page, budgets(root, "budgets-qwen2.5-coder-0.5b-wikitext2-valid")),
        "topic-shift": (page, shift(root, "topic-shift-smollm2")),
        "speed-bfloat16": (page, speed(root, "decode-speed-bfloat16")),
        "speed-float32": (page, speed(root, "decode-speed-float32")),
        "tracer-cost": (page, cost(root, ("tracer-cost-dart-prompt", "tracer-cost-published"))),
    }
    return linked(blocks, root)
