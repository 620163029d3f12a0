"""Prune several prompts in a batch: with one shared mask, and with one mask per row."""

from dart_llm import load, prune

PROMPTS = [
    "Tides rise and fall because the moon",
    "To bake a loaf of bread you need",
    "The judge opened the trial and said",
]

model, tokenizer = load("smollm2-135m")
tokenizer.padding_side = "left"
inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
for batch in ("shared", "per_row"):
    settings = {"sparsity": 0.3, "min_evidence": 0, "drift": "never", "batch": batch}
    with prune(model, "dart", **settings) as run:
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    report = run.report()
    print(f"{batch}: {len(run.remasks)} masks, executor {report.executor}")
    for sequence in report.sequences:
        print(f"  row {sequence.row}: {sequence.achieved_sparsity:.0%} removed")
for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
    print(text.replace("\n", " "))
