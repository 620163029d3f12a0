"""Time the parts of a native decode step: projections, attention, FFN, head.

    python benchmarks/step_parts.py --model smollm2-135m --weights file,q8_0,q4_0

Decodes in each weight format, interleaved: dense, and by ``--method`` at ``--sparsity``.  A part
ends when all threads have finished it; its time is the median over the tokens, and includes
waiting.  Norms are computed in the part that reads them.  "between steps" is what Python does from
one step to the next.  Writes NAME.json and NAME.md to benchmarks/results.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from common import parser, read, save
from keep import page

from dart_llm.experiments.timing import prompt_ids
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.loading import load
from dart_llm.native.build import kernels_in_use
from dart_llm.native.memory import read_speed
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import Run, prepare

PARTS = {
    "embedding": (),
    "q, k, v": ("q_proj", "k_proj", "v_proj"),
    "attention": (),
    "output projection": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "sums": (),
    "head": (),
}
"""The parts in the order of ``StepPart`` (decode.h), and the modules whose weights each reads."""
BETWEEN = "between steps"
WARM = 4
Repetition = tuple[list[list[float]], float]


class Timed:
    """A native decoder that collects the seconds of its steps' parts."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.rows, self.ended = decoder, [], None
        decoder.time_parts(True)

    def step(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = self.decoder.step(*arguments)
        ended = time.perf_counter()
        if self.ended is not None:
            self.rows.append([*self.decoder.part_seconds(), began - self.ended, ended - began])
        self.ended = ended
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)


def part_bytes(model: Any) -> dict[str, int]:
    """The bytes of weights that each part reads for a token."""
    sizes = {
        part: sum(
            p.nbytes for n, p in model.named_parameters() if any(f".{m}." in n for m in names)
        )
        for part, names in PARTS.items()
    }
    return {**sizes, "head": model.get_output_embeddings().weight.nbytes}


def repetition(make: Callable[[], Run], ids: torch.Tensor, tokens: int) -> Repetition:
    """Seconds of each token's parts, and the bytes per second that memory gives."""
    before = read_speed()
    with make() as run:
        timed = Timed(run.patch.whole_steps.native)
        run.patch.whole_steps.native = timed
        count = tokens + WARM
        run.model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        run.patch.whole_steps.native = timed.decoder
        timed.decoder.time_parts(False)
    return timed.rows[WARM - 2 :], (before + read_speed()) / 2


def summarised(model: Any, tokens: list[list[float]], speed: float) -> list[dict[str, Any]]:
    """A row per part: median milliseconds, share of the step, bytes, share of memory speed."""
    columns = [statistics.median(column) for column in zip(*tokens, strict=True)]
    sizes, rows = part_bytes(model), []
    for part, seconds in zip([*PARTS, BETWEEN], columns[:-1], strict=True):
        size = sizes.get(part, 0)
        reached = size / seconds / speed if size and seconds else None
        share = seconds / (columns[-1] + columns[-2])
        row = {"part": part, "ms": 1e3 * seconds, "share": share, "bytes": size}
        rows.append({**row, "share_of_memory_speed": reached})
    total = sum(sizes.values())
    whole = {"part": "token", "ms": 1e3 * (columns[-1] + columns[-2]), "share": 1.0, "bytes": total}
    return [*rows, {**whole, "share_of_memory_speed": total / (whole["ms"] / 1e3) / speed}]


def table(formats: Mapping[str, list[dict[str, Any]]]) -> str:
    """A row per part; for each format its milliseconds and share of memory speed."""
    heads = [cell for name in formats for cell in (f"{name}: ms", "of token", "of memory speed")]
    lines = [f"| part | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for rows in zip(*formats.values(), strict=True):
        cells = [rows[0]["part"]]
        for row in rows:
            reached = row["share_of_memory_speed"]
            cells += [
                f"{row['ms']:.2f}",
                f"{row['share']:.0%}",
                f"{reached:.0%}" if reached else "",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page_of(name: str, document: dict[str, Any]) -> str:
    """The text of NAME.md for the document in NAME.json."""
    speed = f"memory gives {document['read_speed'] / 1e9:.1f} GB/s"
    about = f"A prompt of 128 tokens; kernels {document['kernels']}; {speed}."
    run = {**document, "finished": document["date"]}
    return page(name, [run], [f"{about}\n\n{table(document['rows'])}"])


def candidates(args: argparse.Namespace) -> Iterator[tuple[str, Any, Any, Callable[[], Run]]]:
    """Label, model, prompt and runs of each format, dense and by the method."""
    for weights in args.weights.split(","):
        model, tokenizer = load(args.model, dtype=args.dtype, weights=weights)
        ids = prompt_ids(model, tokenizer, 128)
        stored = checkpoint_facts(model).get("weights") or args.dtype
        dense = PruneConfig.build("dense", executor="native")
        yield stored, model, ids, functools.partial(Run, model, dense)
        if args.method:
            config = PruneConfig.build(args.method, sparsity=args.sparsity, executor="native")
            label = f"{stored}, {args.method} {args.sparsity:.0%}"
            yield label, model, ids, prepare(model, tokenizer, config, say=print).run


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--weights", default="file", help="formats, comma-separated")
    options.add_argument("--method", help="also time this method")
    options.add_argument("--sparsity", type=float, default=0.5, help="of the method")
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--tokens", type=int, default=64, help="timed tokens of a repetition")
    options.set_defaults(dtype="float32")
    args: argparse.Namespace = options.parse_args()
    rows = list(candidates(args))
    tokens: dict[str, list[list[float]]] = {label: [] for label, *_ in rows}
    speeds: dict[str, list[float]] = {label: [] for label, *_ in rows}
    for _ in range(args.repeats):
        for label, _, ids, make in rows:
            seconds, speed = repetition(make, ids, args.tokens)
            tokens[label] += seconds
            speeds[label].append(speed)
    summaries = {
        label: summarised(model, tokens[label], statistics.median(speeds[label]))
        for label, model, *_ in rows
    }
    print(table(summaries))
    model, threads = rows[0][1], torch.get_num_threads()
    speed = statistics.median([speed for each in speeds.values() for speed in each])
    facts = {"threads": threads, "kernels": kernels_in_use(), "read_speed": speed}
    path = save(args.out or "step-parts", model, {**facts, "rows": summaries})
    document = read(path)
    path.with_suffix(".md").write_text(page_of(path.stem, document), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
