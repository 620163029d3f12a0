"""Test and time the executors on a GPU: contract tests, and decode speed at three model sizes.

``make gpu-evidence`` sets up an environment and runs this script.  ``dart-llm bench speed`` times
each model with one mask per prompt (``griffin``) and with per-token selection (``dart-token``
without calibration) under every executor, beside transformers.  The results are saved as
``gpu-CARD.json`` and ``.md``.  A command that fails, for example because the card has too little
memory, is reported and the others still run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from keep import keep  # beside this file
from random_checkpoint import write

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("smollm2-135m", "qwen2.5-1.5b-shape", "llama-3.1-8b-shape")
"""Checkpoints, or names of folders in ``shapes`` (random weights)."""
SELECTION = """\
each token:
  {method: dart-token, score: weight, self_stats: null, skip_sinks: false, compensation: false}
"""


def main(words: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    options.add_argument("--executors", default="cuda,compact", help="comma-separated")
    options.add_argument("--no-tests", action="store_true", help="only time")
    args = options.parse_args(words)
    if not torch.cuda.is_available():
        raise SystemExit(
            "PyTorch finds no CUDA GPU: run this on a machine where `nvidia-smi` shows a GPU; if "
            "this environment has PyTorch's CPU build, "
            "make gpu-evidence VENV=build/gpu-venv creates another environment"
        )
    if not args.no_tests:
        pytest = [sys.executable, "-m", "pytest", "tests/patching", "-m", "gpu", "-q"]
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        subprocess.run(pytest, cwd=ROOT, env=environment, check=False)
    work = ROOT / "results" / "gpu-evidence"
    work.mkdir(parents=True, exist_ok=True)
    folders = []
    for number, command in enumerate(commands(args.models, args.executors, work)):
        results = work / str(number)
        done = subprocess.run([*command, "--results-dir", str(results)], check=False)
        if done.returncode:
            print(f"failed with exit code {done.returncode}: {' '.join(command[2:])}")
        folders += [path.parent for path in sorted(results.glob("*/*/config.json"))[-1:]]
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    print(keep(f"gpu-{name}", folders))


def commands(models: str, executors: str, work: Path) -> list[list[str]]:
    """For each model, one command for masks and one for per-token selection."""
    variants = work / "selection.yaml"
    variants.write_text(SELECTION, encoding="utf-8")
    options = ["--executors", executors, "--device", "cuda:0", "--dtype", "bfloat16"]
    options += ["--sparsities", "0.5,0.7", "--tokens", "96", "--repeats", "3"]
    made = []
    for model in models.split(","):
        shape = ROOT / "benchmarks/shapes" / model / "config.json"
        name = str(write(shape, work / model)) if shape.is_file() else model
        for methods in (["--methods", "griffin"], ["--methods", "", "--variants", str(variants)]):
            bench = [sys.executable, "-m", "dart_llm", "bench", "speed"]
            made.append([*bench, "--model", name, *methods, *options])
    return made


if __name__ == "__main__":
    main()
