"""Quality of weights in blocks: perplexity and KL against bfloat16, beside llama-perplexity's own.

    python benchmarks/packed_quality.py --text wiki.txt --weights file,q8_0,q4_0,q4_1 \\
        --gguf FILE-Q8_0.gguf --gguf FILE-Q4_K_M.gguf --tool PATH/llama-perplexity

Both read the same text as llama-perplexity does: whole chunks of ``--context`` tokens, of which the
second half is scored.  Ours are read as prompts are, or with ``--decode`` token by token by native
steps, as texts are generated.  Every ``--gguf`` is read by both programs; KL is that of each row
against the model in bfloat16, of llama.cpp against ``--base`` (a BF16 file of the same model).
``--tool`` (or ``LLAMA_PERPLEXITY``) is never needed: without it ours stand alone.  Writes
benchmarks/results/packed-quality.json, and exits with 1 where a file's perplexities differ by more
than ``--tolerance``.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import parser, read_text, save
from torch import Tensor

from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.loading import load
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting.words import dtype_text
from dart_llm.session.run import Run

DENSE = "bfloat16"
PERPLEXITY = re.compile(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)")
DIVERGENCE = re.compile(r"Mean\s+KLD:\s+(-?[\d.eE+-]+)")


def chunks_of(text: str, tokenizer: Any, length: int, most: int | None) -> list[Tensor]:
    """[1, length] token ids each, the last line break left out, as llama-perplexity cuts them."""
    ids = tokenizer(text.removesuffix("\n"), return_tensors="pt", verbose=False).input_ids
    found = [ids[:, at : at + length] for at in range(0, ids.shape[1] - length + 1, length)]
    if not found:
        raise SystemExit(f"the text has {ids.shape[1]} tokens: give more than {length}")
    return found[:most]


@torch.inference_mode()
def log_probabilities(model: Any, ids: Tensor, *, decode: bool) -> Tensor:
    """[n, V] float32 for the scored tokens of ids [1, T]: those after its first half and one."""
    first = ids.shape[1] // 2
    if not decode:
        logits = model(ids).logits[0, first:-1]
        return logits.float().log_softmax(-1)
    output = model(ids[:, :first], use_cache=True, logits_to_keep=1)
    found = []
    for at in range(first, ids.shape[1] - 1):
        output = model(ids[:, at : at + 1], use_cache=True, cache=output.cache)
        found.append(output.logits[0, -1].float().log_softmax(-1))
    return torch.stack(found)


@contextlib.contextmanager
def steps(model: Any, decode: bool) -> Iterator[None]:
    """Our own dense path while it lasts, where tokens are decoded."""
    if not decode:
        yield
        return
    with Run(model, PruneConfig.build("griffin", sparsity=0.0, executor="slim")):
        yield


def ours(rows: dict[str, Any], args: argparse.Namespace, chunks: list[Tensor]) -> list[dict]:
    """A row per model: losses and divergences of the same tokens, chunk by chunk."""
    losses: dict[str, list[float]] = {name: [] for name in rows}
    divergences: dict[str, list[float]] = {name: [] for name in rows}
    for number, ids in enumerate(chunks):
        base = None
        for name, model in rows.items():
            with steps(model, args.decode):
                found = log_probabilities(model, ids, decode=args.decode)
            base = found if base is None else base
            target = ids[0, -len(found) :]
            losses[name] += (-found.gather(1, target[:, None])[:, 0]).tolist()
            divergences[name] += (base.exp() * (base - found)).sum(-1).tolist()
        print(f"chunk {number + 1} of {len(chunks)}", flush=True)
    return [
        {
            "row": name,
            "program": "dart-llm",
            "held": dtype_text(checkpoint_facts(model)),
            "tokens": len(losses[name]),
            "perplexity": math.exp(statistics.fmean(losses[name])),
            "kl": statistics.fmean(divergences[name]),
        }
        for name, model in rows.items()
    ]


def theirs(tool: str, file: Path, args: argparse.Namespace, base: Path | None) -> dict[str, Any]:
    """llama-perplexity's row of a file; ``base``: where logits of ``--base`` lie."""
    common = ["-f", args.text, "-c", str(args.context), "-t", str(args.threads)]
    if args.chunks:
        common += ["--chunks", str(args.chunks)]
    told = _run([tool, "-m", str(file), *common])
    estimate = PERPLEXITY.search(told)
    if estimate is None:
        raise SystemExit(f"{tool} told no perplexity of {file.name}: {told[-300:]}")
    kl = None
    if base is not None:
        compared = ["--kl-divergence", "--kl-divergence-base", str(base)]
        found = DIVERGENCE.search(_run([tool, "-m", str(file), *common, *compared]))
        kl = float(found[1]) if found else None
    perplexity, spread = map(float, estimate.groups())
    named = {"row": file.stem, "program": "llama.cpp", "held": file.name}
    return {**named, "perplexity": perplexity, "spread": spread, "kl": kl}


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr.strip()[-300:]}")
    return done.stdout + done.stderr


