"""Real SIGINTs at random moments of attaching and detaching: is every weight in its place after it?

Another process sends them, so that they come wherever they come.  After each, the run is detached
and ``restore`` is called, as a user would, and values, strides, addresses, hooks and attributes are
compared with what they were.  An interrupt counts when it was raised out of the call.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

from common import save

EXECUTORS, ACTS = ("slim", "native"), ("attach", "detach")
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
SENDER = """
import os, signal, sys, time
for line in sys.stdin:
    time.sleep(float(line))
    os.kill(os.getppid(), signal.SIGINT)
"""
PATIENCE = 10.0
"""Seconds within which a signal that was asked for must have come."""


class Sender:
    """A process that interrupts this one after the seconds that it is told."""

    def __init__(self) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SENDER], stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def ask(self, seconds: float) -> None:
        """Returns before the signal comes."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def wait(self) -> None:
        """Until it comes, as ``KeyboardInterrupt``."""
        time.sleep(PATIENCE)
        raise SystemExit("no signal came: the process that sends them has ended")

    def close(self) -> None:
        self.process.communicate()


def make_model() -> Any:
    """A small decoder with wide FFNs, whose down projections are laid out anew."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


class Kept:
    """What the model was."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.values = [p.detach().clone() for p in model.parameters()]
        self.rest = self._rest()

    def _rest(self) -> Any:
        return (
            [(p.data_ptr(), p.stride()) for p in self.model.parameters()],
            [
                (key, dict(value) if "hooks" in key and value is not None else id(value))
                for module in self.model.modules()
                for key, value in module.__dict__.items()
            ],
        )

    def out_of_order(self) -> int:
        """Weights with other values, which are put right."""
        wrong = 0
        for p, value in zip(self.model.parameters(), self.values, strict=True):
            if not bool((p == value).all()):
                p.data = value.clone()
                wrong += 1
        return wrong

    def as_before(self) -> bool:
        """Whether nothing else is changed."""
        return self._rest() == self.rest


def stress(model: Any, executor: str, act: str, count: int, seconds: float) -> dict[str, Any]:
    """Interrupt ``act`` until ``count`` interrupts came, ``seconds`` at most."""
    from dart_llm.patching.patch import restore
    from dart_llm.session.run import prune

    def begin() -> Any:
        run = prune(model, "griffin", sparsity=0.5, executor=executor)
        return run if act == "attach" else run.attach()

    def timed() -> float:
        run = begin()
        start = time.perf_counter()
        getattr(run, act)()
        took = time.perf_counter() - start
        run.detach()
        return took

    timed()
    takes = statistics.median(timed() for _ in range(9))
    kept, sender, draw = Kept(model), Sender(), random.Random(0)
    row = {"executor": executor, "act": act, "takes_ms": round(1e3 * takes, 2), "sent": 0}
    row |= {"interrupted": 0, "out_of_order": 0, "not_as_before": 0}
    end = time.monotonic() + seconds
    while row["interrupted"] < count and time.monotonic() < end:
        run, inside = begin(), True
        try:
            sender.ask(draw.uniform(0, 1.2 * takes))
            getattr(run, act)()
            inside = False
            sender.wait()
        except KeyboardInterrupt:
            row["interrupted"] += inside
        row["sent"] += 1
        run.detach()
        restore(model)
        row["out_of_order"] += kept.out_of_order() > 0
        row["not_as_before"] += not kept.as_before()
    sender.close()
    return row


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--count", type=int, default=200, help="interrupts per executor and act")
    made.add_argument("--seconds", type=float, default=240, help="of each, at most")
    made.add_argument("--out", default="interrupts", help="name of the JSON file, without suffix")
    args = made.parse_args()
    rows, model = [], make_model()
    print("executor  act      takes ms  interrupts of sent  out of order  not as before")
    for executor in EXECUTORS:
        for act in ACTS:
            row = stress(model, executor, act, args.count, args.seconds)
            rows.append(row)
            print(
                f"{executor:<9} {act:<8} {row['takes_ms']:>8}  {row['interrupted']:>10} of "
                f"{row['sent']:<5} {row['out_of_order']:>12}  {row['not_as_before']:>13}",
                flush=True,
            )
    print(f"written: {save(args.out, None, {'shape': SHAPE, 'rows': rows})}")


if __name__ == "__main__":
    main()
