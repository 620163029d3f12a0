"""Does vLLM's memory grow with the number of requests that dart-vllm has pruned?

Run it in the environment of ``make test-vllm``:

    .venv-vllm/bin/python benchmarks/vllm_memory.py --out vllm-memory

A tiny random model answers requests, 8 at a time: dense, griffin and griffin-refresh in turn; a
quarter of them is aborted.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

from vllm_steps import engine, save  # sets the environment

# isort: split
import torch
from dart_vllm.policy import PrunedRequest
from keep import provenance

EXTRAS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"dart": "griffin", "dart_sparsity": 0.5},
    {
        "dart": "griffin-refresh",
        "dart_sparsity": 0.5,
        "dart_settings": {"drift": "interval 2", "remask": {"observe_tokens": 1}},
    },
)
TOKENS = 8
"""Number of tokens per answer, enough for narrow weights and re-masks."""


def write_model(folder: Path) -> None:
    """A random llama of three layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def run(core: Any, first: int, count: int) -> None:
    """Run requests ``first`` to ``first + count``, 8 at a time, or one at a time in every eighth
    group of 8, so that their weights are gathered; abort every fourth."""
    for start in range(first, first + count, 8):
        size = 1 if start % 64 == 0 else 8
        for batch in range(start, start + 8, size):
            numbers = range(batch, batch + size)
            for number in numbers:
                add(core, number)
            for _ in range(6):
                core.step()
            core.abort_request([str(number) for number in numbers if number % 4 == 0])
            while core.has_unfinished_requests():
                core.step()


def add(core: Any, number: int, tokens: int = TOKENS) -> None:
    """Add a request; its number decides its prompt, and how it is pruned."""
    from vllm import SamplingParams

    ids = [3 + (number * 7 + place * 13) % 125 for place in range(16)]
    params = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=EXTRAS[number % len(EXTRAS)],
    )
    core.add_request(str(number), {"prompt_token_ids": ids}, params)


def state(core: Any, requests: int) -> dict[str, int]:
    """The process's memory, and what is left of requests."""
    add(core, 0, 2)  # a dense one, in whose steps the engine learns which others have ended
    while core.has_unfinished_requests():
        core.step()
    gc.collect()
    objects = gc.get_objects()
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line
    )
    return {
        "requests": requests,
        "resident_mib": round(int(status["VmRSS"].split()[0]) / 1024),
        "tensors": sum(isinstance(thing, torch.Tensor) for thing in objects),
        "pruned_requests": sum(isinstance(thing, PrunedRequest) for thing in objects),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--requests", type=int, default=10_000)
    options.add_argument("--out", default=None, help="name of the results files, without suffix")
    args = options.parse_args()
    torch.set_num_threads(1)
    part = max(8, args.requests // 10 // 8 * 8)
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name))
        core = engine(Path(name), {}, skip_tokenizer_init=True)
        rows = []
        for done in range(0, args.requests, part):
            run(core, done, part)
            rows.append(state(core, done + part))
            print(rows[-1], flush=True)
    pruning = core.engine_core.engine_core.model_executor.driver_worker.worker.dart
    ways = dict(pruning.state.counts)
    print(ways)
    if args.out is None:
        return
    save(args.out, {"checkpoint": None, "steps": ways, "rows": rows}, page)


def page(name: str, document: dict[str, Any]) -> str:
    """NAME.md in the layout that tables.py reads."""
    lines = [
        f"# {name}\n\n```sh\n{document['command']}\n```\n",
        f"A random llama of three layers in float32 in vLLM, {provenance(document)} Requests with "
        f"{TOKENS} tokens each, dense and pruned, 8 at a time, or one at a time in every eighth "
        f"group of 8; a quarter was aborted. File: [{name}.json]({name}.json).\n",
        "| requests so far | resident memory, MiB | tensors | pruned requests in memory |",
        "| ---: | ---: | ---: | ---: |",
        *(
            f"| {row['requests']:,} | {row['resident_mib']:,} | {row['tensors']} | "
            f"{row['pruned_requests']} |"
            for row in document["rows"]
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
