"""Every variable alone, and what it asks of other settings: methods and switches that it takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dart_llm.cli.app import app
from dart_llm.data import datasets as mmlu
from dart_llm.errors import ConfigError
from dart_llm.studies.drift.settings import collect as collect_study
from dart_llm.studies.evaluate.settings import EvalSettings
from dart_llm.studies.generate import study as job
from dart_llm.studies.generate.settings import RunSettings, collect
from shells import DRIFT, EXPERIMENT, VARIABLES, Desk, make_desk
from tiny_gpt2 import write_gpt2

DECAY = (
    "--ema-decay is honoured by method dart-prompt with score normalized: taken instead of dart, "
    'whose score "fisher" is a mean over all tokens alike'
)


def told(**flags: Any) -> tuple[RunSettings, tuple[str, ...]]:
    found = collect(flags, environment={})
    return found, found.notes


# --- a method that can --------------------------------------------------------------------------


def test_a_decay_alone_takes_a_method_that_averages() -> None:
    found, notes = told(ema_decay=0.9, sparsity=0.5)
    config = found.prune_config()
    assert notes == (DECAY,)
    assert (found.method, config.score.name, config.score.ema_decay) == (
        "dart-prompt",
        "normalized",
        0.9,
    )
    assert config.sparsity == 0.5 and found.experiment == "smollm2-135m-dart-prompt-0.5"


def test_a_decay_that_the_default_can_honour_changes_no_method() -> None:
    for score in ("magnitude", "max"):
        found, notes = told(ema_decay=0.9, ranking_method=score)
        assert (found.method, notes) == ("dart", ())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            {"method": "dart", "ema_decay": 0.9},
            'score "fisher" is a mean over all tokens alike: drop the ema_decay, or leave the '
            "method out: dart-prompt can",
        ),
        (
            {"method": "static", "ema_decay": 0.9},
            'score "weight" reads no activations: drop the ema_decay, or leave the method out: '
            "dart-prompt can",
        ),
        (
            {"ranking_method": "flap", "ema_decay": 0.9},
            'score "flap" is a variance over all tokens alike: drop the ema_decay',
        ),
    ],
)
def test_what_was_named_and_cannot_is_an_error(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        told(**flags)
    assert str(caught.value) == sentence


def test_other_commands_and_the_environment_alike() -> None:
    from dart_llm.settings import merge

    found = merge(EvalSettings, {"tasks": "perplexity:embedded"}, None, {"DART_EMA_DECAY": "0.9"})
    assert (found.method, found.notes) == ("dart-prompt", (DECAY,))


def test_a_study_of_dart_says_it_before_the_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"drop the ema_decay, or give another --ranking-method"):
        collect_study({"ema_decay": 0.9, "passages": "shipped"}, environment={})
    flags = {"ema_decay": 0.9, "passages": "shipped", "ranking_method": "magnitude"}
    assert collect_study(flags, environment={}).ema_decay == 0.9


# --- switches and values ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "changed", "notes"),
    [
        ({"ppl_max_samples": 3}, {}, ["--ppl-max-samples has no effect without --eval-perplexity"]),
        ({"mmlu_shots": 5}, {}, ["--mmlu-shots has no effect without --eval-mmlu"]),
        (
            {"summarization_max_output": 64, "general_nlp_datasets": "boolq"},
            {},
            [
                "--general-nlp-datasets has no effect without --eval-general-nlp",
                "--summarization-max-output has no effect without --eval-summarization",
            ],
        ),
        (
            {"eval_perplexity": True, "ppl_subjects": "astronomy"},
            {"ppl_datasets": "mmlu"},
            ["--ppl-subjects asks for --ppl-datasets mmlu: taken"],
        ),
        (
            {"eval_perplexity": True, "ppl_subjects": "astronomy", "ppl_datasets": "c4"},
            {"ppl_datasets": "c4"},
            ["--ppl-subjects has no effect without --ppl-datasets mmlu"],
        ),
        (
            {"prompt_subject": "astronomy", "generation": 4},
            {"prompt_type": "mmlu"},
            ["--prompt-subject asks for --prompt-type mmlu: taken"],
        ),
        (
            {"prompt_subject": "astronomy", "custom_prompt_text": "hello"},
            {"prompt_type": "custom"},
            ["--prompt-subject has no effect without --prompt-type mmlu"],
        ),
        ({"eval_mmlu": True, "mmlu_shots": 5, "mmlu_datasets": "anatomy"}, {}, []),
        ({"eval_perplexity": True, "ppl_subjects": "anatomy", "ppl_datasets": "mmlu"}, {}, []),
    ],
)
def test_idle_settings_are_said_and_implied_ones_taken(
    flags: dict[str, Any], changed: dict[str, Any], notes: list[str]
) -> None:
    found, said = told(**flags)
    assert {name: getattr(found, name) for name in changed} == changed
    assert list(said) == notes


# --- every variable of the scripts, alone ---------------------------------------------------------

QUESTIONS = [
    {"question": f"what is {n}", "choices": ["a", "b", "c", "d"], "answer": 0} for n in range(8)
]
# What each variable is set to.
ALONE: dict[str, list[str]] = {
    "METHOD": ["published", "dense"],
    "MODEL": ["model"],
    "CACHE_DIR": ["some cache"],
    "DEVICE": ["cpu", "0"],
    "LAYER_TOPK": ["0:0.5", "all:auto,0:0.9", "@table.txt"],
    "TOTAL_PRUNE_PERCENT": ["0", "99.5"],
    "MASKING_STEP": ["0", "3"],
    "RELEASE_STEP": ["4"],
    "EMA_DECAY": ["0.9"],
    "RANKING_METHOD": ["max", "magnitude"],
    "PRUNE_STRATEGY": ["topk", "auto"],
    "KNOWLEDGE_DRIFT": ["true", "false"],
    "PROMPT_TYPE": ["custom"],
    "PROMPT_SUBJECT": ["astronomy"],
    "CUSTOM_PROMPT_TEXT": ["the sea"],
    "PROMPT_LENGTH": ["4"],
    "GENERATION": ["5"],
    "EVAL_PERPLEXITY": ["false"],
    "PPL_DATASETS": ["text.txt"],
    "PPL_SUBJECTS": ["astronomy"],
    "PPL_MAX_SAMPLES": ["1", "all"],
    "EVAL_MMLU": ["false"],
    "MMLU_DATASETS": ["astronomy"],
    "MMLU_SHOTS": ["2"],
    "MMLU_MAX_SAMPLES": ["1"],
    "EVAL_GENERAL_NLP": ["false"],
    "GENERAL_NLP_DATASETS": ["boolq"],
    "GENERAL_NLP_MAX_SAMPLES": ["1"],
    "EVAL_SUMMARIZATION": ["false"],
    "SUMMARIZATION_DATASETS": ["documents.jsonl"],
    "SUMMARIZATION_MAX_SAMPLES": ["1"],
    "SUMMARIZATION_MAX_OUTPUT": ["8"],
    "SEED": ["7"],
    "VERBOSE": ["true"],
    "SAVE_ACTIVATIONS": ["true"],
    "EXPERIMENT_NAME": ["mine"],
    "RESULTS_DIR": ["else where"],
}
# Where a variable must arrive in the configuration that masks are made by.
ARRIVES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "METHOD": lambda prune: prune["method"],
    "TOTAL_PRUNE_PERCENT": lambda prune: f"{100 * prune['sparsity']:g}",
    "MASKING_STEP": lambda prune: str(prune["masking_step"]),
    "RELEASE_STEP": lambda prune: str(prune["release_step"]),
    "EMA_DECAY": lambda prune: str(prune["score"]["ema_decay"]),
    "RANKING_METHOD": lambda prune: prune["score"]["name"],
    "PRUNE_STRATEGY": lambda prune: prune["score"]["strategy"],
    "KNOWLEDGE_DRIFT": lambda prune: str(prune["drift"]["rule"] != "never").lower(),
    "SEED": lambda prune: str(prune["seed"]),
    "SAVE_ACTIVATIONS": lambda prune: str(prune["executor"] == "masked").lower(),
}
COMBINED = [
    {"KNOWLEDGE_DRIFT": "true", "EMA_DECAY": "0.9", "MASKING_STEP": "3"},
    {"RANKING_METHOD": "magnitude", "EMA_DECAY": "0.9"},
    {"LAYER_TOPK": "all:auto", "EMA_DECAY": "0.9", "TOTAL_PRUNE_PERCENT": "30"},
    {"PRUNE_STRATEGY": "auto", "EMA_DECAY": "0.9"},
    {"EVAL_PERPLEXITY": "true", "PPL_MAX_SAMPLES": "1"},
    {"EVAL_PERPLEXITY": "true", "PPL_DATASETS": "text.txt", "PPL_MAX_SAMPLES": "1"},
    {"EVAL_PERPLEXITY": "true", "PPL_SUBJECTS": "astronomy", "PPL_MAX_SAMPLES": "1"},
    {"PROMPT_TYPE": "mmlu", "PROMPT_SUBJECT": "astronomy", "PROMPT_LENGTH": "32"},
    {"MASKING_STEP": "2", "RELEASE_STEP": "4", "KNOWLEDGE_DRIFT": "true"},
]
SHORT = ["--ppl-prompt-tokens", "48", "--ppl-scored-tokens", "16"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, a layer table and questions on astronomy."""
    root = tmp_path_factory.mktemp("place")
    write_gpt2(root / "model")
    (root / "text.txt").write_text("the birds of winter. " * 20)
    (root / "table.txt").write_text("0:0.5\n1:auto\n")
    local = root / mmlu.LOCAL_MMLU
    local.mkdir(parents=True)
    lines = "".join(json.dumps({**row, "subject": "astronomy"}) + "\n" for row in QUESTIONS)
    (local / "astronomy_dev.jsonl").write_text(lines)
    return root


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return make_desk(tmp_path_factory.mktemp("desk"))


