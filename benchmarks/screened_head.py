"""Simulate the screened head: its loss at several shares of the head's bytes.

    python benchmarks/screened_head.py --text wiki.txt --model smollm2-135m

A screen computes approximate scores of all vocabulary entries from few bytes; only the entries
selected by these are scored exactly.  Screens are built from text sampled from the model, and
evaluated on its greedy answers to the package's prompts and on ``--text`` (the second halves of
chunks of 512 tokens).  KL is that of the full head against the screened head.  Rows "shipped" are
the screens of ``--head screened``, for a head stored in bfloat16, Q8_0 and Q4_0: the threshold is
set on the sampled text, so the bytes on other texts differ.  Rows "alternative" are other designs
that read equal bytes on every text.  Writes benchmarks/results/screened-head-NAME.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import parser, read_text, save
from torch import Tensor
from torch.nn import functional as F

from dart_llm.calibration.collect import opening_ids, sample_continuations
from dart_llm.data import texts
from dart_llm.data.passages import listed_prompts
from dart_llm.data.texts import encode_prompt
from dart_llm.errors import ConfigError
from dart_llm.models.loading import load
from dart_llm.models.screen import Screen, directions_of, divergence, threshold_for
from dart_llm.pruning.config import PruneConfig, SelfStatsConfig
from dart_llm.session.run import Run

FORMATS = {"bfloat16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Bytes of one weight of a stored head."""

SHARES = (0.10, 0.15, 0.20, 0.25, 0.30)


def head_inputs(model: Any, ids: Tensor) -> Tensor:
    """The head's inputs [T, D] for ids [1, T]."""
    states: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: states.append(args[0][0].float()))
    try:
        with torch.inference_mode():
            model(ids, use_cache=False)
    finally:
        handle.remove()
    return torch.cat(states)


def own_states(model: Any) -> Tensor:
    """The head's inputs for text sampled from the model, as in self-calibration."""
    config = SelfStatsConfig()
    opening = opening_ids(model, config.sequences, config.opening)
    if opening is None:
        raise SystemExit("this model's tokenizer cannot encode the package's openings")
    generator = torch.Generator().manual_seed(0)
    sampling = config.temperature, config.top_p
    ids = sample_continuations(
        model, opening, config.length, generator, lambda text: None, *sampling
    )
    return torch.cat([head_inputs(model, sequence[None]) for sequence in ids])


def answers(model: Any, tokenizer: Any, count: int, length: int) -> list[Tensor]:
    """The head's inputs [n, D] for each greedy answer of ``length`` tokens."""
    prompts = [texts.read_prompt(name) for name in texts.prompt_names()]
    prompts += [prompt.text for prompt in listed_prompts()][: count - len(prompts)]
    chat = bool(getattr(tokenizer, "chat_template", None))
    made = []
    with Run(model, PruneConfig.build("griffin", sparsity=0.0, executor="native")):
        for prompt in prompts[:count]:
            ids = encode_prompt(tokenizer, prompt, chat)
            made.append((len(ids[0]), model.generate(ids, do_sample=False, max_new_tokens=length)))
    return [head_inputs(model, ids)[begin - 1 : -1] for begin, ids in made]


def slices(model: Any, tokenizer: Any, text: str, chunks: int, length: int = 512) -> Tensor:
    """The head's inputs for the second halves of chunks of a text."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : chunks * length]
    return torch.cat([head_inputs(model, chunk)[length // 2 :] for chunk in ids.split(length, 1)])


def some(states: Tensor, count: int) -> Tensor:
    """About ``count`` evenly spaced states."""
    return states[:: max(1, len(states) // count)][:count]


@dataclass(frozen=True)
class Seen:
    """Head inputs of a text and the full head's scores for them, float32."""

    states: Tensor
    full: Tensor

    def losses(self, rough: Tensor, near: Tensor) -> dict[str, float]:
        """KL and share of equal best tokens; ``near`` [n, V]: the entries scored exactly."""
        screened = torch.where(near, self.full, rough)
        same = screened.argmax(-1) == self.full.argmax(-1)
        kl = divergence(self.full, screened)
        return {"kl": float(kl.mean()), "same": float(same.float().mean())}


