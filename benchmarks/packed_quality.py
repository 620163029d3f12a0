"""Quality of weights in blocks: perplexity and KL against bfloat16, beside llama-perplexity's own.

    python benchmarks/packed_quality.py --text wiki.txt --weights file,q8_0,q4_0,q4_1 \\
        --gguf FILE-Q8_0.gguf --gguf FILE-Q4_K_M.gguf --tool PATH/llama-perplexity

Both read the same text as llama-perplexity does: whole chunks of ``--context`` tokens, of which
the second half is scored.  Ours are read as prompts are; the first ``--decode`` chunks also token
by token by native steps, as texts are generated.  Every ``--gguf`` is read by both programs; KL is
that of each row against the prompt of the model in bfloat16, of llama.cpp against ``--base`` (a
BF16 file of the same model).  Bits are those of all weights, scales included: in memory, and in
the file.
``--tool`` (or ``LLAMA_PERPLEXITY``) is never needed: without it ours stand alone.  Writes
benchmarks/results/packed-quality.json, and exits with 1 where a file's perplexities differ by more
than ``--tolerance``.
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
    """[1, length] token ids each, the last line break left out, as llama-perplexity cuts them.

    Names of special tokens in the text are text.  Where texts begin with a token of their own, it
    replaces the first one of each chunk.
    """
    how = {"split_special_tokens": True, "return_tensors": "pt", "verbose": False}
    ids = tokenizer(text.removesuffix("\n"), **how).input_ids
    found = [ids[:, at : at + length].clone() for at in range(0, ids.shape[1] - length + 1, length)]
    if not found:
        raise SystemExit(f"the text has {ids.shape[1]} tokens: give more than {length}")
    if ids[0, 0] == tokenizer.bos_token_id and tokenizer("a").input_ids[0] == ids[0, 0]:
        for one in found:
            one[0, 0] = ids[0, 0]
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


@dataclass
class Sums:
    """Losses and divergences of the scored tokens, chunk by chunk."""

    losses: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)

    def add(self, found: Tensor, base: Tensor, ids: Tensor) -> None:
        """Log-probabilities [n, V] of the last n of ids [1, T], and those to compare with."""
        self.losses.append(-found.gather(1, ids[0, -len(found) :, None])[:, 0])
        self.divergences.append((base.exp() * (base - found)).sum(-1))

    def facts(self) -> dict[str, Any]:
        losses = torch.cat(self.losses)
        return {
            "tokens": len(losses),
            "perplexity": math.exp(losses.double().mean()),
            "kl": float(torch.cat(self.divergences).double().mean()),
        }


@contextlib.contextmanager
def native_steps(model: Any) -> Iterator[None]:
    """Our own dense path while it lasts: tokens are decoded by native steps."""
    with Run(model, PruneConfig.build("griffin", sparsity=0.0, executor="native")):
        yield


def ours(
    rows: Mapping[str, Callable[[], Any]], chunks: list[Tensor], decoded: int
) -> list[dict[str, Any]]:
    """A row per model, read as prompts; the first ``decoded`` chunks also by native steps.

    ``rows``: what loads each, one after the other; the first is what the others are compared with.
    """
    base: list[Tensor] = []
    made = []
    for name, load_row in rows.items():
        model = load_row()
        prompts, steps = Sums(), Sums()
        for number, ids in enumerate(chunks):
            found = log_probabilities(model, ids, decode=False)
            if len(base) == number:
                base.append(found)
            prompts.add(found, base[number], ids)
        if decoded:
            with native_steps(model):
                for known, ids in zip(base[:decoded], chunks[:decoded], strict=True):
                    steps.add(log_probabilities(model, ids, decode=True), known, ids)
        made.append(
            {
                "row": name,
                "program": "dart-llm",
                "held": dtype_text(checkpoint_facts(model)),
                "bits": weight_facts(model)["mean_weight_bits"],
                **prompts.facts(),
                **({"decoded": steps.facts()} if decoded else {}),
            }
        )
        print(line(made[-1]), flush=True)
    return made


def bits_of(file: Path) -> float:
    """Of all weights of a GGUF file, per weight."""
    tensors = read_gguf(file).tensors.values()
    return 8 * sum(one.size for one in tensors) / sum(math.prod(one.shape) for one in tensors)


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
    courses = [float(value) for value in COURSE.findall(told)]
    named = {"row": file.stem, "program": "llama.cpp", "held": file.name, "bits": bits_of(file)}
    return {**named, "perplexity": perplexity, "spread": spread, "kl": kl, "course": courses}


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


def compare(rows: list[dict[str, Any]]) -> float:
    """Tell each row how far it is from bfloat16 and from llama.cpp's of its file; the farthest."""
    known = {row["row"]: row for row in rows if row["program"] == "llama.cpp"}
    worst = 0.0
    for row in rows:
        row["times_dense"] = row["perplexity"] / rows[0]["perplexity"]
        if row["program"] != "dart-llm" or row["row"] not in known:
            continue
        other = known[row["row"]]
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
    """A row for the terminal: perplexity, KL, beside llama.cpp, and the same decoded."""
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
    options.add_argument("--gguf", type=Path, action="append", default=[], help="for both programs")
    options.add_argument("--base", type=Path, help="a BF16 file, for llama.cpp's KL")
    options.add_argument("--tool", default=os.getenv("LLAMA_PERPLEXITY"), help="llama-perplexity")
    options.add_argument("--context", type=int, default=512, help="tokens of a chunk")
    options.add_argument("--chunks", type=int, help="at most (default: the whole text)")
    options.add_argument("--decode", type=int, default=0, help="chunks to decode too")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both")
    options.add_argument("--tolerance", type=float, default=0.005, help="between the programs")
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
    found = ours(rows, chunks, min(args.decode, len(chunks)))
    found += their_rows(args) if args.tool else []
    worst = compare(found)
    print(*map(line, found), sep="\n")
    chosen = {name: getattr(args, name) for name in ("context", "chunks", "decode", "threads")}
    data = {"text": about, **chosen, "tolerance": args.tolerance, "rows": found}
    print(save(args.out or "packed-quality", dense, data))
    if worst > args.tolerance:
        raise SystemExit(f"a file's perplexities differ by {worst:.2%}")


if __name__ == "__main__":
    main()
