"""One file of a user's own: what it registers, what it keys, how it fails."""

import pytest
import torch
from typer.testing import CliRunner

from dart_llm.cli.app import app
from dart_llm.errors import ConfigError
from dart_llm.files import file_sha256
from dart_llm.pruning import registry
from dart_llm.pruning.registry import METHODS, SCORES
from dart_llm.session.run import prune
from steps import decode
from tiny import tiny, tokens

TEXT = """
from dart_llm.extend import METHODS, SCORES, score
from dart_llm.pruning.scores import squared

@score(squared, "a test")
def loudest(a, weights):
    \"\"\"The sum's root.\"\"\"
    return a

SCORES.register("loudest", loudest)
METHODS.register("griffin-loudest", METHODS.get("griffin").replace(
    {"method": "griffin-loudest", "score": "loudest"}))
"""


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """Nothing is loaded before, nor afterwards."""
    monkeypatch.setenv(registry.PLUGIN, "")
    monkeypatch.setattr(registry, "_digests", {})
    path = tmp_path / "my_score.py"
    path.write_text(TEXT, encoding="utf-8")
    yield path
    METHODS.unregister("griffin-loudest")
    SCORES.unregister("loudest")


def test_a_file_adds_to_the_names_and_keys_results(file):
    assert "griffin-loudest" not in METHODS and registry.plugin_digest() == {}
    registry.use_plugin(file)
    assert "griffin-loudest" in METHODS and registry.plugin_digest() == {
        "plugin": file_sha256(file)
    }
    model, ids = tiny(), tokens(1, 12)
    with prune(model, "griffin-loudest", sparsity=0.5), torch.no_grad():
        result = decode(model, ids, 6)
    with prune(model, "griffin", score="loudest", sparsity=0.5), torch.no_grad():
        assert torch.equal(decode(model, ids, 6), result)


def test_a_variable_names_it_for_processes_and_commands_have_a_flag(file, monkeypatch):
    result = CliRunner().invoke(app, ["methods", "--plugin", str(file), "--json"])
    assert result.exit_code == 0 and "griffin-loudest" in result.stdout
    METHODS.unregister("griffin-loudest")
    SCORES.unregister("loudest")
    monkeypatch.setattr(registry, "_digests", {})  # as in a process that such a command starts
    assert "loudest" in SCORES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be loaded: FileNotFoundError: .*No such file or directory"),
        ("1 / 0", "cannot be loaded: ZeroDivisionError: division by zero"),
        (TEXT.replace("griffin-loudest", "griffin"), "method 'griffin' is already registered"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "own.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        registry.use_plugin(path)
    assert "\n" not in str(caught.value)


def test_a_score_that_is_not_one_number_per_neuron_is_refused(file):
    file.write_text(TEXT.replace("return a\n", "return a[:-1]\n"), encoding="utf-8")
    registry.use_plugin(file)
    message = r"^score 'loudest' gave \[47\] numbers for \[48\] neurons: it must return one number"
    with (
        prune(tiny(), "griffin-loudest", sparsity=0.5) as run,
        torch.no_grad(),
        pytest.raises(ConfigError, match=message),
    ):
        decode(run.model, tokens(1, 12), 6)
