"""lm-eval's tasks through our path: dense as lm-eval's own model, different when pruned."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from dart_llm.errors import ConfigError
from dart_llm.evaluation import lm_eval as harness
from dart_llm.evaluation.lm_eval_scoring import rolling_pairs
from dart_llm.evaluation.measurement import LEAK
from lm_cases import (
    LETTERS,
    PAGES,
    QUESTIONS,
    SCRAP,
    WRITING,
    Forwards,
    candidate,
    loaded,
    logprobs,
    measured,
    options,
)
from tiny import LAYERS, WIDTH


@functools.cache
def plain(task: str, **how: Any) -> dict[str, Any]:
    """lm-eval with its own Hugging Face model, at batch 8."""
    harness._library()
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    asked = options(**how)
    tasks = harness._load(task, asked)
    harness._configure(tasks["tasks"], task, asked)
    model, tokenizer = loaded()
    with harness._no_bars():
        own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        found: dict[str, Any] = evaluate(own, tasks, bootstrap_iters=0, log_samples=True)
    return found


def plain_answers(task: str, **how: Any) -> list[list[Any]]:
    samples = plain(task, **how)["samples"].values()
    return [sample["resps"] for leaf in samples for sample in leaf]


@pytest.mark.parametrize("task", ["tiny_choice", "tiny_letters", "tiny_short", "tiny_group"])
def test_dense_likelihoods_equal_lm_evals_own(task):
    found = measured(candidate(), task)
    expected = [answer[0] for item in plain_answers(task) for answer in item]
    assert logprobs(found) == pytest.approx([prob for prob, _ in expected], abs=1e-4)
    greedy = [answer[0][1] for sample in found.samples for answer in sample["answers"]]
    assert greedy == [flag for _, flag in expected]
    own = plain(task)
    leaves = list(own["samples"])
    for leaf in leaves:
        metrics = found.subtasks[leaf] if len(leaves) > 1 else found.metrics
        assert set(metrics) == {
            k.removesuffix(",none")
            for k in own["results"][leaf]
            if k[-5:] == ",none" and "stderr" not in k
        }
        for name, value in metrics.items():
            assert value == own["results"][leaf][f"{name},none"]
    items = {item["id"]: item["acc"] for item in found.items}
    assert items == {
        f"{leaf}/{sample['doc_id']}": sample["acc"]
        for leaf in leaves
        for sample in own["samples"][leaf]
    }
    assert (found.metric, found.higher_is_better, found.accounting) == ("acc", True, None)


def test_few_shot_contexts_equal_lm_evals_own():
    found = measured(candidate(), "tiny_choice", options(num_fewshot=2))
    expected = [
        answer[0][0] for item in plain_answers("tiny_choice", num_fewshot=2) for answer in item
    ]
    assert logprobs(found) == pytest.approx(expected, abs=1e-4)
    context = found.samples[0]["arguments"][0][0]
    assert context.startswith(
        "q: an example of what is cold\na: ice\n\nq: an example of what is red"
    )
    assert context.endswith(f"q: {QUESTIONS[0]['question']}\na:")


def test_dense_texts_equal_lm_evals_own():
    found = measured(candidate(), "tiny_write")
    assert [sample["answers"] for sample in found.samples] == plain_answers("tiny_write")
    assert (found.metric, found.metrics, len(found.items)) == (
        "exact_match",
        {"exact_match": 0.0},
        3,
    )


def direct(context: tuple[int, ...], scored: tuple[int, ...]) -> float:
    """Log-probability from one plain forward."""
    with torch.no_grad():
        logits = loaded()[0](torch.tensor([[*context, *scored]])).logits[0, len(context) - 1 : -1]
    return -float(cross_entropy(logits.float(), torch.tensor(scored), reduction="sum"))


def test_dense_rolling_likelihood_equals_its_windows():
    how = options(prompt_tokens=40, scored_tokens=30)
    found = measured(candidate(), "tiny_roll", how)
    tokenizer = loaded()[1]
    totals = []
    for page in PAGES:
        ids = tuple(tokenizer(page["text"]).input_ids)
        total = direct((tokenizer.bos_token_id,), ids[:40])
        for start in range(40, len(ids), 30):
            total += direct(ids[start - 40 : start], ids[start : start + 30])
        totals.append(total)
    assert [sample["answers"][0][0] for sample in found.samples] == pytest.approx(totals, abs=1e-3)
    words = [len(page["text"].split()) for page in PAGES]
    for item, total, count in zip(found.items, totals, words, strict=True):
        assert item["tokens"] == pytest.approx(count, abs=1)  # lm-eval counts the empty end too
        assert item["mean_loss"] * item["tokens"] == pytest.approx(-total, abs=1e-3)
    assert (found.metric, found.higher_is_better) == ("word_perplexity", False)
    size = sum(len(page["text"].encode()) for page in PAGES)
    expected = torch.tensor(-sum(totals) / size).exp()
    assert found.metrics["byte_perplexity"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("length", "prompt", "scored"), [(1, 8, 8), (31, 8, 8), (32, 20, 7), (90, 8, 30)]
)
def test_rolling_windows_score_every_token_once(length, prompt, scored):
    text = list(range(100, 100 + length))
    pairs = rolling_pairs(text, 1, prompt, scored)
    assert [token for _, continuation in pairs for token in continuation] == text
    assert pairs[0][0] == (1,)
    assert (len(pairs) == 1) == (length < 32)
    position = len(pairs[0][1])
    for context, continuation in pairs[1:]:
        assert list(context) == text[max(0, position - prompt) : position]
        position += len(continuation)
    assert rolling_pairs([], 1, prompt, scored) == []


def test_rolling_texts_are_pruned_after_their_first_window():
    how = options(prompt_tokens=40, scored_tokens=30)
    found = measured(candidate("griffin"), "tiny_roll", how)
    lengths = [len(loaded()[1](page["text"]).input_ids) for page in PAGES]
    assert found.accounting["decoded_tokens"] == sum(lengths)
    assert found.accounting["dense_token_share"] == pytest.approx(80 / sum(lengths))
    assert found.accounting["achieved_sparsity"] == pytest.approx(0.5 * (1 - 80 / sum(lengths)))
    assert found.notes == ("1 context was scored dense: fewer than 16 tokens",)
    dense = measured(candidate(), "tiny_roll", how)
    assert all(
        abs(a["mean_loss"] - b["mean_loss"]) > 1e-3
        for a, b in zip(found.items, dense.items, strict=True)
    )


def test_a_text_too_short_for_masks_is_dense_and_says_so():
    found = measured(candidate("griffin"), "tiny_scrap")
    assert found.metrics == measured(candidate(), "tiny_scrap").metrics
    assert found.accounting["decoded_tokens"] == len(SCRAP[0]["text"])
    assert found.accounting["dense_token_share"] == 1.0
    assert found.notes == ("1 context was scored dense: fewer than 16 tokens",)


@pytest.mark.parametrize("protocol", ["decode", "full", "published"])
def test_pruned_scores_differ_from_dense_and_sparsity_0_does_not(protocol):
    how = options(protocol=protocol)
    dense = measured(candidate(), "tiny_choice", how)
    pruned = measured(candidate("griffin"), "tiny_choice", how)
    nothing = measured(candidate("griffin", 0.0), "tiny_choice", how)
    pairs = list(zip(logprobs(dense), logprobs(pruned), logprobs(nothing), strict=True))
    assert len(pairs) == 3 * len(QUESTIONS)
    assert all(abs(a - b) > 1e-2 for a, b, _ in pairs)
    assert [c for _, _, c in pairs] == pytest.approx([a for a, _, _ in pairs], abs=1e-4)
    assert (nothing.items, nothing.metrics) == (dense.items, dense.metrics)
    assert nothing.accounting["achieved_sparsity"] == 0.0
    assert (pruned.protocol, pruned.accounting["achieved_sparsity"]) == (protocol, 0.5)
    assert (LEAK in pruned.notes) == (protocol == "published")
    assert dense.notes == ()


def test_one_prompt_pass_per_context_and_one_batch_of_answers():
    size = [len(f"q: {row['question']}\na:") for row in QUESTIONS]
    widest = [max(len(choice) for choice in row["choices"]) + 1 for row in QUESTIONS]
    expected = [
        shape
        for length, width in zip(size, widest, strict=True)
        for shape in ((1, length - 1), (3, width))  # the last context token is fed with the answer
    ]
    for method in (None, "griffin"):
        with Forwards(loaded()[0]) as ran:
            measured(candidate(method), "tiny_choice")
        assert ran.shapes == expected
    with Forwards(loaded()[0]) as ran:
        measured(candidate("griffin"), "tiny_letters")
    assert [shape for shape in ran.shapes if shape[1] == 1] == [(1, 1)] * len(LETTERS)
    assert len(ran.shapes) == 2 * len(LETTERS)


def test_accounting_counts_decoded_tokens_exactly():
    answers = sum(len(choice) + 1 for row in QUESTIONS for choice in row["choices"])  # " answer"
    found = measured(candidate("griffin"), "tiny_choice").accounting
    assert (found["decoded_tokens"], answers) == (93, 93)
    assert (found["dense_token_share"], found["remasks"]) == (0.0, 0)
    assert found["prompt_tokens"] == sum(len(f"q: {row['question']}\na:") - 1 for row in QUESTIONS)
    assert "sequences" not in found
    letters = measured(candidate("griffin"), "tiny_letters").accounting
    assert letters["decoded_tokens"] == len(LETTERS)  # four letters after one token
    contexts = sum(len(f"q: {row['question']}\na:") * 3 for row in QUESTIONS)
    full = measured(candidate("griffin"), "tiny_choice", options(protocol="full")).accounting
    assert full["decoded_tokens"] == contexts + answers - 3 * len(QUESTIONS)
    texts = measured(candidate("griffin"), "tiny_write")
    tokens = [len(sample["answers"][0][0]) for sample in texts.samples]
    stopped = [count < 10 for count in tokens]  # the line end that stops a text is a token too
    assert texts.accounting["decoded_tokens"] == sum(tokens) + sum(stopped) - len(WRITING)


def test_batch_size_changes_nothing():
    for protocol in ("decode", "full"):
        one, eight = (
            measured(candidate("dart"), "tiny_choice", options(protocol=protocol, batch_size=size))
            for size in (1, 8)
        )
        assert logprobs(one) == pytest.approx(logprobs(eight), abs=1e-4)
        assert one.accounting["decoded_tokens"] == eight.accounting["decoded_tokens"]
        assert one.masks == eight.masks == len(QUESTIONS)


def test_short_contexts_are_dense_and_counted():
    found = measured(candidate("griffin"), "tiny_short")
    dense = measured(candidate(), "tiny_short")
    assert logprobs(found)[:2] == pytest.approx(logprobs(dense)[:2], abs=1e-6)
    assert all(
        abs(a - b) > 1e-3 for a, b in zip(logprobs(found)[2:], logprobs(dense)[2:], strict=True)
    )
    short = len(" duck") + len(" dog")
    long = sum(len(choice) + 1 for choice in QUESTIONS[1]["choices"])
    assert found.accounting["decoded_tokens"] == short + long
    assert found.accounting["dense_token_share"] == pytest.approx(short / (short + long))
    assert found.accounting["achieved_sparsity"] == pytest.approx(0.5 * long / (short + long))
    assert found.accounting["sparsity_while_pruned"] == pytest.approx(0.5)
    assert found.notes == ("1 context was scored dense: fewer than 16 tokens",)


def test_an_item_that_ran_dense_although_pruning_was_asked_for_is_refused():
    with pytest.raises(ConfigError, match=r"griffin@0.5: all \d+ scored tokens .* ran dense"):
        measured(candidate("griffin", min_evidence=500), "tiny_write")


def test_notes_say_that_likelihood_tasks_choose_masks_at_once():
    note = (
        "likelihood tasks: masks at once and no re-mask (masking_step 0, min_evidence 0, "
        "drift never)"
    )
    assert measured(candidate("dart"), "tiny_choice").notes == (note,)
    assert measured(candidate("griffin"), "tiny_choice").notes == ()
    assert note not in measured(candidate("dart"), "tiny_roll").notes  # detectors are live there
    writes = measured(candidate("dart", min_evidence=4), "tiny_write")
    assert writes.notes == ()


def test_masks_are_counted_once_per_context():
    for protocol in ("decode", "full"):
        found = measured(candidate("griffin"), "tiny_choice", options(protocol=protocol))
        assert found.masks == len(QUESTIONS)
        assert len(found.counts) == LAYERS
        assert [int(c.sum()) for c in found.counts] == [len(QUESTIONS) * WIDTH // 2] * LAYERS
    leaking = measured(candidate("griffin"), "tiny_choice", options(protocol="published"))
    assert leaking.masks == 3 * len(QUESTIONS)


def test_generation_under_the_protocols():
    dense = measured(candidate(), "tiny_write")
    decode = measured(candidate("griffin"), "tiny_write")
    full = measured(candidate("griffin"), "tiny_write", options(protocol="full"))
    texts = [[s["answers"][0][0] for s in found.samples] for found in (dense, decode, full)]
    assert texts[0] != texts[1] and texts[1] != texts[2]
    # the first token comes from the prompt's logits: dense under decode
    assert [text[:1] for text in texts[0]] == [text[:1] for text in texts[1]]
    prompts = sum(len(f"q: {row['question']}\na:") for row in WRITING)
    assert decode.accounting["prompt_tokens"] == prompts
    assert full.accounting["decoded_tokens"] > prompts
    assert full.accounting["achieved_sparsity"] == pytest.approx(0.5)
    for found in (decode, full):
        assert found.masks == len(WRITING)
    nothing = measured(candidate("griffin", 0.0), "tiny_write", options(protocol="full"))
    assert [s["answers"][0][0] for s in nothing.samples] == texts[0]


def test_samples_that_are_drawn_differ_and_are_drawn_again_alike():
    first, second = (measured(candidate("griffin"), "tiny_draw") for _ in range(2))
    drawn = [sample["answers"][0] for sample in first.samples]
    assert all(len(set(texts)) == 3 for texts in drawn)
    assert drawn == [sample["answers"][0] for sample in second.samples]
    assert first.masks == 3 * len(WRITING)
    other = measured(candidate("griffin"), "tiny_draw", options(seed=1))
    assert drawn != [sample["answers"][0] for sample in other.samples]


def test_a_group_has_subtasks_and_an_overall_number():
    found = measured(candidate("griffin"), "tiny_group")
    parts = {name: measured(candidate("griffin"), name) for name in ("tiny_choice", "tiny_letters")}
    assert found.subtasks == {name: dict(part.metrics) for name, part in parts.items()}
    assert found.items == tuple(item for part in parts.values() for item in part.items)
    right = sum(item["acc"] for item in found.items)
    assert found.metrics == {"acc": right / (len(QUESTIONS) + len(LETTERS))}
    assert found.accounting["decoded_tokens"] == 93 + len(LETTERS)
    assert found.task == "tiny_group"


def test_progress_goes_by_documents():
    for task, total in (("tiny_choice", 4), ("tiny_group", 9), ("tiny_roll", 2), ("tiny_write", 3)):
        steps: list[int] = []
        measured(candidate("griffin"), task, advance=steps.append)
        assert sum(steps) == total == harness.count(task, options())
        assert min(steps) == 1


def test_a_measurement_is_json_with_finite_numbers():
    found = measured(candidate("griffin"), "tiny_group")
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["accounting"]["decoded_tokens"] == 98
    json.dumps(list(found.samples), allow_nan=False)
