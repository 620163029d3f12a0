"""Exported GGUF files in llama.cpp: log probabilities against dart-llm's, speed against the source.

    python benchmarks/export_gguf.py --bin FOLDER

``--bin`` contains llama.cpp's ``llama-perplexity`` and ``llama-bench``.  For every case in
``CASES``, masks are chosen on the six embedded texts and a file is exported.  llama-perplexity then
scores the second ``TOKENS`` tokens of another text.  dart-llm scores the same tokens with the
dequantised float32 model and the same masks at every position.  Both also score the unpruned source
file, where they differ by rounding alone.  ``TURNS`` times, each file in turn generates ``TOKENS``
tokens.  Writes benchmarks/results/export-gguf.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import parser, save
from torch import Tensor

from dart_llm.data import passages, texts
from dart_llm.experiments.timing import ReferenceFile, decode_row, program_environment
from dart_llm.models.gguf_file import read_gguf
from dart_llm.models.gguf_write import block_of
from dart_llm.models.loading import load, resolve
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import Masks
from dart_llm.session.gguf_export import GgufExport, choose_masks, exportable, write_masks
from dart_llm.session.run import Run, prepare

TOKENS, TURNS = 64, 5
CONTEXT = 2 * TOKENS + 2

CASES = (("griffin", 0.3), ("dart-prompt", 0.3))
"""One case with equal layer widths; one with unequal widths and compensation as a bias."""


def their_log_probabilities(bin: Path, file: Path, text: Path) -> tuple[Tensor, Tensor]:
    """Token ids [1, T], and llama.cpp's log probabilities [n, V] of the last n, stored in 16 bits.

    Values more than 16 below the largest are not stored: they become -inf.
    """
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "logits"
        command = [str(bin / "llama-perplexity"), "-m", str(file), "-f", str(text), "-t", "1"]
        command += ["-c", str(CONTEXT), "--chunks", "1", "--kl-divergence-base", str(kept)]
        where = program_environment({}, command[0])
        done = subprocess.run(command, capture_output=True, text=True, env=where)
        if done.returncode or not kept.exists():
            raise SystemExit(f"llama-perplexity failed on {file.name}: {done.stderr[-400:]}")
        data = kept.read_bytes()
    context, words, chunks = np.frombuffer(data, np.int32, 3, 8)
    ids = np.frombuffer(data, np.int32, context * chunks, 20)
    row = 2 * ((words + 1) // 2) + 4  # float32 scale and minimum, then 16-bit levels
    rows = np.frombuffer(data, np.uint16, offset=20 + 4 * len(ids)).reshape(-1, row)
    ends = np.ascontiguousarray(rows[:, :4]).view(np.float32)
    levels = torch.from_numpy(rows[:, 4 : 4 + words].astype(np.float32))
    scores = levels * torch.from_numpy(ends[:, :1].copy()) + torch.from_numpy(ends[:, 1:].copy())
    return torch.tensor(ids)[None].long(), scores.masked_fill(levels == 0, -torch.inf)


@torch.no_grad()
def our_log_probabilities(model: Any, ids: Tensor, masks: Masks | None = None) -> Tensor:
    """dart-llm's [n, V] float32 for the same tokens, with ``masks`` at every position."""
    first = CONTEXT // 2
    if masks is None:
        return model(ids).logits[0, first:-1].float().log_softmax(-1)
    run = Run(model, PruneConfig.build("griffin", executor="masked"), fixed_masks=masks)
    with run, run.decoding(prompt=True):
        return model(ids).logits[0, first:-1].float().log_softmax(-1)


def agreement(name: str, theirs: Tensor, ours: Tensor, ids: Tensor) -> dict[str, Any]:
    """How far llama.cpp's log probabilities are from dart-llm's."""
    stored = theirs.isfinite()
    apart = (theirs - ours).masked_fill(~stored, 0).abs()
    chance = ours.exp()
    kl = torch.where(stored, chance * (ours - theirs), 0).sum(-1)
    wanted = ids[0, -len(ours) :, None]
    row = {
        "row": name,
        "tokens": len(ours),
        "kl": float(kl.mean()),
        "likely_apart": float(apart[chance > 0.001].max()),
        "same_first": float((theirs.argmax(-1) == ours.argmax(-1)).float().mean()),
        "their_loss": float(-theirs.gather(1, wanted).clamp_min(-30).mean()),
        "our_loss": float(-ours.gather(1, wanted).mean()),
    }
    print(" ".join(f"{v:.5f}" if isinstance(v, float) else str(v) for v in row.values()))
    return row


