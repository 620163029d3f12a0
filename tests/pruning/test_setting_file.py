"""A setting in a file: round trip, bad files, other checkpoints, and every place that takes one."""

import logging
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dart_llm import prune
from dart_llm.cli.chat import settings_line
from dart_llm.cli.chat_settings import ChatSettings
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments.study import load_model
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import METHODS
from dart_llm.pruning.setting_file import KeptSetting, changes_of, read_setting
from dart_llm.reporting.console import Ui
from dart_llm.server.schemas import Dart, RequestReader
from dart_llm.server.settings import ServeSettings
from dart_llm.session.run import identity, other_model
from dart_llm.settings import merge
from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.sweep.grid import expand
from dart_llm.studies.sweep.settings import PerplexitySettings, SweepSettings
from lm_cases import loaded, place

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def keep(path, method="griffin", weights="dense", model=None, **changes):
    config = PruneConfig.build(method, **changes)
    return KeptSetting(config, weights, model or {}).save(path)


@given(
    st.sampled_from(["griffin", "dart", "dart-token", "dense"]),
    st.floats(0.01, 0.99).map(lambda x: round(x, 3)),
    st.sampled_from(["full", "screened"]),
    st.sampled_from([None, "file", "q8_0"]),
)
def test_what_is_saved_is_read_back(tmp_path_factory, method, sparsity, head, weights):
    changes = {} if method == "dense" else {"sparsity": sparsity}
    config = PruneConfig.build(method, head=head, **changes)
    path = tmp_path_factory.mktemp("kept") / "deep" / "setting.yaml"
    kept = KeptSetting(config, weights, {"name": "x"}, {"loss": 0.5}, {"date": "2026-01-02"})
    assert read_setting(kept.save(path)) == kept
    assert PruneConfig.build(f"file:{path}") == config == METHODS.get(f"file:{path}")


def test_the_file_is_small_and_says_what_differs(tmp_path):
    path = keep(tmp_path / "a.yaml", "dart", sparsity=0.3, drift={"min_distance": 9})
    text = path.read_text()
    assert text.startswith("# Found by dart-llm tune; use it by --method file:a.yaml")
    wanted = {"method": "dart", "sparsity": 0.3, "drift": {"min_distance": 9}}
    assert yaml.safe_load(text)["setting"] == {"weights": "dense", **wanted}
    assert changes_of(PruneConfig.build("dense")) == {"method": "dense"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "there is no setting file .*: dart-llm tune --save .* writes one"),
        ("sparsity: 0.5", "is not a setting file: its setting must name a method"),
        ("setting: 3", "is not a setting file"),
        ("setting: {method: griffin, sparsity: 50}", "the setting in .*: sparsity 50 must lie"),
        ("setting: {method: grifin}", "did you mean"),
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


def test_the_home_of_nobody_is_a_file_that_is_missing():
    with pytest.raises(ConfigError, match=r"there is no setting file ~nobody-here/x\.yaml"):
        PruneConfig.build("file:~nobody-here/x.yaml")


def test_prune_takes_it(tmp_path):
    model, _ = loaded()
    path = keep(tmp_path / "s.yaml", sparsity=0.5)
    with prune(model, f"file:{path}") as run:
        model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert run.report().achieved_sparsity == pytest.approx(0.5, abs=0.02)
    with prune(model, f"file:{path}", sparsity=0.25) as run:
        model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert run.report().requested_sparsity == 0.25


def test_another_checkpoint_is_said_in_one_sentence(tmp_path, caplog):
    model, _ = loaded()
    own = keep(tmp_path / "own.yaml", model=identity(model), sparsity=0.5)
    assert other_model(f"file:{own}", model) == "" == other_model("griffin", model)
    other = {**identity(model), "name": "elephant", "sha256": "0" * 64, "parameters": 5}
    path = keep(tmp_path / "other.yaml", model=other, sparsity=0.5)
    sentence = other_model(f"file:{path}", model)
    assert sentence.startswith("other.yaml was found for elephant, not for")
    with caplog.at_level(logging.WARNING):
        prune(model, f"file:{path}")
    assert caplog.messages == [sentence]


@pytest.mark.parametrize("kind", [RunSettings, PerplexitySettings, ChatSettings, ServeSettings])
def test_commands_hold_the_weights_as_the_file_says(tmp_path, kind):
    path = keep(tmp_path / "s.yaml", weights="q8_0", sparsity=0.5)
    result = merge(kind, {"method": f"file:{path}"}, environment={})
    assert result.weights == "q8_0" and result.notes == ("s.yaml asks for --weights q8_0: taken",)
    assert result.prune_config().target == 0.5
    given = merge(kind, {"method": f"file:{path}", "weights": "dense"}, environment={})
    assert given.weights == "dense"
    assert given.notes[0].startswith("s.yaml was found with --weights q8_0, not dense")
    assert merge(kind, {"method": "griffin"}, environment={}).notes == ()


def test_loading_says_where_the_setting_was_found_for_another_model(tmp_path):
    other = {"name": "elephant", "sha256": None, "parameters": 5}
    path = keep(tmp_path / "s.yaml", model=other, sparsity=0.5)
    given = {"model": str(place() / "model"), "device": "cpu", "method": f"file:{path}"}
    ui = Ui(quiet=True)
    load_model(merge(RunSettings, given, environment={}), ui)
    assert "s.yaml was found for elephant" in ui.log[-1]


def test_a_comparison_holds_all_methods_as_the_file_says(tmp_path):
    path = keep(tmp_path / "s.yaml", weights="dense", sparsity=0.4)
    settings = {"methods": f"dense,griffin,file:{path}", "sparsities": "0.5", "tasks": "arc_easy"}
    grid = merge(SweepSettings, settings, environment={})
    assert grid.weights == ("dense",)
    cells = expand(grid)
    assert [cell.config().target for cell in cells] == [0.0, 0.5, 0.4]
    assert "setting" in cells[2].inputs and "setting" not in cells[1].inputs
    second = keep(tmp_path / "t.yaml", weights="q8_0", sparsity=0.4)
    with pytest.raises(ConfigError, match="use weights dense and q8_0: give --weights one"):
        merge(SweepSettings, {**settings, "methods": f"file:{path},file:{second}"}, environment={})


def test_answers_have_the_head_that_the_file_says(tmp_path):
    path = keep(tmp_path / "s.yaml", sparsity=0.5, head="screened")
    assert merge(ChatSettings, {"method": f"file:{path}"}, environment={}).served().screens
    settings = merge(ServeSettings, {"method": f"file:{path}"}, environment={})
    (config,) = settings.configs()
    assert settings.ready == ("griffin",) and config.target == 0.5 and config.screens
    dense = ChatSettings(method="dense", head="screened 0.3")
    assert dense.served().head.bytes == 0.3 and ChatSettings(method="dense").served() is None
    assert settings_line(dense) == "dense: no neuron is removed, output head screened"
    asker = RequestReader(None, ServeSettings(method="dense", head="screened"), (), None, 10)
    assert asker.config(None).screens and asker.config(Dart(method="dense")).screens
    assert asker.config(Dart(sparsity=0.0)) is None  # the model as it is


def test_what_comes_over_the_network_names_no_file(tmp_path):
    path = keep(tmp_path / "s.yaml", sparsity=0.5)
    with pytest.raises(UnknownName):
        METHODS.get_listed(f"file:{path}")
    assert METHODS.get_listed("griffin").method == "griffin"
    assert Path(path).is_file()
