"""Prune a model while it generates, and print the achieved sparsity."""

from dart_llm import load, prune

model, tokenizer = load("smollm2-135m")
inputs = tokenizer("The sky is blue because", return_tensors="pt")
with prune(model, "dart", sparsity=0.3) as run:
    ids = model.generate(**inputs, max_new_tokens=60, do_sample=False)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
report = run.report()
print(f"requested: {report.requested_sparsity:.0%} of the FFN neurons removed")
print(f"while pruned: {report.sparsity_while_pruned:.1%}")
print(f"over all {report.decoded_tokens} decoded tokens: {report.achieved_sparsity:.1%}")