def facts(export: GgufExport) -> dict[str, Any]:
    """The facts of an exported file that the table shows, without its path."""
    kept = export.to_dict()
    counts = {key: kept[key] for key in ("asked", "written")}
    rest = (
        "architecture",
        "method",
        "compensated",
        "kinds",
        "rounded",
        "bytes",
        "bytes_before",
        "block",
    )
    return {**{key: kept[key] for key in rest}, "achieved_sparsity": export.achieved_sparsity} | {
        f"{key}_{end.__name__}": end(values) for key, values in counts.items() for end in (min, max)
    }


def times(bin: Path, files: Sequence[Path], threads: int) -> list[dict[str, Any]]:
    """Tokens per second of every file, in interleaved repetitions."""
    turns: dict[Path, list[float]] = {file: [] for file in files}
    for _ in range(TURNS):
        for file in files:
            row = decode_row(str(bin / "llama-bench"), file, threads, TOKENS, 0)
            turns[file].append(TOKENS / (row["avg_ns"] * 1e-9))
            print(f"{file.stem}: {turns[file][-1]:.1f} tokens per second", flush=True)
    return [
        {
            "row": file.stem,
            "bytes_read": ReferenceFile.of(file).bytes,
            "tokens_per_second": statistics.median(speeds),
            "turns": speeds,
            "times_whole": statistics.median(speeds) / statistics.median(turns[files[0]]),
        }
        for file, speeds in turns.items()
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--bin", type=Path, required=True, help="folder of llama.cpp's programs")
    options.add_argument("--build", default="", help="llama.cpp's version, shown in the table")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--folder", type=Path, help="keep the files there (default: delete them)")
    options.add_argument("--no-times", action="store_true", help="measure only the agreement")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(args, args.folder or Path(scratch))


def measure(args: argparse.Namespace, folder: Path) -> None:
    source = resolve(args.model, packed=True, say=print).blocks
    if source is None:
        raise SystemExit(f"{args.model} is not a GGUF file")
    file = read_gguf(source)
    model, tokenizer = load(args.model, weights="dense", dtype="float32")
    subjects = [texts.read(subject) for subject in texts.subjects()]
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in subjects]
    text = folder / "text.txt"
    text.write_text(passages.shipped()[0].text, encoding="utf-8")
    ids, theirs = their_log_probabilities(args.bin, source, text)
    rows = [agreement("whole file", theirs, our_log_probabilities(model, ids), ids)]
    written, files = [], [source]
    for method, sparsity in CASES:
        config = exportable(PruneConfig.build(method, sparsity=sparsity), print)
        run = prepare(model, tokenizer, config).run(likelihood=True)
        assert run is not None
        masks, counts = choose_masks(run, prompts, block_of(file))
        name = f"{method}@{sparsity:g}"
        export = write_masks(file, masks, folder / f"{method}.gguf", counts, name)
        written.append(facts(export))
        files.append(export.path)
        _, theirs = their_log_probabilities(args.bin, export.path, text)
        ours = our_log_probabilities(model, ids, masks)
        rows.append(agreement(f"{export.method}, masks in memory", theirs, ours, ids))
        if export.architecture == file.architecture and not export.compensated:
            narrow, _ = load(export.path, weights="dense", dtype="float32")
            ours = our_log_probabilities(narrow, ids)
            rows.append(agreement(f"{export.method}, the file", theirs, ours, ids))
    data = {"build": args.build, "threads": args.threads, "tokens": TOKENS, "turns": TURNS}
    data |= {"files": written, "agreement": rows, "rows": []}
    print(save(args.out or "export-gguf", model, data))
    if not args.no_times:
        timed = times(args.bin, files, args.threads)
        print(save(args.out or "export-gguf", model, {**data, "rows": timed}))


if __name__ == "__main__":
    main()
