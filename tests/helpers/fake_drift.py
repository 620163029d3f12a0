"""A drift folder with known numbers, as `dart-llm drift` writes it: the same bytes every time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dart_llm.files import write_json, write_lines
from dart_llm.pruning.records import DriftCheck, Remask
from dart_llm.studies.drift import losses as drift_losses
from fake_results import accounting, config

LAYERS, WIDTH = 6, 64
PROMPT, FIRST, SECOND = 64, 192, 224
"""Tokens: prompt, decoded about the first topic, about the second."""

MOMENT = 64

METHODS: Mapping[str, Mapping[str, float]] = {
    "dense": {},
    "never": {"before": 0.6, "after": 1.0},
    "published": {"before": 0.7, "after": 2.0, "remask": 9},
    "dart": {"before": 0.5, "after": 0.8, "remask": 48},
}
"""Mean loss over dense before and after the change; tokens after it at which masks are rebuilt."""

OBSERVED = {"published": 1, "dart": 16}
"""Dense tokens before a re-mask."""

TOPICS = (("tides", "oceanography"), ("double-entry bookkeeping", "accounting"))
TEXTS = {
    "dense": "The tide rises. A ledger has two sides. ",
    "never": "The tide <b>rises</b> and rises & rises. ",
    "dart": "The tide rises. A ledger <script>alert(1)</script> balances. ",
}


def build(
    folder: Path,
    sources: Sequence[str] = ("01", "02", "03", "04"),
    methods: Sequence[str] = tuple(METHODS),
    *,
    mode: str = "forced",
    layers: int = LAYERS,
    width: int = WIDTH,
    seeds: Sequence[int] = (0,),
    **changes: Any,
) -> Path:
    """Write the folder; ``changes``: entries of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [{"id": source, "text": f"Tell me of {source} & <tides>"} for source in sources]
    facts = {"kind": "drift", "sources": prompts, **changes}
    write_json(folder / "config.json", {**config(), **facts})
    cells = [
        (mode, source, method, seed) for source in sources for method in methods for seed in seeds
    ]
    rows = [row(*cell, layers, width) for cell in cells]
    for cell, one in zip(cells, rows, strict=True):
        if one["remasks"]:
            save_masks(folder, one["key"], masks(*cell[1:], layers, width))
    write_lines(folder / "results.jsonl", rows)
    if mode == "forced":
        write_lines(folder / "tokens.jsonl", [tokens(*cell) for cell in cells])
    else:
        texts = [
            {"key": key(*cell), "id": cell[1], "method": cell[2], "seed": cell[3]} for cell in cells
        ]
        write_lines(folder / "texts.jsonl", [{**t, "text": TEXTS[t["method"]] * 8} for t in texts])
    return folder


def with_detection(folder: Path) -> Path:
    """A finished study beside what ``dart-llm detect`` found."""
    found = build(folder)
    write_json(found / "detection.json", detection())
    return found


def label(method: str) -> str:
    return method if method == "dense" else f"{method}@0.5"


def key(mode: str, source: str, method: str, seed: int) -> str:
    return f"{mode}/{source}/{label(method)}/{seed}"


def remask_steps(method: str) -> list[int]:
    after = METHODS[method].get("remask")
    return [0] if after is None else [0, FIRST + int(after)]


