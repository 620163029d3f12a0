"""What a GPU does with the executors: contract tests on it, and decode speed at three sizes.

    make gpu-evidence

sets up and runs this, in less than ten minutes beside what is downloaded.  Each model is timed by
``dart-llm bench speed``: masks of the prompt (``griffin``) under every executor, and tokens that
choose their own neurons by 4-bit copies under ``triton``, beside plain transformers and our own
dense step of the same run.  ``gpu-CARD.json`` has everything, ``gpu-CARD.md`` the tables.

What fails (memory that a card does not have) is named, and the rest goes on.  ``--device cpu`` runs
through the same steps without a card, to test this script: no number of that means anything.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import save
from keep import gather_speed

from dart_llm.reporting.table import escaped
from dart_llm.studies.speed import summary

ROOT = Path(__file__).parents[1]

MODELS = ("smollm2-135m", "qwen2.5-1.5b-shape", "llama-3.1-8b-shape")
"""A checkpoint, or the name of a folder of ``shapes`` (random weights), or a config.json."""

MASKS = ("--methods", "griffin")
TOKENS = """\
each token:
  method: dart-token
  score: weight
  prior: null
  skip_sinks: false
  compensation: false
"""
"""Tokens choose by 4-bit copies and column norms: what they cost, with nothing to learn first."""


def main(words: Sequence[str] | None = None) -> None:
    args = options().parse_args(words)
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(
            "this measures a CUDA GPU, and PyTorch finds none: run it where `nvidia-smi` shows "
            "one; if this environment holds PyTorch's CPU build, "
            "make gpu-evidence VENV=build/gpu-venv makes another"
        )
    began = time.monotonic()
    tests = {} if args.no_tests else run_tests()
    folders, failed = [], {}
    with tempfile.TemporaryDirectory() as work:
        for number, (about, command) in enumerate(commands(args, Path(work))):
            print(f"{about} ({time.monotonic() - began:.0f} s)", flush=True)
            place = Path(work) / "runs" / str(number)
            error = bench([*command, "--results-dir", str(place)])
            found = sorted(place.glob("*/*/speed.json"))
            if error or not found:
                failed[about] = error
                print(f"failed: {error}", flush=True)
            folders += [path.parent for path in found]
        runs = gather_speed(folders)["runs"]
    data = {"kind": "gpu", **card(args.device), "tests": tests, "failed": failed, "runs": runs}
    data["seconds"] = round(time.monotonic() - began)
    path = save(f"gpu-{slug(data['card'])}", None, data)
    path.with_suffix(".md").write_text(tables(data), encoding="utf-8")
    print(f"{path}\n{path.with_suffix('.md')}\nsend both: docs/performance.md, On a GPU")


def options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--device", default="cuda:0", help="cuda:N, or cpu to try this script")
    made.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    made.add_argument("--executors", default="graph,compact,triton", help="comma-separated")
    made.add_argument("--sparsities", default="0.5,0.7", help="comma-separated")
    made.add_argument("--prompt-tokens", type=int, default=128)
    made.add_argument("--tokens", type=int, default=96, help="timed tokens of a repetition")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--no-tests", action="store_true", help="time alone")
    return made


def commands(args: argparse.Namespace, work: Path) -> list[tuple[str, list[str]]]:
    """What is timed, and by which command of dart-llm."""
    variants = work / "tokens.yaml"
    variants.write_text(TOKENS, encoding="utf-8")
    ways = {"masks of the prompt": [*MASKS, "--executors", args.executors]}
    if "triton" in args.executors:
        each = ["--methods", "", "--variants", str(variants), "--executors", "triton"]
        ways["tokens that choose"] = each
    sizes = ["--prompt-tokens", args.prompt_tokens, "--tokens", args.tokens]
    sizes += ["--repeats", args.repeats, "--sparsities", args.sparsities]
    common = ["--device", args.device, "--dtype", "bfloat16", *map(str, sizes)]
    return [
        (f"{model}, {way}", ["bench", "speed", *model_flags(model), *common, *flags])
        for model in args.models.split(",")
        for way, flags in ways.items()
    ]


def model_flags(model: str) -> list[str]:
    shape = ROOT / "benchmarks" / "shapes" / model / "config.json"
    if shape.is_file() or model.endswith(".json"):
        return ["--model-config", str(shape if shape.is_file() else model)]
    return ["--model", model]


def bench(words: Sequence[str]) -> str:
    """A process of its own, which gives all memory back; why it failed, or ""."""
    done = subprocess.run(
        [sys.executable, "-m", "dart_llm", *words], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return "" if done.returncode == 0 else (said or [f"exit code {done.returncode}"])[-1]


def run_tests() -> dict[str, Any]:
    """The contract tests that want a GPU, on it: counts, and the names of those that failed."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    words = [sys.executable, "-m", "pytest", "tests/patching", "-m", "gpu", "-q"]
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout[-2000:], flush=True)
    return tests_of(done.stdout)


def tests_of(text: str) -> dict[str, Any]:
    """What pytest's last lines say."""
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", text)
    }
    return {**counts, "not_passed": re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)}


def card(device: str) -> dict[str, Any]:
    """What was measured on."""
    versions = {"triton": version_of("triton"), "cuda": torch.version.cuda}
    if device == "cpu":
        return {"card": "none", **versions}
    facts = torch.cuda.get_device_properties(device)
    return {
        "card": facts.name,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "capability": f"{facts.major}.{facts.minor}",
        **versions,
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def tables(data: dict[str, Any]) -> str:
    """A table per run, and what did not work, as Markdown."""
    facts = ", ".join(f"{name} {data[name]}" for name in ("cuda", "triton") if data[name])
    lines = [f"# {data['card']}", "", *([facts, ""] if facts else [])]
    for run in data["runs"]:
        lines += [escaped(summary.caption(run)), "", *summary.table(run).lines(), ""]
        lines += [f"- {escaped(line)}" for line in (*summary.sentences(run), *run["notes"])]
        lines.append("")
    tests = data["tests"]
    if tests:
        counts = ", ".join(f"{n} {word}" for word, n in tests.items() if word != "not_passed")
        lines += [f"Tests on the card: {counts}. {'; '.join(tests['not_passed'])}".strip(), ""]
    lines += [f"- {about} failed: {escaped(why)}" for about, why in data["failed"].items()]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
