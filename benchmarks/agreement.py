"""Does dart-llm decode what docs/method.md says?  Every executor against an independent reference.

The reference (tests/reference.py) is `griffin` and `dart` written a second time from that page, in
plain torch and float64.  Both are fed the same tokens: a prompt of one text, then another text, so
that drift fires.  The kept neurons of every mask and the logits of every token are compared, in
float32.

Usage: python benchmarks/agreement.py [MODEL ...]   (beside smollm2-135m)

Exits with 1 unless all agree: the same masks at the same tokens, logits within 3e-4.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import save

from dart_llm import texts
from dart_llm.errors import ConfigError
from dart_llm.loading import checkpoint_facts, load

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from reference import Dart, Griffin, decode, learn
from reference_compare import LOGITS, compare
from reference_model import own_text

EXECUTORS = ("masked", "compact", "native", "slim")
LENGTH, OPENING = 128, 24


class Case(NamedTuple):
    """What is decoded: ``prompt`` tokens of one text, ``tokens`` of another after them."""

    method: str
    sparsity: float
    prompt: int
    tokens: int
    executors: tuple[str, ...] = EXECUTORS


BOTH = (Case("griffin", 0.5, 120, 80), Case("dart", 0.5, 120, 200))
"""What every model is asked."""
SLOW_AND_FAST = ("masked", "slim")
FIRST = (
    *BOTH,
    Case("dart", 0.5, 1399, 120, SLOW_AND_FAST),  # more windows than a reference of drift holds
    Case("dart", 0.7, 6, 120, SLOW_AND_FAST),  # fewer tokens than a mask wants
    Case("dart", 0.95, 2, 60, SLOW_AND_FAST),  # floors, and sinks alone
)
"""The default model is asked more, and others whether a window of attention that slides matters."""
FURTHER = (*BOTH, Case("griffin", 0.5, 900, 40, ("masked", "native")))


def token_ids(tokenizer: Any, case: Case) -> torch.Tensor:
    """Prompt from the shipped passages but the last, the rest from the last."""
    *before, last = (texts.read(name) for name in texts.subjects())
    ids = tokenizer("\n\n".join(before)).input_ids[: case.prompt]
    return torch.tensor(ids + tokenizer(last).input_ids[: case.tokens])


def rows(name: str, model: Any, tokenizer: Any, cases: tuple[Case, ...], sequences: int) -> Any:
    """A row per case and executor that can run the model."""
    prior = {"sequences": sequences, "length": LENGTH, "opening": OPENING}
    known = learn(model, own_text(model, **prior))
    for case in cases:
        dart = case.method == "dart"
        ids = token_ids(tokenizer, case)
        method = Dart(model, case.sparsity, known) if dart else Griffin(case.sparsity)
        wanted = decode(model, ids, case.prompt, method)
        changes = {"prior": prior} if dart else {}
        for executor in case.executors:
            try:
                found = compare(
                    model, ids, case.prompt, case.method, case.sparsity, wanted, executor, **changes
                )
            except ConfigError as error:  # this executor is not for this family
                print(f"{name}: {error}")
                continue
            row = {"model": name, **case._asdict(), **dataclasses.asdict(found)}
            del row["executors"]
            print({**row, "holds": found.holds}, flush=True)
            yield {**row, "holds": found.holds}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    options.add_argument("models", nargs="*", help="models beside smollm2-135m")
    options.add_argument("--sequences", type=int, default=32, help="of the model's own text")
    options.add_argument("--out", default="agreement", help="name of the JSON file, without suffix")
    args = options.parse_args()
    checkpoints, found = {}, []
    for place, given in enumerate(["smollm2-135m", *args.models]):
        model, tokenizer = load(given, dtype="float32", device="cpu")
        facts = dict(checkpoint_facts(model))
        facts.pop("path", None)
        checkpoints[facts["name"]] = facts
        cases = FURTHER if place else FIRST
        found += rows(facts["name"], model, tokenizer, cases, args.sequences)
        data = {
            "checkpoints": checkpoints,
            "sequences": args.sequences,
            "most_apart": LOGITS,
            "rows": found,
        }
        path = save(args.out, None, data)  # after every model: what is done is kept
        del model
    print(path)
    raise SystemExit(0 if all(row["holds"] for row in found) else 1)


if __name__ == "__main__":
    main()
