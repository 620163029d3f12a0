"""Memory that a model in low-bit blocks takes, dense and pruned: is it that of its weights?

    python benchmarks/packed_memory.py

Makes a random model of each shape in a process of its own, its matrices in blocks (``--weights``),
generates dense and with griffin at 50 and 70 %, and asks the system for the memory that was
resident: now, and the most so far, with everything that Python and torch hold, the making of the
weights, and the prompt.  Writes benchmarks/results/packed-memory.json, and exits with 1 where a
shape took more than its bar.  Linux only.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import torch
from transformers import AutoConfig

from dart_llm.models.packed_loading import random_packed
from dart_llm.session.run import prune

SHAPES = Path(__file__).parent / "shapes"
BARS = {"qwen2.5-1.5b-shape": 1_500_000_000, "llama-7b-shape": 5_500_000_000}
"""Bytes that may be resident at most, in q4_0."""
METHODS = (("dense", 0.0), ("griffin", 0.5), ("griffin", 0.7))
PROMPT = 32


def resident() -> dict[str, int]:
    """Bytes of this process in memory: ``now`` and ``most`` so far."""
    told = Path("/proc/self/status").read_text("utf-8")
    names = {"now": "VmRSS", "most": "VmHWM"}
    found = {key: re.search(rf"{name}:\s+(\d+) kB", told) for key, name in names.items()}
    return {key: int(one[1]) * 1024 for key, one in found.items() if one}


@torch.inference_mode()
def measure(shape: Path, kind: str, tokens: int) -> dict[str, Any]:
    """Rows of a shape, a folder with config.json, in this process."""
    start = resident()
    config = AutoConfig.from_pretrained(shape)
    model: Any = random_packed(config, kind, torch.bfloat16)
    made = {
        "shape": shape.name,
        "parameters": sum(one.numel() for one in model.parameters()),
        "weight_bytes": sum(one.nbytes for one in model.parameters()),
        "start": start,
        "made": resident(),
    }
    ids = torch.randint(3, config.vocab_size, (1, PROMPT))
    return {**made, "rows": [row(model, ids, tokens, *method) for method in METHODS]}


def row(model: Any, ids: Any, tokens: int, method: str, sparsity: float) -> dict[str, Any]:
    """What a method removed, and the memory after it has generated."""
    asked: dict[str, Any] = {"sparsity": sparsity} if sparsity else {}
    with prune(model, method, executor="slim", **asked) as run:
        made = model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
    report = run.report()
    return {
        "method": method,
        "asked": sparsity,
        "tokens": made.shape[1] - ids.shape[1],
        "achieved_sparsity": report.achieved_sparsity,
        "dense_token_share": report.dense_token_share,
        "remasks": report.remasks,
        "held_beside": report.extra_memory_bytes,
        **resident(),
    }


def apart(shape: Path, kind: str, tokens: int) -> dict[str, Any]:
    """``measure`` in a fresh process."""
    asked = ["--apart", str(shape), "--weights", kind, "--tokens", str(tokens)]
    done = subprocess.run([sys.executable, __file__, *asked], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{shape.name} failed with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def judge(found: dict[str, Any], bar: int) -> dict[str, Any]:
    """With the bar, and whether it was kept until the dense text was there; copies come after."""
    most = found["rows"][0]["most"]
    return {**found, "most": most, "bar": bar, "passed": most <= bar}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--shape", choices=BARS, action="append", help="default: all")
    options.add_argument("--weights", default="q4_0", help="q4_0, q4_1 or q8_0")
    options.add_argument("--tokens", type=int, default=18, help="that are generated per row")
    options.add_argument("--out", default="packed-memory", help="name of the JSON file")
    options.add_argument("--apart", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.apart:
        print(json.dumps(measure(args.apart, args.weights, args.tokens)))
        return
    shapes = [
        judge(apart(SHAPES / name, args.weights, args.tokens), BARS[name])
        for name in args.shape or BARS
    ]
    for one in shapes:
        print(f"{one['shape']}: {one['most'] / 1e9:.2f} GB, at most {one['bar'] / 1e9:.1f}")
    passed = all(one["passed"] for one in shapes)
    data = {"weights": args.weights, "prompt": PROMPT, "shapes": shapes, "passed": passed}
    print(common.save(args.out, None, data))
    if not passed:
        raise SystemExit("a shape takes more memory than its bar")


if __name__ == "__main__":
    main()
