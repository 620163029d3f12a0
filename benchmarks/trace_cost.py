"""What a trace costs: the same text decoded with and without one, in turns, and its file.

Per method: a prompt and ``--tokens`` decoded tokens, ``--repeats`` pairs in random order within the
pair.  Writing the report and joining the file, once at the end, is a time of its own.  With
``--activations`` also by executor masked, with activations, beside masked without a trace.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import load_model, parser, save

from dart_llm import Run, prune, read_trace
from dart_llm.data import texts
from dart_llm.models.checkpoint import remember_tokenizer


def decode(model: Any, ids: torch.Tensor, tokens: int) -> None:
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


Clock = tuple[float, float]
"""Seconds passed, and those that this process had a CPU."""


def clock() -> Clock:
    return time.perf_counter(), time.process_time()


def timed(
    model: Any, run: Run, ids: torch.Tensor, args: Any, path: Path | None, kept: bool
) -> tuple[Clock, float]:
    """Milliseconds per token, and seconds that closing the trace took."""
    start = clock()
    if path is None:
        decode(model, ids, args.tokens)
        end = clock()
    else:
        with run.trace(path, activations=kept):
            decode(model, ids, args.tokens)
            end = clock()
    closing = time.perf_counter() - end[0]
    wall, cpu = (1e3 * (b - a) / args.tokens for a, b in zip(start, end, strict=True))
    return (wall, cpu), closing


def read_seconds(path: Path) -> float:
    start = time.perf_counter()
    read_trace(path).frame()
    return time.perf_counter() - start


def row(
    model: Any, ids: torch.Tensor, args: Any, method: str, kept: bool, folder: Path
) -> dict[str, Any]:
    """One method: medians over the pairs, and the median of the pairs' ratios."""
    path = folder / "trace.safetensors"
    settings = {"executor": "masked"} if kept else {}
    times: dict[bool, list[Clock]] = {False: [], True: []}
    closings = []
    with prune(model, method, sparsity=args.sparsity, **settings) as run:
        decode(model, ids, 32)
        for _ in range(args.repeats):
            for traced in random.sample([False, True], 2):
                given = path if traced else None
                per_token, closing = timed(model, run, ids, args, given, kept)
                times[traced].append(per_token)
                closings += [closing] if traced else []
        executor, remasks = run.report().executor, len(run.remasks)
    found = read_trace(path)
    return {
        "method": method,
        "executor": executor,
        "activations": kept,
        "masks_built": remasks / (1 + 2 * args.repeats),
        **compared("ms", times, 0),
        **compared("cpu_ms", times, 1),
        "closing_s": statistics.median(closings),
        "file_bytes": path.stat().st_size,
        "masks_bytes": found.arrays["masks"].nbytes,
        "read_frame_s": statistics.median(read_seconds(path) for _ in range(3)),
        "frame_rows": len(found.frame()),
    }


def compared(unit: str, times: dict[bool, list[Clock]], which: int) -> dict[str, Any]:
    """Medians of a clock, and of the ratios within the pairs."""
    plain, traced = ([one[which] for one in times[key]] for key in (False, True))
    ratios = sorted(b / a for a, b in zip(plain, traced, strict=True))
    return {
        f"plain_{unit}": statistics.median(plain),
        f"traced_{unit}": statistics.median(traced),
        f"ratio_{unit}": statistics.median(ratios),
        f"ratios_{unit}": ratios,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--methods", default="dart,dart-token", help="comma-separated")
    options.add_argument("--sparsity", type=float, default=0.5, help="of all methods")
    options.add_argument("--tokens", type=int, default=500, help="decoded tokens of a text")
    options.add_argument("--repeats", type=int, default=9, help="pairs of texts")
    options.add_argument("--activations", action="store_true", help="also with activations")
    args = options.parse_args()
    random.seed(0)
    model, tokenizer = load_model(args)
    remember_tokenizer(model, tokenizer)
    ids = tokenizer(texts.read("tides"), return_tensors="pt").input_ids[:, :128]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for method in args.methods.split(","):
            for kept in (False, True) if args.activations else (False,):
                rows.append(one := row(model, ids, args, method, kept, Path(folder)))
                print(
                    f"{method}, {one['executor']}, {'with' if kept else 'without'} activations: "
                    f"{one['plain_ms']:.2f} ms, traced {one['traced_ms']:.2f} ms "
                    f"(x {one['ratio_ms']:.3f}; by CPU time x {one['ratio_cpu_ms']:.3f}), "
                    f"{one['file_bytes']:,} bytes, read in {one['read_frame_s']:.2f} s"
                )
    shape = {"prompt_tokens": ids.shape[1], "tokens": args.tokens, "repeats": args.repeats}
    facts = {"threads": torch.get_num_threads(), "sparsity": args.sparsity, **shape}
    print(save(args.out or "trace-cost", model, {**facts, "rows": rows}))


if __name__ == "__main__":
    main()
