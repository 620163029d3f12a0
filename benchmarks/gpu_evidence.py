"""What a GPU does with the executors: contract tests on it, and decode speed at three sizes.

    make gpu-evidence

sets up and runs this.  Each model is timed by ``dart-llm bench speed``: one mask per prompt
(``griffin``) and per-token selection (``dart-token`` without anything learned first) under every
executor, beside transformers.  ``gpu-CARD.json`` and ``.md`` keep the runs; a command that fails,
for example because the card has too little memory, is reported and the others run.
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
"""A checkpoint, or the name of a folder of ``shapes`` (random weights)."""
SELECTION = """\
each token:
  {method: dart-token, score: weight, self_stats: null, skip_sinks: false, compensation: false}
"""


def main(words: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    options.add_argument("--executors", default="cuda,compact", help="comma-separated")
    options.add_argument("--no-tests", action="store_true", help="time alone")
    args = options.parse_args(words)
    if not torch.cuda.is_available():
        raise SystemExit(
            "this measures a CUDA GPU, and PyTorch finds none: run it where `nvidia-smi` shows "
            "one; if this environment holds PyTorch's CPU build, "
            "make gpu-evidence VENV=build/gpu-venv makes another"
        )
    if not args.no_tests:
        pytest = [sys.executable, "-m", "pytest", "tests/patching", "-m", "gpu", "-q"]
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        subprocess.run(pytest, cwd=ROOT, env=environment, check=False)
    work = ROOT / "results" / "gpu-evidence"
    work.mkdir(parents=True, exist_ok=True)
    folders = []
    for number, command in enumerate(commands(args.models, args.executors, work)):
        place = work / str(number)
        done = subprocess.run([*command, "--results-dir", str(place)], check=False)
        if done.returncode:
            print(f"failed with exit code {done.returncode}: {' '.join(command[2:])}")
        folders += [path.parent for path in sorted(place.glob("*/*/config.json"))[-1:]]
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    print(keep(f"gpu-{name}", folders))


def commands(models: str, executors: str, work: Path) -> list[list[str]]:
    """One command for the masks and one for per-token selection, for each model."""
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
