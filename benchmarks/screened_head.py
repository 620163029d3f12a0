"""The screened head in simulation: what is lost at which share of the head's bytes.

    python benchmarks/screened_head.py --text wiki.txt --model smollm2-135m

Hidden states of three texts are scored by the whole head and by screens of it: the model's own
sampled text, of which screens are made; its greedy answers to prompts of the package; and slices of
``--text`` (chunks of 512 tokens, the second half of each).  KL is that of the whole head against
the screened one.  Rows "shipped" are what ``--head screened`` does, for a head stored in bfloat16,
Q8_0 and Q4_0: the threshold is set on the model's own text, and bytes of other texts differ.  Rows
"alternative" read equal bytes of each text.  Writes benchmarks/results/screened-head-NAME.json.
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
    """What the head reads of ids [1, T]: [T, D]."""
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].float()))
    try:
        with torch.inference_mode():
            model(ids, use_cache=False)
    finally:
        handle.remove()
    return torch.cat(seen)


def own_states(model: Any) -> Tensor:
    """Of text that the model samples, as priors are learnt from it."""
    prior = SelfStatsConfig()
    opening = opening_ids(model, prior.sequences, prior.opening)
    if opening is None:
        raise SystemExit("this model's tokenizer does not read the package's openings")
    drawn = torch.Generator().manual_seed(0)
    how = prior.temperature, prior.top_p
    ids = sample_continuations(model, opening, prior.length, drawn, lambda text: None, *how)
    return torch.cat([head_inputs(model, one[None]) for one in ids])


def answers(model: Any, tokenizer: Any, count: int, length: int) -> list[Tensor]:
    """What the head read of each greedy answer of ``length`` tokens, [n, D]."""
    prompts = [texts.read_prompt(name) for name in texts.prompt_names()]
    prompts += [one.text for one in listed_prompts()][: count - len(prompts)]
    chat = bool(getattr(tokenizer, "chat_template", None))
    made = []
    with Run(model, PruneConfig.build("griffin", sparsity=0.0, executor="native")):
        for prompt in prompts[:count]:
            ids = encode_prompt(tokenizer, prompt, chat)
            made.append((len(ids[0]), model.generate(ids, do_sample=False, max_new_tokens=length)))
    return [head_inputs(model, ids)[begin - 1 : -1] for begin, ids in made]


def slices(model: Any, tokenizer: Any, text: str, chunks: int, length: int = 512) -> Tensor:
    """Of the second halves of chunks of a text."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : chunks * length]
    return torch.cat([head_inputs(model, one)[length // 2 :] for one in ids.split(length, 1)])


def some(states: Tensor, count: int) -> Tensor:
    """About ``count`` of the states, evenly."""
    return states[:: max(1, len(states) // count)][:count]


@dataclass(frozen=True)
class Seen:
    """States of a text and the head's scores of them, float32."""

    states: Tensor
    full: Tensor

    def losses(self, rough: Tensor, near: Tensor) -> dict[str, float]:
        """``near``: the words [n, V] that are scored exactly."""
        made = torch.where(near, self.full, rough)
        same = made.argmax(-1) == self.full.argmax(-1)
        kl = divergence(self.full, made)
        return {"kl": float(kl.mean()), "same": float(same.float().mean())}


def rounded(rows: Tensor, bits: int, group: int = 32) -> Tensor:
    """rows [V, r] on symmetric grids of ``bits``, the best of four scales for each group."""
    made = torch.empty_like(rows)
    top = 2 ** (bits - 1) - 1
    for at in range(0, len(rows), 8192):
        x = rows[at : at + 8192].reshape(-1, group)
        peak = x.abs().amax(-1, keepdim=True).clamp_min(1e-9)
        tries = []
        for factor in (1.0, 0.9, 0.8, 0.7):
            scale = peak * factor / (top + 0.5)
            tries.append((x / scale).round().clamp(-top - 1, top) * scale)
        errors = torch.stack([(one - x).square().sum(-1) for one in tries])
        best = errors.argmin(0)
        chosen = torch.stack(tries)[best, torch.arange(len(x))]
        made[at : at + 8192] = chosen.reshape(-1, rows.shape[1])
    return made


Rough = Callable[[Tensor], Tensor]


def alternatives(weight: Tensor, axes: Tensor, room: float) -> Iterator[tuple[str, float, Rough]]:
    """(name, bytes of a word, rough scores) of screens of about ``room`` bytes a word."""
    turned = F.linear(weight, axes)
    hidden = weight.shape[1]

    def low_rank(rows: Tensor) -> Rough:
        basis = axes[: rows.shape[1]]
        return lambda h: F.linear(F.linear(h, basis), rows)

    for bits in (16, 8, 4, 3, 2):
        each = 2.0 if bits == 16 else (bits + 0.5) / 8
        rank = min(int(room / each) // 32 * 32, hidden)
        if rank:
            rows = turned[:, :rank]
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
    yield largest_directions(turned, axes, room)


def largest_directions(turned: Tensor, axes: Tensor, room: float) -> tuple[str, float, Rough]:
    """As the largest inputs at 4 bits, of the head in the directions of the states."""
    count = min(int(room / (4.5 / 8)), len(axes))
    rows, norms = rounded(turned, 4), turned.norm(dim=0)

    def rough(h: Tensor) -> Tensor:
        z = F.linear(h, axes)
        best = (z.abs() * norms).topk(count, -1).indices
        return F.linear(torch.zeros_like(z).scatter(1, best, z.gather(1, best)), rows)

    return f"the {count} largest directions at 4 bits", count * 4.5 / 8, rough


def within(rough: Tensor, rows: float) -> Tensor:
    """Words near the best one, ``rows`` on average."""
    return rough >= rough.amax(-1, keepdim=True) - threshold_for([rough], rows)


def best_rows(rough: Tensor, rows: float) -> Tensor:
    """The best ``rows`` words of each token."""
    found = rough.topk(int(rows), -1).indices
    return torch.zeros_like(rough, dtype=torch.bool).scatter(1, found, True)


def alternative_rows(
    weight: Tensor, axes: Tensor, seen: dict[str, Seen], share: float
) -> Iterator[dict[str, Any]]:
    """Of a head in bfloat16: screens of 0.6 of the bytes, and the rest exact rows."""
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
            for text, one in seen.items():
                scores = rough(one.states)
                row[text] = one.losses(scores, choose(scores, rows))
            yield row


def greedy(
    weight: Tensor, screen: Screen, made: Sequence[Tensor], best: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Shares of whole answers and of tokens whose best word stays; and of rows read exactly."""
    same, count = [], 0.0
    for states, (score, word) in zip(made, best, strict=True):
        rough = screen.rough(states)
        near = screen.near(rough)
        rest = rough.masked_fill(near, -torch.inf).amax(-1)
        same.append(near.gather(1, word[:, None])[:, 0] & (rest < score))
        count += float(near.sum())
    tokens = torch.cat(same)
    return {
        "texts": sum(bool(one.all()) for one in same) / len(same),
        "tokens": float(tokens.float().mean()),
        "rows": count / len(tokens) / len(weight),
    }


def shipped_rows(
    weight: Tensor, own: Tensor, seen: dict[str, Seen], made: Sequence[Tensor]
) -> Iterator[dict[str, Any]]:
    """Of each stored format and share, where a screen fits."""
    words, hidden = weight.shape
    best = [F.linear(states, weight).max(-1) for states in made]
    best = [(one.values, one.indices) for one in best]
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
            for text, one in seen.items():
                rough = screen.rough(one.states)
                near = screen.near(rough)
                row[text] = one.losses(rough, near)
                row[text]["bytes"] = fixed + float(near.float().mean())
            row["greedy"] = greedy(weight, screen, made, best)
            row["greedy"]["bytes"] = fixed + row["greedy"].pop("rows")
            yield row


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    name = row.get("screen") or f"{row['rank']} directions, t = {row['threshold']:.1f}"
    cells = [f"{row['format']:8} {row['share']:.2f} {name:34} {row.get('exact', ''):10}"]
    for text in ("answers", "text"):
        one = row[text]
        cells.append(f"{text} {one['kl']:.5f} {one['same']:.4f}")
        if "bytes" in one:
            cells.append(f"bytes {one['bytes']:.3f}")
    if "greedy" in row:
        cells.append("greedy {texts:.2f} {tokens:.5f} bytes {bytes:.3f}".format(**row["greedy"]))
    return " | ".join(cells)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--text", required=True, help="a text file")
    options.add_argument("--prompts", type=int, default=20)
    options.add_argument("--length", type=int, default=128, help="tokens of an answer")
    options.add_argument("--chunks", type=int, default=8, help="of the text")
    options.add_argument("--tokens", type=int, default=128, help="of each text, for KL")
    options.add_argument("--states", type=Path, help="keep the hidden states here, or read them")
    options.set_defaults(dtype="bfloat16")
    options.add_argument("--alternatives", default="0.25", help="shares, with commas")
    args: argparse.Namespace = options.parse_args()
    text, about = read_text(args.text)
    model, tokenizer = load(args.model, dtype=args.dtype, weights="dense", device="cpu")
    if args.states and args.states.exists():
        known = torch.load(args.states)
    else:
        known = {
            "answers": answers(model, tokenizer, args.prompts, args.length),
            "own": own_states(model),
            "text": slices(model, tokenizer, text, args.chunks),
        }
        if args.states:
            torch.save(known, args.states)
    made, own, other = known["answers"], known["own"].float(), known["text"].float()
    made = [states.float() for states in made]
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
