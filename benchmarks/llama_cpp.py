"""Decode time per token beside llama.cpp: one run, in turns, the same prompt length and threads.

    python benchmarks/llama_cpp.py --bench PATH/llama-bench --gguf FILE.gguf --gguf FILE-Q8_0.gguf

``--bench`` (or ``LLAMA_BENCH``) names llama.cpp's own benchmark; files of other types are made by
its ``llama-quantize``.  Every round runs every row once, in an order that is shuffled anew.  Ours
generate ``--tokens`` after a prompt of ``--prompt`` tokens; llama.cpp generates as many at that
depth.  Writes benchmarks/results/llama-cpp.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import load_model, parser, save

from dart_llm.data import texts
from dart_llm.experiments.timing import Sample, read_bandwidth, repetition
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.records import bytes_limit
from dart_llm.session.prepare import prepare
from dart_llm.session.run import Run

METHODS = (("griffin", 0.5), ("griffin", 0.7), ("dart", 0.5), ("dart-token", 0.5))
DENSE = "dart-llm dense"

Make = Callable[[], Run | None]


def ours(model: Any, tokenizer: Any) -> dict[str, tuple[float, Make]]:
    """Sparsity asked for and a run, not attached, by the row's name."""
    dense = PruneConfig.build("griffin", sparsity=0.0, executor="slim")
    found: dict[str, tuple[float, Make]] = {
        "transformers": (0.0, lambda: None),
        DENSE: (0.0, lambda: Run(model, dense)),
    }
    for method, sparsity in METHODS:
        config = PruneConfig.build(method, sparsity=sparsity, executor="slim")
        candidate = prepare(model, tokenizer, config)
        found[f"dart-llm {method} {100 * sparsity:g} %"] = (sparsity, candidate.run)
    return found


def theirs(bench: str, file: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One turn of llama-bench: its own report."""
    command = [bench, "-m", str(file), "-t", str(args.threads), "-p", "0"]
    command += ["-n", str(args.tokens), "-d", str(args.prompt), "-r", "1", "-o", "json"]
    places = os.pathsep.join(
        p for p in (str(Path(bench).parent), os.getenv("LD_LIBRARY_PATH")) if p
    )
    found = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "LD_LIBRARY_PATH": places}
    )
    if found.returncode:
        raise SystemExit(f"{bench} failed on {file.name}: {found.stderr.strip()[-400:]}")
    return dict(json.loads(found.stdout)[0])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--bench", default=os.getenv("LLAMA_BENCH"), help="path of llama-bench")
    options.add_argument("--build", default="", help="which llama.cpp this is, for the table")
    options.add_argument("--gguf", type=Path, action="append", required=True, help="for llama.cpp")
    options.add_argument("--tokens", type=int, default=128, help="timed tokens of a turn")
    options.add_argument("--prompt", type=int, default=128, help="tokens before them")
    options.add_argument("--repeats", type=int, default=9, help="turns of each row")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both")
    args = options.parse_args()
    if not args.bench:
        raise SystemExit("give --bench, the path of llama-bench, or set LLAMA_BENCH")
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args)
    ids = tokenizer(texts.all_text(), return_tensors="pt").input_ids[:, : args.prompt]
    own = ours(model, tokenizer)
    samples: dict[str, list[Sample]] = {name: [] for name in own}
    reports: dict[str, list[dict[str, Any]]] = {file.name: [] for file in args.gguf}
    files = {file.name: file for file in args.gguf}
    order, bandwidths = random.Random(0), []
    for number in range(args.repeats + 1):
        bandwidths.append(read_bandwidth(torch.device("cpu")))
        for name in order.sample([*own, *files], len(own) + len(files)):
            if name in own:
                turn = repetition(model, ids, args.tokens, own[name][1])
                samples[name] += [turn] if number else []  # the first round warms up
            else:
                report = theirs(args.bench, files[name], args)
                reports[name] += [report] if number else []
        print(f"round {number} of {args.repeats}", flush=True)
    accounting = Run(model, PruneConfig.build("dense")).report()
    share = accounting.ffn_share_of_bytes
    rows = [_own_row(name, own[name][0], samples[name], share) for name in own]
    rows += [_their_row(name, found) for name, found in reports.items()]
    dense = next(row["ms"] for row in rows if row["row"] == DENSE)
    for row in rows:
        row["times_own_dense"] = dense / row["ms"]
        print(f"{row['row']:48} {row['ms']:7.2f} +- {row['spread_ms']:.2f} ms")
    data = {
        "build": args.build,
        "tokens": args.tokens,
        "prompt": args.prompt,
        "repeats": args.repeats,
        "threads": args.threads,
        "read_bandwidth": statistics.median(bandwidths),
        "ffn_share_of_bytes": share,
        "rows": rows,
    }
    print(save(args.out or "llama-cpp", model, data))


def _times(values: list[float]) -> dict[str, Any]:
    middle = statistics.median(values)
    spread = statistics.median(abs(value - middle) for value in values)
    return {"ms": middle, "spread_ms": spread, "turns_ms": values}


def _own_row(name: str, asked: float, found: list[Sample], share: float) -> dict[str, Any]:
    achieved = statistics.mean(turn.get("achieved_sparsity", 0.0) for turn in found)
    dense = statistics.mean(turn.get("dense_token_share", 1.0) for turn in found)
    proxies = statistics.mean(turn.get("proxy_bytes_share", 0.0) for turn in found)
    return {
        "row": name,
        "asked": asked,
        "achieved_sparsity": achieved,
        "dense_token_share": dense if asked else 1.0,
        "remasks": statistics.mean(turn.get("remasks", 0) for turn in found),
        "limit": bytes_limit(share, achieved, proxies),
        **_times([1000 * statistics.mean(turn["steps_s"]) for turn in found]),
    }


def _their_row(name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    first = found[0]
    return {
        "row": f"llama.cpp {name}",
        "type": first["model_type"],
        "file_bytes": first["model_size"],
        **_times([1000 / report["avg_ts"] for report in found]),
    }


if __name__ == "__main__":
    main()
