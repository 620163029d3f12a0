"""The two shell scripts: variables, flags and exit codes, against a recording ``dart-llm``."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dart_llm.studies.generate.settings import RunSettings, collect
from shells import DRIFT, EXPERIMENT, ROOT, SCRIPTS, VARIABLES, Desk, make_desk

LISTS = ("PROMPT_SUBJECT", "PPL_DATASETS", "PPL_SUBJECTS", "MMLU_DATASETS")
LISTS += ("GENERAL_NLP_DATASETS", "SUMMARIZATION_DATASETS")
HARD_PROMPT = "-x \"quoted\" 'single' $HOME ${MODEL} `id` $(id) \\n a=b; * é\n\nlast line"
HELPERS = ("scripts/run_common.sh", "scripts/setup.sh", "scripts/browser.sh", ".ci/run")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_desk(tmp_path)


def listed(script: str) -> dict[str, str]:
    """Variable -> default, as the script's list has them; every line must carry a comment."""
    lines = (ROOT / script).read_text().splitlines()
    found = [re.fullmatch(r': "\$\{([A-Z_]+):=(.*)\}"\s+# \S.*', line) for line in lines]
    return {match[1]: match[2] for match in found if match}


@pytest.mark.parametrize("script", SCRIPTS)
def test_lists_exactly_the_documented_variables(script: str) -> None:
    assert list(listed(script)) == VARIABLES
    assert {name.lower() for name in VARIABLES} <= set(RunSettings.model_fields)


def test_the_scripts_differ_in_two_defaults_only() -> None:
    first, second = (listed(script) for script in SCRIPTS)
    different = {name: (first[name], second[name]) for name in first if first[name] != second[name]}
    assert different == {"KNOWLEDGE_DRIFT": ("", "true"), "GENERATION": ("0", "300")}
    heads = [(ROOT / s).read_text().split("\n\n")[0].splitlines()[0] for s in SCRIPTS]
    assert heads == ["#!/usr/bin/env bash"] * 2


@pytest.mark.parametrize("script", [*SCRIPTS, *HELPERS])
def test_parses(script: str) -> None:
    path = ROOT / script
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    sourced = script.endswith("run_common.sh")
    assert sourced or path.stat().st_mode & 0o111 == 0o111
    assert "eval" not in re.findall(r"\w+", re.sub(r"#.*", "", path.read_text()))


