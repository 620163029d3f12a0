"""Every variable alone, and what it asks of other settings: methods and switches that it takes."""

import json
import shlex
import shutil

import pytest
from typer.testing import CliRunner

from dart_llm.cli.app import app
from dart_llm.data import datasets as mmlu
from dart_llm.errors import ConfigError
from dart_llm.settings import merge
from dart_llm.studies.drift.settings import collect as collect_study
from dart_llm.studies.evaluate.settings import EvalSettings
from dart_llm.studies.generate import study as job
from dart_llm.studies.generate.settings import collect
from shells import DRIFT, EXPERIMENT, VARIABLES, make_desk
from tiny_gpt2 import write_gpt2

DECAY = (
    "--ema-decay is honoured by method dart-prompt with score normalized: taken instead of dart, "
    'whose score "fisher" is a mean over all tokens alike'
)


def told(**flags):
    found = collect(flags, environment={})
    return found, list(found.notes)


def test_a_decay_takes_a_method_that_averages_where_none_was_named():
    found, notes = told(ema_decay=0.9, sparsity=0.5)
    config = found.prune_config()
    assert notes == [DECAY]
    taken = (found.method, config.score.name, config.score.ema_decay, config.sparsity)
    assert taken == ("dart-prompt", "normalized", 0.9, 0.5)
    assert found.experiment == "smollm2-135m-dart-prompt-0.5"
    for score in ("magnitude", "max"):  # the default can
        found, notes = told(ema_decay=0.9, ranking_method=score)
        assert (found.method, notes) == ("dart", [])
    given = {"tasks": "perplexity:embedded"}
    other = merge(EvalSettings, given, None, {"DART_EMA_DECAY": "0.9"})
    assert (other.method, other.notes) == ("dart-prompt", (DECAY,))
    study = {"ema_decay": 0.9, "passages": "shipped"}
    study_found = collect_study({**study, "ranking_method": "magnitude"}, environment={})
    assert study_found.ema_decay == 0.9
    with pytest.raises(ConfigError, match=r"drop the ema_decay, or give another --ranking-method"):
        collect_study(study, environment={})
    can = ": drop the ema_decay, or leave the method out: dart-prompt can"
    for flags, sentence in (
        ({"method": "dart"}, f'score "fisher" is a mean over all tokens alike{can}'),
        ({"method": "static"}, f'score "weight" reads no activations{can}'),
        (
            {"ranking_method": "flap"},
            'score "flap" is a variance over all tokens alike: drop the ema_decay',
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            told(ema_decay=0.9, **flags)
        assert str(caught.value) == sentence


NO_EFFECT = "{} has no effect without {}"


@pytest.mark.parametrize(
    ("flags", "changed", "notes"),
    [
        ({"ppl_max_samples": 3}, {}, [NO_EFFECT.format("--ppl-max-samples", "--eval-perplexity")]),
        ({"mmlu_shots": 5}, {}, [NO_EFFECT.format("--mmlu-shots", "--eval-mmlu")]),
        (
            {"summarization_max_output": 64, "general_nlp_datasets": "boolq"},
            {},
            [
                NO_EFFECT.format("--general-nlp-datasets", "--eval-general-nlp"),
                NO_EFFECT.format("--summarization-max-output", "--eval-summarization"),
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
            [NO_EFFECT.format("--ppl-subjects", "--ppl-datasets mmlu")],
        ),
        (
            {"prompt_subject": "astronomy", "generation": 4},
            {"prompt_type": "mmlu"},
            ["--prompt-subject asks for --prompt-type mmlu: taken"],
        ),
        (
            {"prompt_subject": "astronomy", "custom_prompt_text": "hello"},
            {"prompt_type": "custom"},
            [NO_EFFECT.format("--prompt-subject", "--prompt-type mmlu")],
        ),
        ({"eval_mmlu": True, "mmlu_shots": 5, "mmlu_datasets": "anatomy"}, {}, []),
        ({"eval_perplexity": True, "ppl_subjects": "anatomy", "ppl_datasets": "mmlu"}, {}, []),
    ],
)
def test_idle_settings_are_said_and_implied_ones_taken(flags, changed, notes):
    found, said = told(**flags)
    assert {name: getattr(found, name) for name in changed} == changed
    assert said == notes


# Every variable of the scripts, alone.

ALONE = [
    word.split("=")
    for word in shlex.split("""
METHOD=published METHOD=dense MODEL=model 'CACHE_DIR=some cache' DEVICE=cpu DEVICE=0
LAYER_TOPK=0:0.5 LAYER_TOPK=all:auto,0:0.9 LAYER_TOPK=@table.txt TOTAL_PRUNE_PERCENT=0
TOTAL_PRUNE_PERCENT=99.5 MASKING_STEP=0 MASKING_STEP=3 RELEASE_STEP=4 EMA_DECAY=0.9
RANKING_METHOD=max RANKING_METHOD=magnitude PRUNE_STRATEGY=topk PRUNE_STRATEGY=auto
KNOWLEDGE_DRIFT=true KNOWLEDGE_DRIFT=false PROMPT_TYPE=custom PROMPT_SUBJECT=astronomy
'CUSTOM_PROMPT_TEXT=the sea' PROMPT_LENGTH=4 GENERATION=5 EVAL_PERPLEXITY=false
PPL_DATASETS=text.txt PPL_SUBJECTS=astronomy PPL_MAX_SAMPLES=1 PPL_MAX_SAMPLES=all EVAL_MMLU=false
MMLU_DATASETS=astronomy MMLU_SHOTS=2 MMLU_MAX_SAMPLES=1 EVAL_GENERAL_NLP=false
GENERAL_NLP_DATASETS=boolq GENERAL_NLP_MAX_SAMPLES=1 EVAL_SUMMARIZATION=false
SUMMARIZATION_DATASETS=documents.jsonl SUMMARIZATION_MAX_SAMPLES=1 SUMMARIZATION_MAX_OUTPUT=8 SEED=7
VERBOSE=true SAVE_ACTIVATIONS=true EXPERIMENT_NAME=mine 'RESULTS_DIR=else where'
""")
]
# Where a variable must arrive in the configuration that masks are made by.
ARRIVES = {
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
    {"EVAL_PERPLEXITY": "true", "PPL_DATASETS": "text.txt", "PPL_MAX_SAMPLES": "1"},
    {"EVAL_PERPLEXITY": "true", "PPL_SUBJECTS": "astronomy", "PPL_MAX_SAMPLES": "1"},
    {"PROMPT_TYPE": "mmlu", "PROMPT_SUBJECT": "astronomy", "PROMPT_LENGTH": "32"},
    {"MASKING_STEP": "2", "RELEASE_STEP": "4", "KNOWLEDGE_DRIFT": "true"},
]
DIFFERENT = ("METHOD", "EMA_DECAY", "RANKING_METHOD", "KNOWLEDGE_DRIFT")
"""Variables that may get on badly with the drift detection that the second script switches on."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a text, a layer table and questions on astronomy."""
    root = tmp_path_factory.mktemp("place")
    write_gpt2(root / "model")
    (root / "text.txt").write_text("the birds of winter. " * 20)
    (root / "table.txt").write_text("0:0.5\n1:auto\n")
    local = root / mmlu.LOCAL_MMLU
    local.mkdir(parents=True)
    question = {"choices": ["a", "b", "c", "d"], "answer": 0, "subject": "astronomy"}
    lines = [json.dumps({"question": f"what is {n}", **question}) + "\n" for n in range(8)]
    (local / "astronomy_dev.jsonl").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def desk(tmp_path_factory, place):
    found = make_desk(tmp_path_factory.mktemp("desk"))
    shutil.copy(place / "table.txt", found.root)
    return found


def run_as(desk, script, variables, place):
    """config.json of the run that a script asks for, which is made in this process.

    Its settings are those that dart-llm reads from what the script hands on.
    """
    given = {"MODEL": "model", "GENERATION": "5", "CUSTOM_PROMPT_TEXT": "hello there", **variables}
    if "PROMPT_SUBJECT" in variables:
        given["CUSTOM_PROMPT_TEXT"] = ""
    done = desk.run(script, **given)
    assert done.returncode == 0, done.stderr
    small = {"ppl_prompt_tokens": 48, "ppl_scored_tokens": 16}
    short = ["--ppl-prompt-tokens", "48", "--ppl-scored-tokens", "16", "--fresh", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(job.RunStudy, "figures", lambda self: ())
        patch.setattr(job.RunStudy, "write_page", lambda self: None)
        asked = desk.settings().model_dump(mode="json")
        run = CliRunner().invoke(app, ["run", *desk.recorded(), *short])
    assert run.exit_code == 0, run.exception
    config = json.loads(run.stdout)["config"]
    assert {name: config["settings"][name] for name in asked} == asked | small
    assert config["status"] == "complete"
    found = {name: ARRIVES[name](config["prune"]) for name in variables if name in ARRIVES}
    assert found == {name: value for name, value in variables.items() if name in ARRIVES}
    return config


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        *((EXPERIMENT, *pair) for pair in ALONE),
        *((DRIFT, *pair) for pair in ALONE if pair[0] in DIFFERENT),
    ],
)
def test_every_variable_alone_runs_under_the_defaults(desk, place, script, name, value):
    config = run_as(desk, script, {name: value}, place)
    method = {"METHOD": value, "EMA_DECAY": "dart-prompt"}.get(name, "dart")
    assert config["prune"]["method"] == config["settings"]["method"] == method


def test_every_variable_has_a_value_here():
    assert list(dict.fromkeys(name for name, _ in ALONE)) == VARIABLES


@pytest.mark.parametrize("variables", COMBINED)
def test_combinations_run_too(variables, desk, place):
    run_as(desk, EXPERIMENT, variables, place)
