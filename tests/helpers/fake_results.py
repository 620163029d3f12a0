"""A results folder with known numbers, as a finished run would have written it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dart_llm.files import write_csv, write_json, write_lines
from dart_llm.pruning.records import DriftCheck, LayerStat, Remask, RunReport, SequenceReport

LAYERS, WIDTH = 30, 1536
FFN_SHARE = 0.592
PROMPT = "Why is the sky blue? <script>alert('prompt')</script> & \"quotes\""
DENSE_TEXT = "The sky is blue because air scatters short waves more than long ones. "
PRUNED_TEXT = "The sky is blue since light <b>is</b> bent by the air, and so on & on. "


def kept_counts() -> tuple[int, ...]:
    """Half of all neurons, the first and the last layers keeping more."""
    raw = [
        0.42 + 0.48 * math.exp(-layer / 1.5) + 0.25 * math.exp((layer - 29) / 2)
        for layer in range(LAYERS)
    ]
    scale = 0.5 * LAYERS / sum(raw)
    counts = [round(WIDTH * scale * share) for share in raw]
    counts[10] += LAYERS * WIDTH // 2 - sum(counts)
    return tuple(counts)


def remasks(kept: tuple[int, ...]) -> tuple[Remask, ...]:
    """A first mask and two that drift led to."""
    return (
        Remask(0, None, 12, "first", 64.0, kept, None),
        Remask(0, None, 174, "drift", 57.6, kept, 0.713),
        Remask(0, None, 286, "drift", 57.6, kept, 0.688),
    )


def accounting(
    method: str, sparsity: float, achieved: float, dense: float, **more: Any
) -> dict[str, Any]:
    """``RunReport.to_dict()`` of a run on the fake model."""
    kept = more.pop("kept", None) or (round(WIDTH * (1 - sparsity)),) * LAYERS
    masks = more.pop("masks", (Remask(0, None, 0, "first", 255.0, kept, None),))
    causes: dict[str, int] = {}
    for mask in masks:
        causes[mask.cause] = causes.get(mask.cause, 0) + 1
    decoded = more.pop("decoded", 1536)
    values: dict[str, Any] = {
        "executor": "compact",
        "ffn_flops_share": 1 - achieved + 0.004,
        "ffn_bytes_share": 1 - achieved + 0.031,
        "ffn_flops_share_if_compact": 1 - achieved + 0.004,
        "ffn_bytes_share_if_compact": 1 - achieved + 0.031,
        "ffn_share_of_bytes": FFN_SHARE,
        "extra_memory_bytes": 56_000_000,
        **more,
    }
    stats = tuple(
        LayerStat(layer, WIDTH, count, count / WIDTH, achieved * 1.0)
        for layer, count in enumerate(kept)
    )
    while_pruned = achieved / (1 - dense)
    sequence = SequenceReport(
        0, None, 52, decoded, round(dense * decoded), achieved, while_pruned, dense, masks
    )
    return RunReport(
        method=method,
        requested_sparsity=sparsity,
        achieved_sparsity=achieved,
        sparsity_while_pruned=while_pruned,
        dense_token_share=dense,
        prompt_tokens=52,
        decoded_tokens=decoded,
        remasks=sum(mask.cause != "first" for mask in masks),
        remask_causes=causes,
        layers=stats,
        sequences=(sequence,),
        **values,
    ).to_dict()


def drift_checks() -> list[DriftCheck]:
    """36 windows of 10 tokens: 4 arming, low ones, two triggers and one that was held."""
    noise = random.Random(0)
    low = {132: 1, 142: 2, 152: 3, 224: 1, 234: 2, 244: 3, 254: 4, 264: 5}
    checks = []
    for window, step in enumerate(
        [*range(22, 143, 10), *range(184, 265, 10), *range(296, 397, 10)]
    ):
        armed = not 22 <= step <= 52
        similarity = 0.86 + noise.gauss(0, 0.02) - (0.2 if step in low else 0.0)
        trigger, state = step in (142, 264), "armed" if armed else "arming"
        if step == 244:
            state = "held"
        threshold = None if not armed else 0.8 if step < 180 else 0.78
        checks.append(
            DriftCheck(
                0, 0, step, 29, window + 1, similarity, threshold, low.get(step, 0), trigger, state
            )
        )
    return checks


def perplexity() -> dict[str, Any]:
    """Dense, dart at 20 and 50 %, griffin at 50 %: 1.08, 2.1 and 2.52 times dense."""
    rows: list[dict[str, Any]] = [
        {
            "method": "dense",
            "label": "dense",
            "sparsity": 0.0,
            "perplexity": 17.62,
            "mean_loss": math.log(17.62),
            "ratio_to_dense": 1.0,
            "interval": None,
            "accounting": None,
        }
    ]
    for method, sparsity, ratio in (
        ("dart", 0.2, 1.08),
        ("dart", 0.5, 2.1),
        ("griffin", 0.5, 2.52),
    ):
        rows.append(
            {
                "method": method,
                "label": f"{method}@{sparsity:g}",
                "sparsity": sparsity,
                "perplexity": 17.62 * ratio,
                "mean_loss": math.log(17.62 * ratio),
                "ratio_to_dense": ratio,
                "interval": [ratio / 1.06, ratio * 1.07],
                "accounting": accounting(method, sparsity, sparsity, 0.0),
            }
        )
    return {
        "protocol": "decode",
        "text": "embedded",
        "slices": 6,
        "prompt_tokens": 256,
        "scored_tokens": 256,
        "rows": rows,
        "losses": {"dense": [[2.5, 2.9]]},
    }


def generations() -> list[dict[str, Any]]:
    """Dense and pruned text with their phases, 400 tokens each."""
    kept = kept_counts()
    report = accounting("dart", 0.5, 0.4375, 0.125, kept=kept, masks=remasks(kept), decoded=399)
    phases = ["prefill", *["observe"] * 12]
    phases += ["pruned"] * 130 + ["observe"] * 32 + ["pruned"] * 90 + ["observe"] * 22
    phases += ["pruned"] * (400 - len(phases))
    found = []
    for variant, text, marks in (
        ("dense", DENSE_TEXT, ["prefill", *["dense"] * 399]),
        ("pruned", PRUNED_TEXT, phases),
    ):
        words = [word + " " for word in (text * 40).split(" ")][:400]
        found.append(
            {
                "id": "prompt-0",
                "variant": variant,
                "method": "dense" if variant == "dense" else "dart",
                "sparsity": 0.0 if variant == "dense" else 0.5,
                "prompt": PROMPT,
                "text": "".join(words),
                "token_ids": list(range(400)),
                "tokens": words,
                "phases": marks,
                "seconds": [0.05] * 400,
                "accounting": report if variant == "pruned" else None,
            }
        )
    return found


def config() -> dict[str, Any]:
    """config.json of the fake run."""
    return {
        "schema": 1,
        "status": "complete",
        "settings": {"model": "smollm2-135m", "method": "dart", "sparsity": 0.5, "generation": 400},
        "prune": {
            "method": "dart",
            "sparsity": 0.5,
            "score": {"name": "normalized", "ema_decay": None},
        },
        "command": [
            "/opt/env/bin/dart-llm",
            "run",
            "--prompt",
            "Why is the sky blue? <script>",
            "--sparsity",
            "0.5",
        ],
        "versions": {
            "python": "3.12.7",
            "dart-llm": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.24.0",
        },
        "git": {
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "branch": "main",
            "dirty": True,
        },
        "machine": {
            "system": "Linux 6.12",
            "processor": "Fast CPU",
            "cores": 2,
            "memory_gib": 15.6,
            "device": "cpu",
        },
        "checkpoint": {
            "name": "SmolLM2-135M-Instruct",
            "source": "embedded",
            "file_quantisation": "Q4_K_M",
            "dtype": "bfloat16",
            "sha256": "ab12" * 16,
            "parameters": 134515008,
            "revision": None,
        },
        "seed": 0,
        "started": "2026-03-04T05:06:07+00:00",
        "finished": "2026-03-04T05:08:19+00:00",
    }


def timing() -> dict[str, Any]:
    """54.2 ms per token dense, 44.5 pruned; the bytes allow 1.35 x."""
    return {
        "load_s": 2.5,
        "time_to_first_token_s": {"dense": 0.41, "pruned": 0.44},
        "seconds_per_token": {"dense": 0.0542, "pruned": 0.0445},
        "tokens_per_second": {"dense": 1 / 0.0542, "pruned": 1 / 0.0445},
        "speed_up": 0.0542 / 0.0445,
        "bytes_limit": 1 / (1 - FFN_SHARE * 0.4375),
        "total_s": 132.0,
        "peak_memory_bytes": 1_288_490_189,
    }


def write_results(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write all files; ``changes`` replaces the content of config.json's keys."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = kept_counts()
    write_json(folder / "config.json", {**config(), **(changes or {})})
    write_lines(folder / "generation.jsonl", generations())
    write_json(folder / "perplexity.json", perplexity())
    write_json(folder / "timing.json", timing())
    layers = generations()[1]["accounting"]["layers"]
    write_json(
        folder / "masks.json",
        {"remasks": [asdict(mask) for mask in remasks(kept)], "layers": layers},
    )
    header = [field.name for field in fields(DriftCheck)]
    rows = [[getattr(check, name) for name in header] for check in drift_checks()]
    rows = [[int(v) if isinstance(v, bool) else v for v in row] for row in rows]
    write_csv(folder / "drift.csv", header, rows)
    return folder