def masks(source: str, method: str, seed: int, layers: int, width: int) -> list[list[Any]]:
    """Per mask and layer the kept neurons, half of each layer; a re-mask replaces a quarter."""
    chance = random.Random(f"{source}/{method}/{seed}")
    first = [sorted(chance.sample(range(width), width // 2)) for _ in range(layers)]
    found = [first]
    for _ in remask_steps(method)[1:]:
        new = []
        for layer, old in enumerate(found[-1]):
            gone = set(chance.sample(old, width // 8 + layer * width // (16 * layers)))
            free = chance.sample(sorted(set(range(width)) - set(old)), len(gone))
            new.append(sorted(set(old) - gone | set(free)))
        found.append(new)
    return found


def save_masks(folder: Path, name: str, own: Sequence[Sequence[Any]], width: int = 0) -> Path:
    from safetensors.numpy import save_file

    tensors: dict[str, Any] = {}
    for number, layers in enumerate(own):
        for layer, ids in enumerate(layers):
            stem = f"remask{number}.layer{layer}"
            tensors[f"{stem}.ids"] = np.array(ids, dtype=np.int32)
            tensors[f"{stem}.scores"] = np.zeros(width or 2 * len(ids), dtype=np.float32)
    path = folder / "masks" / f"{name.replace('/', '-')}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return path


def losses(source: str, method: str) -> list[float]:
    """Nats per decoded token: noise that all methods share, plus the method's own excess."""
    shared, own = random.Random(source), METHODS[method]
    base = [3.0 + shared.gauss(0, 0.8) for _ in range(FIRST + SECOND)]
    harder = random.Random(f"{source}/{method}").uniform(0.9, 1.1) if own else 0.0
    return [
        loss + harder * own.get("before" if place < FIRST else "after", 0.0)
        for place, loss in enumerate(base)
    ]


def tokens(mode: str, source: str, method: str, seed: int) -> dict[str, Any]:
    pieces = [f" word{place}" for place in range(FIRST + SECOND)]
    pieces[1] = " <i>&"
    rounded = [round(loss, 4) for loss in losses(source, method)]
    return {"key": key(mode, source, method, seed), "pieces": pieces, "losses": rounded}


def checks(source: str, method: str) -> list[DriftCheck]:
    """Windows of 10 tokens for the methods with a detector; low ones after the change."""
    after = METHODS[method].get("remask")
    noise, found = random.Random(f"{source}/{method}/windows"), []
    trigger = None if after is None else FIRST + int(after) - OBSERVED.get(method, 0)
    for window, step in enumerate(range(10, FIRST + SECOND + 1, 10) if after else (), start=1):
        if trigger is not None and trigger < step <= FIRST + int(after or 0):
            continue  # observed, not watched
        low = trigger is not None and FIRST + 6 < step <= trigger
        fires = trigger is not None and trigger - 10 < step <= trigger
        value = 0.85 + noise.gauss(0, 0.02) - (0.2 if low or fires else 0.0)
        found.append(
            DriftCheck(0, 0, step, 5, window, value, 0.75, int(low or fires), fires, "armed")
        )
    return found


def row(
    mode: str, source: str, method: str, seed: int, layers: int = LAYERS, width: int = WIDTH
) -> dict[str, Any]:
    """One line of results.jsonl."""
    decoded, dense = FIRST + SECOND, method == "dense"
    own = [] if dense else masks(source, method, seed, layers, width)
    starts = (0, FIRST) if mode == "forced" else (None, None)
    return {
        "key": key(mode, source, method, seed),
        "status": "done",
        "error": None,
        "label": label(method),
        "cell": {
            "model": "smollm2-135m",
            "dtype": "float32",
            "mode": mode,
            "source": source,
            "method": method,
            "sparsity": None if dense else 0.5,
            "seed": seed,
        },
        "topics": [
            {"name": name, "domain": domain, "start": start}
            for (name, domain), start in zip(TOPICS, starts, strict=True)
        ],
        "prompt_tokens": PROMPT,
        "decoded_tokens": decoded,
        "finish": "end" if mode == "forced" else "length",
        "checks": [asdict(check) for check in checks(source, method)] if not dense else [],
        "remasks": list(remask_rows(method, own)),
        "dense_from": None,
        "accounting": None if dense else account(method, own, width),
        "loss": loss(source, method) if mode == "forced" else None,
        "metrics": None if dense or mode == "forced" else metrics(source, method),
    }


def remask_rows(method: str, own: Sequence[Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for place, (step, layers) in enumerate(zip(remask_steps(method), own, strict=False)):
        before = own[place - 1] if place else None
        pairs = list(zip(before, layers, strict=True)) if before else []
        yield {
            "step": step,
            "cause": "drift" if place else "first",
            "kept": [len(ids) for ids in layers],
            "evidence_tokens": 32.0 if place else float(PROMPT),
            "observed": OBSERVED.get(method, 0) if place else 0,
            "jaccard": [len({*a} & {*b}) / len({*a} | {*b}) for a, b in pairs] or None,
            "left": [len({*a} - {*b}) for a, b in pairs],
            "joined": [len({*b} - {*a}) for a, b in pairs],
        }


def account(method: str, own: Sequence[Sequence[Any]], width: int) -> dict[str, Any]:
    """Only the tokens observed for a re-mask ran dense."""
    dense = OBSERVED.get(method, 0) / (FIRST + SECOND)
    kept = tuple(len(ids) for ids in own[0])
    remasks = tuple(
        Remask(0, None, step, "drift" if step else "first", 64.0, kept, None)
        for step in remask_steps(method)
    )
    found = accounting(method, 0.5, 0.5 * (1 - dense), dense, masks=remasks, decoded=FIRST + SECOND)
    found["layers"] = [
        {"layer": n, "width": width, "kept": k, "kept_share": k / width, "sparsity_decoded": 0.5}
        for n, k in enumerate(kept)
    ]
    del found["sequences"]
    return found


def loss(source: str, method: str) -> dict[str, Any]:
    own, starts = losses(source, method), (0, FIRST)
    return {
        "topics": drift_losses.topics(own, starts, MOMENT),
        "recovery": drift_losses.recovery(own, losses(source, "dense"), starts),
    }


def metrics(source: str, method: str) -> dict[str, Any]:
    value = random.Random(f"{source}/{method}/metrics").uniform(0.3, 0.5)
    return {"rougeL": value, "bertscore": value + 0.4, "bleu": value / 2, "sentence_order": None}


def detection() -> dict[str, Any]:
    """Two signals under two rules, and a curve each for two counts, as `dart-llm detect` writes."""
    rows, curves = [], []
    for place, signal in enumerate(("last-attention", "attention-80")):
        for rule, rate in (("published", 0.9 - 0.1 * place), ("paper", 0.6 + 0.2 * place)):
            often = rule == "published"
            rows.append(
                {
                    "signal": signal,
                    "rule": rule,
                    "changes": 20,
                    "detected": round(20 * rate),
                    "rate": rate,
                    "rate_interval": [rate - 0.1, min(1.0, rate + 0.08)],
                    "delay_median": 5.0 if often else 20.0 + 10 * place,
                    "delay_interval": [4.0, 40.0],
                    "delay_with_misses": 40.0,
                    "delay_with_misses_interval": None,
                    "false_alarms_per_1000": 30.0 if often else 2.5,
                    "fa_interval": [1.0, 33.0],
                    "late": 1,
                    "tokens": 12000,
                    "blind_rate": 0.5,
                    "gain": rate - 0.5,
                    "gain_interval": [rate - 0.6, rate - 0.4],
                }
            )
        for n0 in (1, 3):
            points = [
                {
                    "k": k,
                    "rate": 1 - 0.2 * k,
                    "delay": 5.0 + 12 * k + 4 * n0 + 3 * place,
                    "delay_with_misses": 9.0 + 20 * k + 4 * n0 + 3 * place,
                    "false_alarms_per_1000": 0.0 if k == 3 else 40.0 / (n0 * 4**k * (1 + place)),
                    "alarms_per_1000": 9.0,
                    "blind_rate": 0.4,
                }
                for k in (0.5, 1.0, 2.0, 3.0)
            ]
            curves.append({"signal": signal, "window": 10, "n0": n0, "points": points})
    return {
        "schema": 1,
        "rows": rows,
        "curves": curves,
        "signals": [],
        "passages": [{"id": f"{n}", "changes": [300, 700]} for n in range(10)],
        "definitions": {"rate": "detected / changes"},
        "settings": {"model": "smollm2-135m", "prompt_tokens": 256, "horizon": 128},
        "checkpoint": {"name": "SmolLM2-135M-Instruct", "dtype": "float32"},
    }
