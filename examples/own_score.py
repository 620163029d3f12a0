"""Define a new score, register it, and compare it with GRIFFIN's."""

from torch import Tensor

from dart_llm import load, prune
from dart_llm.data import texts
from dart_llm.evaluation.perplexity import score as measure
from dart_llm.evaluation.perplexity import slices
from dart_llm.extend import SCORES, FfnWeights, score
from dart_llm.pruning.statistics import squared


@score(squared, "an example")
def reach(a: Tensor, weights: FfnWeights) -> Tensor:
    """Magnitude times the largest entry of the neuron's output column."""
    return a * weights.down.detach().float().abs().amax(0)


SCORES.register("reach", reach)

model, tokenizer = load("smollm2-135m")
ids = tokenizer(texts.read("tides"), return_tensors="pt").input_ids[0]
windows = slices(ids, 1, 256, 128)  # one slice: 256 tokens of prompt, 128 scored
for name in ("normalized", "reach"):
    with prune(model, "griffin", sparsity=0.3, score=name) as run:
        result = measure(model, run, windows, 256)
    print(f"{name}: perplexity {result.perplexity:.1f}")
