"""The two shell scripts: variables, flags and exit codes, against a recording ``dart-llm``.

Of passages, prompts or methods run_knowledge_drift.sh makes a study of drift.
"""

import re
import shlex
import subprocess

import pytest

from dart_llm.studies.drift.settings import collect as collect_drift
from dart_llm.studies.generate.settings import RunSettings, collect
from shells import DRIFT, EXPERIMENT, ROOT, SCRIPTS, VARIABLES, make_desk, parse

RUN = """
METHOD MODEL CACHE_DIR DEVICE LAYER_TOPK TOTAL_PRUNE_PERCENT MASKING_STEP RELEASE_STEP EMA_DECAY
RANKING_METHOD PRUNE_STRATEGY KNOWLEDGE_DRIFT PROMPT_TYPE PROMPT_SUBJECT CUSTOM_PROMPT_TEXT
PROMPT_LENGTH GENERATION SEED VERBOSE SAVE_ACTIVATIONS EXPERIMENT_NAME RESULTS_DIR
""".split()
"""Variables that are settings of ``dart-llm run``."""
HARD_PROMPT = "-x \"quoted\" 'single' $HOME ${MODEL} `id` $(id) \\n a=b; * é\n\nlast line"
HELPERS = ("scripts/run_common.sh", "scripts/setup.sh", "scripts/browser.sh", ".ci/run")


@pytest.fixture
def desk(tmp_path):
    return make_desk(tmp_path)


def test_the_scripts_list_the_documented_variables_and_parse():
    defaults = []
    for script in (*SCRIPTS, *HELPERS):
        path = ROOT / script
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert script.endswith("run_common.sh") or path.stat().st_mode & 0o111 == 0o111
        text = path.read_text()
        assert text.startswith("#!/usr/bin/env bash\n") or script in HELPERS
        assert not re.search(r"^\s*eval\b", text, re.MULTILINE)
        # variables with their defaults; every line must carry a comment
        defaults.append(
            dict(re.findall(r'^: "\$\{([A-Z_]+):=(.*)\}"\s+# \S.*$', text, re.MULTILINE))
        )
    first, second, *_ = defaults
    assert list(first) == list(second) == VARIABLES
    assert {name.lower() for name in RUN} <= set(RunSettings.model_fields)
    different = {name: (first[name], second[name]) for name in first if first[name] != second[name]}
    assert different == {"KNOWLEDGE_DRIFT": ("", "true"), "GENERATION": ("0", "300")}


# One value per variable that is neither the default nor another variable's.
WORDS = """
METHOD=griffin MODEL=gpt2 CACHE_DIR='some cache' DEVICE=0 LAYER_TOPK=all:auto,0:0.9 VERBOSE=True
TOTAL_PRUNE_PERCENT=30.0 MASKING_STEP=3 RELEASE_STEP=40 EMA_DECAY=0.7 RANKING_METHOD=magnitude
PRUNE_STRATEGY=topk KNOWLEDGE_DRIFT=False PROMPT_TYPE=mmlu PROMPT_SUBJECT=astronomy,virology
CUSTOM_PROMPT_TEXT='Write about tides' PROMPT_LENGTH=64 GENERATION=17 EVAL_PERPLEXITY=True
PPL_DATASETS=c4 PPL_SUBJECTS=anatomy PPL_MAX_SAMPLES=5 EVAL_MMLU=True MMLU_DATASETS=anatomy
MMLU_SHOTS=2 MMLU_MAX_SAMPLES=6 EVAL_GENERAL_NLP=True GENERAL_NLP_DATASETS=boolq SEED=11
GENERAL_NLP_MAX_SAMPLES=7 EVAL_SUMMARIZATION=True SUMMARIZATION_DATASETS=xsum
SUMMARIZATION_MAX_SAMPLES=8 SUMMARIZATION_MAX_OUTPUT=99 EXPERIMENT_NAME=mine
RESULTS_DIR='else where' SAVE_ACTIVATIONS=True
"""
WORDS = dict(word.split("=", 1) for word in shlex.split(WORDS))