def run_as(desk: Desk, script: str, variables: dict[str, str], place: Path) -> dict[str, Any]:
    """config.json of the run that a script asks for, which is made in this process.

    Its settings are those that dart-llm reads from what the script hands on.
    """
    given = {"MODEL": "model", "GENERATION": "5", "CUSTOM_PROMPT_TEXT": "hello there", **variables}
    if "PROMPT_SUBJECT" in variables:
        given["CUSTOM_PROMPT_TEXT"] = ""
    shutil.copy(place / "table.txt", desk.root)
    done = desk.run(script, **given)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(job.RunStudy, "figures", lambda self: ())
        patch.setattr(job.RunStudy, "write_page", lambda self: None)
        asked = desk.settings().model_dump(mode="json")
        run = CliRunner().invoke(app, ["run", *desk.recorded(), *SHORT, "--fresh", "--json"])
    assert run.exit_code == 0, run.exception
    config = dict(json.loads(run.stdout)["config"])
    changed = {"ppl_prompt_tokens": 48, "ppl_scored_tokens": 16}
    assert {name: config["settings"][name] for name in asked} == asked | changed
    return config


DIFFERENT = ("METHOD", "EMA_DECAY", "RANKING_METHOD", "KNOWLEDGE_DRIFT", "GENERATION")
"""Variables that may get on badly with the drift detection that the second script switches on."""


@pytest.mark.parametrize(
    ("script", "name"),
    [*((EXPERIMENT, name) for name in VARIABLES), *((DRIFT, name) for name in DIFFERENT)],
)
def test_every_variable_alone_runs_under_the_defaults(
    desk: Desk, script: str, name: str, place: Path
) -> None:
    for value in ALONE[name]:
        config = run_as(desk, script, {name: value}, place)
        assert config["status"] == "complete"
        if name in ARRIVES:
            assert ARRIVES[name](config["prune"]) == value
        method = {"METHOD": value, "EMA_DECAY": "dart-prompt"}.get(name, "dart")
        assert config["prune"]["method"] == config["settings"]["method"] == method


@pytest.mark.parametrize("variables", COMBINED)
def test_combinations_run_too(variables: dict[str, str], desk: Desk, place: Path) -> None:
    config = run_as(desk, EXPERIMENT, variables, place)
    assert config["status"] == "complete"
    found = {name: ARRIVES[name](config["prune"]) for name in variables if name in ARRIVES}
    assert found == {name: value for name, value in variables.items() if name in ARRIVES}
