"""CPU time of vLLM's decode steps under the plug-in dart-vllm, in one thread and interleaved.

Run it in the environment of ``make test-vllm``:

    .venv-vllm/bin/python benchmarks/vllm_steps.py --out vllm-steps

Two engines in one process: one prunes per request, the other is narrowed at load.  Each round runs
every row once, so that all rows see the same machine; a row's speed-up is the median over rounds.
CPU time is used because other programs may run at the same time.  ``limit``: a step's speed-up if
only bytes of weights cost time, and if those of removed neurons cost none.
"""

from __future__ import annotations

import os

os.environ |= {  # before vLLM and torch are imported
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS, command
from keep import provenance
from safetensors.torch import save_file

from dart_llm import load, prune
from dart_llm.experiments.provenance import git_state, machine, versions
from dart_llm.experiments.store import now
from dart_llm.files import write_json
from dart_llm.models.checkpoint import checkpoint_facts

SPARSITY, SKIPPED = 0.5, 8
"""``SKIPPED``: first steps of an answer, in which the prompt runs and weights are gathered."""
TEXT = "The heart pumps blood through the body. Arteries carry it away, and veins bring it back."
GRIFFIN = {"dart": "griffin", "dart_sparsity": SPARSITY}
SHARED = {"dart_masks": "topic"}


class Row(NamedTuple):
    """``engine``: 0 prunes per request, 1 is narrowed.  ``limited``: compared with the limit."""

    name: str
    engine: int
    requests: int
    extra: dict[str, Any] | None
    limited: bool = True


ROWS = (
    Row("dense", 0, 1, None, False),
    Row("mask per request", 0, 1, GRIFFIN),
    Row("shared mask", 0, 1, SHARED),
    Row("narrowed at load", 1, 1, None),
    Row("dense", 0, 8, None, False),
    Row("masks that differ (rows)", 0, 8, GRIFFIN, False),
    Row("shared mask", 0, 8, SHARED),
    Row("narrowed at load", 1, 8, None),
)


def prepare(model: str, folder: Path, file: Path) -> tuple[list[int], dict[str, Any], float]:
    """Write the model and a mask file; return a prompt, facts, and the FFNs' share of the bytes."""
    loaded, tokenizer = load(model, dtype="float32", weights="dense")
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = tokenizer(TEXT).input_ids
    with prune(loaded, "griffin", sparsity=SPARSITY, executor="masked") as run:
        loaded.generate(torch.tensor([ids]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        kept = run.masks()
        share = run.report().ffn_share_of_bytes
    tensors = {f"remask0.layer{n}.ids": torch.as_tensor(v) for n, v in kept.items()}
    save_file(tensors, str(file))
    facts = checkpoint_facts(loaded)
    facts.pop("path", None)
    return ids, facts, share


def engine(folder: Path, dart: dict[str, Any], **options: Any) -> Any:
    """vLLM's engine with the plug-in, in this process; ``dart``: the server's settings."""
    from vllm import LLM

    return LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        gpu_memory_utilization=0.3,
        enable_prefix_caching=False,
        worker_cls="dart_vllm.Worker",
        additional_config={"dart": dart},
        **options,
    ).llm_engine


def steps(core: Any, row: Row, ids: list[int], count: int) -> tuple[list[float], float]:
    """CPU milliseconds of ``count`` decode steps, and of the decode steps before them."""
    from vllm import SamplingParams

    tokens = SKIPPED + count
    options = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}
    for number in range(row.requests):
        params = SamplingParams(extra_args=row.extra, **options)  # type: ignore[arg-type]
        core.add_request(str(number), {"prompt_token_ids": ids}, params)
    times = []
    while core.has_unfinished_requests():
        began = time.process_time()
        core.step()
        times.append(1000 * (time.process_time() - began))
    return times[SKIPPED : SKIPPED + count], sum(times[1:SKIPPED])


def measure(engines: list[Any], ids: list[int], rounds: int, count: int) -> list[dict[str, Any]]:
    """All rows, interleaved; every second round runs them backwards."""
    times: list[list[list[float]]] = [[] for _ in ROWS]
    starts: list[list[float]] = [[] for _ in ROWS]
    for turn in range(rounds):
        for number in range(len(ROWS))[:: -1 if turn % 2 else 1]:
            row = ROWS[number]
            found, start = steps(engines[row.engine], row, ids, count)
            times[number].append(found)
            starts[number].append(start)
    rows = []
    for row, found, start in zip(ROWS, times, starts, strict=True):
        median = statistics.median(time for part in found for time in part)
        facts = {
            "median_ms": median,
            "smallest_ms": min(time for part in found for time in part),
            "round_medians_ms": [statistics.median(part) for part in found],
            "extra_start_ms": statistics.median(start) - (SKIPPED - 1) * median,
        }
        rows.append({**row._asdict(), **facts})
    return rows


def compare(rows: list[dict[str, Any]], limit: float) -> None:
    """Add to each row its speed over the dense row with as many requests, round by round."""
    dense = {row["requests"]: row["round_medians_ms"] for row in rows if row["name"] == "dense"}
    for row in rows:
        pairs = zip(dense[row["requests"]], row["round_medians_ms"], strict=True)
        row["speedup"] = statistics.median(before / after for before, after in pairs)
        row["share_of_limit"] = row["speedup"] / limit if row["limited"] else None


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as a table."""
    lines = [
        "| requests | masks | CPU ms per step, median (smallest) | speed-up over dense | share of "
        "the limit | CPU ms more at an answer's start |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        share = "" if row["share_of_limit"] is None else f"{row['share_of_limit']:.0%}"
        lines.append(
            f"| {row['requests']} | {row['name']} | {row['median_ms']:.1f} "
            f"({row['smallest_ms']:.1f}) | {row['speedup']:.2f} | {share} | "
            f"{max(0.0, row['extra_start_ms']):.0f} |"
        )
    return lines


def page(name: str, document: dict[str, Any]) -> str:
    """NAME.md in the layout that tables.py reads."""
    facts = [
        f"# {name}\n\n```sh\n{document['command']}\n```\n",
        f"{provenance(document)} vLLM {document['versions']['vllm']}, eager, float32, "
        f"{document['instructions']}, "
        f"{document['steps']} decode steps per row. Sparsity {document['sparsity']:.0%}; FFNs are "
        f"{document['ffn_share_of_bytes']:.0%} of a step's bytes, so that the limit is "
        f"{document['limit']:.2f}. File: [{name}.json]({name}.json).\n",
    ]
    return "\n".join([*facts, *table(document["rows"])]) + "\n"


def save(name: str, facts: dict[str, Any], page: Callable[[str, dict[str, Any]], str]) -> None:
    """Write NAME.json with ``facts`` and their provenance, and ``page`` of it as NAME.md."""
    document = {
        "command": f"python benchmarks/{command(sys.argv)}",
        "finished": now().isoformat(),
        "git": git_state(RESULTS),
        "versions": {**versions(), "vllm": metadata.version("vllm-cpu")},
        "machine": machine(),
        **facts,
    }
    write_json(RESULTS / f"{name}.json", document)
    (RESULTS / f"{name}.md").write_text(page(name, document), "utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--model", default="smollm2-135m", help="as in dart-llm run")
    options.add_argument("--rounds", type=int, default=6)
    options.add_argument("--steps", type=int, default=16, help="decode steps per row and round")
    options.add_argument("--out", default=None, help="name of the results files, without suffix")
    args = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        # not in the model's folder, where vLLM takes every safetensors file for weights
        folder, file = Path(name) / "model", Path(name) / "masks.safetensors"
        ids, facts, share = prepare(args.model, folder, file)
        settings: list[dict[str, Any]] = [{"shared": {"topic": str(file)}}, {"masks": str(file)}]
        engines = [engine(folder, dart) for dart in settings]
        rows = measure(engines, ids, args.rounds, args.steps)
    limit = 1 / (1 - share * SPARSITY)
    compare(rows, limit)
    print("\n".join(table(rows)))
    if args.out is None:
        return
    document = {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "checkpoint": facts,
        "sparsity": SPARSITY,
        "ffn_share_of_bytes": share,
        "limit": limit,
        "steps": args.rounds * args.steps,
        "rows": rows,
    }
    save(args.out, document, page)


if __name__ == "__main__":
    main()
