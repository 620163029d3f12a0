"""What the parts of a method cost: attaching, observing, drift checks, a re-mask.

    python benchmarks/costs.py --dtype bfloat16 --method dart --sparsity 0.5 --executor slim

Costs of a few hundredths of a token drown in the scatter of whole repetitions.  So the two rows
whose difference is taken decode in turns, each on a cache of its own and attached only in its
turns: what drifts in the machine meets both alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import load_model, parser, save
from torch import Tensor

from dart_llm.experiments.timed_cases import TRANSFORMERS, rebuilding
from dart_llm.experiments.timing import WARM, Make, greedy, mad, prompt_ids, repetition
from dart_llm.experiments.variants import NEVER
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.sequence import Phase
from dart_llm.session.prepare import prepare
from dart_llm.session.run import Run

TURN = 32
"""Timed steps of a turn: observed tokens are added up that often at the latest."""

FOREVER = 10**6
"""Tokens before the first mask where only observing is measured."""

ATTACHED, OBSERVING, CHECKS, REMASK = "attaching", "observing", "drift checks", "a re-mask"

WHAT = {
    ATTACHED: "per token of a model attached at sparsity 0, against the untouched model; medians "
    "of turns",
    OBSERVING: "per observed token (no mask is ever built), against the row that is named; means "
    "of turns",
    CHECKS: "per pruned token, against the same row with the drift rule never; means of turns",
    REMASK: "of the step that builds masks, beyond the median pruned step of the same repetition",
}

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Cost:
    """One cost: the row that has it, and the row that is subtracted (None: the untouched model)."""

    kind: str
    row: str
    config: PruneConfig
    against: str
    base: PruneConfig | None = None


def cases(method: str, sparsity: float, executor: str, tokens: int) -> list[Cost]:
    """The costs of a method that there are to measure."""
    idle = PruneConfig.build("griffin", sparsity=0.0)
    config = PruneConfig.build(method, sparsity=sparsity)
    watching = config.replace({"masking_step": FOREVER, "release_step": None})
    attached = f"attached, {idle.target:g} pruned"
    # masked: observed tokens run through the model's own modules, as in the other row
    masked = watching.replace({"executor": "masked"})
    costs = [
        Cost(ATTACHED, attached, idle, TRANSFORMERS),
        Cost(OBSERVING, f"{method} observing", masked, attached, idle),
    ]
    if executor == "slim":
        slim, dense = (one.replace({"executor": "slim"}) for one in (watching, idle))
        costs.append(Cost(OBSERVING, f"{method} observing, slim", slim, "dense, slim", dense))
    fixed = config.replace({"executor": executor})
    if config.drift.rule.split()[0] not in (NEVER, "interval"):
        never, row = fixed.replace({"drift": {"rule": NEVER}}), f"{method}, {executor}"
        costs.append(Cost(CHECKS, row, fixed, f"{method} never, {executor}", never))
    often = rebuilding(fixed, max(1, tokens // 6))
    return [*costs, Cost(REMASK, f"{method} re-masking, {executor}", often, "")]


class Row:
    """One row and its sequence; attached only in its turns."""

    def __init__(self, model: Any, ids: Tensor, make: Make) -> None:
        self.model, self.run, self._ids = model, make(), ids
        self._cache: Any = None
        self._token = ids[:, -1:]
        self._built: list[int] = []
        self._steps = 0

    def turn(self, steps: int) -> dict[str, Any]:
        """``steps_s``, ``phases`` and ``built`` of some timed steps, after ``WARM`` others."""
        if self.run is None:
            return self._timed(steps, None)
        with self.run as run:
            run.on_remask = lambda remask: self._built.append(self._steps)
            return self._timed(steps, run)

    @torch.inference_mode()
    def _timed(self, steps: int, run: Run | None) -> dict[str, Any]:
        seconds: list[float] = []
        phases: list[str] = []
        if self._cache is None:
            self._cache, self._token = greedy(self.model, self._ids, logits_to_keep=1)
        first = self._steps + WARM
        for _ in range(steps + WARM):
            begin = time.perf_counter()
            _, self._token = greedy(self.model, self._token, cache=self._cache)
            seconds.append(time.perf_counter() - begin)
            phases.append("dense" if run is None else run.phase)
            self._steps += 1
        built = [at - first for at in self._built if at >= first]
        return {"steps_s": seconds[WARM:], "phases": phases[WARM:], "built": built}


def paired_timing(
    model: Any, ids: Tensor, tokens: int, make: Make, base: Make
) -> list[dict[str, Any]]:
    """Pairs of what ``make`` and ``base`` took, ``tokens`` timed steps of each in all.

    Steps as in ``timing.repetition``; ids: [1, P], the prompt of both.
    """
    rows = {"own": Row(model, ids, make), "base": Row(model, ids, base)}
    turns = []
    for number in range(max(1, tokens // TURN)):
        names = list(rows) if number % 2 else list(rows)[::-1]
        turn = {name: rows[name].turn(min(TURN, tokens)) for name in names}
        turns.append({name: turn[name] for name in rows})
    return turns


def differences(kind: str, turns: Sequence[Sample]) -> list[float]:
    """The cost in ms, one value per turn."""
    if kind == OBSERVING and not any(Phase.OBSERVE in turn["own"]["phases"] for turn in turns):
        return []  # a method whose masks are made beforehand observes nothing
    # every step costs the same while attached: medians scatter less; the others have rare steps
    mean = statistics.median if kind == ATTACHED else statistics.fmean
    pairs = [
        [_pruned(turn[name]) if kind == CHECKS else _ms(turn[name]) for name in ("own", "base")]
        for turn in turns
    ]
    return [mean(own) - mean(base) for own, base in pairs if own and base]


def builds(sample: Sample) -> list[float]:
    """What each step that built masks took beyond the median pruned step, in ms."""
    usual, steps = _pruned(sample), _ms(sample)
    return [steps[at] - statistics.median(usual) for at in sample["built"]] if usual else []


def _ms(sample: Sample) -> list[float]:
    return [1000 * seconds for seconds in sample["steps_s"]]


def _pruned(sample: Sample) -> list[float]:
    """Times of the pruned steps that build no masks."""
    return [
        ms
        for at, (ms, phase) in enumerate(zip(_ms(sample), sample["phases"], strict=True))
        if phase == Phase.PRUNED and at not in sample["built"]
    ]


def measure(
    model: Any, tokenizer: Any, ids: Tensor, costs: Sequence[Cost], tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """One entry per cost: ms, its spread, and its share of a dense token."""

    def make(config: PruneConfig | None) -> Make:
        return prepare(model, tokenizer, config).run if config else lambda: None

    dense = [statistics.fmean(_ms(repetition(model, ids, tokens, make(None))))]
    rows = []
    for cost in costs:
        own, base, values = make(cost.config), make(cost.base), list[float]()
        for _ in range(repeats):
            if cost.kind == REMASK:
                values += builds(repetition(model, ids, tokens, own))
            else:
                values += differences(cost.kind, paired_timing(model, ids, tokens, own, base))
            dense.append(statistics.fmean(_ms(repetition(model, ids, tokens, make(None)))))
        if values:
            ms = statistics.median(values)
            row = {"cost": cost.kind, "row": cost.row, "against": cost.against or cost.row}
            row |= {"ms": ms, "spread_ms": mad(values), "values": len(values)}
            rows.append({**row, "what": WHAT[cost.kind]})
    token = statistics.median(dense)
    return [{**row, "share_of_token": row["ms"] / token} for row in rows]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--method", default="dart", help="whose costs")
    options.add_argument("--sparsity", type=float, default=0.5, help="fraction to remove")
    options.add_argument("--executor", default="slim", help="native, slim, graph or compact")
    options.add_argument("--prompt-tokens", type=int, default=128)
    options.add_argument("--tokens", type=int, default=128, help="timed tokens of a repetition")
    options.add_argument("--repeats", type=int, default=5)
    args = options.parse_args()
    model, tokenizer = load_model(args)
    ids = prompt_ids(model, tokenizer, args.prompt_tokens, 0)
    costs = cases(args.method, args.sparsity, args.executor, args.tokens)
    rows = measure(model, tokenizer, ids, costs, args.tokens, args.repeats)
    for row in rows:
        print(
            f"{row['cost']:13} {row['row']:28} against {row['against']:28} {row['ms']:7.3f} ms "
            f"+- {row['spread_ms']:.3f}, {row['share_of_token']:.1%} of a dense token"
        )
    print(save(args.out or "costs", model, {"rows": rows}))


if __name__ == "__main__":
    main()
