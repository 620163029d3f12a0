"""A run with known numbers, as its page shows it."""

import math
import random
from collections import Counter
from dataclasses import replace

from dart_llm.experiments.stats import judge
from dart_llm.pruning.records import DriftCheck, LayerStat, Remask, RunReport, SequenceReport
from dart_llm.studies.generate.report import RunView

LAYERS, WIDTH = 30, 1536
FFN_SHARE = 0.592
PROMPT = "Why is the sky blue? <script>alert('prompt')</script> & \"quotes\""
DENSE_TEXT = "The sky is blue because air scatters short waves more than long ones. "
PRUNED_TEXT = "The sky is blue since light <b>is</b> bent by the air, and so on & on. "


def kept_counts():
    """Half of all neurons, the first and the last layers keeping more."""
    raw = [
        0.42 + 0.48 * math.exp(-layer / 1.5) + 0.25 * math.exp((layer - 29) / 2)
        for layer in range(LAYERS)
    ]
    scale = 0.5 * LAYERS / sum(raw)
    counts = [round(WIDTH * scale * share) for share in raw]
    counts[10] += LAYERS * WIDTH // 2 - sum(counts)
    return tuple(counts)


def remasks(kept):
    """A first mask and two that drift led to."""
    return (
        Remask(0, None, 12, "first", 64.0, kept, None),
        Remask(0, None, 174, "drift", 57.6, kept, 0.713),
        Remask(0, None, 286, "drift", 57.6, kept, 0.688),
    )


def accounting(method, sparsity, achieved, dense, **more):
    """``RunReport.to_dict()`` of a run on the fake model."""
    kept = more.pop("kept", None) or (round(WIDTH * (1 - sparsity)),) * LAYERS
    masks = more.pop("masks", (Remask(0, None, 0, "first", 255.0, kept, None),))
    decoded = more.pop("decoded", 1536)
    while_pruned = achieved / (1 - dense)
    sequence = SequenceReport(0, None, 52, decoded, round(dense * decoded), achieved, masks)
    values = {
        "executor": "compact",
        "ffn_bytes_share": 1 - achieved + 0.031,
        "ffn_bytes_share_if_compact": 1 - achieved + 0.031,
        "ffn_share_of_bytes": FFN_SHARE,
        "extra_memory_bytes": 56_000_000,
        **more,
    }
    return RunReport(
        method=method,
        requested_sparsity=sparsity,
        achieved_sparsity=achieved,
        sparsity_while_pruned=while_pruned,
        dense_token_share=dense,
        prompt_tokens=52,
        decoded_tokens=decoded,
        remasks=sum(mask.cause != "first" for mask in masks),
        remask_causes=dict(Counter(mask.cause for mask in masks)),
        layers=tuple(LayerStat(n, WIDTH, k, k / WIDTH, achieved) for n, k in enumerate(kept)),
        sequences=(sequence,),
        **values,
    ).to_dict()


def drift_checks():
    """36 windows of 10 tokens: 4 arming, low ones, two triggers and one that was held."""
    noise = random.Random(0)
    low = {132: 1, 142: 2, 152: 3, 224: 1, 234: 2, 244: 3, 254: 4, 264: 5}
    checks = []
    steps = [*range(22, 143, 10), *range(184, 265, 10), *range(296, 397, 10)]
    for window, step in enumerate(steps, 1):
        armed = not 22 <= step <= 52
        similarity = 0.86 + noise.gauss(0, 0.02) - (0.2 if step in low else 0.0)
        threshold = None if not armed else 0.8 if step < 180 else 0.78
        state = "suppressed" if step == 244 else "armed" if armed else "arming"
        told = (low.get(step, 0), step in (142, 264), state)
        checks.append(DriftCheck(0, 0, step, 29, window, similarity, threshold, *told))
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
        pruned, words = variant == "pruned", [word + " " for word in (text * 40).split(" ")][:400]
        one = {"id": "prompt-0", "variant": variant, "method": "dart" if pruned else "dense"}
        one |= {"sparsity": 0.5 if pruned else 0.0, "prompt": PROMPT, "text": "".join(words)}
        one |= {"token_ids": list(range(400)), "tokens": words, "phases": marks}
        one |= {"seconds": [0.05] * 400, "accounting": report if pruned else None}
        found.append(one)
    return found


def config():
    prompt = ["--prompt", "Why is the sky blue? <script>", "--sparsity", "0.5"]
    score = {"name": "normalized"}
    checkpoint = {"name": "SmolLM2-135M-Instruct", "source": "embedded", "dtype": "bfloat16"}
    checkpoint |= {"file_quantisation": "Q4_K_M", "sha256": "ab12" * 16}
    return {
        "schema": 1,
        "status": "complete",
        "settings": {"model": "smollm2-135m", "method": "dart", "sparsity": 0.5, "generation": 400},
        "given": ["sparsity"],
        "prune": {"method": "dart", "sparsity": 0.5, "score": score},
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
    each = {"dense": 0.0542, "pruned": 0.0445}
    judged = judge([each["dense"]] * 2, [each["pruned"]] * 2, 1 / (1 - FFN_SHARE * 0.4375))
    return {
        "load_s": 2.5,
        "time_to_first_token_s": {"dense": 0.41, "pruned": 0.44},
        "repetitions": {name: [seconds] * 2 for name, seconds in each.items()},
        "seconds_per_token": each,
        "tokens_per_second": {"dense": 1 / 0.0542, "pruned": 1 / 0.0445},
        **judged.to_dict(),
        "weight_bytes_per_token": {"dense": 96.6e6, "pruned": 96.6e6 * (1 - FFN_SHARE * 0.4375)},
        "total_s": 132.0,
        "peak_memory_bytes": 1_288_490_189,
    }


def fake_view(**changes):
    """A finished run as its page shows it."""
    view = RunView(config(), generations(), timing(), drift_checks(), perplexity())
    return replace(view, **changes)
