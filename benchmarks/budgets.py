"""Perplexity under the decode protocol, never re-masking: dense, griffin, depth and dart budgets.

Slices of 256 prompt + 256 scored tokens, evenly spaced over a text file (WikiText-2's validation
or test text, say).  Every row is shown with and without compensation, so that the budget is not
credited with what compensation does.
"""

from __future__ import annotations

from common import load_model, parser, read_text, save

from dart_llm.evaluation.perplexity import Scored, score, slices
from dart_llm.experiments.stats import ratio_interval
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import Run

BUDGETS = {
    "griffin (uniform)": "uniform",
    "depth": "depth",
    "energy": "energy",
    "global": "global",
    "dart-prompt (blend energy depth)": "blend energy depth",
}


def items(scored: Scored) -> dict[str, list[float]]:
    """The mean loss of every slice, in the order of the text."""
    return {"slice_losses": [sum(losses) / len(losses) for losses in scored.losses]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("text", help="a text file")
    options.add_argument("--slices", type=int, default=8, help="slices of the text")
    options.add_argument(
        "--sparsities",
        default="0.3,0.5,0.7",
        help="fractions of neurons to remove, comma-separated",
    )
    args = options.parse_args()
    model, tokenizer = load_model(args)
    text, source = read_text(args.text)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = slices(ids, args.slices, 256, 256)
    dense = score(model, None, windows, 256)
    print(f"dense perplexity {dense.perplexity:.2f} on {len(windows)} slices")
    rows = [
        {"method": "dense", "sparsity": 0.0, "perplexity": dense.perplexity, **items(dense)},
    ]
    for sparsity in map(float, args.sparsities.split(",")):
        gap = None
        for name, budget in BUDGETS.items():
            for compensation in (False, True):
                config = PruneConfig.build(
                    "griffin", sparsity=sparsity, budget=budget, compensation=compensation
                )
                with Run(model, config) as run:
                    scored = score(model, run, windows, 256)
                gap = gap if gap is not None else scored.mean_loss - dense.mean_loss
                report = scored.report
                assert report is not None
                rows.append(
                    {
                        "method": name + (" + compensation" if compensation else ""),
                        "sparsity": sparsity,
                        "achieved_sparsity": report.achieved_sparsity,
                        "dense_token_share": report.dense_token_share,
                        "remasks": report.remasks,
                        "perplexity": scored.perplexity,
                        "ratio_to_dense": scored.perplexity / dense.perplexity,
                        "interval": ratio_interval(scored.losses, dense.losses),
                        "gap_closed": 1 - (scored.mean_loss - dense.mean_loss) / gap,
                        **items(scored),
                    }
                )
                row = rows[-1]
                print(
                    f"{row['method']:42} {sparsity:.0%} achieved {report.achieved_sparsity:.1%} "
                    f"ppl {scored.perplexity:8.2f}  gap closed {row['gap_closed']:6.1%}",
                    flush=True,
                )
    data = {"text": source, "slices": len(windows), "prompt": 256, "scored": 256, "rows": rows}
    print(save(args.out or "budgets", model, {**data, "protocol": "decode, never re-mask"}))


if __name__ == "__main__":
    main()
