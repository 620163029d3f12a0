"""Every executor keeps the same neurons as ``masked``, and computes the same numbers.

Every method keeps as many as its budget says.  New presets, scores and budgets join by their
registration.  Of each product a pairwise part runs, and all of it with ``-m full``.
"""

import functools
import importlib.util
from itertools import product

import pytest
import torch

from dart_llm.models.packed_loading import round_weights
from dart_llm.models.steps import step_unsupported_reason
from dart_llm.patching.executors.token_ffn import WHOLE_STEPS
from dart_llm.pruning.registry import BUDGETS, METHODS, SCORES, TOKEN_RULES
from prior_cases import SMALL, ready
from products import DTYPES, SHAPES, cases, in_turn
from steps import apart, decode, pruned, same_masks, shared_model
from tiny import NAMES, tiny, tokens

pytestmark = pytest.mark.usefixtures("native", "dequantised_prompts")

FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}
TOLERANCE |= {"q8_0": 3e-2, "q4_0": 3e-2, "q4_1": 3e-2}
"""Largest difference of the logits, relative to the largest; packed: inputs rounded to 8 bits."""

ROUNDING = 1e-3
"""The same of most tokens, where both executors round the inputs of packed weights."""

PROMPT, DECODED = 66, 8
"""More prompt tokens than any preset wants as evidence."""

PRUNING = [name for name in METHODS.names() if METHODS.get(name).sparsity != 0]
PER_TOKEN = [name for name in PRUNING if METHODS.get(name).token is not None]
OFTEN = {"rule": "interval 2", "min_distance": 0, "max_dense_share": None}


def _preset(method):
    # half of the neurons, selected anew by every token or helped by maps of a rank that is the tiny
    # model's whole hidden size, give nearly what all of them give
    config = METHODS.get(method)
    sparsity = 0.75 if config.token or config.compensation_rank else 0.5
    more = {"self_stats": SMALL} if config.self_stats else {}
    return {"method": method, "sparsity": sparsity, **more}


def _score(name):
    more = {"self_stats": SMALL} if SCORES.get(name).needs_fisher else {}
    return {"score": name, "sparsity": 0.4, **more}


REMASK = {"drift": OFTEN, "remask": {"observe_tokens": 1}, "self_stats": SMALL, "sparsity": 0.5}
TOKEN = _preset("dart-token")
SETTINGS = {
    **{name: _preset(name) for name in PRUNING},
    **{f"score {name}": _score(name) for name in SCORES.names()},
    "new masks": {"method": "dart", **REMASK},
    "3 rows, new masks": {"method": "dart", **REMASK},
    "late masks": {"method": "published", "masking_step": 3, "sparsity": 0.5},
    "3 rows": {"method": "griffin", "sparsity": 0.6},
    "8 rows": {"method": "griffin", "sparsity": 0.6},
    "3 rows per token": TOKEN,
    "8-bit proxies": {**TOKEN, "token": {"bits": 8, "group": 12}},
    "activations alone": {**TOKEN, "compensation": False, "score": "normalized"},
    "proxies of packed": {**TOKEN, "token": {"proxy": "always"}},
}
WEIGHTS = ("contribution", "fisher", "max", "weight")
"""Scores that read weights as each shape stores them, or learn."""

PACKED = (("llama", "q8_0"), ("qwen2", "q4_0"), ("gemma2", "q4_1"))
PACKED_CASES = ("griffin", "dart", "dart-token", "3 rows per token")
EXTRA = list(SETTINGS)[len(PRUNING) + len(SCORES.names()) :]

CUDA = {("llama", "float32", "dart"), ("llama", "bfloat16", "griffin")}
"""Triton's interpreter takes 10 ms per program: these alone."""


def _matrix():
    chosen = {
        *product(NAMES, ["float32"], ["dart"]),
        *product(("mistral", "gemma3", "olmo2"), ["float32"], ["new masks"]),
        *((name, case) for case, name in in_turn([*PRUNING, *EXTRA], SHAPES[:4])),
        *((name, f"score {score}") for score, name in in_turn(WEIGHTS, SHAPES[:4])),
        *product(SHAPES, FLOATS, ["griffin"]),
        *product(SHAPES[:1], ["float32"], SETTINGS),
        *CUDA,
    }
    chosen = {case if len(case) == 3 else (case[0], "float32", case[1]) for case in chosen}
    chosen |= {(*model, case) for model in PACKED for case in (*PACKED_CASES, "proxies of packed")}
    every = {*product(NAMES, FLOATS, SETTINGS), *chosen}
    for name, weights, case in sorted(every):
        half = weights in ("bfloat16", "float16")
        if half and SETTINGS[case].get("method") in PER_TOKEN:
            continue  # it rounds some choices otherwise, and one neuron is much here
        executors = [] if name.startswith("opt") else ["compact"]  # beside masked
        executors += ["native"] if executors and weights != "float16" else []
        executors += ["cuda"] if (name, weights, case) in CUDA else []
        for executor in executors:
            marks = [] if (name, weights, case) in chosen else [pytest.mark.full]
            marks += [pytest.mark.gpu] if executor == "cuda" else []
            yield pytest.param(executor, name, weights, case, marks=marks)


@functools.cache
def _model(name, weights):
    if weights in FLOATS:
        return shared_model(name, FLOATS[weights])
    model = tiny(name, hidden_size=64, intermediate_size=160)
    assert round_weights(model, weights) == []
    return model


def _run(executor, name, weights, case):
    rows = int(case[0]) if case[0].isdigit() and "row" in case else 1
    ids = tokens(rows, PROMPT + DECODED, seed=3)
    settings = {**SETTINGS[case], "executor": executor}
    return pruned(_model(name, weights), ids, PROMPT, make=ready, **settings)


