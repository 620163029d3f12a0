"""A setting in a file: round trip, bad files, other checkpoints, and every place that takes one."""

import logging

import pytest
import torch
import yaml

from dart_llm import prune
from dart_llm.cli.chat import ChatSettings
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import METHODS
from dart_llm.pruning.setting_file import KeptSetting, changes_of, read_setting
from dart_llm.server.schemas import Dart, RequestReader
from dart_llm.server.settings import ServeSettings
from dart_llm.session.run import identity, other_model
from dart_llm.settings import merge
from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.sweep.settings import PerplexitySettings
from lm_cases import loaded

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def keep(path, method="griffin", weights="dense", model=None, **changes):
    config = PruneConfig.build(method, **changes)
    return KeptSetting(config, weights, model or {}).save(path)


def test_what_is_saved_is_read_back_and_shows_what_differs(tmp_path):
    for number, (method, changes, weights) in enumerate(
        (
            ("griffin", {"sparsity": 0.37}, "file"),
            ("dart", {"sparsity": 0.3, "drift": {"min_distance": 9}}, "q8_0"),
            ("dart-token", {"head": "screened 0.3", "seed": 3}, None),
            ("dense", {}, None),
        )
    ):
        config, path = PruneConfig.build(method, **changes), tmp_path / "deep" / f"{number}.yaml"
        kept = KeptSetting(config, weights, {"name": "x"}, {"loss": 0.5}, {"date": "2026-01-02"})
        assert read_setting(kept.save(path)) == kept
        assert PruneConfig.build(f"file:{path}") == config == METHODS.get(f"file:{path}")
    assert (tmp_path / "deep" / "0.yaml").read_text().startswith("# Written by dart-llm tune.  Use")
    written = yaml.safe_load((tmp_path / "deep" / "1.yaml").read_text())["setting"]
    wanted = {"method": "dart", "sparsity": 0.3, "drift": {"min_distance": 9}}
    assert written == {"weights": "q8_0", **wanted}
    assert changes_of(PruneConfig.build("dense")) == {"method": "dense"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "there is no setting file .*: dart-llm tune --save .* writes one"),
        ("sparsity: 0.5", "is not a setting file: its setting must name a method"),
        ("setting: {method: griffin, sparsity: 50}", "the setting in .*: sparsity 50 must lie"),
        ("setting: {method: griffin, weight: file}", 'unknown setting "weight"'),
        ("setting: {method: griffin, weights: [file]}", "is not a setting file"),
        ("setting: {method: 'file:x'}", "is not a setting file"),
        ("model: 3\nsetting: {method: griffin}", "is not a setting file"),
        ("{", "cannot read the settings file"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    for build in (lambda: PruneConfig.build(f"file:{path}"), lambda: METHODS.check(f"file:{path}")):
        with pytest.raises(ConfigError, match=sentence) as result:
            build()
        assert "\n" not in str(result.value)


def test_prune_takes_it_and_warns_on_another_checkpoint(tmp_path, caplog):
    model, _ = loaded()
    path = keep(tmp_path / "own.yaml", model=identity(model), sparsity=0.5)
    with caplog.at_level(logging.WARNING), prune(model, f"file:{path}") as run:
        model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert run.report().achieved_sparsity == pytest.approx(0.5, abs=0.02) and not caplog.messages
    assert other_model(f"file:{path}", model) == "" == other_model("griffin", model)
    other = {**identity(model), "name": "elephant", "sha256": "0" * 64, "parameters": 5}
    path = keep(tmp_path / "other.yaml", model=other, sparsity=0.5)
    with caplog.at_level(logging.WARNING):
        prune(model, f"file:{path}")
    assert caplog.messages == [other_model(f"file:{path}", model)]
    assert caplog.messages[0].startswith("other.yaml was measured on elephant, not on")


@pytest.mark.parametrize("kind", [RunSettings, PerplexitySettings, ChatSettings, ServeSettings])
def test_commands_hold_the_weights_as_the_file_says(tmp_path, kind):
    path = keep(tmp_path / "s.yaml", weights="q8_0", sparsity=0.5)
    result = merge(kind, {"method": f"file:{path}"}, environment={})
    assert result.weights == "q8_0" and result.notes == ("s.yaml sets --weights q8_0",)
    assert result.prune_config().target == 0.5
    given = merge(kind, {"method": f"file:{path}", "weights": "dense"}, environment={})
    assert given.weights == "dense"
    assert given.notes[0].startswith("s.yaml was measured with --weights q8_0, not dense")


def test_answers_have_the_head_that_the_file_says_and_clients_name_no_file(tmp_path):
    path = keep(tmp_path / "s.yaml", sparsity=0.5, head="screened")
    assert merge(ChatSettings, {"method": f"file:{path}"}, environment={}).served().screens
    settings = merge(ServeSettings, {"method": f"file:{path}"}, environment={})
    (config,) = settings.configs()
    assert settings.ready == ("griffin",) and config.target == 0.5 and config.screens
    asker = RequestReader(None, ServeSettings(method="dense", head="screened"), (), None, 10)
    assert asker.config(None).screens and asker.config(Dart(method="dense")).screens
    assert asker.config(Dart(sparsity=0.0)) is None  # the model as it is
    with pytest.raises(UnknownName):
        METHODS.get_listed(f"file:{path}")
    assert METHODS.get_listed("griffin").method == "griffin"
