"""Decode time per token of two revisions of this project, in turns.

    python benchmarks/revisions.py --old bc50a2c

A process per revision loads the model; each round every row runs once in all, one directly after
the other, in shuffled order.  ``again`` is the old revision in another process: how far it is from
``old`` is what two processes of the same code differ by.  Where the memory of a process happens to
lie moves its times by a percent, so that every few rounds the processes start anew.  Only the
public interface is used, so that revisions far apart can be compared.  ``new`` is the working tree.
Writes benchmarks/results/revisions.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Turns = dict[str, list[float]]
"""Milliseconds per token of each revision."""
ROWS: dict[str, dict[str, Any]] = {
    "transformers": {},
    "dense, slim": {"method": "griffin", "sparsity": 0.0, "executor": "slim"},
    "griffin 50 %, slim": {"method": "griffin", "sparsity": 0.5, "executor": "slim"},
    "dart 50 %, slim": {"method": "dart", "sparsity": 0.5, "executor": "slim"},
    "dart-token 50 %, slim": {"method": "dart-token", "sparsity": 0.5, "executor": "slim"},
    "griffin 50 %, native": {"method": "griffin", "sparsity": 0.5, "executor": "native"},
    "griffin 50 %, compact": {"method": "griffin", "sparsity": 0.5, "executor": "compact"},
}

WORKER = """
import contextlib, json, sys, time
import torch
from dart_llm import load, prune

torch.set_num_threads(THREADS)
model, tokenizer = load(MODEL, dtype="bfloat16")
text = " ".join(f"Line {n}: the tide rises and falls twice a day." for n in range(40))
ids = tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT]
print("ready", flush=True)
for line in sys.stdin:
    given, tokens = json.loads(line)
    method = given.pop("method", None)
    inside = prune(model, method, **given) if method else contextlib.nullcontext()
    seconds = []
    with inside, torch.inference_mode():
        output = model(ids, use_cache=True, logits_to_keep=1)
        for _ in range(tokens + 2):
            token = output.logits[:, -1:].argmax(-1)
            begin = time.perf_counter()
            output = model(token, cache=output.cache, use_cache=True)
            int(output.logits[0, -1].argmax())
            seconds.append(time.perf_counter() - begin)
    print(json.dumps(1000 * sum(seconds[2:]) / tokens), flush=True)
"""


class Worker:
    """One revision's process."""

    def __init__(self, source: Path, args: argparse.Namespace) -> None:
        code = f"THREADS, MODEL, PROMPT = {args.threads}, {args.model!r}, {args.prompt}\n{WORKER}"
        policy = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**policy, **os.environ, "PYTHONPATH": str(source)},
        )
        self._read("the model could not be loaded")

    def turn(self, given: dict[str, Any], tokens: int) -> float:
        """Milliseconds per token."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([given, tokens]) + "\n")
        self.process.stdin.flush()
        return float(json.loads(self._read(f"{given} failed")))

    def _read(self, problem: str) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended: {problem}")
        return line


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--old", required=True, help="the revision to compare with")
    options.add_argument("--model", default="smollm2-135m", help="as in dart-llm run")
    options.add_argument("--rows", default="", help="only rows whose names hold one of these words")
    options.add_argument("--tokens", type=int, default=96, help="timed tokens of a turn")
    options.add_argument("--prompt", type=int, default=128, help="tokens before them")
    options.add_argument("--rounds", type=int, default=15, help="turns of each row")
    options.add_argument("--starts", type=int, default=3, help="processes of each, in turn")
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pack = subprocess.run(
            ["git", "archive", args.old, "src"], cwd=ROOT, check=True, capture_output=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=pack.stdout, check=True)
        sources = {name: Path(folder) / "src" for name in ("old", "again")}
        turns = _measure({**sources, "new": ROOT / "src"}, args)
    _keep(args, [_row(name, own) for name, own in turns.items()])


def _measure(sources: dict[str, Path], args: argparse.Namespace) -> dict[str, Turns]:
    words = args.rows.split(",")
    rows = [name for name in ROWS if any(word in name for word in words)]
    turns: dict[str, Turns] = {name: {which: [] for which in sources} for name in rows}
    order = random.Random(0)
    for start in range(args.starts):
        workers = {which: Worker(source, args) for which, source in sources.items()}
        for name in rows:  # what is compiled or learnt on the first use
            for worker in workers.values():
                worker.turn(ROWS[name], 4)
        for number in range(start, args.rounds, args.starts):
            for name in order.sample(rows, len(rows)):
                for which in order.sample(list(workers), len(workers)):
                    turns[name][which].append(workers[which].turn(ROWS[name], args.tokens))
            print(f"round {number + 1} of {args.rounds}", flush=True)
        for worker in workers.values():
            worker.process.communicate(timeout=60)
    return turns


def _ratios(turns: Turns, which: str) -> list[float]:
    """Of a revision to the old one, turn by turn, sorted."""
    return sorted(new / old for old, new in zip(turns["old"], turns[which], strict=True))


def _row(name: str, turns: Turns) -> dict[str, Any]:
    row: dict[str, Any] = {"row": name}
    for which in turns:
        row[f"{which}_ms"] = statistics.median(turns[which])
    for which in ("again", "new"):
        ratios = _ratios(turns, which)
        row[f"{which}_over_old"] = statistics.median(ratios)
        row[f"{which}_quarters"] = [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]]
    print(
        f"{name:24} {row['old_ms']:7.2f} {row['new_ms']:7.2f} ms  x {row['new_over_old']:.3f}"
        f"  (the same code x {row['again_over_old']:.3f})"
    )
    return {**row, "turns_ms": turns}


def _keep(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from common import load_model, save

    model, _ = load_model(argparse.Namespace(model=args.model, dtype="bfloat16"))
    commit = ["git", "rev-parse", "--short", args.old]
    old = subprocess.run(commit, cwd=ROOT, check=True, capture_output=True, text=True)
    names = ("tokens", "prompt", "rounds", "starts", "threads")
    settings = {name: getattr(args, name) for name in names}
    print(save("revisions", model, {"old": old.stdout.strip(), **settings, "rows": rows}))


if __name__ == "__main__":
    main()
