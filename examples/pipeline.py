"""Use a transformers pipeline while its model is pruned."""

from transformers import pipeline

from dart_llm import load, prune

model, tokenizer = load("smollm2-135m")
write = pipeline("text-generation", model=model, tokenizer=tokenizer)
question = [{"role": "user", "content": "Why is the sky blue?"}]
with prune(model, "dart", sparsity=0.3) as run:
    answers = write(question, max_new_tokens=60, do_sample=False)
print(answers[0]["generated_text"][-1]["content"])
report = run.report()
print(f"{report.achieved_sparsity:.0%} of the neurons were removed")
