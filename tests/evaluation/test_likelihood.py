"""``score_context``: protocols, shared prompt passes and masks, accounting, causality."""

import contextlib
import copy
import functools

import pytest
import torch

from dart_llm.errors import AttachError, ConfigError, DartError
from dart_llm.evaluation.likelihood import score_context
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import Run, likelihood_config
from lm_cases import Forwards
from tiny import LAYERS, WIDTH, tiny, tokens
from token_cases import before_down

CONTEXT = tuple(tokens(1, 30, seed=1)[0].tolist())
ANSWERS = [tuple(tokens(1, n, seed=10 + n)[0].tolist()) for n in (1, 4, 7, 3, 5)]
LETTERS = [(40, 41), (40, 42), (40, 43), (40, 44)]
model = functools.cache(tiny)


def score(
    method, answers=ANSWERS, protocol="decode", size=8, name="llama", context=CONTEXT, **settings
):
    """As ``score_context``; the method under the settings of likelihood tasks."""
    if method is None:
        return score_context(model(name), None, context, answers, protocol, size)
    config = likelihood_config(PruneConfig.build(method, **settings))
    with Run(model(name), config) as run:
        return score_context(model(name), run, context, answers, protocol, size)


def probs(*arguments, **settings):
    return [scored.logprob for scored in score(*arguments, **settings)[0]]


@torch.no_grad()
def losses(answer, context=CONTEXT, name="llama"):
    """Losses of an answer's tokens, and which are the likeliest, from one plain forward."""
    logits = model(name)(torch.tensor([[*context, *answer]])).logits[0, len(context) - 1 : -1]
    targets = torch.tensor(answer)
    per_token = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return per_token.tolist(), (logits.argmax(-1) == targets).tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_dense_equals_one_plain_forward(name):
    likely = []
    for _ in range(3):
        with torch.no_grad():
            logits = model(name)(torch.tensor([[*CONTEXT, *likely]])).logits
        likely.append(int(logits[0, -1].argmax()))
    answers = [*ANSWERS, likely, [*likely[:2], (likely[2] + 1) % 90], likely[:1]]
    scores, reports = score(None, answers, name=name)
    for answer, scored in zip(answers, scores, strict=True):
        wanted, greedy = losses(answer, name=name)
        assert scored.losses == pytest.approx(wanted, abs=1e-4) and scored.greedy == all(greedy)
        assert scored.logprob == pytest.approx(-sum(wanted), abs=1e-4)
    assert reports == [] and [scored.greedy for scored in scores[-3:]] == [True, False, True]
    (single,) = probs(None, [ANSWERS[1]], context=CONTEXT[:1])  # no prompt pass
    assert single == pytest.approx(-sum(losses(ANSWERS[1], CONTEXT[:1])[0]), abs=1e-4)


@pytest.mark.contract("sparsity 0 is bit-identical")
@pytest.mark.parametrize("protocol", ["decode", "full", "published"])
def test_nothing_removed_is_dense(protocol):
    dense, pruned = score(None)[0], score("griffin", protocol=protocol, sparsity=0.0)[0]
    for scored, other in zip(dense, pruned, strict=True):
        if protocol == "decode":  # the same forwards, to the bit
            assert scored == other
        assert scored.losses == pytest.approx(other.losses, abs=1e-4)
        assert scored.greedy == other.greedy


@pytest.mark.contract("same report whatever the batch")
@pytest.mark.parametrize(
    ("method", "protocol", "release"),
    [
        ("dart", "decode", None),
        ("griffin", "full", None),
        ("griffin", "decode", 3),  # every answer is released at the same step
    ],
)
def test_neither_batches_nor_other_answers_change_a_score(method, protocol, release):
    settings = {"sparsity": 0.5, "release_step": release}
    answers = ANSWERS + LETTERS
    alone, *others = [score(method, answers, protocol, n, **settings) for n in (1, 2, 8)]
    wanted = [scored.logprob for scored in alone[0]]
    for scores, reports in others:
        assert [scored.logprob for scored in scores] == pytest.approx(wanted, abs=1e-4)
        assert len(reports) == 1 and reports[0]["remasks"] == 0
        for key in ("decoded_tokens", "dense_token_share", "achieved_sparsity"):
            assert reports[0][key] == pytest.approx(alone[1][0][key])
    assert probs(method, answers[2:3], protocol, **settings) == pytest.approx(wanted[2:3], abs=1e-5)


def test_one_prompt_pass_and_batches_of_answers():
    for answers, protocol, size, shapes in (
        (ANSWERS, "decode", 3, [(1, 29), (3, 7), (2, 5)]),
        (ANSWERS, "full", 8, [(1, 30), (5, 36)]),
        (ANSWERS[:2], "published", 8, [(1, 31), (1, 30), (1, 34), (1, 33)]),
        (LETTERS, "decode", 8, [(1, 29), (1, 2)]),  # one row, but for the last token
    ):
        with Forwards(model("llama")) as ran:
            score("griffin", answers, protocol, size, sparsity=0.5)
        assert ran.shapes == shapes


