"""Every method by name, and what can be chosen by name."""

from __future__ import annotations

from typing import Any

from dart_llm.pruning.config import (
    BudgetConfig,
    CalibrationConfig,
    DriftConfig,
    PriorConfig,
    PruneConfig,
    RemaskConfig,
    ScoreConfig,
    TokenConfig,
)
from dart_llm.pruning.registry import BUDGETS, DRIFT_RULES, METHODS, SCORES, Registry


def _by_token(method: str, **token: Any) -> PruneConfig:
    """Tokens choose by ``token``: nothing is learnt, nothing of the prompt is read."""
    return PruneConfig(
        method=method,
        score=ScoreConfig(name="weight"),  # asks for no evidence; no score ranks anything here
        budget=BudgetConfig(name="uniform"),
        drift=DriftConfig(rule="never"),
        token=TokenConfig(**token),
    )


CATS = _by_token("cats", rule="gate")
"""CATS (arXiv 2404.08763): the gate is computed whole, and its largest outputs say which neurons.

``v = act(W_gate x)``; ``z = W_down[:, S] (v_S * (W_up[S] x))`` with S the k largest ``abs(v_i)``.
The paper's threshold is a percentile over a calibration text; here every token keeps exactly k
neurons, as for ``teal``.  In a plain FFN, which has no gate, v is u itself.  Bytes: the gate whole,
up and down of k neurons.  Plain PyTorch: for quality at equal bytes, not for speed.
"""

COUNTDOWN = _by_token("countdown", rule="up")
"""CountDown (arXiv 2505.17701), its variant M: up is computed whole and says which neurons.

``s = W_up x``; ``z = W_down[:, S] (act(W_gate[S] x) * s_S)`` with S the k largest ``abs(s_i)``.
Exactly k per token where the paper has a threshold.  The variant D of the paper trains a predictor,
which nothing does here.  In a plain FFN s is u itself, as for ``cats``.  Bytes: up whole, gate and
down of k neurons.  Plain PyTorch: for quality at equal bytes, not for speed.
"""

DART = PruneConfig(
    method="dart",
    score=ScoreConfig(name="fisher"),
    budget=BudgetConfig(name="ranked"),
    drift=DriftConfig(
        rule="dart", signal="hidden", min_distance=64, max_dense_share=0.05, allowance=32
    ),
    remask=RemaskConfig(evidence="decay", decay=0.1, observe_tokens=32),
    prior=PriorConfig(tokens=32),
    min_evidence=16,
    skip_sinks=True,
    compensation=True,
    compensation_rank=32,
)
"""DART for LLMs: one mask for a text, made anew on drift.

Fisher scores (arXiv 2204.09656) ranked over all layers at once, with the activations of the prompt
and gradients that are learnt once from the model's own text; low-rank compensation, after FLAP's
mean (arXiv 2312.11983); re-masks from decayed evidence when the last hidden state leaves the
topic.  docs/method.md has the formulas and what each part is worth.
"""

DART_PROMPT = PruneConfig(
    method="dart-prompt",
    score=ScoreConfig(name="normalized"),
    budget=BudgetConfig(name="blend energy depth"),
    drift=DriftConfig(rule="paper", min_distance=64, max_dense_share=0.10),
    remask=RemaskConfig(evidence="decay", decay=0.1, observe_tokens=32),
    min_evidence=64,
    compensation=True,
)
"""DART for LLMs from the prompt alone: nothing is learnt of the model beforehand.

The first default of this project.

GRIFFIN's scores (arXiv 2404.01365), the mean of the energy and the depth budget, the paper's drift
rule (arXiv 2601.22632) with guards, decayed evidence, and compensation after FLAP
(arXiv 2312.11983).  docs/method.md has the formulas and the measurements behind each choice.
"""

