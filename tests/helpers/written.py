"""Results of every command that writes some, in their smallest form, on tiny models.

What matters here is which files there are, and which keys and columns they hold.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dart_llm.reporting.console import Ui
from dart_llm.studies.generate import study as demo
from detect_cases import passage
from drift_cases import PROMPT, PROMPTS, THREE, TWO
from inspect_cases import A, B
from lm_cases import break_position, call, loaded, place, write_rows
from mmlu_cases import mmlu_row
from quality_cases import PROMPT as QUALITY_PROMPT
from quality_cases import TOKENS as QUALITY_TOKENS
from quality_cases import write_texts
from speed_cases import shape
from summary_cases import write_documents

SLICES = ("--prompt-tokens", 48, "--scored-tokens", 24, "--limit", 2)
HALF = ("--sparsity", 0.5)


def prepare(root: Path) -> None:
    """What the commands read, in the folder in which they run."""
    text = "".join(f"number {n * n} comes before {n * 7}. " for n in range(40))
    for name in ("text", "other"):
        (root / f"{name}.txt").write_text(f"{name}: {text}", encoding="utf-8")
    write_documents(root / "four.jsonl")
    data = root / "datasets/mmlu"
    data.mkdir(parents=True)
    for split in ("test", "dev"):
        write_rows(data / f"anatomy_{split}.jsonl", [mmlu_row(n) for n in range(3)])
    write_rows(root / "passages.jsonl", [TWO, THREE])
    write_rows(root / "prompts.jsonl", PROMPTS[:1])
    write_rows(root / "detect.jsonl", [passage(n).to_dict() for n in (1, 2)])
    write_texts(root)
    shape(root)
    model, tokenizer = loaded()
    break_position(copy.deepcopy(model), 60).save_pretrained(root / "broken")
    tokenizer.save_pretrained(root / "broken")


def command(*arguments: object, code: int = 0) -> Any:
    """Run a command on the tiny model."""
    done = call(*arguments, "--device", "cpu", "--results-dir", "results")
    assert done.code == code, (arguments, done.code, done.err[-2000:])
    return done


def run() -> None:
    """Two texts, activations, the three evaluations; a table of layers; given masks; per token."""
    model = ("run", "--model", place() / "model", *HALF)
    text = ("--prompt", "the sea and the moon and the tide. ", "--generation", 70)
    command(
        *(*model, *text, "--method", "dart-prompt", "--drift", "paper", "--masking-step", 0),
        *("--save-activations", "--activation-layers", "1", "--activation-tokens", "0:4"),
        *("--min-evidence", 0, "--verbose"),
        *("--eval-perplexity", "--ppl-datasets", "text.txt,other.txt", "--ppl-max-samples", 2),
        *("--ppl-prompt-tokens", 48, "--ppl-scored-tokens", 24),
        *("--eval-mmlu", "--mmlu-datasets", "anatomy", "--mmlu-max-samples", 2),
        *("--eval-general-nlp", "--general-nlp-datasets", "tiny_choice,tiny_letters"),
        *("--general-nlp-max-samples", 2, "--include-path", place() / "tasks"),
        *("--eval-summarization", "--summarization-datasets", "four.jsonl"),
        *("--summarization-max-samples", 2, "--summarization-max-output", 6),
    )
    command(
        *(*model, "--method", "griffin", "--eval-perplexity", "--ppl-datasets", "text.txt"),
        *("--ppl-max-samples", 2, "--ppl-prompt-tokens", 48, "--ppl-scored-tokens", 24),
    )
    command(*model, "--prompt", "the sea", "--generation", 4, "--method", "dart-token")


def evaluate() -> None:
    tasks = "tiny_choice,tiny_group,tiny_roll,tiny_last,tiny_write"
    command(
        *("eval", "--model", place() / "model", "--include-path", place() / "tasks"),
        *("--tasks", tasks, "--limit", 2, "--method", "griffin", *HALF, "--dense"),
        *("--prompt-tokens", 48, "--scored-tokens", 24),
    )


def perplexity() -> None:
    model = ("perplexity", "--model", place() / "model", "--data", "text.txt")
    command(*model, *SLICES, "--method", "griffin", *HALF, "--dense")
    command(*model, *SLICES, "--method", "wanda", "--calibration", "other.txt", *HALF)
    standard = ("--protocol", "standard", "--window", 96, "--limit", 2)
    command(*model, *standard, "--method", "griffin", *HALF)


def summarize() -> None:
    command(
        *("summarize", "--model", place() / "model", "--data", "four.jsonl", "--limit", 2),
        *("--max-output", 6, "--method", "griffin", *HALF, "--dense"),
    )


def compare() -> None:
    head = ("compare", "--models", place() / "model", "--include-path", place() / "tasks")
    where = ("--methods", "griffin,static", "--sparsities", "0.25,0.5", *SLICES)
    command(*head, *where, "--tasks", "perplexity:text.txt,tiny_choice", "--protocols",
            "full,published")  # fmt: skip


def sweep() -> None:
    """Layer by layer, by sparsity, and on a model that fails."""
    task = ("--tasks", "perplexity:text.txt", *SLICES, "--methods", "griffin")
    good = ("sweep", "--models", place() / "model", *task)
    command(*good, "--layers", "each", "--keep", 0.5)
    command(*good, "--sparsities", "0.25,0.5")
    command("sweep", "--models", "broken", *task, "--sparsities", 0.5, code=2)


def drift_forced() -> None:
    """With the pictures of a detection."""
    detect()
    (found,) = Path("results").glob("detect-*/*")
    found = Path(shutil.move(found, "detected"))
    shutil.rmtree("results")
    command(
        *(
            "drift",
            "--detection",
            found,
            "--model",
            place() / "model",
            "--passages",
            "passages.jsonl",
            "--limit",
            2,
        ),
        *("--prompt-tokens", PROMPT, "--methods", "dense,interval:16,dart,fresh:1"),
    )


def drift_free() -> None:
    command(
        *("drift", "--model", place() / "model", "--prompts", "prompts.jsonl", "--no-chat"),
        *("--generation", 40, "--min-evidence", 0, "--methods", "never,interval:8"),
    )


def detect() -> None:
    command(
        *("detect", "--model", place() / "model", "--passages", "detect.jsonl"),
        *("--prompt-tokens", 120, "--horizon", 60, "--thresholds", "0,2", "--counts", "1,2"),
        *("--signals", "attention,hidden", "--rules", "paper,interval 16", "--windows", "10,20"),
    )


def inspect() -> None:
    command(
        *("inspect", "--model", place() / "model", "--prompt", A, "--prompt-b", B),
        *("--ablation-seeds", 1, "--method", "griffin"),
        *("--save-activations", "--activation-layers", "1", "--activation-tokens", "0:4"),
    )


def quality() -> None:
    command(
        *("bench", "quality", "--model", place() / "model", "--text", "bees.txt"),
        *("--text", "loans.jsonl", "--dtype", "float32", "--slices", 2),
        *("--prompt-tokens", QUALITY_PROMPT, "--tokens", QUALITY_TOKENS),
        *("--sparsities", "0.5,0.7", "--methods", "griffin,dart-prompt"),
    )


def speed() -> None:
    command(
        *("bench", "speed", "--model-config", "llama.json", "--dtype", "float32"),
        *("--methods", "griffin", "--sparsities", "0.5", "--prompt-tokens", 12, "--tokens", 12),
        *("--repeats", 2, "--no-warmup"),
    )


def run_demo() -> None:
    """The demo's own job on a model that takes a moment."""
    small = {"generation": 80, "ppl_prompt_tokens": 48, "ppl_scored_tokens": 24}
    model = {"model": str(place() / "chatty"), "device": "cpu", "results_dir": "results"}
    demo.run_demo(Ui(quiet=True), **model, **small, ppl_max_samples=2)


def unfinished() -> None:
    """A run that fails after its text: what it would resume from is left."""
    command(
        *("run", "--model", "broken", "--prompt", "the sea", "--generation", 4, *HALF),
        *("--method", "griffin", "--eval-perplexity", "--ppl-datasets", "text.txt"),
        *("--ppl-prompt-tokens", 48, "--ppl-scored-tokens", 24, "--ppl-max-samples", 1),
        code=2,
    )


COMMANDS: dict[str, tuple[str, Callable[[], None]]] = {
    "run": ("run", run),
    "demo": ("demo", run_demo),
    "unfinished": ("an unfinished run", unfinished),
    "eval": ("eval", evaluate),
    "perplexity": ("perplexity", perplexity),
    "summarize": ("summarize", summarize),
    "compare": ("compare", compare),
    "sweep": ("sweep", sweep),
    "passages": ("drift", drift_forced),
    "prompts": ("drift", drift_free),
    "detect": ("detect", detect),
    "inspect": ("inspect", inspect),
    "quality": ("bench quality", quality),
    "speed": ("bench speed", speed),
}
"""What makes folders, by a name of the run: the command's name in the docs, and how it is run."""
