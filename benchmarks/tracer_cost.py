"""Memory and FLOPs of tracing at the shapes of a model, counted from state that really exists.

Runs the tracer of a preset on random activations with the widths of Llama-3.1-8B (or others): all
statistics, masks and the drift detector are real; only the model's weights are left out, except
one layer's down projection, which compensation needs.
"""

from __future__ import annotations

import torch
from common import parser, save

from dart_llm.pruning.accounting import Costs
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.controller import PruningController as Tracer
from dart_llm.pruning.forward import ForwardCall as Call
from dart_llm.pruning.forward import Kind
from dart_llm.pruning.observations import LayerObservation as Seen
from dart_llm.pruning.weights import FfnWeights


def layers(count: int, hidden: int, width: int) -> tuple[FfnWeights, ...]:
    """Layers that share one random set of weights."""
    up = torch.randn(width, hidden, dtype=torch.bfloat16)
    down = torch.randn(hidden, width, dtype=torch.bfloat16)
    return tuple(FfnWeights(i, i / max(1, count - 1), up, up, down) for i in range(count))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=32, help="number of layers")
    options.add_argument("--hidden", type=int, default=4096, help="width of the residual stream")
    options.add_argument("--width", type=int, default=14336, help="neurons per layer")
    options.add_argument("--method", default="dart-prompt", help="one that learns nothing")
    options.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt")
    args = options.parse_args()
    config = PruneConfig.build(args.method, sparsity=0.5)
    weights = layers(args.layers, args.hidden, args.width)
    tracer = Tracer(config, weights)
    torch.manual_seed(0)
    for start in range(0, args.prompt, 256):
        tracer.before_forward(Call(Kind.PREFILL, start, 256, 1))
        for layer in range(args.layers):
            u, z = torch.randn(1, 256, args.width), torch.randn(1, 256, args.hidden)
            tracer.observe(layer, Seen(u, None, z, z + 1, z))
        tracer.observe_signal(torch.randn(1, 256, args.hidden))
        tracer.after_forward()
    before = sum(life.nbytes() for life in tracer.all_sequences())
    tracer.before_forward(Call(Kind.DECODE, args.prompt, 1, 1))
    after = sum(life.nbytes() for life in tracer.all_sequences())
    costs = Costs(weights, costs_total(args))
    token = costs.flops(None) + 2 * (costs_total(args) // 2 - costs.bytes(None) // 2)
    kept = tracer.sequences[0].remasks[0].kept
    compensates = config.compensation
    data = {
        "shapes": {"layers": args.layers, "hidden": args.hidden, "width": args.width},
        "method": args.method,
        "prompt_tokens": args.prompt,
        "bytes_while_observing": before,
        "bytes_while_pruned": after,
        "flops_dense_token": token,
        "flops_observe_token": costs.observe_flops,
        "flops_observe_share_of_token": costs.observe_flops / token,
        "flops_build_masks": costs.build_flops(kept, compensates),
        "flops_drift_window": 6 * args.hidden,
        "share_per_256_tokens_with_one_remask_of_32": (
            32 * costs.observe_flops + costs.build_flops(kept, compensates) + 26 * 6 * args.hidden
        )
        / (256 * token),
    }
    for key, value in data.items():
        print(f"{key}: {value}")
    print(save(args.out or f"tracer-cost-{args.method}", None, data))


def costs_total(args: object) -> int:
    """Bytes of an 8B-shaped model in bfloat16: FFN, attention (grouped queries) and head."""
    ffn = 3 * args.layers * args.hidden * args.width  # type: ignore[attr-defined]
    attention = args.layers * args.hidden * args.hidden * 5 // 2  # type: ignore[attr-defined]
    head = 128256 * args.hidden  # type: ignore[attr-defined]
    return 2 * (ffn + attention + head)


if __name__ == "__main__":
    main()
