"""Shared by the benchmark scripts: loading, provenance, output."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does

import argparse
import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from dart_llm.experiments.provenance import git_state, machine, versions
from dart_llm.experiments.store import now
from dart_llm.files import write_json
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.loading import load

RESULTS = Path(os.environ.get("DART_KEPT_RESULTS") or Path(__file__).parent / "results")
"""Where results files are written; reproduce.py sets another folder."""
PLACES = ("--experiment-name", "--results-dir")
"""Options that say where results go."""


def parser(doc: str, model: str = "smollm2-135m") -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    options = argparse.ArgumentParser(description=doc)
    options.add_argument("--model", default=model, help="as in dart-llm run")
    options.add_argument("--dtype", default=None, help="default: the checkpoint's")
    options.add_argument("--out", default=None, help="name of the JSON file, without suffix")
    return options


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer of ``--model`` and ``--dtype``."""
    return load(args.model, dtype=args.dtype, device="auto")


def plain_lm_eval(
    model: Any, tokenizer: Any, args: argparse.Namespace, batch: int, chat: bool = False
) -> list[dict[str, Any]]:
    """The first ``args.limit`` samples of ``args.task``, scored by lm-eval's own model class."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
        tasks=[args.task],
        limit=args.limit,
        bootstrap_iters=0,
        apply_chat_template=chat,
        task_manager=TaskManager(include_path=args.include_path),
    )
    samples: list[dict[str, Any]] = results["samples"][args.task]
    return samples


def read_text(path: str) -> tuple[str, dict[str, str]]:
    """The content of a text file, and its name and checksum."""
    data = Path(path).read_bytes()
    return data.decode("utf-8"), {
        "file": Path(path).name,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def read(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def command(words: list[str]) -> str:
    """The command line with paths cut to file names and without the options in ``PLACES``.

    The path of a task's text (perplexity:../shared/data/X) stays: ``reproduce.py`` links to it.
    """
    kept, skip = [], False
    for word in words:
        dropped, skip = skip or word in PLACES, word in PLACES
        if not dropped:
            kept.append(Path(word).name if "/" in word and ":../" not in word else word)
    return shlex.join(kept)


def save(name: str, model: Any, data: dict[str, Any]) -> Path:
    """Write ``data`` with its provenance to benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    facts = {} if model is None else dict(checkpoint_facts(model))
    facts.pop("path", None)
    arguments = [Path(a).name if "/" in a else a for a in sys.argv[1:]]
    document = {
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(arguments)}".strip(),
        "date": now().isoformat(),
        "checkpoint": facts,
        "versions": versions(),
        "machine": machine(),
        "git": git_state(Path(__file__).parent),
        **data,
    }
    path = RESULTS / f"{name}.json"
    write_json(path, document)
    return path