COMMANDS = {
    "run": {name: WORDS[name] for name in RUN},
    "perplexity": {"DATA": "c4", "LIMIT": "5"},
    "eval": {"TASKS": "mmlu:anatomy", "NUM_FEWSHOT": "2", "LIMIT": "6", "DENSE": "True"},
    "summarize": {"DATA": "xsum", "LIMIT": "8", "MAX_OUTPUT": "99", "DENSE": "True"},
}
"""What arrives at each command."""
SHARED = ("METHOD", "MODEL", "CACHE_DIR", "DEVICE", "LAYER_TOPK", "MASKING_STEP", "RELEASE_STEP")
SHARED += ("EMA_DECAY", "RANKING_METHOD", "KNOWLEDGE_DRIFT", "SEED", "EXPERIMENT_NAME")
GENERAL = ["--tasks=boolq", "--dense", "--limit=7"]
"""What the second ``dart-llm eval`` gets, besides the variables of every command."""


def taken(settings, names):
    """The settings that the variables are."""
    values = {name: getattr(settings, name.lower()) for name in names}
    return {n: ",".join(v) if isinstance(v, tuple) else str(v) for n, v in values.items()}


@pytest.mark.parametrize(
    ("script", "way"),
    [(EXPERIMENT, "edited"), (DRIFT, "in front"), (EXPERIMENT, "exported"), (DRIFT, "edited")],
)
def test_every_variable_arrives_in_each_way(desk, script, way):
    assert set(WORDS) == set(VARIABLES)
    assignments = [f'{name}="{value}"' for name, value in WORDS.items()]
    if way == "edited":
        desk.edit(script, WORDS)
        done = desk.run(script)
    elif way == "in front":
        done = desk.bash(f"{' '.join(assignments)} ./{script}")
    else:
        done = desk.bash("\n".join([f"export {part}" for part in assignments] + [f"./{script}"]))
    assert done.returncode == 0, done.stderr
    called = [command for command, *_ in desk.commands()]
    assert called == ["run", "perplexity", "eval", "eval", "summarize"]
    assert desk.commands()[3][-3:] == GENERAL
    for (command, *arguments), name in zip(desk.commands(), called, strict=True):
        wanted = COMMANDS[name] if arguments[-3:] != GENERAL else {}
        wanted = {**wanted, **{name: WORDS[name] for name in SHARED}}
        assert taken(parse(command, arguments), wanted) == wanted


OTHER = """
METHOD=dense METHOD=published DEVICE=cpu LAYER_TOPK=0:0.5 LAYER_TOPK=@table.txt MASKING_STEP=0
TOTAL_PRUNE_PERCENT=0 TOTAL_PRUNE_PERCENT=99.5 RANKING_METHOD=max PRUNE_STRATEGY=auto
KNOWLEDGE_DRIFT=true PROMPT_TYPE=custom PPL_MAX_SAMPLES=all
"""
ALONE = [
    (name, value) for name, value in WORDS.items() if not name.startswith(("EVAL", "PROMPT_T"))
]
ALONE += [tuple(word.split("=", 1)) for word in OTHER.split()]
DIFFERENT = ("METHOD", "EMA_DECAY", "RANKING_METHOD", "KNOWLEDGE_DRIFT")
"""Variables that may get on badly with the drift detection that the second script switches on."""


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        *((EXPERIMENT, *pair) for pair in ALONE),
        *((DRIFT, *pair) for pair in ALONE if pair[0] in DIFFERENT),
    ],
)
def test_every_variable_alone_fits_the_defaults(desk, monkeypatch, script, name, value):
    monkeypatch.chdir(desk.root)
    (desk.root / "table.txt").write_text("0:0.5\n1:auto\n")
    done = desk.run(script, **{name: value})
    assert done.returncode == 0, done.stderr
    method = {"METHOD": value, "EMA_DECAY": "dart-prompt"}.get(name, "dart")
    assert desk.settings().prune_config().method == method


def test_only_the_scripts_read_the_bare_names(monkeypatch):
    for name, value in WORDS.items():
        monkeypatch.setenv(name, value)
        monkeypatch.delenv(f"DART_{name}", raising=False)
    assert collect({}) == RunSettings()
    for name in RUN:
        monkeypatch.setenv(f"DART_{name}", WORDS[name])
    assert taken(collect({}), RUN) == COMMANDS["run"]
    rivals = {"DART_SPARSITY": "0.3", "DART_DRIFT": "never", "DART_PROMPT": "a"}
    flags = {"total_prune_percent": 40.0, "knowledge_drift": True, "custom_prompt_text": "b"}
    given = collect(flags, environment=rivals)  # a flag beats its rival from the environment
    assert given.target_sparsity() == 0.4
    assert (given.sparsity, given.drift, given.prompt) == (None, None, None)


