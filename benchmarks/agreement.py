"""Does dart-llm decode what docs/method.md says?  Every executor against an independent reference.

The reference (tests/helpers/reference.py) is `griffin` and `dart` written a second time from that
page, in plain torch and float64.  Both are fed the same tokens: a prompt of one text, then another
text, so that drift fires.  The kept neurons of every mask and the logits of every token are
compared, in float32.

Usage: python benchmarks/agreement.py [--model MODEL] [--out agreement-NAME]

Exits with 1 unless all agree: the same masks at the same tokens, logits within 3e-4.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import load_model, parser, save

from dart_llm.data import texts
from dart_llm.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from reference import Dart, Griffin, decode, learn
from reference_compare import LOGITS, compare
from reference_model import own_text

EXECUTORS = ("masked", "compact", "native", "slim")
SECOND = "bicycle"
OWN_TEXT = {"sequences": 32, "length": 128, "opening": 24}
LITTLE_TEXT = {"sequences": 4, "length": 40, "opening": 24}


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
"""The default model is asked more; others whether attention's sliding window matters."""
FURTHER = (*BOTH, Case("griffin", 0.5, 900, 40, ("masked", "native")))
SHORT = (Case("griffin", 0.5, 120, 20), Case("dart", 0.5, 120, 70))


def token_ids(tokenizer: Any, case: Case) -> torch.Tensor:
    """Prompt from the other shipped passages, then the one about a bicycle: drift fires early."""
    before = "\n\n".join(texts.read(name) for name in texts.subjects() if name != SECOND)
    ids = tokenizer(before).input_ids[: case.prompt]
    return torch.tensor(ids + tokenizer(texts.read(SECOND)).input_ids[: case.tokens])


def rows(
    model: Any, tokenizer: Any, cases: tuple[Case, ...], prior: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """A row per case and executor that can run the model."""
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
                print(error)
                continue
            row = {**case._asdict(), **dataclasses.asdict(found), "holds": found.holds}
            del row["executors"]
            print(row, flush=True)
            yield row


def main() -> None:
    options = parser(__doc__.partition("\n\n")[0])
    options.set_defaults(dtype="float32")
    options.add_argument("--short", action="store_true", help="few tokens, little own text")
    args = options.parse_args()
    model, tokenizer = load_model(args)
    cases = FIRST if args.model == options.get_default("model") else FURTHER
    cases, prior = (SHORT, LITTLE_TEXT) if args.short else (cases, OWN_TEXT)
    found = list(rows(model.cpu(), tokenizer, cases, prior))
    data = {"own_text": prior, "most_apart": LOGITS, "rows": found}
    print(save(args.out or f"agreement-{Path(args.model).stem}", model, data))
    raise SystemExit(0 if all(row["holds"] for row in found) else 1)


if __name__ == "__main__":
    main()