DART_TOKEN = PruneConfig(
    method="dart-token",
    score=ScoreConfig(name="fisher"),
    budget=BudgetConfig(name="uniform"),
    drift=DriftConfig(rule="never"),
    prior=PriorConfig(tokens=32),
    skip_sinks=True,
    compensation=True,
    token=TokenConfig(bits=4, group=32),
)
"""Token-level tracing: every token computes only its own strongest neurons.

4-bit copies of gate and up rank the neurons by ``abs(u~_i)`` times the root of the loss's mean
squared gradient by u_i, learnt once from the model's own text; the winners are computed with the
model's own weights.  The idea of copies and winners is that of Prox (arXiv 2607.27591) and WINA
(arXiv 2505.19427).  The others stand at what they are worth on average where tokens leave them out.
Uniform budget, no drift rule: there is no mask that could grow stale.
"""

DENSE = PruneConfig(method="dense", sparsity=0.0)
"""Dense: nothing is removed.  The baseline of every comparison."""

DENSE_4BIT = PruneConfig(method="dense-4bit", sparsity=0.0, weight_bits=4)
"""Dense with 4-bit weights: what quantisation gives instead of pruning.

GGUF's format Q4_1, 5 bits a weight with its scales; as in such files, token embedding and output
head have 8 (Q8_0).  All neurons are kept.
"""

DENSE_8BIT = PruneConfig(method="dense-8bit", sparsity=0.0, weight_bits=8)
"""Dense with 8-bit weights: what quantisation gives instead of pruning.

GGUF's format Q8_0, 8.5 bits a weight with its scales.  All neurons are kept.
"""

FLAP = PruneConfig(
    method="flap",
    score=ScoreConfig(name="flap"),
    budget=BudgetConfig(name="standardized"),
    calibration=CalibrationConfig(source="text", sequences=128, length=256, purpose="masks"),
    compensation=True,
)
"""FLAP (arXiv 2312.11983): static masks from a calibration text, with compensation.

``Var(u_i) * ||w_i||_2^2`` over 128 x 256 tokens, standardised per layer and ranked over all layers
at once; at least 10 % of a layer stay.  The paper prunes attention heads too; this does not.
"""

GLASS = PruneConfig(
    method="glass",
    score=ScoreConfig(name="normalized", prior_weight=0.5),
    budget=BudgetConfig(name="uniform"),
    calibration=CalibrationConfig(source="self", sequences=64, length=128, purpose="prior"),
)
"""GLASS (arXiv 2508.14302): GRIFFIN's prompt statistic and a global prior, by mean rank.

The prior is the same statistic over 64 sequences of 128 tokens that the model writes itself.
``score={"prior_weight": w}``: 0 is GRIFFIN, 1 the prior alone.  Uniform budget, never a re-mask.
"""

GRIFFIN = PruneConfig(
    method="griffin",
    score=ScoreConfig(name="normalized"),
    budget=BudgetConfig(name="uniform"),
    drift=DriftConfig(rule="never"),
)
"""GRIFFIN (arXiv 2404.01365): the prompt's normalised activations choose, once.

Uniform budget, never a re-mask.
"""

GRIFFIN_REFRESH = PruneConfig(
    method="griffin-refresh",
    score=ScoreConfig(name="normalized"),
    budget=BudgetConfig(name="uniform"),
    drift=DriftConfig(rule="interval 64"),
    remask=RemaskConfig(evidence="fresh", observe_tokens=16),
)
"""GRIFFIN (arXiv 2404.01365), chosen anew every 64 pruned tokens from 16 dense ones.

Only the newly observed tokens count.  Another period N is ``--drift "interval N"``.  The dense
tokens lower the achieved sparsity, which the report gives.
"""

PROX = _by_token("prox", rule="copies", bits=4, group=32, inputs=0.5)
"""Prox (arXiv 2607.27591): low-bit estimates at the large inputs choose, winners are exact.

``u~ = act(gate~ x~) * (up~ x~)``, where x~ keeps the half of x with the largest ``abs(x_j)``, and
gate~, up~ are 4-bit copies; the k largest ``abs(u~_i) * ||w_i||_2`` are computed with the model's
own weights.  No code of the paper was found: this is its idea on this project's copies.  Bytes:
half of the copies with all of their scales, and k neurons.  Plain PyTorch: for quality at equal
bytes, not for speed.
"""