@pytest.mark.contract("accounting equals a count by hooks")
def test_decoded_tokens_are_counted_exactly():
    # padding counts for nothing; the last context token is fed with each row
    single = [(token,) for token in (40, 41, 42, 43)]
    for answers, count in ((ANSWERS, 1 + 4 + 7 + 3 + 5), (LETTERS, 2), (single, 1)):
        assert score("griffin", answers, sparsity=0.5)[1][0]["decoded_tokens"] == count
    full = score("griffin", protocol="full", sparsity=0.5)[1][0]
    assert full["decoded_tokens"] == 5 * 29 + (1 + 4 + 7 + 3 + 5)
    assert (full["achieved_sparsity"], full["dense_token_share"]) == (0.5, 0.0)
    reports = score("griffin", protocol="published", sparsity=0.5)[1]
    assert [report["decoded_tokens"] for report in reports] == [29 + n for n in (1, 4, 7, 3, 5)]


@contextlib.contextmanager
def by_hand(masks):
    """The model with all neurons but those of the masks 0."""

    def keep(layer, _, u):
        return u * torch.zeros(WIDTH).index_fill(0, masks[layer], 1)

    with before_down(model("llama"), None, keep), torch.no_grad():
        yield


def chosen(ids):
    """GRIFFIN's neurons for a text, from its formula alone."""
    masks = {}

    def choose(layer, _, u):
        scores = (u[0] / u[0].norm(dim=-1, keepdim=True)).square().sum(0)
        masks[layer] = scores.topk(WIDTH // 2).indices

    with before_down(model("llama"), None, choose), torch.no_grad():
        model("llama")(torch.tensor([list(ids)]))
    return masks


@pytest.mark.contract("answer tokens never in masks")
def test_each_protocol_prunes_by_hand():
    """full: every position by the context; published: by the whole text; decode: what follows,
    by the context without its last token."""
    with by_hand(chosen(CONTEXT)):
        full = [-sum(losses(answer)[0]) for answer in ANSWERS]
    assert probs("griffin", protocol="full", sparsity=0.5) == pytest.approx(full, abs=1e-4)
    published = []
    for answer in ANSWERS:
        with by_hand(chosen([*CONTEXT, *answer])):
            published.append(-sum(losses(answer)[0]))
    logprobs = probs("griffin", protocol="published", sparsity=0.5)
    assert logprobs == pytest.approx(published, abs=1e-4)
    with torch.no_grad():
        cache = model("llama")(torch.tensor([CONTEXT[:-1]]), use_cache=True).cache
    answer = ANSWERS[2]
    with by_hand(chosen(CONTEXT[:-1])):
        ids = torch.tensor([[CONTEXT[-1], *answer[:-1]]])
        logits = model("llama")(ids, cache=cache).logits[0].log_softmax(-1)
    wanted = float(logits.gather(1, torch.tensor(answer)[:, None]).sum())
    assert probs("griffin", [answer], sparsity=0.5) == pytest.approx([wanted], abs=1e-4)


def test_what_a_run_scored_before_leaves_no_trace():
    config = likelihood_config(PruneConfig.build("dart", sparsity=0.5))
    with Run(model("llama"), config) as run:
        other = tokens(1, 40, seed=5)[0].tolist()
        score_context(model("llama"), run, other, ANSWERS, "full")
        scores, reports = score_context(model("llama"), run, CONTEXT, ANSWERS, "full")
    alone, counted = score("dart", protocol="full", sparsity=0.5)
    assert scores == alone
    assert reports[0]["decoded_tokens"] == counted[0]["decoded_tokens"]


def test_what_is_refused():
    broken = tiny("llama")
    with torch.no_grad():
        broken.lm_head.weight[ANSWERS[1][2]] = float("nan")
    config = PruneConfig.build("griffin", sparsity=0.5)
    for run in (None, Run(broken, likelihood_config(config)).attach()):
        with pytest.raises(DartError, match="not finite: the model overflows; try dtype float32"):
            score_context(broken, run, CONTEXT, [ANSWERS[1]])
    for context, answers in (((), [(4,)]), (CONTEXT, [(4,), ()])):
        with pytest.raises(ConfigError, match="at least one context and one continuation token"):
            score_context(model("llama"), None, context, answers)


def test_hold_select_and_branch_of_a_run():
    config = likelihood_config(PruneConfig.build("griffin", sparsity=0.5))
    network, ids = model("llama"), torch.tensor([CONTEXT])
    with Run(network, config) as run, torch.no_grad():
        with pytest.raises(AttachError, match="no token has been observed"):
            run.select()
        cache = network(ids[:, :-1], use_cache=True).cache
        first = run.select()
        assert [mask.kept for mask in first] == [WIDTH // 2] * LAYERS
        for _ in range(3):  # three continuations of one prompt; the tokens of each stay counted
            with run.decoding():
                network(torch.tensor([[5, 6]]), cache=copy.deepcopy(cache))
            run.branch()
        assert run.report().decoded_tokens == 6
        run.hold(first)
        assert run.report().decoded_tokens == 0  # holding forgets what was decoded
        dense = network(ids).logits
        with run.decoding(prompt=True):
            assert not torch.allclose(dense, network(ids).logits, atol=1e-2)
        assert run.report().decoded_tokens == len(CONTEXT) and run.select() is first
        run.hold(None)  # choose again
        with pytest.raises(AttachError):
            run.select()
        run.hold((None,) * LAYERS)  # masks that remove nothing: dense, and it says so
        with run.decoding(prompt=True):
            assert torch.equal(network(ids).logits, dense) and not run.asks_for_pruning
