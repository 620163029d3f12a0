"""One FFN alone, one vector: torch dense against the native kernels at several keep ratios.

Enough layers with weights of their own are used in turn that no cache holds them.  A pass goes over
all layers; passes are interleaved in shuffled order, and what counts is the median over passes of
the time per FFN.  Kept neurons are drawn at random.  Bytes are those of the kept neurons' weights.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import parser, save
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from dart_llm.experiments.timing import read_bandwidth
from dart_llm.models.describe import describe
from dart_llm.native.build import kernels_in_use
from dart_llm.patching.executors.native_ffn import Layout, NativeFfn
from dart_llm.pruning.masks import LayerMask

SHAPES = {(576, 1536): 30, (1536, 8960): 8}
"""Hidden size and width; how many layers are used in turn."""
KEEPS = (1.0, 0.5, 0.3)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SEED = 0

Passes = dict[tuple[str, float], Callable[[], None]]


def blocks(hidden: int, width: int, dtype: torch.dtype, layers: int) -> Any:
    """Gated FFNs of random weights, in a model that is nothing else."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    torch.manual_seed(SEED)
    make: Any = AutoModelForCausalLM.from_config
    return describe(make(config, dtype=dtype).eval()).blocks


def passes(hidden: int, width: int, dtype: torch.dtype, layers: int) -> Passes:
    """A pass over all layers, by path and keep ratio; torch and native have their own weights."""
    x = torch.randn(1, hidden, generator=torch.Generator().manual_seed(SEED)).to(dtype)
    plain, layout = blocks(hidden, width, dtype, layers), Layout()
    natives = [NativeFfn(block, layout) for block in blocks(hidden, width, dtype, layers)]

    def dense() -> None:
        for block in plain:
            block.ffn(x)

    kept = {("native", keep): pruned(natives, keep, x) for keep in KEEPS}
    return {("torch", 1.0): dense, **kept}


def pruned(natives: list[NativeFfn], keep: float, x: Tensor) -> Callable[[], None]:
    """A pass in which every layer keeps random neurons, their ids ascending."""
    generator = torch.Generator().manual_seed(SEED)
    found = []
    for ffn in natives:
        width = len(ffn.up)
        ids = torch.randperm(width, generator=generator)[: round(keep * width)].sort().values
        ffn.load(LayerMask(ids, width))
        found.append((ffn, ffn.kept))

    def run() -> None:
        for ffn, kept in found:
            ffn.kept = kept
            ffn.run(x)

    return run


@torch.inference_mode()
def measure(each: Passes, repeats: int, layers: int) -> dict[tuple[str, float], float]:
    """Median seconds of one FFN."""
    order = random.Random(SEED)
    times: dict[tuple[str, float], list[float]] = {name: [] for name in each}
    for way in each.values():
        way()
    for _ in range(repeats):
        for name in order.sample(list(each), len(each)):
            begin = time.perf_counter()
            each[name]()
            times[name].append((time.perf_counter() - begin) / layers)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def rows(hidden: int, width: int, dtype: str, layers: int, repeats: int) -> list[dict[str, Any]]:
    """Of one shape and dtype."""
    size = 3 * hidden * width * DTYPES[dtype].itemsize
    found = measure(passes(hidden, width, DTYPES[dtype], layers), repeats, layers)
    full = size / found["native", 1.0]
    return [
        {
            "hidden": hidden,
            "width": width,
            "dtype": dtype,
            "layers": layers,
            "path": path,
            "keep": keep,
            "ms": 1000 * seconds,
            "times_torch": found["torch", 1.0] / seconds,
            "bytes_per_second": keep * size / seconds,
            "share_of_native_dense": keep * size / seconds / full,
        }
        for (path, keep), seconds in found.items()
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=50, help="timed passes of each row")
    options.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch's threads"
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    found = []
    for (hidden, width), layers in SHAPES.items():
        for dtype in [args.dtype] if args.dtype else DTYPES:
            for row in rows(hidden, width, dtype, layers, args.repeats):
                found.append(row)
                print(
                    f"{hidden} x {width} {dtype:9} {row['path']:7} keep {row['keep']:.1f} "
                    f"{row['ms']:7.3f} ms  x {row['times_torch']:.2f}  "
                    f"{row['bytes_per_second'] / 1e9:5.1f} GB/s  "
                    f"{row['share_of_native_dense']:.0%} of native at keep 1",
                    flush=True,
                )
    data = {
        "repeats": args.repeats,
        "threads": args.threads,
        "kernels": kernels_in_use(),
        "read_bandwidth": read_bandwidth(torch.device("cpu")),
        "rows": found,
    }
    print(save(args.out or "ffn-speed", None, data))


if __name__ == "__main__":
    main()