PUBLISHED = PruneConfig(
    method="published",
    score=ScoreConfig(name="magnitude", proxy_embedding="input"),
    budget=BudgetConfig(name="depth"),
    drift=DriftConfig(rule="published"),
    remask=RemaskConfig(evidence="fresh"),
)
"""DART as its scripts were published (arXiv 2601.22632), with their defects mended.

Magnitude scores, the depth budget, the scripts' drift rule, fresh evidence.  Departures, each a
defect of the scripts:

- masks are built from earlier tokens only; the scripts masked the forward that made the mask;
- a re-mask holds for all layers at once; the scripts lost every other layer's mask on a trigger;
- the reference of the drift rule is never a single token, whose deviation is undefined;
- the sensitivity behind the budget uses the FFN's output everywhere;
- budgets stay with their layers and meet the requested total; the scripts clipped it to 10-90 %;
- sums are float32, all rows and all tokens count, padding does not;
- the published rule never triggers after the release step.
"""

RANDOM = PruneConfig(
    method="random", score=ScoreConfig(name="random"), budget=BudgetConfig(name="uniform")
)
"""Random: neurons are drawn by lot, from the seed; the floor under every other method.

The same mask for every text, uniform budget, never a re-mask.
"""

STATIC = PruneConfig(
    method="static", score=ScoreConfig(name="weight"), budget=BudgetConfig(name="uniform")
)
"""Static: neurons ranked by the norms of their weights; the same mask for every text.

The classical magnitude-pruning baseline, for whole neurons: uniform budget, no activations.
"""

TEAL = _by_token("teal", rule="inputs")
"""TEAL (arXiv 2408.14690) on the FFNs: each matrix is read at its largest inputs.

``W x`` becomes ``W s(x)``, where s keeps the entries of largest ``abs(x_j)`` and sets the others to
0: x of gate and up, u of down.  Sparsity is here the fraction of each matrix's inputs that is
dropped; those of down are the neurons.  The paper sets a threshold per matrix by a calibration text
and, in its best variant, a sparsity per matrix by a greedy search.  Here every token keeps exactly
the same share everywhere: no text is needed, what was asked for is what is read, token by token,
and no threshold of another text or of the prompt can go stale.  Plain PyTorch: for quality at equal
bytes, not for speed.
"""

TEAL_ATTENTION = _by_token("teal-attention", rule="inputs", attention=True)
"""TEAL (arXiv 2408.14690) as in the paper: the projections of attention too.

As ``teal``, and q, k, v and the output projection keep the same share of their inputs.  Sparsity
and the shares of FFN bytes count the FFNs alone; bytes per token count attention too.
"""

WANDA = PruneConfig(
    method="wanda",
    score=ScoreConfig(name="wanda"),
    budget=BudgetConfig(name="uniform"),
    calibration=CalibrationConfig(source="text", sequences=128, length=256, purpose="masks"),
)
"""Wanda (arXiv 2306.11695) for whole neurons: static masks from a calibration text.

The paper's criterion, weight magnitude times activation norm, summed over the weights of a neuron's
output column: ``||w_i||_1 * ||u_i||_2`` over 128 x 256 tokens.  Uniform budget.
"""

WINA = _by_token("wina", rule="inputs", weighted=True)
"""WINA (arXiv 2505.19427) on the FFNs: as TEAL, inputs weighted by what they meet.

The entries of largest ``abs(x_j) * ||W[:, j]||_2`` stay, by matrix; as many for every token, as in
the paper.  The rotation of the weights that its error bound assumes is not made.  Sparsity is the
fraction of each matrix's inputs that is dropped.  Plain PyTorch: for quality at equal bytes, not
for speed.
"""