@pytest.mark.parametrize(("script", "tokens", "drift"), [(EXPERIMENT, 0, None), (DRIFT, 300, True)])
def test_stated_defaults(desk: Desk, script: str, tokens: int, drift: bool | None) -> None:
    done = desk.run(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    expected = {
        "total_prune_percent": 50.0,
        "layer_topk": "all:auto",
        "masking_step": 0,
        "prune_strategy": "topk",
        "generation": tokens,
        "knowledge_drift": drift,
    }
    assert desk.settings() == RunSettings.model_validate(expected)


# One value per variable that is neither the default nor another variable's.
VALUES: dict[str, tuple[str, object]] = {
    "METHOD": ("griffin", "griffin"),
    "MODEL": ("gpt2", "gpt2"),
    "CACHE_DIR": ("some cache", "some cache"),
    "DEVICE": ("0", "0"),
    "LAYER_TOPK": ("all:auto,0:0.9", "all:auto,0:0.9"),
    "TOTAL_PRUNE_PERCENT": ("30", 30.0),
    "MASKING_STEP": ("3", 3),
    "RELEASE_STEP": ("40", 40),
    "EMA_DECAY": ("0.7", 0.7),
    "RANKING_METHOD": ("magnitude", "magnitude"),
    "PRUNE_STRATEGY": ("topk", "topk"),
    "KNOWLEDGE_DRIFT": ("false", False),
    "PROMPT_TYPE": ("mmlu", "mmlu"),
    "PROMPT_SUBJECT": ("astronomy,virology", "astronomy,virology"),
    "CUSTOM_PROMPT_TEXT": ("Write about tides", "Write about tides"),
    "PROMPT_LENGTH": ("64", 64),
    "GENERATION": ("17", 17),
    "EVAL_PERPLEXITY": ("true", True),
    "PPL_DATASETS": ("c4", "c4"),
    "PPL_SUBJECTS": ("anatomy", "anatomy"),
    "PPL_MAX_SAMPLES": ("5", 5),
    "EVAL_MMLU": ("true", True),
    "MMLU_DATASETS": ("anatomy", "anatomy"),
    "MMLU_SHOTS": ("2", 2),
    "MMLU_MAX_SAMPLES": ("6", 6),
    "EVAL_GENERAL_NLP": ("true", True),
    "GENERAL_NLP_DATASETS": ("boolq", "boolq"),
    "GENERAL_NLP_MAX_SAMPLES": ("7", 7),
    "EVAL_SUMMARIZATION": ("true", True),
    "SUMMARIZATION_DATASETS": ("govreport", "govreport"),
    "SUMMARIZATION_MAX_SAMPLES": ("8", 8),
    "SUMMARIZATION_MAX_OUTPUT": ("99", 99),
    "SEED": ("11", 11),
    "VERBOSE": ("true", True),
    "EXPERIMENT_NAME": ("mine", "mine"),
    "RESULTS_DIR": ("else where", "else where"),
    "SAVE_ACTIVATIONS": ("true", True),
}


@pytest.mark.parametrize(
    ("script", "way"),
    [(EXPERIMENT, "edited"), (DRIFT, "in front"), (EXPERIMENT, "exported"), (DRIFT, "edited")],
)
def test_every_variable_arrives_in_each_way(desk: Desk, script: str, way: str) -> None:
    assert set(VALUES) == set(VARIABLES)
    values = {name: value for name, (value, _) in VALUES.items()}
    assignments = [f'{name}="{value}"' for name, value in values.items()]
    if way == "edited":
        desk.edit(script, values)
        done = desk.run(script)
    elif way == "in front":
        done = desk.bash(f"{' '.join(assignments)} ./{script}")
    else:
        done = desk.bash("\n".join([f"export {part}" for part in assignments] + [f"./{script}"]))
    assert done.returncode == 0, done.stderr
    found = desk.settings().model_dump()
    expected = {name.lower(): value for name, (_, value) in VALUES.items()}
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("prompt", [HARD_PROMPT, "two  words"])
def test_a_prompt_arrives_unchanged(desk: Desk, prompt: str) -> None:
    assert desk.run(DRIFT, CUSTOM_PROMPT_TEXT=prompt).returncode == 0
    assert desk.settings().custom_prompt_text == prompt


def test_a_prompt_on_a_line_of_its_own_in_the_file(desk: Desk) -> None:
    path = desk.script(EXPERIMENT)
    line = "CUSTOM_PROMPT_TEXT='\"It\" costs $5, `not` {6}'\nset -euo"
    path.write_text(path.read_text().replace("set -euo", line, 1))
    assert desk.run(EXPERIMENT, CUSTOM_PROMPT_TEXT="other").returncode == 0
    assert desk.settings().custom_prompt_text == '"It" costs $5, `not` {6}'


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("astronomy anatomy", "astronomy,anatomy"),
        ("  astronomy \t anatomy\n virology ", "astronomy,anatomy,virology"),
        ("astronomy,anatomy", "astronomy,anatomy"),
        ("astronomy, my notes.txt", "astronomy, my notes.txt"),
        ("my notes.txt", "my notes.txt"),
        ("* astronomy", "*,astronomy"),
        ("astronomy", "astronomy"),
    ],
)
def test_lists_take_spaces_or_commas(desk: Desk, value: str, expected: str) -> None:
    (desk.root / "my notes.txt").write_text("a file whose name has a space")
    assert desk.run(EXPERIMENT, **dict.fromkeys(LISTS, value)).returncode == 0
    found = desk.settings().model_dump()
    assert [found[name.lower()] for name in LISTS] == [expected] * len(LISTS)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        *[(word, True) for word in ("true", "TRUE", "True", "1", "yes", "Yes")],
        *[(word, False) for word in ("false", "FALSE", "False", "0", "no", "No")],
    ],
)
def test_words_for_true_and_false(desk: Desk, word: str, value: bool) -> None:
    assert desk.run(DRIFT, KNOWLEDGE_DRIFT=word, EVAL_PERPLEXITY=word).returncode == 0
    found = desk.settings()
    assert found.knowledge_drift is value and found.eval_perplexity is value


@pytest.mark.parametrize("word", ["maybe", "on", "2", " true", "$(id)"])
def test_other_words_end_with_2_and_one_sentence(desk: Desk, word: str) -> None:
    done = desk.run(EXPERIMENT, VERBOSE=word)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"run_experiment.sh: VERBOSE={word} is neither true nor false: write true, false, yes, no, "
        "1 or 0\n"
    )
    assert not (desk.root / "record.json").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_empty_variable_is_one_that_is_not_given(desk: Desk, script: str) -> None:
    assert desk.run(script).returncode == 0
    expected = desk.recorded()
    assert desk.run(script, **dict.fromkeys(VARIABLES, "")).returncode == 0
    assert desk.recorded() == expected
    assert not any(part.endswith("=") for part in expected)
    assert desk.run(script, MMLU_DATASETS="  ", PPL_SUBJECTS=" ").returncode == 0
    assert not any(part.startswith(("--mmlu-d", "--ppl-subj")) for part in desk.recorded())
    path = desk.script(script)
    path.write_text(re.sub(r"^: .*\n", "", path.read_text(), flags=re.MULTILINE))
    assert desk.run(script).returncode == 0
    assert desk.recorded() == []


