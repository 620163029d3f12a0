"""Watch masks change: a callback gets every new mask."""

from dart_llm import Remask, load, prune


def show(remask: Remask) -> None:
    """Print a line per mask."""
    kept = sum(remask.kept)
    shared = "" if remask.overlap is None else f", {remask.overlap:.0%} also in the previous mask"
    print(f"token {remask.step}: {remask.cause}, {kept} neurons kept{shared}")


model, tokenizer = load("smollm2-135m")
inputs = tokenizer("A short history of bicycles, and then of bread:", return_tensors="pt")
with prune(model, "dart", sparsity=0.5, drift="interval 64", on_remask=show) as run:
    model.generate(**inputs, max_new_tokens=150, min_new_tokens=150, do_sample=False)
print(f"re-masks: {run.report().remasks}")
