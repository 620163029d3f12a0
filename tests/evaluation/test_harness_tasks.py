"""Names of lm-eval tasks: shortcuts, MMLU over local files, near names, data that is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from dart_llm.data.datasets import MMLU_SUBJECTS
from dart_llm.errors import ConfigError, LoadError, UnknownName
from dart_llm.evaluation import lm_eval as harness
from dart_llm.evaluation.task_names import GENERAL_NLP, expand, mmlu_name, specifications
from lm_cases import (
    CHOICE,
    EXAMPLES,
    QUESTIONS,
    candidate,
    loaded,
    logprobs,
    measured,
    options,
    place,
    write_rows,
    write_task,
)

SUBJECTS = ("anatomy", "astronomy")


def mmlu_rows(subject: str, split: str, count: int) -> list[dict[str, object]]:
    return [
        {
            "question": f" {split} question {number} of {subject} ",
            "choices": [f"choice {letter}{number}" for letter in "pqrs"],
            "answer": number % 4,
        }
        for number in range(count)
    ]


@pytest.fixture
def local_mmlu(tmp_path, monkeypatch) -> Path:
    """``datasets/mmlu`` in the current folder: anatomy with 3 questions, astronomy with 5."""
    folder = tmp_path / "datasets/mmlu"
    folder.mkdir(parents=True)
    for subject, size in zip(SUBJECTS, (3, 5), strict=True):
        write_rows(folder / f"{subject}_test.jsonl", mmlu_rows(subject, "test", size))
        write_rows(folder / f"{subject}_dev.jsonl", mmlu_rows(subject, "dev", 5))
    place()
    monkeypatch.chdir(tmp_path)
    harness._load.cache_clear()  # the same names, other files
    yield folder
    harness._load.cache_clear()


def test_shortcuts_expand_in_order_and_once():
    assert GENERAL_NLP == (
        "boolq",
        "rte",
        "hellaswag",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
    )
    assert expand("general-nlp") == list(GENERAL_NLP)
    assert expand(" rte , general-nlp,mmlu,rte") == ["rte", "boolq", *GENERAL_NLP[2:], "mmlu"]
    assert expand("gpqa,medmcqa") == ["gpqa_main_n_shot", "medmcqa"]
    with pytest.raises(ConfigError, match="--tasks"):
        expand(" , ")


def test_every_shortcut_is_known_to_lm_eval():
    known = harness._manager(str(place() / "tasks")).all_tasks
    assert set(expand("general-nlp,gpqa,medmcqa,mmlu")) <= set(known)
    assert {f"mmlu_{subject}" for subject in MMLU_SUBJECTS} <= set(known)


def test_mmlu_names():
    assert mmlu_name("all") == mmlu_name(" ") == "mmlu"
    assert mmlu_name("astronomy, mmlu_anatomy") == "mmlu:astronomy+anatomy"
    with pytest.raises(UnknownName, match="did you mean astronomy"):
        mmlu_name("astronomi")


def test_specifications(local_mmlu, tmp_path):
    assert specifications("arc_easy") == ["arc_easy"]
    assert [one["task"] for one in specifications("mmlu")] == ["mmlu_anatomy", "mmlu_astronomy"]
    mixed = specifications("mmlu:virology+anatomy")
    assert (mixed[0], mixed[1]["task"]) == ("mmlu_virology", "mmlu_anatomy")
    assert specifications("mmlu", tmp_path / "nothing") == ["mmlu"]
    (local_mmlu / "anatomy_dev.jsonl").unlink()
    assert "fewshot_split" not in specifications("mmlu:anatomy")[0]


def test_mmlu_over_local_files_by_subject_and_overall(local_mmlu):
    found = measured(candidate("griffin"), "mmlu")
    assert list(found.subtasks) == ["mmlu_anatomy", "mmlu_astronomy"]
    assert [item["id"] for item in found.items] == [
        *(f"mmlu_anatomy/{n}" for n in range(3)),
        *(f"mmlu_astronomy/{n}" for n in range(5)),
    ]
    right: dict[str, list[float]] = {name: [] for name in found.subtasks}
    for sample, item in zip(found.samples, found.items, strict=True):
        values = [answer[0][0] for answer in sample["answers"]]
        number = int(item["id"].partition("/")[2])
        assert item["acc"] == float(values.index(max(values)) == number % 4)
        right[item["id"].partition("/")[0]].append(item["acc"])
    for subject, values in right.items():
        assert found.subtasks[subject] == {"acc": pytest.approx(sum(values) / len(values))}
    every = [value for values in right.values() for value in values]
    assert found.metrics == {"acc": pytest.approx(sum(every) / 8)}  # over questions, not subjects
    assert found.accounting["decoded_tokens"] == 2 * 8  # " A" is two letters, shared by four
    assert found.notes[-1] == "mmlu: 2 of its 57 subjects, those in datasets/mmlu"


def test_mmlu_questions_are_written_as_lm_eval_writes_them(local_mmlu):
    found = measured(candidate(), "mmlu:anatomy")
    context, answer = found.samples[1]["arguments"][2]
    assert context == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "test question 1 of anatomy\n"
        "A. choice p1\nB. choice q1\nC. choice r1\nD. choice s1\nAnswer:"
    )
    assert answer == " C"


def test_few_shot_examples_come_from_dev_and_never_from_test(local_mmlu):
    for shots in (0, 2, 5):
        found = measured(candidate(), "mmlu", options(num_fewshot=shots))
        for sample in found.samples:
            subject = sample["id"].partition("/")[0].removeprefix("mmlu_")
            context = sample["arguments"][0][0]
            dev = [context.find(f"dev question {n} of {subject}") for n in range(5)]
            assert [position >= 0 for position in dev] == [n < shots for n in range(5)]
            assert dev[:shots] == sorted(dev[:shots])
            assert context.count("test question") == 1
            assert context.count("Answer:") == shots + 1
            if shots:  # with the right answer: that of question 1 is B
                assert "Answer: A\n\ndev question 1" in context


def test_a_limit_is_per_subject(local_mmlu):
    found = measured(candidate(), "mmlu", options(limit=4))
    ids = [item["id"] for item in found.items]
    assert ids == [
        *(f"mmlu_anatomy/{n}" for n in range(3)),
        *(f"mmlu_astronomy/{n}" for n in range(4)),
    ]
    assert harness.count("mmlu", options(limit=4)) == 7


def test_a_random_choice_of_documents_is_fixed_by_its_seed():
    def ids(task: str = "tiny_choice", **how: object) -> list[str]:
        return [item["id"] for item in measured(candidate(), task, options(**how)).items]

    every = [f"tiny_choice/{n}" for n in range(len(QUESTIONS))]
    assert ids(limit=2) == every[:2]
    drawn = [ids(limit=2, sample_seed=seed) for seed in range(6)]
    assert drawn == [ids(limit=2, sample_seed=seed) for seed in range(6)]
    assert len({tuple(one) for one in drawn}) > 1
    assert all(len(one) == 2 and set(one) < set(every) for one in drawn)
    assert ids(limit=9, sample_seed=1) == every
    chosen = next(one for one in drawn if one != every[:2])
    seed = drawn.index(chosen)
    scores = measured(candidate("griffin"), "tiny_choice", options(limit=2, sample_seed=seed))
    whole = measured(candidate("griffin"), "tiny_choice")
    place_of = [every.index(one) for one in chosen]
    expected = [logprobs(whole)[3 * n + i] for n in place_of for i in range(3)]
    assert logprobs(scores) == expected  # the numbers belong to the documents they name


def test_few_shot_examples_are_those_of_the_task_and_a_task_of_0_takes_none():
    for shots in (1, 2):
        found = measured(candidate(), "tiny_choice", options(num_fewshot=shots))
        context = found.samples[0]["arguments"][0][0]
        assert [row["question"] in context for row in EXAMPLES] == [True, shots > 1]
    assert (
        EXAMPLES[0]["question"]
        not in measured(candidate(), "tiny_choice").samples[0]["arguments"][0][0]
    )


def test_the_chat_template_wraps_contexts():
    from dart_llm.session.prepare import PreparedMethod as Candidate

    chatty = Candidate(*loaded("chatty"), None)
    found = measured(chatty, "tiny_choice", options(apply_chat_template=True))
    context = f"[user] q: {QUESTIONS[0]['question']}\na:\n[assistant] "
    assert found.samples[0]["arguments"][0] == [context, QUESTIONS[0]["choices"][0]]
    assert abs(logprobs(found)[0] - logprobs(measured(chatty, "tiny_choice"))[0]) > 1e-3
    shots = measured(chatty, "tiny_choice", options(apply_chat_template=True, num_fewshot=1))
    assert shots.samples[0]["arguments"][0][0] == (
        f"[user] q: {EXAMPLES[0]['question']}\na:\n[assistant] ice\n{context}"
    )
    with pytest.raises(ConfigError, match="no chat template"):
        measured(candidate(), "tiny_choice", options(apply_chat_template=True))


def test_a_task_that_does_not_exist_has_near_names():
    with pytest.raises(UnknownName, match="unknown task 'tiny_choise'; did you mean tiny_choice"):
        measured(candidate(), "tiny_choise")
    with pytest.raises(UnknownName, match=r"none of the \d+ known ones is like it") as found:
        harness.count("qqqqqqqqqqqqqq", options())
    assert len(str(found.value)) < 150  # lm-eval knows thousands


def test_data_that_cannot_be_had_names_the_task_and_the_way_out():
    with pytest.raises(LoadError) as found:
        measured(candidate(), "tiny_lost")
    for word in ("task tiny_lost ", "tiny_lost.jsonl", "correct the task file"):
        assert word in str(found.value)
    with pytest.raises(LoadError, match=r"task openbookqa .* without the hub give --include-path"):
        measured(candidate(), "openbookqa")
    with pytest.raises(LoadError, match=r"'cais/mmlu' .* put <subject>_test.jsonl into datasets/"):
        measured(candidate(), "mmlu:virology")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StopIteration(), "it has no rows"),
        (ValueError("odd node <ast.Name object at 0x7fc048fb3b80>."), "odd node <ast.Name object>"),
        (KeyError(), "KeyError"),
    ],
)
def test_the_reason_is_the_same_in_every_process(error, reason):
    assert harness._reason(error) == reason


def test_a_folder_of_tasks_that_does_not_exist_is_said():
    from dart_llm.evaluation.measurement import MeasureOptions

    with pytest.raises(ConfigError, match="--include-path no/such is not a folder"):
        harness.count("arc_easy", MeasureOptions(include_path="no/such"))


def test_a_task_file_with_a_wrong_column_is_one_sentence():
    harness._load.cache_clear()
    wrong = {**CHOICE, "task": "tiny_wrong", "doc_to_text": "{{nothing.x}}"}
    folder = place() / "tasks"
    write_task(folder, "tiny_wrong", wrong, QUESTIONS)
    try:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(folder), include_defaults=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(harness, "_manager", lambda path: manager)
            with pytest.raises((ConfigError, LoadError), match="tiny_wrong"):
                measured(candidate(), "tiny_wrong")
    finally:
        (folder / "tiny_wrong.yaml").unlink()
        harness._load.cache_clear()
