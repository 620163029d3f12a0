"""Golden values of the published budget, and layers to allocate over."""

from dart_llm.pruning.budgets import LayerView

S = (14, 1, 1.2, 0.9, 1.1, 1.3, 1, 0.8)
GOLDEN = {
    0.5: (0.1, 0.4042, 0.6321, 0.6709, 0.6606, 0.6504, 0.6452, 0.2366),
    0.7: (0.1, 0.6308, 0.9, 0.9, 0.9, 0.9, 0.9, 0.3692),
}


def depths(count):
    return [layer / max(1, count - 1) for layer in range(count)]


def views(scores, sensitivity=None, residual=None, impacts=None):
    def own(given):
        return [None] * len(scores) if given is None else given

    impacts = None if impacts is None else [one.double() for one in impacts]
    parts = [depths(len(scores)), scores, own(sensitivity), own(residual), own(impacts)]
    return [
        LayerView(len(score), depth, score.double(), *more)
        for depth, score, *more in zip(*parts, strict=True)
    ]
