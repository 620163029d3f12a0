"""A run with known numbers, as its page shows it."""

import math
from dataclasses import replace

from dart_llm.experiments.stats import judge
from dart_llm.pruning.records import DriftCheck, LayerStat, Remask, RunReport, SequenceReport
from dart_llm.studies.generate.report import RunView

LAYERS, WIDTH = 30, 1536
FFN_SHARE = 0.592
PROMPT = "Why is the sky blue? <script>alert('prompt')</script> & \"quotes\""
TEXTS = {
    "dense": "The sky is blue because air scatters short waves more than long ones. ",
    "pruned": "The sky is blue since light <b>is</b> bent by the air, and so on & on. ",
}
HALF = (WIDTH // 2,) * LAYERS
REMASKS = (
    Remask(0, None, 12, "first", 64.0, HALF, None),
    Remask(0, None, 174, "drift", 57.6, HALF, 0.713),
    Remask(0, None, 286, "drift", 57.6, HALF, 0.688),
)


def accounting(method, sparsity, achieved, dense, masks=(), decoded=1536, **more):
    """``RunReport.to_dict()`` of a run on the fake model."""
    kept = (round(WIDTH * (1 - sparsity)),) * LAYERS
    masks = masks or (Remask(0, None, 0, "first", 255.0, kept, None),)
    causes = [mask.cause for mask in masks]
    bytes_share = 1 - achieved + 0.031
    values = {
        "executor": "compact",
        "ffn_bytes_share": bytes_share,
        "ffn_bytes_share_if_compact": bytes_share,
        "ffn_share_of_bytes": FFN_SHARE,
        "extra_memory_bytes": 56_000_000,
        **more,
    }
    return RunReport(
        method=method,
        requested_sparsity=sparsity,
        achieved_sparsity=achieved,
        sparsity_while_pruned=achieved / (1 - dense),
        dense_token_share=dense,
        prompt_tokens=52,
        decoded_tokens=decoded,
        remasks=len(masks) - 1,
        remask_causes={cause: causes.count(cause) for cause in causes},
        layers=tuple(LayerStat(n, WIDTH, k, k / WIDTH, achieved) for n, k in enumerate(kept)),
        sequences=(SequenceReport(0, None, 52, decoded, round(dense * decoded), achieved, masks),),
        **values,
    ).to_dict()


def drift_checks():
    """36 windows of 10 tokens: 4 that arm the detector, then high ones but for two triggers."""
    checks = []
    for window in range(1, 37):
        trigger, step = window in (13, 22), 12 + 10 * window
        numbers = (0.66, 0.8) if trigger else (0.86, None if window <= 4 else 0.8)
        state = "arming" if window <= 4 else "armed"
        checks.append(DriftCheck(0, 0, step, 29, window, *numbers, int(trigger), trigger, state))
    return checks


def perplexity():
    """Dense, dart at 20 and 50 %, griffin at 50 %: 1.08, 2.1 and 2.52 times dense."""
    rows = []
    for method, share, ratio in (
        *(("dense", 0.0, 1.0), ("dart", 0.2, 1.08)),
        *(("dart", 0.5, 2.1), ("griffin", 0.5, 2.52)),
    ):
        pruned = method != "dense"
        row = {"method": method, "label": f"{method}@{share:g}" if pruned else method}
        row |= {"sparsity": share, "perplexity": 17.62 * ratio, "ratio_to_dense": ratio}
        row |= {"mean_loss": math.log(17.62 * ratio)}
        row["interval"] = [ratio / 1.06, ratio * 1.07] if pruned else None
        row["accounting"] = accounting(method, share, share, 0.0) if pruned else None
        rows.append(row)
    about = {"protocol": "decode", "text": "embedded", "slices": 6, "prompt_tokens": 256}
    return {**about, "scored_tokens": 256, "rows": rows, "losses": {"dense": [[2.5, 2.9]]}}


def generations():
    """Dense and pruned text with their phases, 400 tokens each."""
    phases = ["prefill", *["observe"] * 12, *["pruned"] * 130, *["observe"] * 32]
    phases += ["pruned"] * 90 + ["observe"] * 22 + ["pruned"] * 113
    rows = []
    for name, marks in (("dense", ["prefill", *["dense"] * 399]), ("pruned", phases)):
        pruned = name == "pruned"
        report = accounting("dart", 0.5, 0.4375, 0.125, REMASKS, 399) if pruned else None
        words = [word + " " for word in (TEXTS[name] * 40).split(" ")][:400]
        row = {"id": "prompt-0", "variant": name, "method": "dart" if pruned else "dense"}
        row |= {"sparsity": 0.5 if pruned else 0.0, "prompt": PROMPT, "text": "".join(words)}
        row |= {"token_ids": list(range(400)), "tokens": words, "phases": marks}
        rows.append({**row, "seconds": [0.05] * 400, "accounting": report})
    return rows


def config():
    prompt = ["--prompt", "Why is the sky blue? <script>", "--sparsity", "0.5"]
    checkpoint = {"name": "SmolLM2-135M-Instruct", "source": "embedded", "dtype": "bfloat16"}
    checkpoint |= {"file_quantisation": "Q4_K_M", "sha256": "ab12" * 16}
    return {
        "schema": 1,
        "status": "complete",
        "settings": {"model": "smollm2-135m", "method": "dart", "sparsity": 0.5, "generation": 400},
        "given": ["sparsity"],
        "prune": {"method": "dart", "sparsity": 0.5, "score": {"name": "normalized"}},
        "command": ["/opt/env/bin/dart-llm", "run", *prompt],
        "versions": {"python": "3.12.7", "torch": "2.13.0", "transformers": "5.24.0"},
        "git": {"commit": "0123456789" * 4, "branch": "main", "dirty": True},
        "machine": {"system": "Linux 6.12", "processor": "Fast CPU", "cores": 2, "device": "cpu"},
        "checkpoint": {**checkpoint, "parameters": 134515008, "revision": None},
        "seed": 0,
        "started": "2026-03-04T05:06:07+00:00",
        "finished": "2026-03-04T05:08:19+00:00",
    }


def timing():
    """54.2 ms per token dense, 44.5 pruned; the bytes allow 1.35 x."""
    seconds = {"dense": 0.0542, "pruned": 0.0445}
    pruned_bytes = 1 - FFN_SHARE * 0.4375
    return {
        "load_s": 2.5,
        "time_to_first_token_s": {"dense": 0.41, "pruned": 0.44},
        "repetitions": {name: [each] * 2 for name, each in seconds.items()},
        "seconds_per_token": seconds,
        "tokens_per_second": {name: 1 / each for name, each in seconds.items()},
        **judge([seconds["dense"]] * 2, [seconds["pruned"]] * 2, 1 / pruned_bytes).to_dict(),
        "weight_bytes_per_token": {"dense": 96.6e6, "pruned": 96.6e6 * pruned_bytes},
        "total_s": 132.0,
        "peak_memory_bytes": 1_288_490_189,
    }


def fake_view(**changes):
    """A finished run as its page shows it."""
    view = RunView(config(), generations(), timing(), drift_checks(), perplexity())
    return replace(view, **changes)
