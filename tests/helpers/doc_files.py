"""The texts, data and settings files that the documentation's commands name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from dart_llm.data import texts
from doc_commands import ROOT, blocks
from doc_models import configuration
from window_cases import records, write

YAML_BLOCKS = {
    "grid.yaml": ("docs/evaluation.md", "# grid.yaml"),
    "ablation.yaml": ("docs/quality.md", "without low rank"),
    "my_domains.yaml": ("docs/drift.md", "domains:"),
    "my_tasks/my_task.yaml": ("docs/evaluation.md", "task: my_questions"),
}
"""Files that are YAML blocks of a page: the page, and how the block begins."""


def write_files(root: Path, shared: Path) -> None:
    """All of them: in the clone ``root``, and ``shared`` beside it."""
    _write_texts(root)
    _write_settings(root)
    _write_shared(shared, root)


def _write_texts(root: Path) -> None:
    names = texts.subjects()
    long = "\n\n".join(texts.read(name) for name in names)
    for at, name in enumerate(("my.txt", "my_text.txt", "wiki.txt", "wikitext2_valid.txt")):
        (root / name).write_text(long[at:], encoding="utf-8")
    for name, text in zip(("bees.txt", "loans.txt"), names, strict=False):
        (root / name).write_text(texts.read(text), encoding="utf-8")
    (root / "question.txt").write_text("Why is the sky blue?\n", encoding="utf-8")
    (root / "questions.txt").write_text("Why is it blue?\n/stats\n", encoding="utf-8")
    write(root / "records.jsonl", records())
    pieces = [long[at : at + 3000] for at in range(0, 9000, 3000)]
    for name, column in {
        "news.jsonl": "text",
        "code.jsonl": "source",
        "xsum.jsonl": "document",
        "gsm8k.jsonl": "solution",
        "articles.jsonl": "document",
    }.items():
        rows = [{column: piece[at:], "summary": "In short."} for at, piece in enumerate(pieces)]
        _write_rows(root / name, rows)


def _write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_settings(root: Path) -> None:
    for name, (page, start) in YAML_BLOCKS.items():
        (root / name).parent.mkdir(exist_ok=True)
        found = [
            body
            for language, _, body in blocks((ROOT / page).read_text(encoding="utf-8"))
            if language == "yaml" and body.startswith(start)
        ]
        text = found[0].replace("task: my_questions", "task: my_task")
        (root / name).write_text(text, encoding="utf-8")
    questions = [{"question": "What flies?", "choices": ["a bird", "a stone"], "answer": 0}] * 3
    _write_rows(root / "my_questions.jsonl", questions)
    (root / "never.yaml").write_text("dart, drift never: {drift: never}\n", encoding="utf-8")
    shutil.copy(ROOT / "benchmarks/quality_ablations.yaml", root)
    (root / "qwen2.5-1.5b").mkdir()
    for name in ("config.json", "qwen2.5-1.5b/config.json"):
        (root / name).write_text(configuration().to_json_string(), encoding="utf-8")


def _write_shared(shared: Path, root: Path) -> None:
    """What benchmarks/README.md says lies beside the clone."""
    (shared / "tasks").mkdir(parents=True)
    task = (root / "my_tasks/my_task.yaml").read_text(encoding="utf-8")
    for name in ("arc_easy_local", "mmlu_local"):
        made = task.replace("my_questions.jsonl", str(root / "my_questions.jsonl"))
        made = re.sub("^task: .*", f"task: {name}", made)
        (shared / f"tasks/{name}.yaml").write_text(made, encoding="utf-8")
    (shared / "data").mkdir()
    for name in ("xsum.jsonl", "gsm8k.jsonl", "wikitext2_valid.txt"):
        shutil.copy(root / name, shared / "data")