@pytest.mark.parametrize(("script", "tokens", "drift"), [(EXPERIMENT, 0, None), (DRIFT, 300, True)])
def test_defaults(desk, script, tokens, drift):
    done = desk.run(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    expected = {"total_prune_percent": 50.0, "layer_topk": "all:auto", "masking_step": 0}
    expected |= {"method": "dart", "prune_strategy": "topk"}
    expected |= {"generation": tokens, "knowledge_drift": drift}
    assert desk.settings() == RunSettings.model_validate(expected)
    before = desk.recorded()
    assert desk.run(script, **dict.fromkeys(VARIABLES, "")).returncode == 0
    assert desk.recorded() == before  # an empty variable is one that is not given
    assert desk.run(script, STUB_EXIT="130").returncode == 130
    more = ["--fresh", "--generation", "5", "--prompt", "a  'b'"]  # arguments follow, and win
    assert desk.run(script, *more).returncode == 0
    assert desk.recorded()[-5:] == more and desk.settings().generation == 5
    path = desk.root / script
    path.write_text(re.sub(r"^: .*\n", "", path.read_text(), flags=re.MULTILINE))
    assert desk.run(script).returncode == 0 and desk.recorded() == []


def test_evaluations_are_commands_and_a_failure_ends_the_script(desk):
    """Without a prompt nothing is generated; lists of subjects are one name."""
    ppl = {"EVAL_PERPLEXITY": "true", "PPL_DATASETS": "mmlu c4", "PPL_SUBJECTS": "virology anatomy"}
    mmlu = {"EVAL_MMLU": "yes", "MMLU_DATASETS": "mmlu_virology, anatomy", "VERBOSE": "true"}
    done = desk.run(EXPERIMENT, "--dtype", "float32", **ppl, **mmlu)
    assert done.returncode == 0, done.stderr
    assert "VERBOSE=true applies only to a generated text and is ignored" in done.stderr
    (first, *perplexity), (second, *questions) = desk.commands()
    assert (first, second) == ("perplexity", "eval")
    assert "--data=mmlu:virology+anatomy,c4" in perplexity
    assert "--tasks=mmlu:virology+anatomy" in questions and "--num-fewshot=0" in questions
    assert perplexity[-2:] == questions[-2:] == ["--dtype", "float32"]
    assert not [part for part in perplexity + questions if part.startswith("--limit")]
    done = desk.run(EXPERIMENT, EVAL_PERPLEXITY="1", PPL_SUBJECTS="anatomy", PPL_MAX_SAMPLES="all")
    assert "--data=mmlu:anatomy" in desk.recorded("perplexity")
    assert desk.run(EXPERIMENT, EVAL_GENERAL_NLP="1", EVAL_SUMMARIZATION="1").returncode == 0
    assert desk.recorded("eval")[-2:] == ["--tasks=general-nlp", "--dense"]
    done = desk.run(EXPERIMENT, STUB_EXIT="130", **ppl, **mmlu)
    assert done.returncode == 130 and len(desk.commands()) == 1


def test_values_arrive_as_they_are(desk):
    for prompt in (HARD_PROMPT, "two  words"):
        assert desk.run(DRIFT, CUSTOM_PROMPT_TEXT=prompt).returncode == 0
        assert desk.settings().custom_prompt_text == prompt
    (desk.root / "my notes.txt").write_text("a file whose name has a space")
    for value, expected in (
        ("  astronomy \t anatomy\n virology ", "astronomy,anatomy,virology"),
        ("astronomy, my notes.txt", "astronomy, my notes.txt"),
        ("my notes.txt", "my notes.txt"),
        ("* astronomy", "*,astronomy"),
    ):
        assert desk.run(EXPERIMENT, PROMPT_SUBJECT=value).returncode == 0
        assert desk.settings().prompt_subject == expected
        done = desk.run(EXPERIMENT, EVAL_SUMMARIZATION="1", SUMMARIZATION_DATASETS=value)
        assert f"--data={expected}" in desk.recorded("summarize")
    said = "is neither true nor false: write true, false, yes, no, 1 or 0\n"
    for word in ("maybe", " true", "$(id)"):
        done = desk.run(EXPERIMENT, VERBOSE=word)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"run_experiment.sh: VERBOSE={word} {said}"
    assert not (desk.root / "record.json").exists()
    for word in ("TRUE", "1", "yes", "False", "0", "No"):
        assert desk.run(DRIFT, KNOWLEDGE_DRIFT=word, EVAL_PERPLEXITY=word).returncode == 0
        value = word.lower() in ("true", "1", "yes")
        assert desk.settings().knowledge_drift is value
        assert len(desk.commands()) == 1 + value


TABLE = "# auto in a comment\n0:#3 # auto again\n1:0.5\n"
FIXED = "has no auto and fixes every count"


def test_the_default_total_steps_back_where_another_setting_says_the_amount(desk):
    (desk.root / "table.txt").write_text(TABLE)
    (desk.root / "auto.txt").write_text(TABLE + "2-3:auto\n")
    for variables, reason in (
        ({"LAYER_TOPK": "0-5:0.6"}, f"LAYER_TOPK=0-5:0.6 {FIXED}"),
        ({"LAYER_TOPK": "@table.txt"}, f"LAYER_TOPK=@table.txt {FIXED}"),
        ({"PRUNE_STRATEGY": "auto"}, "PRUNE_STRATEGY=auto sets the counts itself"),
        ({"METHOD": "dense"}, "METHOD=dense removes nothing"),
    ):
        done = desk.run(EXPERIMENT, **variables)
        said = f"run_experiment.sh: the default TOTAL_PRUNE_PERCENT=50 is ignored: {reason}\n"
        assert (done.returncode, done.stderr) == (0, said)
        assert not any(part.startswith("--total-prune-percent") for part in desk.recorded())
    done = desk.run(EXPERIMENT, "--sparsity", "0.3")
    assert "TOTAL_PRUNE_PERCENT=50 is ignored: --sparsity sets the amount" in done.stderr
    assert desk.settings().prune_config().sparsity == 0.3
    for variables in (
        {"LAYER_TOPK": "all:auto,0:0.9"},
        {"LAYER_TOPK": "all:0.5", "TOTAL_PRUNE_PERCENT": "40"},  # dart-llm refuses the two
        {"METHOD": "dense", "TOTAL_PRUNE_PERCENT": "40"},
    ):
        done = desk.run(EXPERIMENT, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        total = variables.get("TOTAL_PRUNE_PERCENT", "50")
        assert f"--total-prune-percent={total}" in desk.recorded()


LIST = "the bees; then $HOME, `id` and 'quotes'"


def drift_settings(desk):
    """The settings that the recorded flags give; later ones win, as on the command line."""
    command, *flags = desk.commands()[-1]
    assert command == "drift"
    pairs = (flag.removeprefix("--").partition("=") for flag in flags)
    return collect_drift(
        {name.replace("-", "_"): value for name, _, value in pairs}, environment={}
    )


def test_the_variables_become_flags_of_a_study(desk):
    variables = {"MODEL": "gpt2", "TOTAL_PRUNE_PERCENT": "30", "SEED": "4"}
    variables |= {"RANKING_METHOD": "magnitude", "EXPERIMENT_NAME": "mine"}
    variables |= {"RESULTS_DIR": "else where", "CUSTOM_PROMPT_TEXT": LIST}
    done = desk.run(DRIFT, "--passages=shipped", **variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    study = drift_settings(desk)
    assert (study.kind, study.model, study.seeds) == ("forced", "gpt2", (4,))
    assert (study.experiment, study.results_dir, study.prompt) == ("mine", "else where", None)
    never = study.candidates()[1]
    assert never.label == "never@0.3" and never.config.score.name == "magnitude"
    # where no passages are named, a prompt of the variables is the source
    assert desk.run(DRIFT, "--mode=free", CUSTOM_PROMPT_TEXT=LIST, METHOD="griffin").returncode == 0
    study = drift_settings(desk)
    assert (study.prompt, study.generation, study.sparsity) == (LIST, 300, None)
    labels = [method.label for method in study.candidates()]
    assert labels == ["dense", "never@0.5", "griffin@0.5"]
