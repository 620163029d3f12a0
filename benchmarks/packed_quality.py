"""Quality of packed weights: perplexity and KL against bfloat16, compared with llama-perplexity.

    python benchmarks/packed_quality.py --text wiki.txt --weights file,q8_0,q4_0,q4_1 \\
        --gguf FILE-Q8_0.gguf --gguf FILE-Q4_K_M.gguf --tool PATH/llama-perplexity

Both programs split the text as llama-perplexity does: whole chunks of ``--context`` tokens, of
which the second half is scored.  dart-llm processes chunks as prompts, and the first ``--decode``
chunks also token by token with native steps.  Both programs score every ``--gguf``.  The KL of
dart-llm's rows is against the model in bfloat16, that of llama.cpp's against ``--base`` (a BF16
file of the same model).  Bits per weight count all weights with their scales, in memory or in the
file.  ``--tool`` (or ``LLAMA_PERPLEXITY``) is optional: without it only dart-llm is measured.
Writes benchmarks/results/packed-quality.json, and exits with 1 if a file's two perplexities differ
by more than ``--tolerance``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import parser, read_text, save
from torch import Tensor

from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import weight_facts
from dart_llm.models.gguf_file import read_gguf
from dart_llm.models.loading import load
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting.words import dtype_text
from dart_llm.session.run import Run

DENSE = "bfloat16"
COURSE = re.compile(r"\[\d+\]([\d.]+),")
"""Perplexities after each chunk."""
PERPLEXITY = re.compile(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)")
DIVERGENCE = re.compile(r"Mean\s+KLD:\s+(-?[\d.eE+-]+)")


def chunks_of(text: str, tokenizer: Any, length: int, most: int | None) -> list[Tensor]:
    """Chunks of token ids [1, length], split as llama-perplexity does, without the last line break.

    Special tokens' names in the text are treated as text.  If the tokenizer adds a first token, it
    replaces the first token of each chunk.
    """
    how = {"split_special_tokens": True, "return_tensors": "pt", "verbose": False}
    ids = tokenizer(text.removesuffix("\n"), **how).input_ids
    starts = range(0, ids.shape[1] - length + 1, length)
    chunks = [ids[:, start : start + length].clone() for start in starts]
    if not chunks:
        raise SystemExit(f"the text has {ids.shape[1]} tokens: give more than {length}")
    if ids[0, 0] == tokenizer.bos_token_id and tokenizer("a").input_ids[0] == ids[0, 0]:
        for chunk in chunks:
            chunk[0, 0] = ids[0, 0]
    return chunks[:most]


@torch.inference_mode()
def log_probabilities(model: Any, ids: Tensor, *, decode: bool) -> Tensor:
    """[n, V] float32 of the scored tokens of ids [1, T]: its second half except the first token."""
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


@dataclass
class Sums:
    """Losses and KL divergences of the scored tokens, one tensor per chunk."""

    losses: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)

    def add(self, scores: Tensor, base: Tensor, ids: Tensor) -> None:
        """Add log-probabilities [n, V] of the last n of ids [1, T], and those of the base model."""
        self.losses.append(-scores.gather(1, ids[0, -len(scores) :, None])[:, 0])
        self.divergences.append((base.exp() * (base - scores)).sum(-1))

    def facts(self) -> dict[str, Any]:
        losses = torch.cat(self.losses)
        return {
            "tokens": len(losses),
            "perplexity": math.exp(losses.double().mean()),
            "kl": float(torch.cat(self.divergences).double().mean()),
        }


@contextlib.contextmanager
def native_steps(model: Any) -> Iterator[None]:
    """Inside the block, the dense model decodes with native steps."""
    with Run(model, PruneConfig.build("griffin", sparsity=0.0, executor="native")):
        yield


def ours(
    rows: Mapping[str, Callable[[], Any]], chunks: list[Tensor], decoded: int
) -> list[dict[str, Any]]:
    """A row per model over all chunks as prompts, and over ``decoded`` chunks by native steps.

    ``rows``: functions that load the models in turn; the first is the base of the comparison.
    """
    base: list[Tensor] = []
    results = []
    for name, load_row in rows.items():
        model = load_row()
        prompts, steps = Sums(), Sums()
        for number, ids in enumerate(chunks):
            scores = log_probabilities(model, ids, decode=False)
            if len(base) == number:
                base.append(scores)
            prompts.add(scores, base[number], ids)
        if decoded:
            with native_steps(model):
                for expected, ids in zip(base[:decoded], chunks[:decoded], strict=True):
                    steps.add(log_probabilities(model, ids, decode=True), expected, ids)
        results.append(
            {
                "row": name,
                "program": "dart-llm",
                "held": dtype_text(checkpoint_facts(model)),
                "bits": weight_facts(model)["mean_weight_bits"],
                **prompts.facts(),
                **({"decoded": steps.facts()} if decoded else {}),
            }
        )
        print(line(results[-1]), flush=True)
    return results


def bits_of(file: Path) -> float:
    """Mean bits per weight of a GGUF file."""
    tensors = read_gguf(file).tensors.values()
    return 8 * sum(t.size for t in tensors) / sum(math.prod(t.shape) for t in tensors)


def theirs(tool: str, file: Path, args: argparse.Namespace, base: Path | None) -> dict[str, Any]:
    """llama-perplexity's row for a file; ``base``: the file with the logits of ``--base``."""
    common = ["-f", args.text, "-c", str(args.context), "-t", str(args.threads)]
    if args.chunks:
        common += ["--chunks", str(args.chunks)]
    output = _run([tool, "-m", str(file), *common])
    estimate = PERPLEXITY.search(output)
    if estimate is None:
        raise SystemExit(f"{tool} printed no perplexity of {file.name}: {output[-300:]}")
    kl = None
    if base is not None:
        compared = ["--kl-divergence", "--kl-divergence-base", str(base)]
        divergence = DIVERGENCE.search(_run([tool, "-m", str(file), *common, *compared]))
        kl = float(divergence[1]) if divergence else None
    perplexity, spread = map(float, estimate.groups())
    courses = [float(value) for value in COURSE.findall(output)]
    named = {"row": file.stem, "program": "llama.cpp", "held": file.name, "bits": bits_of(file)}
    return {**named, "perplexity": perplexity, "spread": spread, "kl": kl, "course": courses}


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr.strip()[-300:]}")
    return done.stdout + done.stderr


