"""Decode time per token: dense, attached at sparsity 0, observing, compact; one run, shuffled.

The prompt is read once per repetition and not timed.  Medians over groups of 16 tokens, for work
that is put off and done for several tokens at once must count; ratios of medians.  ``limit`` is
1 / (1 - f s): what the bytes allow, with f the FFN's share of the bytes that one token reads and s
the sparsity.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from typing import Any

import torch
from common import load_model, parser, save

from dart_llm.data import texts
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import Run

GROUP = 16


def cases() -> dict[str, PruneConfig | None]:
    build = PruneConfig.build
    return {
        "dense": None,
        "attached, sparsity 0": build("griffin", sparsity=0.0),
        "observing (dart-prompt statistics)": build(
            "dart-prompt", sparsity=0.5, masking_step=10**6
        ),
        "compact 50 %": build("griffin", sparsity=0.5, executor="compact"),
        "compact 70 %": build("griffin", sparsity=0.7, executor="compact"),
        "masked 50 %": build("griffin", sparsity=0.5, executor="masked"),
        "dart-prompt 50 %": build("dart-prompt", sparsity=0.5, drift="never", min_evidence=0),
    }


@torch.inference_mode()
def decode(model: Any, ids: torch.Tensor, config: PruneConfig | None, tokens: int) -> list[float]:
    """Seconds per token of ``tokens`` greedy decode steps, as means over groups of ``GROUP``."""
    seconds = []
    with contextlib.nullcontext() if config is None else Run(model, config):
        output = model(ids, use_cache=True, logits_to_keep=1)
        for _ in range(tokens + 2):
            cache, token = output.cache, output.logits[:, -1:].argmax(-1)
            begin = time.perf_counter()
            output = model(token, cache=cache, use_cache=True)
            output.logits[0, -1, 0].item()
            seconds.append(time.perf_counter() - begin)
    timed = seconds[2:]
    return [sum(timed[i : i + GROUP]) / GROUP for i in range(0, len(timed) - GROUP + 1, GROUP)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=64, help="timed tokens per repetition")
    options.add_argument("--repeats", type=int, default=6, help="repetitions, interleaved")
    options.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    options.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch's threads"
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args)
    ids = tokenizer(texts.all_text(), return_tensors="pt").input_ids[:, : args.prompt]
    ids = ids.to(model.device)
    share = Run(model, PruneConfig.build("dense")).report().ffn_share_of_bytes
    times: dict[str, list[float]] = {name: [] for name in cases()}
    order = random.Random(0)
    for _ in range(args.repeats):
        for name, config in order.sample(list(cases().items()), len(cases())):
            times[name] += decode(model, ids, config, args.tokens)
    dense = statistics.median(times["dense"])
    rows = []
    for name, config in cases().items():
        median = statistics.median(times[name])
        low, high = (
            statistics.quantiles(times[name], n=20)[0],
            statistics.quantiles(times[name], n=20)[-1],
        )
        pruned = config is not None and "observing" not in name and "masked" not in name
        sparsity = config.target if pruned and config is not None else 0.0
        rows.append(
            {
                "case": name,
                "ms_per_token": 1000 * median,
                "p5_p95_ms": [1000 * low, 1000 * high],
                "speed_up": dense / median,
                "limit": 1 / (1 - share * sparsity),
                "sparsity": sparsity,
            }
        )
        print(
            f"{name:30} {1000 * median:7.2f} ms  x {dense / median:.3f}  "
            f"limit {rows[-1]['limit']:.2f}",
            flush=True,
        )
    data = {
        "ffn_share_of_bytes": share,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "prompt": args.prompt,
        "threads": args.threads,
        "rows": rows,
    }
    print(save(args.out or f"decode-speed-{str(model.dtype).removeprefix('torch.')}", model, data))


if __name__ == "__main__":
    main()
