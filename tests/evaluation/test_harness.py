"""lm-eval's tasks through our path: as lm-eval's own model, pruned; names, limits, refusals."""

import functools
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import lm_cases
from dart_llm.data.datasets import MMLU_SUBJECTS
from dart_llm.errors import ConfigError, LoadError, UnknownName
from dart_llm.evaluation import lm_eval as harness
from dart_llm.evaluation.measurement import LEAK, MeasureOptions
from dart_llm.evaluation.tasks import GENERAL_NLP, expand, specifications
from dart_llm.experiments import comparison
from dart_llm.session.run import BoundMethod
from lm_cases import QUESTIONS, candidate, loaded, logprobs, measured, options, place


@functools.cache
def plain(task, **how):
    """lm-eval with its own Hugging Face model, at batch 8."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    tasks = harness._load(task, options(**how))
    harness._configure(tasks["tasks"], task, options(**how))
    model, tokenizer = loaded()
    with harness._no_bars():
        hflm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        return evaluate(hflm, tasks, bootstrap_iters=0, log_samples=True)


@pytest.mark.parametrize(
    ("task", "how"), [("tiny_short", {}), ("tiny_group", {}), ("tiny_choice", {"num_fewshot": 2})]
)
def test_dense_likelihoods_equal_lm_evals_own(task, how):
    ours, theirs = measured(candidate(), task, options(**how)), plain(task, **how)
    leaves = theirs["samples"]
    samples = [(leaf, sample) for leaf in leaves for sample in leaves[leaf]]
    expected = [answer[0] for _, sample in samples for answer in sample["resps"]]
    assert logprobs(ours) == pytest.approx([prob for prob, _ in expected], abs=1e-4)
    greedy = [answer[0][1] for sample in ours.samples for answer in sample["answers"]]
    assert greedy == [flag for _, flag in expected]
    for leaf in leaves:
        metrics = ours.subtasks[leaf] if len(leaves) > 1 else ours.metrics
        results = theirs["results"][leaf].items()
        expected = {name: v for name, v in results if name.endswith(",none")}
        expected = {name: v for name, v in expected.items() if "stderr" not in name}
        assert {f"{name},none": value for name, value in metrics.items()} == expected
    items = [(f"{leaf}/{sample['doc_id']}", sample["acc"]) for leaf, sample in samples]
    assert [(item["id"], item["acc"]) for item in ours.items] == items


def direct(context, scored):
    with torch.no_grad():
        logits = loaded()[0](torch.tensor([[*context, *scored]])).logits[0, len(context) - 1 : -1]
    return -float(cross_entropy(logits.float(), torch.tensor(scored), reduction="sum"))


def test_rolling_likelihoods_are_those_of_their_windows_and_pruned_after_the_first():
    how = options(prompt_tokens=40, scored_tokens=30)
    dense, tokenizer = measured(candidate(), "tiny_roll", how), loaded()[1]
    every, totals = [tuple(tokenizer(page["text"]).input_ids) for page in lm_cases.PAGES], []
    for ids in every:
        total = direct((tokenizer.bos_token_id,), ids[:40])
        for start in range(40, len(ids), 30):
            total += direct(ids[start - 40 : start], ids[start : start + 30])
        totals.append(total)
    assert [sample["answers"][0][0] for sample in dense.samples] == pytest.approx(totals, abs=1e-3)
    for item, total in zip(dense.items, totals, strict=True):
        assert item["mean_loss"] * item["tokens"] == pytest.approx(-total, abs=1e-3)
    assert (dense.metric, dense.higher_is_better) == ("word_perplexity", False)
    size = sum(len(page["text"].encode()) for page in lm_cases.PAGES)
    assert dense.metrics["byte_perplexity"] == pytest.approx(math.exp(-sum(totals) / size), 1e-4)
    pruned, length = measured(candidate("griffin"), "tiny_roll", how), sum(map(len, every))
    assert pruned.accounting["decoded_tokens"] == length
    assert pruned.accounting["dense_token_share"] == pytest.approx(80 / length)
    assert pruned.accounting["achieved_sparsity"] == pytest.approx(0.5 * (1 - 80 / length))
    assert pruned.notes == ("1 context was scored dense: fewer than 16 tokens",)


@pytest.mark.parametrize("protocol", ["decode", "full", "published"])
def test_pruned_scores_differ_from_dense_and_are_counted(protocol):
    how = options(protocol=protocol)
    dense, pruned = (measured(candidate(x), "tiny_choice", how) for x in (None, "griffin"))
    pairs = list(zip(logprobs(dense), logprobs(pruned), strict=True))
    assert len(pairs) == 3 * len(QUESTIONS) and all(abs(a - b) > 1e-2 for a, b in pairs)
    assert measured(candidate("griffin", 0.0), "tiny_choice", how).items == dense.items
    assert (pruned.protocol, pruned.accounting["achieved_sparsity"]) == (protocol, 0.5)
    assert dense.notes == () and (LEAK in pruned.notes) == (protocol == "published")
    single = measured(candidate("griffin"), "tiny_choice", options(protocol=protocol, batch_size=1))
    assert logprobs(single) == pytest.approx(logprobs(pruned), abs=1e-4)
    contexts = [len(f"q: {row['question']}\na:") - 1 for row in QUESTIONS]
    answers = sum(len(choice) + 1 for row in QUESTIONS for choice in row["choices"])  # " answer"
    tokens = answers + (0 if protocol == "decode" else 3 * sum(contexts))
    for accounting in (pruned.accounting, single.accounting):
        assert (accounting["decoded_tokens"], accounting["dense_token_share"]) == (tokens, 0.0)


def test_notes_and_an_item_that_ran_dense_although_pruning_was_asked_for():
    at_once = "likelihood tasks: masks right after the context, never re-masked "
    at_once += "(masking_step 0, min_evidence 0, drift never)"
    assert measured(candidate("dart"), "tiny_choice").notes == (at_once,)
    assert at_once not in measured(candidate("dart"), "tiny_roll").notes  # detectors are live there
    assert measured(candidate("dart", min_evidence=4), "tiny_write").notes == ()
    with pytest.raises(ConfigError, match=r"griffin@0.5: all \d+ scored tokens .* ran dense"):
        measured(candidate("griffin", min_evidence=500), "tiny_write")


def texts(measurement):
    return [sample["answers"][0] for sample in measurement.samples]


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
    prompts = sum(len(f"q: {row['question']}\na:") for row in lm_cases.WRITING)
    assert decode.accounting["prompt_tokens"] == prompts
    assert full.accounting["decoded_tokens"] > prompts
    assert full.accounting["achieved_sparsity"] == pytest.approx(0.5)
    first, second = (measured(candidate("griffin"), "tiny_draw") for _ in range(2))
    assert all(len(set(drawn)) == 3 for drawn in texts(first))  # drawn, and drawn again alike
    assert texts(first) == texts(second)
    assert texts(first) != texts(measured(candidate("griffin"), "tiny_draw", options(seed=1)))


def test_a_group_has_subtasks_and_means_over_all_documents_where_tasks_have_means():
    group = measured(candidate("griffin"), "tiny_group")
    parts = {name: measured(candidate("griffin"), name) for name in ("tiny_choice", "tiny_letters")}
    assert group.subtasks == {name: dict(part.metrics) for name, part in parts.items()}
    assert group.items == tuple(item for part in parts.values() for item in part.items)
    right = sum(item["acc"] for item in group.items)
    assert group.metrics == {"acc": right / (len(QUESTIONS) + len(lm_cases.LETTERS))}
    pages = measured(candidate(), "tiny_pages")  # the perplexity is that of all words
    words = sum(item["tokens"] for item in pages.items)
    loss = math.fsum(item["mean_loss"] * item["tokens"] for item in pages.items) / words
    assert pages.metrics == {"word_perplexity": pytest.approx(math.exp(loss))}
    assert comparison.scores(pages.to_dict()).mean == pytest.approx(math.exp(loss))
    by_bytes = measured(candidate(), "tiny_bytes")
    mean = comparison.scores(by_bytes.to_dict()).mean
    assert mean == pytest.approx(by_bytes.metrics["byte_perplexity"])
    lasts = measured(candidate("griffin"), "tiny_lasts")  # no mean of perplexities
    assert lasts.metrics == {"acc": sum(item["acc"] for item in lasts.items) / len(lasts.items)}


@pytest.fixture
def local_mmlu(tmp_path, monkeypatch):
    """``datasets/mmlu`` in the current folder: anatomy with 3 questions, astronomy with 5."""
    folder = tmp_path / "datasets/mmlu"
    folder.mkdir(parents=True)
    for subject, size in (("anatomy", 3), ("astronomy", 5)):
        for split, count in (("test", size), ("dev", 5)):
            rows = []
            for number in range(count):
                question = f" {split} question {number} of {subject} "
                choices = [f"choice {letter}{number}" for letter in "pqrs"]
                rows.append({"question": question, "choices": choices, "answer": number % 4})
            lm_cases.write_rows(folder / f"{subject}_{split}.jsonl", rows)
    place()
    monkeypatch.chdir(tmp_path)
    harness._load.cache_clear()  # the same names, other files
    yield folder
    harness._load.cache_clear()


def test_names_and_what_lm_eval_is_given(local_mmlu):
    assert expand(["general-nlp"]) == list(GENERAL_NLP)
    names = ["rte", "general-nlp", "mmlu", "rte"]
    assert expand(names) == ["rte", "boolq", *GENERAL_NLP[2:], "mmlu"]
    with pytest.raises(ConfigError, match="--tasks"):
        expand([])
    with pytest.raises(UnknownName, match="did you mean mmlu_astronomy"):
        harness.check("mmlu:astronomi", str(place() / "tasks"))
    known = set(harness._manager(str(place() / "tasks")).all_tasks)
    assert {*expand(["general-nlp", "gpqa", "medmcqa", "mmlu"])} <= known
    assert {f"mmlu_{subject}" for subject in MMLU_SUBJECTS} <= known
    assert specifications("arc_easy") == ["arc_easy"]
    mmlu = [task["task"] for task in specifications("mmlu")]
    assert mmlu == ["mmlu_anatomy", "mmlu_astronomy"]


def test_mmlu_over_local_files_by_subject_and_overall(local_mmlu):
    measurement = measured(candidate("griffin"), "mmlu")
    sizes = {"mmlu_anatomy": 3, "mmlu_astronomy": 5}
    every = [f"{name}/{n}" for name, size in sizes.items() for n in range(size)]
    assert [item["id"] for item in measurement.items] == every
    right = {name: [] for name in sizes}
    for sample, item in zip(measurement.samples, measurement.items, strict=True):
        values = [answer[0][0] for answer in sample["answers"]]
        name, _, number = item["id"].partition("/")
        assert item["acc"] == float(values.index(max(values)) == int(number) % 4)
        right[name].append(item["acc"])
    for name, values in right.items():
        assert measurement.subtasks[name] == {"acc": pytest.approx(sum(values) / sizes[name])}
    assert measurement.metrics == {"acc": pytest.approx(sum(map(sum, right.values())) / 8)}
    assert measurement.accounting["decoded_tokens"] == 2 * 8  # " A" is two letters, shared by four
    assert measurement.notes[-1] == "mmlu: 2 of its 57 subjects, those in datasets/mmlu"
    context, answer = measurement.samples[1]["arguments"][2]
    assert context == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "test question 1 of anatomy\n"
        "A. choice p1\nB. choice q1\nC. choice r1\nD. choice s1\nAnswer:"
    )
    assert answer == " C"
    limited = measured(candidate(), "mmlu", options(limit=4))  # per subject
    assert [item["id"] for item in limited.items] == every[:7]


def test_few_shot_examples_come_from_dev_and_never_from_test(local_mmlu):
    for shots in (0, 2, 5):
        for sample in measured(candidate(), "mmlu", options(num_fewshot=shots)).samples:
            subject = sample["id"].partition("/")[0].removeprefix("mmlu_")
            context = sample["arguments"][0][0]
            dev = [context.find(f"dev question {n} of {subject}") for n in range(5)]
            assert dev == sorted(dev[:shots]) + [-1] * (5 - shots) and -1 not in dev[:shots]
            assert context.count("test question") == 1
            assert context.count("Answer:") == shots + 1
            # with the right answer: that of question 1 is B
            assert not shots or "Answer: A\n\ndev question 1" in context


def contexts(who=None, **how):
    measurement = measured(who or candidate(), "tiny_choice", options(**how))
    return [sample["arguments"][0][0] for sample in measurement.samples]


def test_few_shot_examples_are_those_of_the_task_and_a_task_of_0_takes_none():
    for shots in (0, 1, 2):
        context = contexts(num_fewshot=shots)[0]
        assert [row["question"] in context for row in lm_cases.EXAMPLES] == [shots > 0, shots > 1]
    task = harness._load("tiny_choice", options(num_fewshot=1))["tasks"]["tiny_choice"]
    for default, asked in ((0, 0), (3, 1)):
        task.set_config(key="num_fewshot", value=default)
        harness._configure({"tiny_choice": task}, "tiny_choice", options(num_fewshot=1))
        assert task.get_config("num_fewshot") == asked
    harness._load.cache_clear()


def test_a_random_choice_of_documents_is_fixed_by_its_seed():
    def ids(**how):
        return [item["id"] for item in measured(candidate(), "tiny_choice", options(**how)).items]

    every = [f"tiny_choice/{n}" for n in range(len(QUESTIONS))]
    assert ids(limit=2) == every[:2]
    drawn = [ids(limit=2, sample_seed=seed) for seed in range(6)]
    assert drawn == [ids(limit=2, sample_seed=seed) for seed in range(6)]
    assert len({tuple(names) for names in drawn}) > 1 and {len(names) for names in drawn} == {2}
    assert ids(limit=9, sample_seed=1) == every
    seed, chosen = next((n, names) for n, names in enumerate(drawn) if names != every[:2])
    scores = measured(candidate(), "tiny_choice", options(limit=2, sample_seed=seed))
    whole = logprobs(measured(candidate(), "tiny_choice"))
    expected = [whole[3 * every.index(names) + i] for names in chosen for i in range(3)]
    assert logprobs(scores) == expected  # the numbers belong to the documents they name


def test_the_chat_template_wraps_contexts():
    chatty = BoundMethod(*loaded("chatty"), None)
    context = f"[user] q: {QUESTIONS[0]['question']}\na:\n[assistant] "
    assert contexts(who=chatty, apply_chat_template=True)[0] == context
    shots = contexts(who=chatty, apply_chat_template=True, num_fewshot=1)[0]
    assert shots == f"[user] q: {lm_cases.EXAMPLES[0]['question']}\na:\n[assistant] ice\n{context}"
    with pytest.raises(ConfigError, match="no chat template"):
        contexts(apply_chat_template=True)


REFUSED = (
    ("tiny_choise", UnknownName, "unknown task 'tiny_choise'; did you mean tiny_choice"),
    ("qqqqqqqqqqqqqq", UnknownName, r"none of the \d+ known names is similar: check the spelling$"),
    ("tiny_lost", LoadError, r"task tiny_lost .*tiny_lost\.jsonl.* correct the task file"),
    ("openbookqa", LoadError, r"task openbookqa .* without the hub: give --include-path"),
    ("tiny_wrong", (ConfigError, LoadError), "tiny_wrong"),  # a column that does not exist
    ("mmlu:virology", LoadError, r"'cais/mmlu' .* put <subject>_test.jsonl into datasets/"),
)


def test_tasks_that_cannot_be_measured():
    for task, kind, words in REFUSED:
        with pytest.raises(kind, match=words):
            measured(candidate(), task)
    with pytest.raises(ConfigError, match="--include-path no/such is not a folder"):
        harness.count("arc_easy", MeasureOptions(include_path="no/such"))
