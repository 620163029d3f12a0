"""What one setting asks of others: the methods and switches that it takes."""

import pytest

from dart_llm.cli.app import HELP
from dart_llm.cli.chat import ChatSettings
from dart_llm.errors import ConfigError
from dart_llm.pruning.config import DEFAULT_METHOD, DEFAULT_SPARSITY, PruneConfig
from dart_llm.pruning.methods import summaries
from dart_llm.server.settings import ServeSettings
from dart_llm.settings import merge
from dart_llm.studies.bench.settings import SpeedSettings
from dart_llm.studies.generate.settings import RunSettings, collect
from dart_llm.studies.inspection.settings import InspectSettings
from dart_llm.studies.quality.settings import QualitySettings
from dart_llm.studies.sweep.settings import (
    CompareSettings,
    EvalSettings,
    PerplexitySettings,
    SummarizeSettings,
    SweepSettings,
)

PER_TOKEN = "with method dart-token every token selects its own neurons"
MASKS = f"--{{}}: method dart is used instead of dart-token, because {PER_TOKEN}"


def collected(**flags):
    result = collect(flags, environment={})
    return result, list(result.notes)


def test_a_decay_takes_a_method_that_averages_where_none_was_named():
    result, notes = collected(ema_decay=0.9, sparsity=0.5)
    mean = 'score "fisher" weighs all tokens alike, as a mean'
    assert notes == [
        f"--ema-decay: method dart-prompt is used instead of dart-token, because {mean}"
    ]
    score = result.prune_config().score
    assert (result.method, score.name, score.ema_decay) == ("dart-prompt", "normalized", 0.9)
    assert collected(ema_decay=0.9, ranking_method="max")[1] == [MASKS.format("ranking-method")]
    for method, why in (("dart", mean), ("static", 'score "weight" reads no activations')):
        with pytest.raises(ConfigError, match=f"{why}: drop --ema-decay, or .* dart-prompt can"):
            collected(ema_decay=0.9, method=method)


def test_settings_of_masks_take_a_method_with_masks_where_none_was_named():
    for name, value in (
        *(("drift", "paper"), ("drift", "interval 64"), ("knowledge_drift", True)),
        *(("ranking_method", "magnitude"), ("masks", "masks.safetensors")),
    ):
        result, notes = collected(**{name: value})
        flag = name.replace("_", "-")
        assert (result.method, notes) == ("dart", [MASKS.format(flag)]), name
        with pytest.raises(ConfigError) as caught:
            collected(method="dart-token", **{name: value})
        can = f"drop --{flag}, or leave the method out: dart can"
        assert str(caught.value) == f"{PER_TOKEN}: {can}"
    assert collected(drift="paper")[0].prune_config().drift.rule == "paper"
    with pytest.raises(ConfigError, match="with method teal every token"):
        collected(method="teal", drift="paper")
    for honoured in (
        *({"drift": "never"}, {"knowledge_drift": False}, {"ranking_method": "fisher"}),
        *({"masking_step": 3}, {"release_step": 9}, {"min_evidence": 8}, {"budget": "depth"}),
        *({"layer_topk": "0:0.5"}, {"prune_strategy": "auto"}, {"compensation": False}),
        {"head": "screened"},
    ):
        result, notes = collected(**honoured)
        assert (result.method, notes) == ("dart-token", []), honoured
    chat = merge(ChatSettings, {"drift": "paper"}, None, {})
    assert (chat.method, chat.notes) == ("dart", (MASKS.format("drift"),))
    with pytest.raises(ConfigError):  # no method takes two amounts
        collected(drift="paper", sparsity=0.5, layer_topk="0:0.5")


def test_one_method_and_one_sparsity_are_the_default_of_every_command():
    for kind in (RunSettings, ChatSettings, EvalSettings, PerplexitySettings, SummarizeSettings):
        given = {"tasks": "perplexity:embedded"} if kind is EvalSettings else {}
        config = merge(kind, given, None, {}).prune_config()
        assert (config.method, config.target) == (DEFAULT_METHOD, DEFAULT_SPARSITY), kind
        dart = merge(kind, {**given, "method": "dart"}, None, {}).prune_config()
        assert (dart.method, dart.target) == ("dart", DEFAULT_SPARSITY), kind
    (served,) = merge(ServeSettings, {}, None, {}).configs()
    assert served.replace({"sparsity": None}) == PruneConfig.build()
    assert (PruneConfig.build().method, PruneConfig.build().target) == ("dart-token", 0.3)
    looked_at = merge(InspectSettings, {}, None, {}).prune_config()  # at masks
    assert (looked_at.method, looked_at.target) == ("dart", DEFAULT_SPARSITY)
    speed = merge(SpeedSettings, {}, None, {})
    assert [one.label for one in speed.variant_list()] == [DEFAULT_METHOD]
    assert {config.target for _, config in speed.method_list()} == {DEFAULT_SPARSITY}
    assert QualitySettings().variant_list()[1].label == DEFAULT_METHOD
    compared = merge(CompareSettings, {"tasks": "a"}, None, {})
    assert compared.methods == ("dense", "griffin", "dart-token")
    assert compared.sparsities == (0.3,)
    assert merge(SweepSettings, {"tasks": "a"}, None, {}).methods == ("dense", DEFAULT_METHOD)
    assert "dense, griffin and dart-token at sparsity 0.3" in HELP["compare"]["help"]
    assert [name for name, text in summaries().items() if "default" in text] == [DEFAULT_METHOD]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"temperature": -1.0}, "--temperature -1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"seed": 2**70}, "--seed"),
        ({"prompt": "\udcff\udcfe"}, "not valid UTF-8"),
        ({"masks": "m.safetensors", "sparsity": 0.2}, "drop the sparsity"),
    ],
)
def test_values_that_cannot_be(flags, words):
    with pytest.raises(ConfigError, match=words):
        collected(**flags)


@pytest.mark.parametrize(
    ("flags", "subjects"),
    [
        ({"prompt_subject": "astronomy,virology"}, ["astronomy", "virology"]),
        ({"prompt_subject": "astronomy", "custom_prompt_text": "hello"}, []),
        ({"prompt_subject": "astronomy", "prompt": "x", "prompt_type": "mmlu"}, ["astronomy"]),
    ],
)
def test_a_subject_without_a_prompt_is_a_mmlu_prompt(flags, subjects):
    assert collected(**flags)[0].mmlu_subjects == subjects


def test_what_beats_what_and_what_is_not_given_twice(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("total-prune-percent: 40\ndrift: never\nmethod: dart\n")
    environment = {"DART_KNOWLEDGE_DRIFT": "true", "DART_SPARSITY": "0.2"}
    settings = merge(RunSettings, {"sparsity": 0.6}, file, environment)
    assert (settings.sparsity, settings.total_prune_percent) == (0.6, None)
    assert (settings.knowledge_drift, settings.drift, settings.method) == (True, None, "dart")
    for flags in (
        {"sparsity": 0.5, "total_prune_percent": 50.0},
        {"drift": "never", "knowledge_drift": True},
        {"prompt": "a", "prompt_file": "b"},
    ):
        with pytest.raises(ConfigError, match="not both"):
            collected(**flags)
    for name in ("../x", "/tmp/x", "."):
        with pytest.raises(ConfigError, match="leaves the results folder"):
            collected(experiment_name=name)