@functools.cache
def _masked(name, weights, case):
    """Report, masks and logits of the reference, which removes what was asked for."""
    run, masks, logits = _run("masked", name, weights, case)
    report = run.report()
    assert report.executor == "masked" and masks
    if weights in FLOATS:
        rows = len(logits)
        dense = decode(run.model, tokens(rows, PROMPT + DECODED, seed=3), PROMPT)
        assert torch.equal(logits[:, :PROMPT], dense[:, :PROMPT])
        assert apart(logits[:, PROMPT:], dense[:, PROMPT:]) > 2 * TOLERANCE[weights]
    if case in PRUNING or case.startswith("score"):
        _check_total(run, SETTINGS[case]["sparsity"])
    return report, masks, logits


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize(("executor", "name", "weights", "case"), [*_matrix()])
def test_executor_agrees(few_programs, executor, name, weights, case):
    if executor == "cuda" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (extra gpu)")
    reference, masks, wanted = _masked(name, weights, case)
    run, same, logits = _run(executor, name, weights, case)
    exact = weights in FLOATS or executor == "native"
    per_token = SETTINGS[case].get("method") in PER_TOKEN
    # compact rounds no input of packed weights; there a selection may fall to another neuron
    allowed = TOLERANCE[weights] * (1 if weights in FLOATS else 4 if per_token else 2)
    assert apart(logits, wanted) < allowed
    if exact and weights not in FLOATS:
        assert (logits - wanted).abs().amax(-1).median() / wanted.abs().max() < ROUNDING
    assert [mask[:2] for mask in same] == [mask[:2] for mask in masks]
    assert all(same_masks(a[2], b[2]) for a, b in zip(same, masks, strict=True))
    report = run.report()
    assert report.executor == _label(executor, run)
    assert report.achieved_sparsity == reference.achieved_sparsity > 0
    assert executor == "compact" or report.ffn_bytes_share <= reference.ffn_bytes_share


def _label(executor, run):
    config = run.config
    # a drift signal inside the model, and selection that no kernel implements, need its modules
    watched = run.controller.rule.window and config.drift.signal != "hidden"
    plain = config.token is None or TOKEN_RULES.get(config.token.rule).native
    whole = step_unsupported_reason(run.model) is None and not watched and plain
    return WHOLE_STEPS if executor == "native" and whole else executor


IDS = tokens(1, PROMPT + DECODED, seed=3)
EVERY = tuple(METHODS.names())
DART = [*product(NAMES, ["dart"], DTYPES[:1]), *product(SHAPES, ["dart"], DTYPES)]
"""Every architecture, and every shape by dtype."""

decoded = functools.partial(pruned, ids=IDS, prompt=PROMPT, make=ready)


def _check_total(run, sparsity):
    report = run.report()
    total = sum(layer.width for layer in report.layers)
    assert abs(sum(layer.kept for layer in report.layers) - (1 - sparsity) * total) <= 1
    assert abs(report.achieved_sparsity - sparsity) <= 1 / total + 1e-9
    assert report.achieved_sparsity == pytest.approx(report.sparsity_while_pruned)
    assert report.decoded_tokens == DECODED and report.dense_token_share == 0


@pytest.mark.contract("sparsity 0 is bit-identical")
@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    cases([*DART, *product(SHAPES, EVERY, DTYPES[:1])], NAMES, EVERY, DTYPES),
    ids=str,
)
def test_sparsity_zero_is_bit_identical(name, method, dtype):
    run, masks, logits = decoded(shared_model(name, dtype), method=method, sparsity=0.0)
    assert torch.equal(logits, decode(shared_model(name, dtype), IDS, PROMPT))
    assert masks == []
    report = run.report()
    assert report.achieved_sparsity == 0 and report.decoded_tokens == DECODED
    assert report.ffn_bytes_share == 1


SPARSITIES = (0.05, 0.3, 0.75, 0.85)
ALL = [*BUDGETS.names(), "blend uniform energy"]
EACH = tuple(product(ALL, SPARSITIES))


@pytest.mark.contract("allocation sums to the budget")
@pytest.mark.parametrize(
    ("name", "budget", "sparsity"),
    cases([(name, *each) for each, name in in_turn(EACH, SHAPES)], SHAPES, ALL, SPARSITIES),
)
def test_budgets(name, budget, sparsity):
    settings = {"budget": budget, "sparsity": sparsity, "compensation": True}
    run, masks, logits = decoded(shared_model(name), **settings)
    if sparsity > 0.1:  # below, all that goes may be neurons that a relu had silenced anyway
        assert apart(logits[:, PROMPT:], decode(shared_model(name), IDS, PROMPT)[:, PROMPT:]) > 1e-3
    _check_total(run, sparsity)
    for ids, layer in zip(masks[0][2], run.report().layers, strict=True):
        assert layer.kept == (layer.width if ids is None else len(ids))
        assert ids is None or (bool((ids[1:] > ids[:-1]).all()) and int(ids[-1]) < layer.width)


@pytest.mark.contract("allocation sums to the budget")
@pytest.mark.parametrize("name", SHAPES)
def test_auto_counts_by_itself(name):
    settings = {"score": {"name": "magnitude", "strategy": "auto"}, "sparsity": None}
    report = decoded(shared_model(name), **settings)[0].report()
    assert report.requested_sparsity is None and 0 < report.achieved_sparsity < 1
    assert all(layer.kept >= 0.1 * layer.width - 1 for layer in report.layers)
