"""run_knowledge_drift.sh as a shell over ``dart-llm drift``, against a recording ``dart-llm``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dart_llm.studies.drift.settings import DriftSettings, collect
from shells import DRIFT, EXPERIMENT, Desk, make_desk

LIST = "the bees; then $HOME, `id` and 'quotes'"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_desk(tmp_path)


def recorded(desk: Desk) -> list[str]:
    found: list[str] = json.loads((desk.root / "record.json").read_text())
    return found


def settings(desk: Desk) -> DriftSettings:
    """The settings that the recorded flags give; later ones win, as on the command line."""
    command, *flags = recorded(desk)
    assert command == "drift"
    found: dict[str, str] = {}
    for flag in flags:
        name, _, value = flag.removeprefix("--").partition("=")
        found[name.replace("-", "_")] = value
    return collect(found, environment={})


def test_the_variables_become_flags_of_a_study(desk: Desk) -> None:
    done = desk.run(
        DRIFT,
        "--passages=shipped",
        MODEL="gpt2",
        TOTAL_PRUNE_PERCENT="30",
        SEED="4",
        RANKING_METHOD="magnitude",
        EXPERIMENT_NAME="mine",
        RESULTS_DIR="else where",
        CUSTOM_PROMPT_TEXT=LIST,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = settings(desk)
    assert (found.kind, found.model, found.seeds) == ("forced", "gpt2", "4")
    assert (found.experiment, found.results_dir, found.prompt) == ("mine", "else where", None)
    assert [m.label for m in found.method_list()][1] == "never@0.3"
    config = found.method_list()[1].config
    assert config is not None and config.score.name == "magnitude"


@pytest.mark.parametrize("flag", ["--methods=never", "--mode=free"])
def test_a_prompt_of_the_variables_is_the_source(desk: Desk, flag: str) -> None:
    assert desk.run(DRIFT, flag, CUSTOM_PROMPT_TEXT=LIST, METHOD="griffin").returncode == 0
    found = settings(desk)
    assert (found.prompt, found.generation, found.sparsity) == (LIST, 300, None)
    labels = [method.label for method in found.method_list()]
    own = ["dense", "never@0.5"] if flag == "--methods=never" else None
    assert labels == (own or ["dense", "never@0.5", "griffin@0.5"])


def test_arguments_win_and_what_concerns_a_single_run_is_left_out(desk: Desk) -> None:
    done = desk.run(
        DRIFT, "--prompts", "shipped", "--sparsity=0.2", EVAL_MMLU="true", VERBOSE="yes"
    )
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "run_knowledge_drift.sh: the default TOTAL_PRUNE_PERCENT=50 is left out: --sparsity=0.2 "
        "sets the amount",
        "run_knowledge_drift.sh: EVAL_MMLU=true concerns a single run and is left out",
        "run_knowledge_drift.sh: VERBOSE=yes concerns a single run and is left out",
    ]
    assert recorded(desk)[-3:] == ["--prompts", "shipped", "--sparsity=0.2"]
    assert not any(part.startswith(("--eval", "--verbose")) for part in recorded(desk))


@pytest.mark.parametrize("code", [0, 2, 130])
def test_exit_code_is_that_of_dart_llm(desk: Desk, code: int) -> None:
    assert desk.run(DRIFT, "--passages", "shipped", STUB_EXIT=str(code)).returncode == code


def test_without_these_arguments_it_is_a_single_run(desk: Desk) -> None:
    assert desk.run(DRIFT, "--fresh").returncode == 0
    assert recorded(desk)[0] == "run"
    assert desk.run(EXPERIMENT, "--methods", "x").returncode == 0
    assert recorded(desk)[0] == "run"