SUMMARIES = {
    "cats": (
        "CATS (arXiv 2404.08763): the gate is computed whole, and its largest outputs say which "
        "neurons; reference speed."
    ),
    "countdown": (
        "CountDown (arXiv 2505.17701), its variant M: up is computed whole and says which neurons; "
        "reference speed."
    ),
    "dart": "DART for LLMs: one mask for a text, made anew on drift.",
    "dart-prompt": (
        "DART for LLMs from the prompt alone: nothing is learnt of the model beforehand."
    ),
    "dart-token": (
        "Token-level tracing: every token computes only its own strongest neurons.  The default "
        "of every command and of prune."
    ),
    "dense": "Dense: nothing is removed.  The baseline of every comparison.",
    "dense-4bit": "Dense with 4-bit weights: what quantisation gives instead of pruning.",
    "dense-8bit": "Dense with 8-bit weights: what quantisation gives instead of pruning.",
    "flap": ("FLAP (arXiv 2312.11983): static masks from a calibration text, with compensation."),
    "glass": (
        "GLASS (arXiv 2508.14302): GRIFFIN's prompt statistic and a global prior, by mean rank."
    ),
    "griffin": ("GRIFFIN (arXiv 2404.01365): the prompt's normalised activations choose, once."),
    "griffin-refresh": (
        "GRIFFIN (arXiv 2404.01365), chosen anew every 64 pruned tokens from 16 dense ones."
    ),
    "prox": (
        "Prox (arXiv 2607.27591): low-bit estimates at the large inputs choose, winners are exact; "
        "reference speed."
    ),
    "published": (
        "DART as its scripts were published (arXiv 2601.22632), with their defects mended."
    ),
    "random": (
        "Random: neurons are drawn by lot, from the seed; the floor under every other method."
    ),
    "static": (
        "Static: neurons ranked by the norms of their weights; the same mask for every text."
    ),
    "teal": (
        "TEAL (arXiv 2408.14690) on the FFNs: each matrix is read at its largest inputs; sparsity "
        "is of inputs; reference speed."
    ),
    "teal-attention": (
        "TEAL (arXiv 2408.14690) as in the paper: the projections of attention too; sparsity is of "
        "inputs; reference speed."
    ),
    "wanda": ("Wanda (arXiv 2306.11695) for whole neurons: static masks from a calibration text."),
    "wina": (
        "WINA (arXiv 2505.19427) on the FFNs: as TEAL, inputs weighted by what they meet; sparsity "
        "is of inputs; reference speed."
    ),
}
"""One line on each method."""


def listing() -> dict[str, list[dict[str, str]]]:
    """Name, one-line description and source of every method, score, budget and drift rule."""

    def entry(name: str, summary: str, source: str) -> dict[str, str]:
        return {"name": name, "summary": summary, "source": source}

    def entries(table: Registry[Any]) -> list[dict[str, str]]:
        found = [(name, table.get(name)) for name in table.names()]
        return [entry(name, rule.summary, rule.source) for name, rule in found]

    methods = [(name, METHODS.get(name)) for name in METHODS.names()]
    rules = [(name, DRIFT_RULES.get(name).__doc__ or "") for name in DRIFT_RULES.names()]
    blend = "The mean of two budgets' keep counts.", "this project; docs/method.md"
    return {
        "methods": [entry(name, SUMMARIES.get(name, ""), _settings(one)) for name, one in methods],
        "scores": entries(SCORES),
        "budgets": [*entries(BUDGETS), entry("blend A B", *blend)],
        "drift_rules": [entry(name, text.strip().split("\n")[0], "") for name, text in rules],
    }


def _settings(config: PruneConfig) -> str:
    if config.weight_bits is not None:
        return f"weights of {config.weight_bits} bits, nothing removed"
    parts = [
        f"score {config.score.name}",
        f"budget {config.budget.name}",
        f"drift {config.drift.rule}",
        f"evidence {config.remask.evidence}",
        f"compensation {'on' if config.compensation else 'off'}",
    ]
    if config.token is not None:
        parts.append(_choice(config.token))
    if config.calibration is not None:
        size = f"{config.calibration.sequences} x {config.calibration.length} tokens"
        parts.append(f"{config.calibration.purpose} from calibration on {size}")
    return ", ".join(parts)


def _choice(token: TokenConfig) -> str:
    """What every token chooses, in words."""
    if token.rule == "inputs":
        weighted = " times column norm" if token.weighted else ""
        where = "FFN and attention" if token.attention else "FFN"
        return f"every token's largest inputs{weighted} of each matrix of {where}"
    if token.rule != "copies":
        return f"winners of every token by the exact {token.rule}"
    copies = f"{token.bits}-bit copies in groups of {token.group}"
    if token.by_weights(blocks=True):
        copies += ", or by weights that are in blocks themselves"
    at = "" if token.inputs == 1 else f", read at {token.inputs:.0%} of the inputs"
    return f"winners of every token by {copies}{at}"