def their_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """llama-perplexity's row for each file; the base's logits are stored temporarily."""
    with tempfile.TemporaryDirectory() as folder:
        base = None
        if args.base is not None:
            base = Path(folder) / "base.kld"
            more = ["--chunks", str(args.chunks)] if args.chunks else []
            common = ["-f", args.text, "-c", str(args.context), "-t", str(args.threads), *more]
            _run([args.tool, "-m", str(args.base), *common, "--kl-divergence-base", str(base)])
        return [theirs(args.tool, file, args, base) for file in args.gguf]


def compare(rows: list[dict[str, Any]]) -> float:
    """Add to each row its distance from bfloat16 and llama.cpp; return the largest distance."""
    by_file = {row["row"]: row for row in rows if row["program"] == "llama.cpp"}
    worst = 0.0
    for row in rows:
        row["times_dense"] = row["perplexity"] / rows[0]["perplexity"]
        if row["program"] != "dart-llm" or row["row"] not in by_file:
            continue
        other = by_file[row["row"]]
        row["to_llama_cpp"] = row["perplexity"] / other["perplexity"] - 1
        worst = max(worst, abs(row["to_llama_cpp"]))
        decoded = row.get("decoded")
        if decoded and other["course"]:
            chunks = round(len(other["course"]) * decoded["tokens"] / row["tokens"])
            theirs_then = other["course"][chunks - 1]
            decoded["to_llama_cpp"] = decoded["perplexity"] / theirs_then - 1
            worst = max(worst, abs(decoded["to_llama_cpp"]))
    return worst


def line(row: dict[str, Any]) -> str:
    """A row for the terminal: perplexity, KL and distance from llama.cpp, as prompt and decoded."""
    cells = [f"{row['program']:9} {row['row']:36} {row['bits']:6.2f}"]
    for part in (row, row.get("decoded")):
        if part:
            kl = "" if part["kl"] is None else f"{part['kl']:.5f}"
            beside = f"{part['to_llama_cpp']:+.3%}" if "to_llama_cpp" in part else ""
            cells.append(f"{part['perplexity']:9.4f} {kl:>8} {beside:>8}")
    return " ".join(cells)


def loaded(model: str | Path, weights: str) -> Any:
    return load(model, weights=weights, device="cpu")[0]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--text", required=True, help="a text file")
    options.add_argument("--weights", default="file,q8_0,q4_0,q4_1", help="formats of --model")
    options.add_argument(
        "--gguf", type=Path, action="append", default=[], help="a file for both programs"
    )
    options.add_argument("--base", type=Path, help="a BF16 file, for llama.cpp's KL")
    options.add_argument("--tool", default=os.getenv("LLAMA_PERPLEXITY"), help="llama-perplexity")
    options.add_argument("--context", type=int, default=512, help="tokens of a chunk")
    options.add_argument("--chunks", type=int, help="chunks at most (default: the whole text)")
    options.add_argument(
        "--decode", type=int, default=0, help="chunks to decode token by token too"
    )
    threads = torch.get_num_threads()
    options.add_argument("--threads", type=int, default=threads, help="threads of both programs")
    options.add_argument(
        "--tolerance", type=float, default=0.005, help="largest difference allowed"
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    text, about = read_text(args.text)
    dense, tokenizer = load(args.model, dtype="bfloat16", weights="dense", device="cpu")
    rows: dict[str, Callable[[], Any]] = {DENSE: lambda: dense}
    for weights in filter(None, args.weights.split(",")):
        rows[weights] = functools.partial(loaded, args.model, weights)
    for file in args.gguf:
        rows[file.stem] = functools.partial(loaded, file, "file")
    chunks = chunks_of(text, tokenizer, args.context, args.chunks)
    results = ours(rows, chunks, min(args.decode, len(chunks)))
    results += their_rows(args) if args.tool else []
    worst = compare(results)
    print(*map(line, results), sep="\n")
    chosen = {name: getattr(args, name) for name in ("context", "chunks", "decode", "threads")}
    data = {"text": about, **chosen, "tolerance": args.tolerance, "rows": results}
    print(save(args.out or "packed-quality", dense, data))
    if worst > args.tolerance:
        raise SystemExit(f"a file's perplexities differ by {worst:.2%}")


if __name__ == "__main__":
    main()
