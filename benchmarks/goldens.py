"""Record the output and files of every command, to compare two revisions of the program.

    python benchmarks/goldens.py make before            # in the first revision
    python benchmarks/goldens.py make after             # in the second revision
    python benchmarks/goldens.py diff before after

``make`` runs every command once on the default model and saves its output and the files of its
results folder.  Numbers are rounded, and values that change between runs (times, paths, memory) are
removed.  ``diff`` prints the differences, and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMALL = ("--dtype", "float32", "--seed", "1")
COMMANDS: dict[str, tuple[str, ...]] = {
    "methods": ("methods",),
    "methods-json": ("methods", "--json"),
    "prompts-list": ("prompts", "list"),
    "run": (*("run", "--prompt", "two_topics", "--generation", "24", "--sparsity", "0.5"), *SMALL),
    "eval": ("eval", "--tasks", "TASK", "--include-path", "FOLDER", "--limit", "4", *SMALL),
    "perplexity": ("perplexity", "--method", "griffin", "--limit", "2", "--json", *SMALL),
    "summarize": (
        *("summarize", "--data", "DOCUMENTS", "--method", "griffin", "--max-output", "16"),
        *("--json", *SMALL),
    ),
    "sweep": (
        *("sweep", "--methods", "dense,griffin,static", "--sparsities", "0.3,0.5"),
        *("--tasks", "perplexity:embedded", "--limit", "2", *SMALL[:2]),
    ),
    "compare": (
        *("compare", "--methods", "griffin,dart", "--sparsities", "0.5"),
        *("--tasks", "perplexity:embedded", "--limit", "2", "--json", *SMALL[:2]),
    ),
    "drift-forced": (
        *("drift", "--passages", "shipped", "--limit", "1", "--methods", "dense,never,dart"),
        *("--json", *SMALL[:2]),
    ),
    "drift-free": (
        *("drift", "--prompts", "shipped", "--limit", "1", "--methods", "dense,dart"),
        *("--generation", "48", *SMALL[:2]),
    ),
    "detect": ("detect", "--limit", "2", "--json", *SMALL[:2]),
    "inspect": ("inspect", "--passage", "01", "--json", *SMALL[:2]),
    "bench-quality": (
        *("bench", "quality", "--methods", "griffin,dart", "--sparsities", "0.5"),
        *("--slices", "2", "--json", *SMALL[:2]),
    ),
    "bench-speed": (
        *("bench", "speed", "--methods", "griffin", "--sparsities", "0.5", "--repeats", "1"),
        *("--tokens", "8", "--executors", "compact", *SMALL[:2]),
    ),
    "tune-quick": ("tune", "--quick", "--json"),
    "results": ("results",),
    "refused": ("run", "--sparsity", "2"),
}
HELP = (
    *("", "run", "chat", "eval", "perplexity", "summarize", "compare", "sweep", "drift", "detect"),
    *("inspect", "export", "serve", "replay", "results", "demo", "methods", "doctor", "tune"),
    *("bench quality", "bench speed", "prompts", "prompts list", "prompts show"),
)
TEXT = (".json", ".jsonl", ".csv", ".md", ".txt", ".html", ".yaml", ".log")
TIMED = re.compile(
    r'("[^"]*(?:_s|_ms|seconds|memory|started|finished|time|times|created|host|pid|commit|command|'
    r'version|versions|git|machine|peak|duration|tokens_per_second|speed_up|bandwidth)[^"]*": )'
    r"(?:\"[^\"]*\"|[-+0-9.eE]+|\[[^\]]*\]|\{[^{}]*\}|null)"
)
CHANGING = (
    (re.compile(r"\d{8}-\d{6}(?:-\d+)?"), "STAMP"),
    (re.compile(r"\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(?::\d{2})?(?:[.+:\d]*)?(?: UTC)?"), "DATE"),
    (re.compile(r"\b\d[\d,.]* (?:ms|s|min|h|MiB|GiB|MB|GB|KiB|tokens/s|GB/s)\b"), "AMOUNT"),
    (re.compile(r"\d+\.\d{4,}(?:e-?\d+)?"), "FRACTION"),
    (re.compile(r"\b[0-9a-f]{12,64}\b"), "DIGEST"),
)
TASK = """task: goldens
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


