"""lm-eval's tasks through our path: dense as lm-eval's own model, different when pruned."""

import functools
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from dart_llm.errors import ConfigError
from dart_llm.evaluation import lm_eval as harness
from dart_llm.evaluation.measurement import LEAK
from dart_llm.experiments import comparison
from lm_cases import (
    LETTERS,
    PAGES,
    QUESTIONS,
    WRITING,
    candidate,
    loaded,
    logprobs,
    measured,
    options,
)

AT_ONCE = (
    "likelihood tasks: masks at once and no re-mask (masking_step 0, min_evidence 0, drift never)"
)
SHORT = "1 context was scored dense: fewer than 16 tokens"


@functools.cache
def plain(task, **how):
    """lm-eval with its own Hugging Face model, at batch 8."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    asked = options(**how)
    tasks = harness._load(task, asked)
    harness._configure(tasks["tasks"], task, asked)
    model, tokenizer = loaded()
    with harness._no_bars():
        own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        return evaluate(own, tasks, bootstrap_iters=0, log_samples=True)


@pytest.mark.parametrize(
    ("task", "how"), [("tiny_short", {}), ("tiny_group", {}), ("tiny_choice", {"num_fewshot": 2})]
)
def test_dense_likelihoods_equal_lm_evals_own(task, how):
    found, own = measured(candidate(), task, options(**how)), plain(task, **how)
    leaves = list(own["samples"])
    samples = [sample for leaf in leaves for sample in own["samples"][leaf]]
    expected = [answer[0] for sample in samples for answer in sample["resps"]]
    assert logprobs(found) == pytest.approx([prob for prob, _ in expected], abs=1e-4)
    greedy = [answer[0][1] for sample in found.samples for answer in sample["answers"]]
    assert greedy == [flag for _, flag in expected]
    for leaf in leaves:
        metrics = found.subtasks[leaf] if len(leaves) > 1 else found.metrics
        assert {f"{name},none": value for name, value in metrics.items()} == {
            name: value
            for name, value in own["results"][leaf].items()
            if name.endswith(",none") and "stderr" not in name
        }
    assert [item["acc"] for item in found.items] == [sample["acc"] for sample in samples]
    names = [f"{leaf}/{sample['doc_id']}" for leaf in leaves for sample in own["samples"][leaf]]
    assert [item["id"] for item in found.items] == names


def direct(context, scored):
    with torch.no_grad():
        logits = loaded()[0](torch.tensor([[*context, *scored]])).logits[0, len(context) - 1 : -1]
    return -float(cross_entropy(logits.float(), torch.tensor(scored), reduction="sum"))


def test_rolling_likelihoods_are_those_of_their_windows_and_pruned_after_the_first():
    how = options(prompt_tokens=40, scored_tokens=30)
    found, tokenizer = measured(candidate(), "tiny_roll", how), loaded()[1]
    every, totals = [tuple(tokenizer(page["text"]).input_ids) for page in PAGES], []
    for ids in every:
        total = direct((tokenizer.bos_token_id,), ids[:40])
        for start in range(40, len(ids), 30):
            total += direct(ids[start - 40 : start], ids[start : start + 30])
        totals.append(total)
    assert [sample["answers"][0][0] for sample in found.samples] == pytest.approx(totals, abs=1e-3)
    for item, total in zip(found.items, totals, strict=True):
        assert item["mean_loss"] * item["tokens"] == pytest.approx(-total, abs=1e-3)
    assert (found.metric, found.higher_is_better) == ("word_perplexity", False)
    size = sum(len(page["text"].encode()) for page in PAGES)
    assert found.metrics["byte_perplexity"] == pytest.approx(math.exp(-sum(totals) / size), 1e-4)
    pruned, length = measured(candidate("griffin"), "tiny_roll", how), sum(map(len, every))
    assert pruned.accounting["decoded_tokens"] == length
    assert pruned.accounting["dense_token_share"] == pytest.approx(80 / length)
    assert pruned.accounting["achieved_sparsity"] == pytest.approx(0.5 * (1 - 80 / length))
    assert pruned.notes == (SHORT,)


@pytest.mark.parametrize("protocol", ["decode", "full", "published"])
def test_pruned_scores_differ_from_dense_and_are_counted(protocol):
    how = options(protocol=protocol)
    dense, pruned = (measured(candidate(x), "tiny_choice", how) for x in (None, "griffin"))
    pairs = list(zip(logprobs(dense), logprobs(pruned), strict=True))
    assert len(pairs) == 3 * len(QUESTIONS) and all(abs(a - b) > 1e-2 for a, b in pairs)
    assert measured(candidate("griffin", 0.0), "tiny_choice", how).items == dense.items
    assert (pruned.protocol, pruned.accounting["achieved_sparsity"]) == (protocol, 0.5)
    assert dense.notes == () and (LEAK in pruned.notes) == (protocol == "published")
    one = measured(candidate("griffin"), "tiny_choice", options(protocol=protocol, batch_size=1))
    assert logprobs(one) == pytest.approx(logprobs(pruned), abs=1e-4)
    contexts = [len(f"q: {row['question']}\na:") - 1 for row in QUESTIONS]
    answers = sum(len(choice) + 1 for row in QUESTIONS for choice in row["choices"])  # " answer"
    tokens = answers + (0 if protocol == "decode" else 3 * sum(contexts))
    for found in (pruned.accounting, one.accounting):
        assert (found["decoded_tokens"], found["dense_token_share"]) == (tokens, 0.0)


def test_notes_and_an_item_that_ran_dense_although_pruning_was_asked_for():
    assert measured(candidate("dart"), "tiny_choice").notes == (AT_ONCE,)
    assert AT_ONCE not in measured(candidate("dart"), "tiny_roll").notes  # detectors are live there
    assert measured(candidate("dart", min_evidence=4), "tiny_write").notes == ()
    with pytest.raises(ConfigError, match=r"griffin@0.5: all \d+ scored tokens .* ran dense"):
        measured(candidate("griffin", min_evidence=500), "tiny_write")


def texts(found):
    return [sample["answers"][0] for sample in found.samples]


def test_texts_are_lm_evals_own_and_pruned_as_the_protocol_says():
    dense = measured(candidate(), "tiny_write")
    assert [[text] for text in texts(dense)] == [
        sample["resps"] for sample in plain("tiny_write")["samples"]["tiny_write"]
    ]
    decode = measured(candidate("griffin"), "tiny_write")
    full = measured(candidate("griffin"), "tiny_write", options(protocol="full"))
    assert texts(dense) != texts(decode) and texts(decode) != texts(full)
    # the first token comes from the prompt's logits: dense under decode
    assert [text[0][:1] for text in texts(dense)] == [text[0][:1] for text in texts(decode)]
    prompts = sum(len(f"q: {row['question']}\na:") for row in WRITING)
    assert decode.accounting["prompt_tokens"] == prompts
    assert full.accounting["decoded_tokens"] > prompts
    assert full.accounting["achieved_sparsity"] == pytest.approx(0.5)
    first, second = (measured(candidate("griffin"), "tiny_draw") for _ in range(2))
    assert all(len(set(drawn)) == 3 for drawn in texts(first))  # drawn, and drawn again alike
    assert texts(first) == texts(second)
    assert texts(first) != texts(measured(candidate("griffin"), "tiny_draw", options(seed=1)))


def test_a_group_has_subtasks_and_means_over_all_documents_where_tasks_have_means():
    found = measured(candidate("griffin"), "tiny_group")
    parts = {name: measured(candidate("griffin"), name) for name in ("tiny_choice", "tiny_letters")}
    assert found.subtasks == {name: dict(part.metrics) for name, part in parts.items()}
    assert found.items == tuple(item for part in parts.values() for item in part.items)
    right = sum(item["acc"] for item in found.items)
    assert found.metrics == {"acc": right / (len(QUESTIONS) + len(LETTERS))}
    pages = measured(candidate(), "tiny_pages")  # the perplexity is that of all words
    words = sum(item["tokens"] for item in pages.items)
    loss = math.fsum(item["mean_loss"] * item["tokens"] for item in pages.items) / words
    assert pages.metrics == {"word_perplexity": pytest.approx(math.exp(loss))}
    assert comparison.scores(pages.to_dict()).mean == pytest.approx(math.exp(loss))
    own = measured(candidate(), "tiny_bytes")
    mean = comparison.scores(own.to_dict()).mean
    assert mean == pytest.approx(own.metrics["byte_perplexity"])
    lasts = measured(candidate("griffin"), "tiny_lasts")  # no mean of perplexities
    assert lasts.metrics == {"acc": sum(item["acc"] for item in lasts.items) / len(lasts.items)}
