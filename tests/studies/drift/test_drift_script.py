"""run_knowledge_drift.sh as a shell over ``dart-llm drift``, against a recording ``dart-llm``."""

import json

import pytest

from dart_llm.studies.drift.settings import collect
from shells import DRIFT, EXPERIMENT, make_desk

LIST = "the bees; then $HOME, `id` and 'quotes'"


@pytest.fixture
def desk(tmp_path):
    return make_desk(tmp_path)


def recorded(desk):
    return json.loads((desk.root / "record.json").read_text())


def settings(desk):
    """The settings that the recorded flags give; later ones win, as on the command line."""
    command, *flags = recorded(desk)
    assert command == "drift"
    pairs = (flag.removeprefix("--").partition("=") for flag in flags)
    return collect({name.replace("-", "_"): value for name, _, value in pairs}, environment={})


def test_the_variables_become_flags_of_a_study(desk):
    variables = {"MODEL": "gpt2", "TOTAL_PRUNE_PERCENT": "30", "SEED": "4"}
    variables |= {"RANKING_METHOD": "magnitude", "EXPERIMENT_NAME": "mine"}
    variables |= {"RESULTS_DIR": "else where", "CUSTOM_PROMPT_TEXT": LIST}
    done = desk.run(DRIFT, "--passages=shipped", **variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = settings(desk)
    assert (found.kind, found.model, found.seeds) == ("forced", "gpt2", "4")
    assert (found.experiment, found.results_dir, found.prompt) == ("mine", "else where", None)
    never = found.method_list()[1]
    assert never.label == "never@0.3" and never.config.score.name == "magnitude"
    # where no passages are named, a prompt of the variables is the source
    assert desk.run(DRIFT, "--mode=free", CUSTOM_PROMPT_TEXT=LIST, METHOD="griffin").returncode == 0
    found = settings(desk)
    assert (found.prompt, found.generation, found.sparsity) == (LIST, 300, None)
    labels = [method.label for method in found.method_list()]
    assert labels == ["dense", "never@0.5", "griffin@0.5"]


def test_arguments_win_and_what_concerns_a_single_run_is_left_out(desk):
    arguments = ["--prompts", "shipped", "--sparsity=0.2"]
    done = desk.run(DRIFT, *arguments, EVAL_MMLU="true", VERBOSE="yes")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "run_knowledge_drift.sh: the default TOTAL_PRUNE_PERCENT=50 is left out: --sparsity=0.2 "
        "sets the amount",
        "run_knowledge_drift.sh: EVAL_MMLU=true concerns a single run and is left out",
        "run_knowledge_drift.sh: VERBOSE=yes concerns a single run and is left out",
    ]
    assert recorded(desk)[-3:] == arguments
    assert not any(part.startswith(("--eval", "--verbose")) for part in recorded(desk))


def test_the_command_and_its_exit_code_are_those_of_dart_llm(desk):
    for code in (2, 130):
        assert desk.run(DRIFT, "--passages", "shipped", STUB_EXIT=str(code)).returncode == code
    assert desk.run(DRIFT, "--fresh").returncode == 0 and recorded(desk)[0] == "run"
    assert desk.run(EXPERIMENT, "--methods", "x").returncode == 0 and recorded(desk)[0] == "run"
