"""How long one small operation takes under several ways in which OpenMP's threads may wait.

OpenMP reads its variables once, so every policy is a process of its own; policies take turns,
alone and beside processes that only count.  Medians over rounds of each round's median and mean.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from common import parser, save

POLICIES = {
    "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "PASSIVE, spin count 1000": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"},
    "PASSIVE, spin count 10000": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"},
    "neither": {},
}
HIDDEN, WIDTH, KEPT = 576, 1536, 460
WARM, CALLS = 200, 2000
BUSY = "while True: pass"


def operations() -> dict[str, Callable[[], Any]]:
    """One vector in bfloat16: torch's matrix product, and a pruned FFN by the native kernels."""
    import torch
    from ffn_speed import blocks

    from dart_llm.patching.executors.native_ffn import Layout, NativeFfn
    from dart_llm.pruning.masks import LayerMask

    dtype = torch.bfloat16
    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
    (block,) = blocks(HIDDEN, WIDTH, dtype, 1)
    ffn = NativeFfn(block, Layout())
    weight = torch.randn(WIDTH, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
    ffn.load(LayerMask(torch.arange(0, WIDTH)[: 3 * KEPT : 3], WIDTH))
    return {
        "linear": lambda: torch.nn.functional.linear(x, weight),
        "FFN": lambda: ffn.run(x),
    }


def timed(calls: int) -> dict[str, list[float]]:
    """Median and mean milliseconds of each operation, in this process."""
    import torch

    found = {}
    with torch.inference_mode():
        for name, work in operations().items():
            seconds = []
            for _ in range(WARM + calls):
                begin = time.perf_counter()
                work()
                seconds.append(1000 * (time.perf_counter() - begin))
            found[name] = [statistics.median(seconds[WARM:]), statistics.fmean(seconds[WARM:])]
    return found


def child(policy: str, calls: int) -> dict[str, list[float]]:
    """The same in a process under a policy."""
    own = {name: text for name, text in os.environ.items() if not name.startswith("GOMP_")}
    own |= {"OMP_WAIT_POLICY": "", **POLICIES[policy]}  # empty: OpenMP's default; see common.py
    command = [sys.executable, __file__, "--child", "--calls", str(calls)]
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def company(number: int) -> Iterator[None]:
    """So many processes that only count."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def rows(rounds: int, calls: int, busy: int) -> list[dict[str, Any]]:
    """One per operation, company and policy."""
    found: dict[tuple[str, int, str], list[list[float]]] = {}
    for _ in range(rounds):
        for number in (0, busy):
            with company(number):
                for policy in POLICIES:
                    for name, times in child(policy, calls).items():
                        found.setdefault((name, number, policy), []).append(times)
    return [
        {
            "path": name,
            "row": f"beside {number} busy processes" if number else "alone",
            "case": policy,
            "ms": statistics.median(median for median, _ in times),
            "mean_ms": statistics.median(mean for _, mean in times),
        }
        for (name, number, policy), times in sorted(found.items(), key=lambda pair: pair[0][:2])
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5, help="processes per policy and company")
    options.add_argument("--calls", type=int, default=CALLS, help="timed calls of a process")
    options.add_argument("--busy", type=int, default=3, help="processes that only count")
    options.add_argument("--child", action="store_true", help="time in this process, and print")
    args = options.parse_args()
    if args.child:
        print(json.dumps(timed(args.calls)))
        return
    timed(1)  # the kernels are built before anything is timed
    load = os.getloadavg()[0]
    found = rows(args.rounds, args.calls, args.busy)
    for row in found:
        print(
            f"{row['path']:6} {row['row']:23} {row['case']:25} median {row['ms']:.4f} ms, "
            f"mean {row['mean_ms']:.4f} ms"
        )
    import torch

    data = {
        "rounds": args.rounds,
        "calls": args.calls,
        "threads": torch.get_num_threads(),
        "load_average_before": load,
        "rows": found,
    }
    print(save(args.out or "thread-policy", None, data))


if __name__ == "__main__":
    main()
