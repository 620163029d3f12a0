"""Names of lm-eval tasks: shortcuts, MMLU over local files, few-shot examples, limits, refusals."""

import pytest

from dart_llm.data.datasets import MMLU_SUBJECTS
from dart_llm.errors import ConfigError, LoadError, UnknownName
from dart_llm.evaluation import lm_eval as harness
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.tasks import GENERAL_NLP, expand, specifications
from dart_llm.session.run import BoundMethod
from lm_cases import (
    EXAMPLES,
    QUESTIONS,
    candidate,
    loaded,
    logprobs,
    measured,
    options,
    place,
    write_rows,
)


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
            write_rows(folder / f"{subject}_{split}.jsonl", rows)
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
    assert [one["task"] for one in specifications("mmlu")] == ["mmlu_anatomy", "mmlu_astronomy"]


def test_mmlu_over_local_files_by_subject_and_overall(local_mmlu):
    found = measured(candidate("griffin"), "mmlu")
    sizes = {"mmlu_anatomy": 3, "mmlu_astronomy": 5}
    every = [f"{name}/{n}" for name, size in sizes.items() for n in range(size)]
    assert [item["id"] for item in found.items] == every
    right = {name: [] for name in sizes}
    for sample, item in zip(found.samples, found.items, strict=True):
        values = [answer[0][0] for answer in sample["answers"]]
        name, _, number = item["id"].partition("/")
        assert item["acc"] == float(values.index(max(values)) == int(number) % 4)
        right[name].append(item["acc"])
    for name, values in right.items():
        assert found.subtasks[name] == {"acc": pytest.approx(sum(values) / sizes[name])}
    assert found.metrics == {"acc": pytest.approx(sum(map(sum, right.values())) / 8)}
    assert found.accounting["decoded_tokens"] == 2 * 8  # " A" is two letters, shared by four
    assert found.notes[-1] == "mmlu: 2 of its 57 subjects, those in datasets/mmlu"
    context, answer = found.samples[1]["arguments"][2]
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


def contexts(task="tiny_choice", who=None, **how):
    found = measured(who or candidate(), task, options(**how))
    return [sample["arguments"][0][0] for sample in found.samples]


def test_few_shot_examples_are_those_of_the_task_and_a_task_of_0_takes_none():
    for shots in (0, 1, 2):
        context = contexts(num_fewshot=shots)[0]
        assert [row["question"] in context for row in EXAMPLES] == [shots > 0, shots > 1]
    task = harness._load("tiny_choice", options(num_fewshot=1))["tasks"]["tiny_choice"]
    for own, asked in ((0, 0), (3, 1)):
        task.set_config(key="num_fewshot", value=own)
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
    assert len({tuple(one) for one in drawn}) > 1 and {len(one) for one in drawn} == {2}
    assert ids(limit=9, sample_seed=1) == every
    seed, chosen = next((n, one) for n, one in enumerate(drawn) if one != every[:2])
    scores = measured(candidate(), "tiny_choice", options(limit=2, sample_seed=seed))
    whole = logprobs(measured(candidate(), "tiny_choice"))
    expected = [whole[3 * every.index(one) + i] for one in chosen for i in range(3)]
    assert logprobs(scores) == expected  # the numbers belong to the documents they name


def test_the_chat_template_wraps_contexts():
    chatty = BoundMethod(*loaded("chatty"), None)
    context = f"[user] q: {QUESTIONS[0]['question']}\na:\n[assistant] "
    assert contexts(who=chatty, apply_chat_template=True)[0] == context
    shots = contexts(who=chatty, apply_chat_template=True, num_fewshot=1)[0]
    assert shots == f"[user] q: {EXAMPLES[0]['question']}\na:\n[assistant] ice\n{context}"
    with pytest.raises(ConfigError, match="no chat template"):
        contexts(apply_chat_template=True)


REFUSED = (
    ("tiny_choise", UnknownName, "unknown task 'tiny_choise'; did you mean tiny_choice"),
    ("qqqqqqqqqqqqqq", UnknownName, r"none of the \d+ known ones is like it: correct the name$"),
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
