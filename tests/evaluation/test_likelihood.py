"""``score_context``: protocols, shared prompt passes and masks, accounting, causality."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dart_llm.errors import AttachError, ConfigError, DartError
from dart_llm.evaluation.likelihood import Likelihood, decoded_tokens, score_context
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.prepare import likelihood_config
from dart_llm.session.run import Run, prune
from lm_cases import Forwards
from tiny import LAYERS, WIDTH, tiny, tokens

CONTEXT = tuple(tokens(1, 30, seed=1)[0].tolist())
ANSWERS = [tuple(tokens(1, n, seed=10 + n)[0].tolist()) for n in (1, 4, 7, 3, 5)]
LETTERS = [(40, 41), (40, 42), (40, 43), (40, 44)]
PROTOCOLS = ("decode", "full", "published")
model = functools.cache(tiny)


def score(
    method: str | None,
    answers: Sequence[Sequence[int]] = ANSWERS,
    protocol: str = "decode",
    size: int = 8,
    name: str = "llama",
    context: Sequence[int] = CONTEXT,
    **settings: Any,
) -> tuple[list[Likelihood], list[dict[str, Any]]]:
    """As ``score_context``; the method under the settings of likelihood tasks."""
    if method is None:
        return score_context(model(name), None, context, answers, protocol, size)
    config = likelihood_config(PruneConfig.build(method, **settings))
    with Run(model(name), config) as run:
        return score_context(model(name), run, context, answers, protocol, size)


def probs(*arguments: Any, **settings: Any) -> list[float]:
    return [one.logprob for one in score(*arguments, **settings)[0]]


@torch.no_grad()
def direct(answer: Sequence[int], context: Sequence[int] = CONTEXT) -> torch.Tensor:
    """Log-probabilities of an answer's tokens from one plain forward."""
    ids = torch.tensor([[*context, *answer]])
    logits = model("llama")(ids).logits[0].log_softmax(-1)
    rows = logits[len(context) - 1 : -1]
    return rows.gather(1, ids[0, len(context) :, None])[:, 0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_dense_equals_one_plain_forward(name):
    found, reports = score(None, name=name)
    assert reports == []
    for answer, one in zip(ANSWERS, found, strict=True):
        ids = torch.tensor([[*CONTEXT, *answer]])
        with torch.no_grad():
            logits = model(name)(ids).logits[0, len(CONTEXT) - 1 : -1].float()
        targets = torch.tensor(answer)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        assert one.losses == pytest.approx(losses.tolist(), abs=1e-4)
        assert one.logprob == pytest.approx(-float(losses.sum()), abs=1e-4)
        assert one.greedy == bool((logits.argmax(-1) == targets).all())


def test_the_likeliest_continuation_is_greedy_and_no_other():
    likely = []
    for _ in range(3):
        with torch.no_grad():
            likely.append(
                int(model("llama")(torch.tensor([[*CONTEXT, *likely]])).logits[0, -1].argmax())
            )
    other = [*likely[:2], (likely[2] + 1) % 90]
    assert [one.greedy for one in score(None, [likely, other, likely[:1]])[0]] == [
        True,
        False,
        True,
    ]


def test_a_context_of_one_token_has_no_prompt_pass():
    found = score(None, [ANSWERS[1]], context=CONTEXT[:1])[0]
    assert found[0].logprob == pytest.approx(float(direct(ANSWERS[1], CONTEXT[:1]).sum()), abs=1e-4)


@pytest.mark.contract("sparsity 0 is bit-identical")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_removed_is_dense(protocol):
    dense, pruned = score(None)[0], score("griffin", protocol=protocol, sparsity=0.0)[0]
    for one, other in zip(dense, pruned, strict=True):
        if protocol == "decode":  # the same forwards, to the bit
            assert one == other
        assert one.losses == pytest.approx(other.losses, abs=1e-4)
        assert one.greedy == other.greedy


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_half_the_neurons_change_every_score(protocol):
    dense, pruned = probs(None), probs("griffin", protocol=protocol, sparsity=0.5)
    assert all(abs(a - b) > 1e-3 for a, b in zip(dense, pruned, strict=True))


@pytest.mark.contract("same report whatever the batch")
@pytest.mark.parametrize("protocol", ["decode", "full"])
@pytest.mark.parametrize("method", ["griffin", "dart"])
def test_batches_change_nothing(protocol, method):
    results = [score(method, ANSWERS + LETTERS, protocol, n, sparsity=0.5) for n in (1, 2, 8)]
    for found, reports in results[1:]:
        assert [one.logprob for one in found] == pytest.approx(
            [one.logprob for one in results[0][0]], abs=1e-4
        )
        assert len(reports) == 1
        assert reports[0]["decoded_tokens"] == results[0][1][0]["decoded_tokens"]
        assert reports[0]["achieved_sparsity"] == pytest.approx(0.5)
        assert reports[0]["remasks"] == 0


@pytest.mark.parametrize("protocol", ["decode", "full"])
def test_batches_release_every_answer_at_the_same_step(protocol):
    settings = {"sparsity": 0.5, "release_step": 3 if protocol == "decode" else 33}
    alone, *others = [score("griffin", ANSWERS, protocol, n, **settings) for n in (1, 2, 8)]
    for found, reports in others:
        wanted = [one.logprob for one in alone[0]]
        assert [one.logprob for one in found] == pytest.approx(wanted, abs=1e-4)
        for key in ("decoded_tokens", "dense_token_share", "achieved_sparsity"):
            assert reports[0][key] == pytest.approx(alone[1][0][key])


def test_one_prompt_pass_and_batches_of_answers():
    with Forwards(model("llama")) as ran:
        score("griffin", sparsity=0.5, size=3)
    assert ran.shapes == [(1, 29), (3, 7), (2, 5)]
    with Forwards(model("llama")) as ran:
        score("griffin", protocol="full", sparsity=0.5)
    assert ran.shapes == [(1, 30), (5, 36)]
    with Forwards(model("llama")) as ran:
        score("griffin", ANSWERS[:2], "published", sparsity=0.5)
    assert ran.shapes == [(1, 31), (1, 30), (1, 34), (1, 33)]


def test_answers_that_differ_in_their_last_token_are_one_row():
    with Forwards(model("llama")) as ran:
        found, reports = score("griffin", LETTERS, sparsity=0.5)
    assert ran.shapes == [(1, 29), (1, 2)]
    assert reports[0]["decoded_tokens"] == decoded_tokens(LETTERS) == 2
    alone = [probs("griffin", [letter], sparsity=0.5)[0] for letter in LETTERS]
    assert [one.logprob for one in found] == pytest.approx(alone, abs=1e-5)
    single = [(token,) for token in (40, 41, 42, 43)]
    assert score("griffin", single, sparsity=0.5)[1][0]["decoded_tokens"] == 1


@pytest.mark.contract("accounting equals a count")
def test_decoded_tokens_are_counted_exactly():
    # padding counts for nothing; the last context token is fed with each row
    assert score("griffin", sparsity=0.5)[1][0]["decoded_tokens"] == 1 + 4 + 7 + 3 + 5
    full = score("griffin", protocol="full", sparsity=0.5)[1][0]
    assert full["decoded_tokens"] == 5 * 29 + (1 + 4 + 7 + 3 + 5)
    assert (full["achieved_sparsity"], full["dense_token_share"]) == (0.5, 0.0)
    reports = score("griffin", protocol="published", sparsity=0.5)[1]
    assert [report["decoded_tokens"] for report in reports] == [29 + n for n in (1, 4, 7, 3, 5)]
    same = score("griffin", [ANSWERS[1], ANSWERS[1]], sparsity=0.5)
    assert same[1][0]["decoded_tokens"] == 4
    assert same[0][0] == same[0][1]


@pytest.mark.parametrize("protocol", ["decode", "full"])
def test_a_score_does_not_depend_on_the_other_answers(protocol):
    def first(*others: int) -> float:
        chosen = [ANSWERS[2], *(ANSWERS[i] for i in others)]
        return probs("griffin", chosen, protocol, sparsity=0.5)[0]

    assert [first(0, 1), first(3, 4), first(1)] == pytest.approx([first()] * 3, abs=1e-5)


def test_published_masks_have_seen_the_answer():
    full, leaking = (probs("griffin", protocol=p, sparsity=0.5) for p in ("full", "published"))
    assert sum(abs(a - b) > 1e-4 for a, b in zip(full, leaking, strict=True)) >= 4


@pytest.mark.contract("answer tokens never in masks under decode")
def test_in_decode_the_masks_do_not_see_the_context_last_token():
    kept = []
    for last in (20, 60):
        config = likelihood_config(PruneConfig.build("griffin", sparsity=0.5))
        with Run(model("llama"), config) as run:
            score_context(model("llama"), run, [*CONTEXT[:-1], last], [ANSWERS[1]])
            kept.append(run.masks())
    assert all(torch.equal(kept[0][layer], kept[1][layer]) for layer in range(LAYERS))


class ByHand:
    """Multiplies what each FFN's down projection reads, as masks do."""

    def __init__(self, masks: dict[int, torch.Tensor]) -> None:
        self.handles = []
        for layer, block in enumerate(model("llama").model.layers):
            multiplier = torch.zeros(WIDTH)
            multiplier[masks[layer]] = 1

            def apply(module: Any, args: Any, multiplier: Any = multiplier) -> Any:
                return (args[0] * multiplier,)

            self.handles.append(block.mlp.down_proj.register_forward_pre_hook(apply))

    def __enter__(self) -> None:
        return

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def chosen(ids: Sequence[int]) -> dict[int, torch.Tensor]:
    """GRIFFIN's neurons for a text, from its formula alone."""
    seen: list[torch.Tensor] = []
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
        for block in model("llama").model.layers
    ]
    with torch.no_grad():
        model("llama")(torch.tensor([list(ids)]))
    for handle in handles:
        handle.remove()
    scores = [(u / u.norm(dim=-1, keepdim=True)).square().sum(0) for u in seen]
    return {layer: s.topk(WIDTH // 2).indices.sort().values for layer, s in enumerate(scores)}


def test_full_prunes_every_position_by_the_context_alone():
    masks = chosen(CONTEXT)
    with ByHand(masks):
        expected = [float(direct(answer).sum()) for answer in ANSWERS]
    found = probs("griffin", protocol="full", sparsity=0.5)
    assert found == pytest.approx(expected, abs=1e-4)
    with prune(model("llama"), "griffin", sparsity=0.5) as run:
        with torch.no_grad():
            model("llama")(torch.tensor([CONTEXT]))
        selected = run.select()
    assert [mask.ids.tolist() for mask in selected if mask] == [m.tolist() for m in masks.values()]
    with prune(model("llama"), masks=masks) as run, run.decoding(prompt=True):
        given = [float(direct(answer).sum()) for answer in ANSWERS]
    assert given == pytest.approx(expected, abs=1e-4)


def test_published_prunes_every_position_by_the_whole_text():
    expected = []
    for answer in ANSWERS:
        with ByHand(chosen([*CONTEXT, *answer])):
            expected.append(float(direct(answer).sum()))
    assert probs("griffin", protocol="published", sparsity=0.5) == pytest.approx(expected, abs=1e-4)


def test_decode_prunes_what_follows_the_prompt():
    answer = ANSWERS[2]
    masks = chosen(CONTEXT[:-1])
    with torch.no_grad():
        cache = model("llama")(torch.tensor([CONTEXT[:-1]]), use_cache=True).cache
        with ByHand(masks):
            ids = torch.tensor([[CONTEXT[-1], *answer[:-1]]])
            logits = model("llama")(ids, cache=cache).logits[0].log_softmax(-1)
    expected = float(logits.gather(1, torch.tensor(answer)[:, None]).sum())
    assert probs("griffin", [answer], sparsity=0.5) == pytest.approx([expected], abs=1e-4)


@pytest.mark.parametrize("protocol", ["decode", "full"])
def test_what_a_run_scored_before_leaves_no_trace(protocol):
    config = likelihood_config(PruneConfig.build("dart", sparsity=0.5))
    with Run(model("llama"), config) as run:
        for seed in (5, 6):
            other = tokens(1, 40, seed=seed)[0].tolist()
            score_context(model("llama"), run, other, ANSWERS, protocol)
        found, reports = score_context(model("llama"), run, CONTEXT, ANSWERS, protocol)
    alone, own = score("dart", protocol=protocol, sparsity=0.5)
    assert found == alone
    assert reports[0]["decoded_tokens"] == own[0]["decoded_tokens"]
    assert probs(None) == pytest.approx([float(direct(a).sum()) for a in ANSWERS], abs=1e-4)


def test_a_release_step_is_met_within_an_answer():
    found, reports = score("griffin", [ANSWERS[2]], sparsity=0.5, release_step=3)
    assert reports[0]["decoded_tokens"] == 7
    assert reports[0]["dense_token_share"] == pytest.approx(4 / 7)
    pruned = score("griffin", [ANSWERS[2]], sparsity=0.5)[0][0].losses
    assert found[0].losses[:3] == pytest.approx(pruned[:3], abs=1e-5)
    assert abs(found[0].losses[5] - pruned[5]) > 1e-4


@pytest.mark.parametrize("method", [None, "griffin"])
def test_a_loss_that_is_not_finite_is_an_error(method):
    broken = tiny("llama")
    with torch.no_grad():
        broken.lm_head.weight[ANSWERS[1][2]] = float("nan")
    config = PruneConfig.build("griffin", sparsity=0.5)
    run = None if method is None else Run(broken, likelihood_config(config)).attach()
    with pytest.raises(DartError, match="not finite: the model overflows; try dtype float32"):
        score_context(broken, run, CONTEXT, [ANSWERS[1]])


def test_nothing_to_score_is_refused():
    for context, answers in (((), [(4,)]), (CONTEXT, [(4,), ()])):
        with pytest.raises(ConfigError, match="at least one context and one continuation token"):
            score_context(model("llama"), None, context, answers)


def test_hold_select_and_branch_of_a_run():
    config = likelihood_config(PruneConfig.build("griffin", sparsity=0.5))
    network = model("llama")
    ids = torch.tensor([CONTEXT])
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
        assert [mask.ids.tolist() for mask in run.select()] == [m.ids.tolist() for m in first]
        run.hold(first)
        assert run.report().decoded_tokens == 0  # holding forgets what was decoded
        dense = network(ids).logits
        with run.decoding(prompt=True):
            pruned = network(ids).logits
        assert not torch.allclose(dense, pruned, atol=1e-2)
        report = run.report()
        assert (report.decoded_tokens, report.achieved_sparsity) == (len(CONTEXT), 0.5)
        assert run.select() is first
        run.hold(None)  # choose again
        with pytest.raises(AttachError):
            run.select()
        run.hold((None,) * LAYERS)  # masks that remove nothing: dense, and it says so
        with run.decoding(prompt=True):
            assert torch.equal(network(ids).logits, dense)
        assert not run.asks_for_pruning
    with pytest.raises(AttachError, match="attached run"), run.decoding(prompt=True):
        pass
