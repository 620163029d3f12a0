"""Compare ``dart-llm eval`` with lm-eval's own Hugging Face model class: answers and time.

Answers: every item's metrics at sparsity 0, in float32 and in bfloat16.  Time: several rounds of
whole evaluations, lm-eval's model class at batch 8 and ``dart-llm eval``'s code, in random order.
"""

from __future__ import annotations

import random
import time
from statistics import median
from typing import Any

from common import load_model, parser, plain_lm_eval, save

from dart_llm.evaluation import lm_eval as harness
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.parts import MemoryStore as Memory
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import BoundMethod as Candidate

CASES = (("griffin", 0.0), ("griffin", 0.5), ("dart-prompt", 0.5))


def plain(model: Any, tokenizer: Any, args: Any) -> dict[str, dict[str, float]]:
    """Metrics of each item by lm-eval's own model class at batch 8."""
    return {
        f"{args.task}/{s['doc_id']}": {m: float(s[m]) for m in s["metrics"]}
        for s in plain_lm_eval(model, tokenizer, args, batch=8)
    }


def ours(model: Any, tokenizer: Any, args: Any, method: str, sparsity: float) -> Any:
    config = PruneConfig.build(method, sparsity=sparsity)
    options = MeasureOptions(limit=args.limit, include_path=args.include_path)
    candidate = Candidate(model, tokenizer, config)
    return harness.measure(candidate, args.task, options, Memory(), lambda items: None)


def differing(first: dict[str, dict[str, float]], second: Any) -> dict[str, int]:
    """Number of items whose value differs, by metric."""
    other = {item["id"]: item for item in second.items}
    assert first.keys() == other.keys()
    names = next(iter(first.values()))
    return {m: sum(first[i][m] != other[i][m] for i in first) for m in names}


def mean(items: dict[str, dict[str, float]]) -> dict[str, float]:
    names = next(iter(items.values()))
    return {m: sum(item[m] for item in items.values()) / len(items) for m in names}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--task", default="arc_easy_local", help="an lm-eval task")
    options.add_argument("--include-path", required=True, help="folder of the task files")
    options.add_argument("--limit", type=int, default=150, help="items")
    options.add_argument("--rounds", type=int, default=3, help="timed passes of each model")
    args = options.parse_args()
    model, tokenizer = load_model(args)
    seconds: dict[str, list[float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    names = ["plain lm-eval, batch 8", *(f"{m} {s:g}" for m, s in CASES)]
    order = random.Random(0)
    reference: dict[str, dict[str, float]] = {}
    for number in range(args.rounds):
        for name in order.sample(names, len(names)) if number else names:
            begin = time.perf_counter()
            if name == names[0]:
                reference = plain(model, tokenizer, args)
                rows[name] = {"metrics": mean(reference)}
            else:
                method, sparsity = name.split()
                result = ours(model, tokenizer, args, method, float(sparsity))
                account = result.accounting
                rows[name] = {
                    "metrics": result.metrics,
                    "items_differing_from_plain": differing(reference, result),
                    "achieved_sparsity": account["achieved_sparsity"],
                    "dense_token_share": account["dense_token_share"],
                    "remasks": account["remasks"],
                }
            seconds.setdefault(name, []).append(time.perf_counter() - begin)
            print(f"{name}: {rows[name]} {seconds[name][-1]:.1f} s")
    base = median(seconds[names[0]])
    for name, row in rows.items():
        row.update(seconds=median(seconds[name]), times_plain=median(seconds[name]) / base)
        row["all_seconds"] = seconds[name]
    data = {"task": args.task, "items": args.limit, "rounds": args.rounds, "rows": rows}
    print(save(args.out or f"harness_{args.dtype or 'checkpoint'}", model, data))


if __name__ == "__main__":
    main()