def their_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per file; the logits of the base are kept while they are compared with."""
    with tempfile.TemporaryDirectory() as folder:
        base = None
        if args.base is not None:
            base = Path(folder) / "base.kld"
            more = ["--chunks", str(args.chunks)] if args.chunks else []
            common = ["-f", args.text, "-c", str(args.context), "-t", str(args.threads), *more]
            _run([args.tool, "-m", str(args.base), *common, "--kl-divergence-base", str(base)])
        return [theirs(args.tool, file, args, base) for file in args.gguf]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--text", required=True, help="a text file")
    options.add_argument("--weights", default="file,q8_0,q4_0,q4_1", help="formats of --model")
    options.add_argument("--gguf", type=Path, action="append", default=[], help="for both programs")
    options.add_argument("--base", type=Path, help="a BF16 file, for llama.cpp's KL")
    options.add_argument("--tool", default=os.getenv("LLAMA_PERPLEXITY"), help="llama-perplexity")
    options.add_argument("--context", type=int, default=512, help="tokens of a chunk")
    options.add_argument("--chunks", type=int, help="at most (default: the whole text)")
    options.add_argument("--decode", action="store_true", help="token by token")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both")
    options.add_argument("--tolerance", type=float, default=0.005, help="between the programs")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    text, about = read_text(args.text)
    dense, tokenizer = load(args.model, dtype="bfloat16", weights="dense", device="cpu")
    rows: dict[str, Any] = {DENSE: dense}
    for weights in filter(None, args.weights.split(",")):
        rows[weights] = load(args.model, weights=weights, device="cpu")[0]
    for file in args.gguf:
        rows[file.stem] = load(file, weights="file", device="cpu")[0]
    chunks = chunks_of(text, tokenizer, args.context, args.chunks)
    found = ours(rows, args, chunks)
    found += their_rows(args) if args.tool else []
    known = {row["row"]: row for row in found if row["program"] == "llama.cpp"}
    worst = 0.0
    for row in found:
        row["times_dense"] = row["perplexity"] / found[0]["perplexity"]
        if row["program"] == "dart-llm" and row["row"] in known:
            row["to_llama_cpp"] = row["perplexity"] / known[row["row"]]["perplexity"] - 1
            worst = max(worst, abs(row["to_llama_cpp"]))
        kl = "" if row["kl"] is None else f"{row['kl']:.5f}"
        beside = f"{row['to_llama_cpp']:+.3%}" if "to_llama_cpp" in row else ""
        print(f"{row['program']:9} {row['row']:40} {row['perplexity']:9.4f} {kl:>9} {beside}")
    chosen = {name: getattr(args, name) for name in ("context", "chunks", "decode", "threads")}
    data = {"text": about, **chosen, "tolerance": args.tolerance, "rows": found}
    print(save(args.out or "packed-quality", dense, data))
    if worst > args.tolerance:
        raise SystemExit(f"a file's perplexities differ by {worst:.2%}")


if __name__ == "__main__":
    main()