@pytest.mark.parametrize(("script", "code"), [(EXPERIMENT, 2), (DRIFT, 130), (DRIFT, 0)])
def test_exit_code_is_that_of_dart_llm(desk: Desk, script: str, code: int) -> None:
    assert desk.run(script, STUB_EXIT=str(code)).returncode == code


def test_arguments_follow_the_variables_and_win(desk: Desk) -> None:
    assert desk.run(DRIFT, "--fresh", "--generation", "5", "--prompt", "a  'b'").returncode == 0
    assert desk.recorded()[-5:] == ["--fresh", "--generation", "5", "--prompt", "a  'b'"]
    assert desk.settings().generation == 5


TABLE = "# auto in a comment\n0:#3 # auto again\n1:0.5\n"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"LAYER_TOPK": "0-5:0.6"}, "LAYER_TOPK=0-5:0.6 holds no auto and fixes every count"),
        ({"LAYER_TOPK": "@table.txt"}, "LAYER_TOPK=@table.txt holds no auto and fixes every count"),
        ({"PRUNE_STRATEGY": "auto"}, "PRUNE_STRATEGY=auto sets the counts itself"),
        ({"METHOD": "dense"}, "METHOD=dense removes nothing"),
    ],
)
def test_the_default_total_steps_back(desk: Desk, variables: dict[str, str], reason: str) -> None:
    (desk.root / "table.txt").write_text(TABLE)
    done = desk.run(EXPERIMENT, **variables)
    assert done.returncode == 0
    assert done.stderr == (
        f"run_experiment.sh: the default TOTAL_PRUNE_PERCENT=50 is left out: {reason}\n"
    )
    assert not any(part.startswith("--total-prune-percent") for part in desk.recorded())


def test_the_default_total_steps_back_for_the_flag_sparsity(desk: Desk) -> None:
    done = desk.run(EXPERIMENT, "--sparsity", "0.3")
    assert "TOTAL_PRUNE_PERCENT=50 is left out: --sparsity sets the amount" in done.stderr
    assert desk.settings().prune_config().sparsity == 0.3


@pytest.mark.parametrize(
    "variables",
    [
        {"LAYER_TOPK": "all:auto,0:0.9"},
        {"LAYER_TOPK": "@auto.txt"},
        {"LAYER_TOPK": "@missing.txt"},  # dart-llm says that it cannot be read
        {"LAYER_TOPK": "all:0.5", "TOTAL_PRUNE_PERCENT": "40"},  # dart-llm refuses the two
        {"METHOD": "dense", "TOTAL_PRUNE_PERCENT": "40"},
    ],
)
def test_any_other_total_is_handed_on(desk: Desk, variables: dict[str, str]) -> None:
    (desk.root / "auto.txt").write_text(TABLE + "2-3:auto\n")
    done = desk.run(EXPERIMENT, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    total = variables.get("TOTAL_PRUNE_PERCENT", "50")
    assert f"--total-prune-percent={total}" in desk.recorded()


def test_works_from_another_folder(desk: Desk, tmp_path: Path) -> None:
    place = tmp_path / "else where"
    place.mkdir()
    done = desk.bash(f'cd "{place}" && CDPATH=/ "../a desk/{EXPERIMENT}" --fresh')
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert desk.recorded()[-1] == "--fresh"


def test_finds_the_environment_beside_the_script(desk: Desk) -> None:
    shutil.move(desk.root / "bin", desk.root / "moved")
    own = desk.root / ".venv/bin/dart-llm"
    own.parent.mkdir(parents=True)
    command = (desk.root / "moved/dart-llm").read_text()
    own.write_text(command.replace("a desk/bin", "a desk/moved"))
    own.chmod(0o755)
    assert desk.run(EXPERIMENT, MODEL="found").returncode == 0
    assert "--model=found" in desk.recorded()


def test_without_an_environment_it_says_make_setup(desk: Desk) -> None:
    shutil.rmtree(desk.root / "bin")
    done = desk.run(EXPERIMENT)
    assert done.returncode == 127 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and 'run "make setup"' in done.stderr


def test_only_the_scripts_read_the_bare_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (value, _) in VALUES.items():
        monkeypatch.setenv(name, value)
        monkeypatch.delenv(f"DART_{name}", raising=False)
    monkeypatch.setenv("DEVICE", "cuda")
    assert collect({}) == RunSettings()
    for name, (value, _) in VALUES.items():
        monkeypatch.setenv(f"DART_{name}", value)
    found = collect({}).model_dump()
    assert {name: found[name.lower()] for name in VALUES} == {n: v for n, (_, v) in VALUES.items()}


def test_a_flag_beats_its_rival_from_the_environment() -> None:
    environment = {"DART_SPARSITY": "0.3", "DART_DRIFT": "never", "DART_PROMPT": "a"}
    flags = {"total_prune_percent": 40.0, "knowledge_drift": True, "custom_prompt_text": "b"}
    found = collect(flags, environment=environment)
    assert found.target_sparsity() == 0.4
    assert (found.sparsity, found.drift, found.prompt) == (None, None, None)
