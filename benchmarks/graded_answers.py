"""Do a model's answers survive graded planes, and roundings at equal bytes?  GSM8K by lm-eval.

    python benchmarks/graded_answers.py --model MODEL --name NAME --form mixed \\
        --ggml libggml-base.so --only "Q4_K;best 30%" --include-path ../shared/tasks --work FOLDER

The simulation of graded_planes.py while the model generates: questions and answers run in planes,
each token refines its own best neurons.  lm-eval's own Hugging Face model asks and compares,
greedy, a batch of questions at a time; batches of another size may round otherwise.  A finished
setting is kept in ``--work`` and not run again.  Writes benchmarks/results/NAME.json from the
rows of this model there.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import graded_planes as planes
from common import plain_lm_eval, save

from dart_llm.experiments.stats import interval, paired_interval
from dart_llm.files import append_row, whole_rows
from dart_llm.reporting.console import Ui


def answers(model: Any, tokenizer: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of every question: its number, whether the answer was right, and the text."""
    chat = bool(tokenizer.chat_template)
    return [
        {
            "id": str(one["doc_id"]),
            "exact": float(one["exact_match"]),
            "tokens": len(tokenizer(one["resps"][0][0]).input_ids),
            "text": one["resps"][0][0],
        }
        for one in plain_lm_eval(model, tokenizer, args, args.batch, chat)
    ]


def rows_file(args: argparse.Namespace) -> Path:
    """Rows of one model in one form."""
    found: Path = args.work / f"answers-{args.name}-{args.form}.jsonl"
    return found


def run(args: argparse.Namespace, console: Ui) -> None:
    """Make the rows that are lacking."""
    path = rows_file(args)
    args.work.mkdir(parents=True, exist_ok=True)
    done = {row["label"] for row in whole_rows(path) if len(row["answers"]) >= args.limit}
    settings = [planes.DENSE, *planes.wanted(args)]
    left = [one for one in settings if planes.label(one) not in done]
    if not left:
        return
    model, tokenizer, facts = planes.whole(args)
    planes.multiply_fast(model)
    runner = planes.Runner(planes.unlearnt(model, args))
    with console.progress(args.name, len(left)) as advance:
        for setting in left:
            begin = time.perf_counter()
            with runner.running(setting) as read_by_a_token:
                found = answers(model, tokenizer, args)
                row = {"label": planes.label(setting), "setting": asdict(setting)}
                row |= {**read_by_a_token(), "seconds": time.perf_counter() - begin}
            append_row(path, {**row, **facts, "answers": found})
            right = sum(one["exact"] for one in found)
            console.say(f"{right:.0f} of {len(found)} right  {row['label']}")
            advance(1)


def facts_of(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """A row beside the dense one, with intervals over questions, without the texts."""
    exact, base = ({a["id"]: a["exact"] for a in one["answers"]} for one in (row, dense))
    texts, dense_texts = ({a["id"]: a["text"] for a in one["answers"]} for one in (row, dense))
    own, to_dense = interval(exact), paired_interval(exact, base)
    return {
        **{k: row[k] for k in ("label", "setting", "share", "bytes", "seconds")},
        "exact": sum(exact.values()) / len(exact),
        "interval": own and own.ends,
        "to_dense": to_dense and to_dense.to_dict(),
        "same_text": sum(texts[n] == dense_texts[n] for n in texts) / len(texts),
        "tokens": sum(a["tokens"] for a in row["answers"]) / len(exact),
        "right": [n for n, value in exact.items() if value],
    }


def finish(args: argparse.Namespace) -> None:
    """The results file of all finished rows."""
    latest = {row["label"]: row for row in whole_rows(rows_file(args))}
    dense = latest[planes.label(planes.DENSE)]
    rows = sorted((facts_of(row, dense) for row in latest.values()), key=lambda row: -row["bytes"])
    facts = {"checkpoints": {args.name: dense["checkpoint"]}, "grids": {args.name: dense["grid"]}}
    count = len(dense["answers"])
    data = {**facts, "task": args.task, "questions": count, "batch": args.batch, "rows": rows}
    print(save(args.out or "graded-answers", None, data))


def main() -> None:
    options = planes.options_of(__doc__)
    options.add_argument("--task", default="gsm8k_local", help="task of lm-eval")
    options.add_argument("--include-path", required=True, help="folder of the task files")
    options.add_argument("--limit", type=int, default=100, help="questions")
    options.add_argument("--batch", type=int, default=50, help="questions at a time")
    args = options.parse_args()
    run(args, Ui())
    finish(args)


if __name__ == "__main__":
    main()