def plain(text: str, folder: Path) -> str:
    """The text without values that change between runs; numbers have four digits."""
    text = text.replace(str(folder), "FOLDER")
    text = TIMED.sub(r"\1TIMED", text)
    text = re.sub(r"\d+\.\d{4,}(?:e-?\d+)?", lambda number: f"{float(number[0]):.4g}", text)
    for pattern, word in CHANGING:
        text = pattern.sub(word, text)
    return text


def inputs(folder: Path) -> dict[str, str]:
    """Write the files that commands read; the replacement of each placeholder in ``COMMANDS``."""
    items = [
        {"question": f"{n} plus {n} is", "choices": [" " + str(2 * n), " " + str(n)], "answer": 0}
        for n in range(1, 7)
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)), "utf-8")
    (folder / "goldens.yaml").write_text(TASK.replace("FOLDER", str(folder)), "utf-8")
    document = "The tide rises and falls twice a day. The moon pulls the water. " * 8
    rows = [{"document": document, "summary": "The moon makes tides."} for _ in range(2)]
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return {"TASK": "goldens", "FOLDER": str(folder), "DOCUMENTS": str(folder / "documents.jsonl")}


def make(name: str, only: str) -> None:
    kept = ROOT / "build" / "goldens" / name
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        words = inputs(folder)
        for label, command in COMMANDS.items():
            if only and only not in label:
                continue
            results = folder / label
            arguments = [words.get(word, word) for word in command]
            writes = label not in ("methods", "methods-json", "prompts-list", "refused")
            arguments += ["--results-dir", str(results)] if writes and label != "results" else []
            arguments += [str(folder / "run")] if label == "results" else []
            done = run(arguments, folder)
            write(kept / f"{label}.out", plain(done.stdout, folder))
            write(kept / f"{label}.code", f"{done.returncode}\n")
            if done.returncode not in (0, 2):
                print(done.stderr[-2000:], file=sys.stderr)
            print(f"{label}: {done.returncode}", flush=True)
            keep_files(results, kept / label, folder)
        for label in HELP if not only else ():
            done = run([*label.split(), "--help"], folder)
            write(kept / "help" / f"{label.replace(' ', '-') or 'all'}.txt", done.stdout)
    print(kept)


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "dart_llm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def keep_files(results: Path, kept: Path, folder: Path) -> None:
    """Save the names of all files, and the contents of text files."""
    names = []
    for path in sorted(results.rglob("*")):
        if path.is_file():
            name = re.sub(r"\d{8}-\d{6}(?:-\d+)?", "STAMP", path.relative_to(results).as_posix())
            names.append(name)
            if path.suffix in TEXT:
                write(kept / name, plain(path.read_text("utf-8", "replace"), folder))
    if names:
        write(kept / "names.txt", "\n".join(sorted(names)) + "\n")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def diff(first: str, second: str) -> int:
    """Print a unified diff of all files; 1 if there are differences."""
    folders = [ROOT / "build" / "goldens" / name for name in (first, second)]
    names = sorted(
        {p.relative_to(root) for root in folders for p in root.rglob("*") if p.is_file()}
    )
    differing = 0
    for name in names:
        paths = [root / name for root in folders]
        texts = [
            path.read_text("utf-8").splitlines() if path.exists() else ["(missing)"]
            for path in paths
        ]
        lines = list(difflib.unified_diff(*texts, f"{first}/{name}", f"{second}/{name}", "", "", 1))
        if lines:
            differing += 1
            print("\n".join(line[:300] for line in lines[:40]))
    print(f"{len(names)} files, {differing} differ")
    return 1 if differing else 0


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = options.add_subparsers(dest="what", required=True)
    making = parts.add_parser("make", help="run every command and save its output and files")
    making.add_argument("name", help="the folder below build/goldens")
    making.add_argument("--only", default="", help="only commands whose label contains this")
    comparing = parts.add_parser("diff", help="compare the saved output of two runs")
    comparing.add_argument("first", help="a name used with make")
    comparing.add_argument("second", help="another name used with make")
    args = options.parse_args()
    if args.what == "make":
        make(args.name, args.only)
    else:
        sys.exit(diff(args.first, args.second))


if __name__ == "__main__":
    main()