def rounded(rows: Tensor, bits: int, group: int = 32) -> Tensor:
    """rows [V, r] rounded to symmetric grids of ``bits``, the best of four scales per group."""
    result = torch.empty_like(rows)
    top = 2 ** (bits - 1) - 1
    for at in range(0, len(rows), 8192):
        x = rows[at : at + 8192].reshape(-1, group)
        peak = x.abs().amax(-1, keepdim=True).clamp_min(1e-9)
        tries = []
        for factor in (1.0, 0.9, 0.8, 0.7):
            scale = peak * factor / (top + 0.5)
            tries.append((x / scale).round().clamp(-top - 1, top) * scale)
        errors = torch.stack([(attempt - x).square().sum(-1) for attempt in tries])
        best = errors.argmin(0)
        chosen = torch.stack(tries)[best, torch.arange(len(x))]
        result[at : at + 8192] = chosen.reshape(-1, rows.shape[1])
    return result


Rough = Callable[[Tensor], Tensor]


def alternatives(weight: Tensor, axes: Tensor, room: float) -> Iterator[tuple[str, float, Rough]]:
    """(name, bytes per entry, rough scores) of screens with about ``room`` bytes per entry."""
    projected = F.linear(weight, axes)
    hidden = weight.shape[1]

    def low_rank(rows: Tensor) -> Rough:
        basis = axes[: rows.shape[1]]
        return lambda h: F.linear(F.linear(h, basis), rows)

    for bits in (16, 8, 4, 3, 2):
        each = 2.0 if bits == 16 else (bits + 0.5) / 8
        rank = min(int(room / each) // 32 * 32, hidden)
        if rank:
            rows = projected[:, :rank]
            rows = rows.bfloat16().float() if bits == 16 else rounded(rows, bits)
            yield f"{rank} directions at {bits} bits", rank * each, low_rank(rows)
    for bits in (3, 2):
        each = (bits + 0.5) / 8
        if each * hidden < 1.4 * room:
            copy = rounded(weight, bits)
            yield f"all inputs at {bits} bits", each * hidden, lambda h, c=copy: F.linear(h, c)
    norms = weight.norm(dim=0)
    copy = rounded(weight, 4)
    for bits, each, rows in ((16, 2.0, weight), (4, 4.5 / 8, copy)):
        count = min(int(room / each), hidden)

        def largest(h: Tensor, count: int = count, rows: Tensor = rows) -> Tensor:
            best = (h.abs() * norms).topk(count, -1).indices
            return F.linear(torch.zeros_like(h).scatter(1, best, h.gather(1, best)), rows)

        yield f"the {count} largest inputs at {bits} bits", count * each, largest
    yield largest_directions(projected, axes, room)


def largest_directions(projected: Tensor, axes: Tensor, room: float) -> tuple[str, float, Rough]:
    """Each token's largest inputs at 4 bits, of the head projected onto the states' directions."""
    count = min(int(room / (4.5 / 8)), len(axes))
    rows, norms = rounded(projected, 4), projected.norm(dim=0)

    def rough(h: Tensor) -> Tensor:
        z = F.linear(h, axes)
        best = (z.abs() * norms).topk(count, -1).indices
        return F.linear(torch.zeros_like(z).scatter(1, best, z.gather(1, best)), rows)

    return f"the {count} largest directions at 4 bits", count * 4.5 / 8, rough


def within(rough: Tensor, rows: float) -> Tensor:
    """Vocabulary entries whose rough score is near the best, ``rows`` on average."""
    return rough >= rough.amax(-1, keepdim=True) - threshold_for([rough], rows)


def best_rows(rough: Tensor, rows: float) -> Tensor:
    """The ``rows`` best vocabulary entries for each token."""
    best = rough.topk(int(rows), -1).indices
    return torch.zeros_like(rough, dtype=torch.bool).scatter(1, best, True)


def alternative_rows(
    weight: Tensor, axes: Tensor, seen: dict[str, Seen], share: float
) -> Iterator[dict[str, Any]]:
    """Rows for a bfloat16 head: screens take 0.6 of the bytes, exactly scored rows the rest."""
    words, hidden = weight.shape
    budget = share * 2 * hidden
    for name, each, rough in alternatives(weight, axes, 0.6 * budget):
        rows = words * (budget - each) / (2 * hidden)
        if rows < 1:
            continue
        ways = [("threshold", within)] + [("best rows", best_rows)] * (" at 4 bits" in name)
        for how, choose in ways:
            row: dict[str, Any] = {"kind": "alternative", "format": "bfloat16", "share": share}
            row |= {"screen": name, "exact": how}
            for text, inputs in seen.items():
                scores = rough(inputs.states)
                row[text] = inputs.losses(scores, choose(scores, rows))
            yield row


def greedy(
    weight: Tensor, screen: Screen, made: Sequence[Tensor], best: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Shares of answers and of tokens whose best token is unchanged, and of rows read exactly."""
    same, count = [], 0.0
    for states, (score, word) in zip(made, best, strict=True):
        rough = screen.rough(states)
        near = screen.near(rough)
        rest = rough.masked_fill(near, -torch.inf).amax(-1)
        same.append(near.gather(1, word[:, None])[:, 0] & (rest < score))
        count += float(near.sum())
    tokens = torch.cat(same)
    return {
        "texts": sum(bool(answer.all()) for answer in same) / len(same),
        "tokens": float(tokens.float().mean()),
        "rows": count / len(tokens) / len(weight),
    }


def shipped_rows(
    weight: Tensor, own: Tensor, seen: dict[str, Seen], made: Sequence[Tensor]
) -> Iterator[dict[str, Any]]:
    """Rows for each stored format and share for which a screen fits."""
    words, hidden = weight.shape
    maxima = [F.linear(states, weight).max(-1) for states in made]
    best = [(maximum.values, maximum.indices) for maximum in maxima]
    for name, each in FORMATS.items():
        for share in SHARES:
            stored = words * hidden * each
            try:
                screen = Screen.of(weight, own, share, stored)
            except ConfigError as error:
                print(error)
                continue
            fixed = screen.nbytes() / stored
            row: dict[str, Any] = {"kind": "shipped", "format": name, "share": share}
            row |= {"rank": screen.keep, "screen_bytes": fixed, "threshold": screen.threshold}
            for text, inputs in seen.items():
                rough = screen.rough(inputs.states)
                near = screen.near(rough)
                row[text] = inputs.losses(rough, near)
                row[text]["bytes"] = fixed + float(near.float().mean())
            row["greedy"] = greedy(weight, screen, made, best)
            row["greedy"]["bytes"] = fixed + row["greedy"].pop("rows")
            yield row


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    name = row.get("screen") or f"{row['rank']} directions, t = {row['threshold']:.1f}"
    cells = [f"{row['format']:8} {row['share']:.2f} {name:34} {row.get('exact', ''):10}"]
    for text in ("answers", "text"):
        losses = row[text]
        cells.append(f"{text} {losses['kl']:.5f} {losses['same']:.4f}")
        if "bytes" in losses:
            cells.append(f"bytes {losses['bytes']:.3f}")
    if "greedy" in row:
        cells.append("greedy {texts:.2f} {tokens:.5f} bytes {bytes:.3f}".format(**row["greedy"]))
    return " | ".join(cells)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--text", required=True, help="a text file")
    options.add_argument("--prompts", type=int, default=20, help="number of prompts")
    options.add_argument("--length", type=int, default=128, help="tokens of an answer")
    options.add_argument("--chunks", type=int, default=8, help="chunks of the text")
    options.add_argument("--tokens", type=int, default=128, help="tokens of each text, for KL")
    options.add_argument("--states", type=Path, help="file to keep the hidden states in")
    options.set_defaults(dtype="bfloat16")
    options.add_argument("--alternatives", default="0.25", help="shares, comma-separated")
    args: argparse.Namespace = options.parse_args()
    text, about = read_text(args.text)
    model, tokenizer = load(args.model, dtype=args.dtype, weights="dense", device="cpu")
    if args.states and args.states.exists():
        states_of = torch.load(args.states)
    else:
        states_of = {
            "answers": answers(model, tokenizer, args.prompts, args.length),
            "own": own_states(model),
            "text": slices(model, tokenizer, text, args.chunks),
        }
        if args.states:
            torch.save(states_of, args.states)
    made = [states.float() for states in states_of["answers"]]
    own, other = states_of["own"].float(), states_of["text"].float()
    weight = model.get_output_embeddings().weight.detach().bfloat16().float()
    axes = directions_of(own)
    seen = {
        name: Seen(states, F.linear(states, weight))
        for name, states in (
            ("answers", some(torch.cat(made), args.tokens)),
            ("text", some(other, args.tokens)),
        )
    }
    rows = []
    with torch.inference_mode():
        for share in map(float, filter(None, args.alternatives.split(","))):
            for row in alternative_rows(weight, axes, seen, share):
                rows.append(row)
                print(line(row), flush=True)
        for row in shipped_rows(weight, own, seen, made):
            rows.append(row)
            print(line(row), flush=True)
    counted = {"prompts": len(made), "greedy_tokens": sum(map(len, made)), "tokens": args.tokens}
    head = {"words": len(weight), "hidden": weight.shape[1]}
    data = {"text": about, **counted, "head": head, "rows": rows}
    print(save(args.out or "screened-head", model, data))


if __name__ == "__main__":
    main()
