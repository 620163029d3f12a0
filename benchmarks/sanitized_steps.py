"""Random whole decode steps of the native kernels under ASan and UBSan.

Builds tests/native/steps.cpp, which draws small decoders of every shape that whole steps support
and compares each step with plain loops.  A sequence depends only on the seed and its number.

Usage: python benchmarks/sanitized_steps.py [--steps 12000] [--seed 1]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import save

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/helpers"))

from sanitized import COMPILER, FLAGS, driver, kernel_objects, random_steps


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    options.add_argument("--steps", type=int, default=12000, help="run at least so many steps")
    options.add_argument("--seed", type=int, default=1, help="seed of the random decoders")
    options.add_argument("--first", type=int, default=0, help="number of the first sequence")
    options.add_argument("--out", default="sanitized-steps", help="name of the JSON file")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        begun = time.monotonic()
        program = driver("steps", kernel_objects(folder), folder)
        built = time.monotonic()
        try:
            counts = random_steps(program, args.steps, args.seed, args.first)
        except RuntimeError as error:
            raise SystemExit(str(error)) from None
    version = subprocess.run([str(COMPILER), "--version"], capture_output=True, text=True)
    data = {
        "compiler": version.stdout.splitlines()[0],
        "flags": FLAGS,
        "seed": args.seed,
        "counts": counts,
        "build_s": built - begun,
        "run_s": time.monotonic() - built,
    }
    for name, n in counts.items():
        print(f"{name}: {n}")
    print(save(args.out, None, data))


if __name__ == "__main__":
    main()
