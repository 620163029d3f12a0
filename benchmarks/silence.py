"""Measure the longest silence of every command, with short settings, on each model.

    python benchmarks/silence.py --model smollm2-135m --model mine.gguf

Stdout and stderr of a command go to one pipe.  A silence is the time between two pieces of output,
or before the first or after the last.  Finished rows stay in the results file, and the same command
resumes.  ``serve`` is measured until it prints its link; then it answers a request and is ended.

``--empty-cache`` starts with an empty cache, so that the first command of each model also converts
weights and calibrates.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import goldens

BOUND_S = 15.0
"""Seconds for which a command may be silent."""

LINK = re.compile(r"at (http://127\.0\.0\.1:\d+)/ \(Ctrl-C")
QUESTIONS = "Why is the sky blue?\n/stats\n"
REQUEST = {"model": "", "prompt": "The sky is blue because", "max_tokens": 8}
FEW = ("--methods", "griffin", "--sparsities", "0.3")
COMMANDS: dict[str, tuple[str, ...]] = {
    "run": ("run", "--prompt", "sky", "--generation", "24"),
    "chat": ("chat", "--max-tokens", "16"),
    "eval": ("eval", "--tasks", "TASK", "--include-path", "FOLDER", "--limit", "4"),
    "perplexity": ("perplexity", "--limit", "2"),
    "summarize": ("summarize", "--data", "DOCUMENTS", "--max-output", "16"),
    "compare": ("compare", *FEW, "--tasks", "perplexity:embedded", "--limit", "2"),
    "sweep": ("sweep", *FEW, "--tasks", "perplexity:embedded", "--limit", "2"),
    "drift": ("drift", "--prompts", "shipped", "--limit", "1", "--generation", "32"),
    "detect": ("detect", "--limit", "1"),
    "inspect": ("inspect", "--passage", "01"),
    "bench quality": ("bench", "quality", *FEW, "--slices", "2"),
    "bench speed": ("bench", "speed", *FEW, "--repeats", "1", "--tokens", "16"),
    "tune": ("tune", "QUICK"),
    "export": ("export", "--gguf", "FOLDER/narrow.gguf", "--sparsity", "0.3", "--prompt", "sky"),
    "serve": ("serve", "--port", "0"),
    "demo": ("demo",),
    "doctor": ("doctor",),
    "methods": ("methods",),
}
OF_NO_MODEL = ("doctor", "methods")
WITHOUT_FOLDER = (*OF_NO_MODEL, "chat", "export", "serve")
"""Commands without ``--results-dir``."""
SLOW = (*FEW, "--heads", "full", "--slices", "2", "--repeats", "1")
"""Options of ``tune`` in versions without ``--quick``."""


@dataclass
class Watched:
    """The output of a command and its times, in seconds since the start."""

    began: float
    times: list[float]
    texts: list[str]

    def silences(self, ended: float) -> Iterator[tuple[float, str]]:
        """The length of each silence, and the last line before it."""
        last, line = 0.0, ""
        for at, text in zip(self.times, self.texts, strict=True):
            yield at - last, line
            last, line = at, (text.strip().splitlines() or [line])[-1]
        yield ended - last, line

    def read(self, process: subprocess.Popen[bytes], limit: float, until: re.Pattern[str]) -> None:
        """Read until the command ends, the output matches ``until``, or ``limit`` seconds pass."""
        assert process.stdout is not None
        while (left := self.began + limit - time.monotonic()) > 0:
            if not select.select([process.stdout], [], [], left)[0]:
                return
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                return
            self.times.append(time.monotonic() - self.began)
            self.texts.append(data.decode("utf-8", "replace"))
            if until.search("".join(self.texts[-3:])):
                return


def measure(
    label: str, command: Sequence[str], environment: Mapping[str, str], limit: float
) -> Any:
    """Run a command, for at most ``limit`` seconds, and return its row."""
    watched = Watched(time.monotonic(), [], [])
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(environment),
    )
    assert process.stdin is not None and process.stdout is not None
    request_s = None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write(QUESTIONS.encode() if label == "chat" else b"")
    try:
        watched.read(process, limit, LINK if label == "serve" else re.compile(r"(?!)"))
        ended = time.monotonic() - watched.began
        if label == "serve" and (link := LINK.search("".join(watched.texts))):
            request_s = ask(link[1], limit)
    finally:
        stopped = process.poll() is None and label != "serve" and ended >= limit
        code = end(process)
    silence, before = max(watched.silences(ended))
    return {
        "seconds": ended,
        "first_s": watched.times[0] if watched.times else None,
        "first": next(iter("".join(watched.texts).strip().splitlines()), "")[:120],
        "silence_s": silence,
        "silent_after": re.sub(r"/\S+/", "", before)[:120],
        "lines": "".join(watched.texts).count("\n"),
        "request_s": request_s,
        "code": None if stopped else code,
    }


def end(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process, which is ended by SIGTERM if it still runs."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(1)
    process.terminate()
    try:
        return process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def ask(link: str, limit: float) -> float:
    """Send a request to a server and return the seconds until its answer."""
    with urllib.request.urlopen(f"{link}/v1/models", timeout=limit) as answer:
        name = json.loads(answer.read())["data"][0]["id"]
    body = json.dumps({**REQUEST, "model": name}).encode()
    headers = {"Content-Type": "application/json"}
    began = time.monotonic()
    request = urllib.request.Request(f"{link}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=limit) as answer:
        answer.read()
    return time.monotonic() - began


def quick() -> Sequence[str]:
    """Options of a short ``tune``."""
    command = [sys.executable, "-m", "dart_llm", "tune", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return ["--quick"] if "--quick" in text else SLOW


def command_of(label: str, model: str, folder: Path, words: Mapping[str, str]) -> list[str]:
    """The complete command line of a label."""
    command = [sys.executable, "-m", "dart_llm"]
    for word in COMMANDS[label]:
        word = re.sub("^FOLDER", str(folder), words.get(word, word))
        command += quick() if word == "QUICK" else [word]
    if label not in OF_NO_MODEL:
        command += ["--model", model]
    if label not in WITHOUT_FOLDER:
        command += ["--results-dir", str(folder / "results")]
    return command


def line(row: Mapping[str, Any]) -> str:
    """A row as a line."""
    end = "ended at the limit" if row["code"] is None else f"code {row['code']}"
    return (
        f"{row['command']} {row['model']}: {row['seconds']:.0f} s, {end}; silent for "
        f"{row['silence_s']:.1f} s at most, after: {row['silent_after'][:80] or '(start)'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", help="as in dart-llm run; may be repeated")
    parser.add_argument("--only", default="", help="commands, comma-separated (default: all)")
    parser.add_argument("--limit", type=float, default=900.0, help="maximum seconds of a command")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    parser.add_argument("--empty-cache", action="store_true", help="begin with empty caches")
    parser.add_argument("--out", default="silence", help="name of the JSON file, without suffix")
    args = parser.parse_args()
    models = args.model or ["smollm2-135m"]
    wanted = [name.strip() for name in args.only.split(",") if name.strip()] or list(COMMANDS)
    if unknown := sorted(set(wanted) - set(COMMANDS)):
        parser.error(f"unknown command {unknown[0]}: choose from {', '.join(COMMANDS)}")
    kept = common.RESULTS / f"{args.out}.json"
    rows = common.read(kept)["rows"] if kept.exists() and not args.fresh else []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        words = goldens.inputs(folder)
        for model in models:
            name = Path(model).name
            environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1"}
            if args.empty_cache:
                environment["DART_CACHE"] = str(folder / "cache" / name)
            for label in wanted:
                of = "" if label in OF_NO_MODEL else name
                if any((row["command"], row["model"]) == (label, of) for row in rows):
                    continue
                command = command_of(label, model, folder, words)
                row = measure(label, command, environment, args.limit)
                arguments = " ".join(COMMANDS[label])
                rows.append({"command": label, "asked": arguments, "model": of, **row})
                common.save(args.out, None, {"empty_cache": args.empty_cache, "rows": rows})
                print(line(rows[-1]), flush=True)
    over = sum(row["silence_s"] > BOUND_S for row in rows)
    print(f"{over} of {len(rows)} were silent for longer than {BOUND_S:.0f} s")


if __name__ == "__main__":
    main()
