"""Loss after a topic change, teacher-forced: a live detector against never re-masking.

Passages of two embedded texts: 320 tokens of the first (256 of them the prompt), then 640 of the
second.  Each method is compared with ``dart-prompt`` that never re-masks, run at the sparsity that
the method achieved over all decoded tokens, dense tokens counted in full.
"""

from __future__ import annotations

from common import load_model, parser, save
from torch import Tensor, cat

from dart_llm.data import texts
from dart_llm.evaluation.perplexity import Scored, score
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import Run

PROMPT, FIRST, SECOND = 256, 320, 640


def passages(tokenizer: object, distance: int = 3) -> list[Tensor]:
    names = texts.subjects()
    pairs = [(names[i], names[(i + distance) % len(names)]) for i in range(len(names))]

    def ids(name: str, count: int) -> Tensor:
        return tokenizer(texts.read(name), return_tensors="pt").input_ids[0][:count]  # type: ignore[operator]

    return [cat([ids(a, FIRST), ids(b, SECOND)]) for a, b in pairs]


def loss_after(scored: Scored) -> float:
    """Mean loss (nats) of the tokens after the change."""
    after = [losses[FIRST - PROMPT :] for losses in scored.losses]
    return sum(map(sum, after)) / sum(map(len, after))


def by_passage(scored: Scored) -> list[float]:
    """The same of every passage."""
    after = [losses[FIRST - PROMPT :] for losses in scored.losses]
    return [sum(losses) / len(losses) for losses in after]


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--sparsity", type=float, default=0.5, help="fraction of neurons to remove"
    )
    args = options.parse_args()
    model, tokenizer = load_model(args)
    windows = passages(tokenizer)
    dense = loss_after(score(model, None, windows, PROMPT))
    print(f"dense loss after the change {dense:.4f} ({len(windows)} passages)")
    rows = []
    for method in ("dart-prompt", "published", "griffin"):
        with Run(model, PruneConfig.build(method, sparsity=args.sparsity)) as run:
            scored = score(model, run, windows, PROMPT)
        report = scored.report
        assert report is not None
        never = PruneConfig.build("dart-prompt", sparsity=report.achieved_sparsity, drift="never")
        with Run(model, never) as run:
            same = score(model, run, windows, PROMPT)
        rows.append(
            {
                "method": method,
                "sparsity": args.sparsity,
                "achieved_sparsity": report.achieved_sparsity,
                "dense_token_share": report.dense_token_share,
                "remasks": report.remasks,
                "remask_steps": [
                    [r.step for r in sequence.remasks] for sequence in report.sequences
                ],
                "loss_after_change": loss_after(scored),
                "never_at_equal_sparsity": loss_after(same),
                "passage_losses": by_passage(scored),
                "never_passage_losses": by_passage(same),
            }
        )
        print(
            {
                key: value
                for key, value in rows[-1].items()
                if "passage" not in key and key != "remask_steps"
            },
            flush=True,
        )
    data = {"dense_loss_after_change": dense, "passages": len(windows), "rows": rows}
    print(save(args.out or "topic-shift", model, data))


if __name__ == "__main__":
    main()
