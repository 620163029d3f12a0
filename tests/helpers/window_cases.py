"""A small recorded run: a pruned answer with a re-mask, and the dense one to the same question."""

import json

LAYERS, WIDTH, BINS = 3, 64, 8
QUESTION = "What is </script><b>bold</b> & why?"
PROMPT = ["<|im_start|>", "user", "\n", QUESTION, "<|im_end|>", "\n", "<|im_start|>", "assistant"]
TRIGGER, READY = 10, 14
"""Tokens decoded at the trigger, and at the new mask."""


def records(tokens=24):
    """Both answers; the second begins where the first is done."""
    return [*answer("dart", 0.5, tokens), *answer("dense", 0.0, tokens)]


def answer(method, sparsity, tokens):
    start = {"kind": "start", "id": f"req-{method}", "model": "tiny", "method": method}
    start |= {"config": {"method": method, "drift": {"rule": "dart" if sparsity else "never"}}}
    prompt = [{"id": i, "text": text} for i, text in enumerate(PROMPT)]
    size = {"layers": LAYERS, "neurons": [WIDTH] * LAYERS, "prompt": prompt}
    found = [{**start, "sparsity": sparsity, **size}]
    texts = [f" <i>{index}</i>" for index in range(tokens)]
    for index, text in enumerate(texts):
        phase = "pruned" if sparsity else "dense"
        if index == 0:
            phase = "prefill"
        elif sparsity and TRIGGER < index <= READY:
            phase = "observe"
        if sparsity and index in (1, READY + 1):
            found += _mask(index, first=index == 1)
        token = {"kind": "token", "choice": 0, "index": index, "id": index, "phase": phase}
        top = [{"id": 7, "text": " other", "logprob": -1.0}]
        scored = {"logprob": -0.1 - index % 5, "top": top, "seconds": 0.02}
        found.append({**token, "text": text, "piece": text, **scored})
        if sparsity and index in (5, TRIGGER, READY + 5):
            place = {"kind": "check", "sequence": 0, "row": 0, "step": index, "layer": 2}
            low = index == TRIGGER
            score = {"similarity": 0.5 if low else 0.9, "threshold": 0.7, "counter": int(low)}
            window = index - READY if index > READY else index
            found.append({**place, "window": window, **score, "trigger": low, "state": "armed"})
    decoded, dense = tokens - 1, READY - TRIGGER if sparsity else tokens - 1
    report = {"decoded_tokens": decoded, "remasks": int(sparsity > 0)}
    report |= {"achieved_sparsity": sparsity * (1 - dense / decoded)}
    report |= {"dense_token_share": dense / decoded}
    usage = {"prompt_tokens": len(PROMPT), "completion_tokens": tokens, "cached_tokens": 0}
    done = {"kind": "done", "id": f"req-{method}", "finish": ["length"], "texts": ["".join(texts)]}
    timings = {"predicted_per_second": 50.0}
    return [*found, {**done, "usage": usage, "timings": timings, "report": report}]


def _mask(index, first):
    shift = 0 if first else 1
    raster = [[255 * ((bin_ + row + shift) % 2) for bin_ in range(BINS)] for row in range(LAYERS)]
    cause = {"cause": "first" if first else "drift", "overlap": None if first else 0.25}
    remask = {"kind": "remask", "sequence": 0, "row": None, "step": index - 1, **cause}
    remask |= {"evidence_tokens": 8.0, "kept": [WIDTH // 2] * LAYERS}
    mask = {"kind": "mask", "number": 1 + shift, "token": index, "kept_share": [0.5] * LAYERS}
    return [remask, {**mask, "raster": raster}]


def write(path, found):
    path.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")
    return path


def past_run(folder, kind="run", **files):
    """A finished run's folder; ``rows_jsonl`` among ``files`` is the text of rows.jsonl."""
    folder.mkdir(parents=True)
    config = {"kind": kind, "status": "complete", "prune": {"method": "griffin", "sparsity": 0.4}}
    config |= {"settings": {}, "started": "2026-01-01T10:00:00+00:00", "finished": None}
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
