"""Python blocks of CONTRIBUTING.md, the README and the pages run as they stand, on small models."""

import re
import tomllib

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dart_llm.errors import ConfigError, UnsupportedModel
from dart_llm.models.architectures import LAYER_NAMES as LAYERS
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.drift import make_rule
from dart_llm.pruning.masks import top_ids
from dart_llm.pruning.registry import ALL, BUDGETS, DRIFT_RULES, METHODS, SCORES, TOKEN_RULES
from dart_llm.session.run import prune
from dart_llm.studies.drift.settings import DetectSettings
from shells import ROOT
from stand_in import write_model
from steps import apart, decode
from tiny import CONFIGS, tiny, tokens

PAGE = ROOT / "CONTRIBUTING.md"
LONGEST = 50
"""Lines of a recipe: well under a page."""
PROMPT = 80

_PARTS = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
SECTIONS = dict(zip(_PARTS[1::2], _PARTS[2::2], strict=True))


@pytest.fixture(autouse=True)
def _clean():
    """Take back whatever a block registers."""
    names = [(registry, set(registry.names())) for registry in ALL]
    layers, configs = dict(LAYERS), dict(CONFIGS)
    yield
    for registry, before in names:
        for name in set(registry.names()) - before:
            registry.unregister(name)
    for table, old in ((LAYERS, layers), (CONFIGS, configs)):
        table.clear()
        table.update(old)


def _block(title):
    """The section's only block of Python."""
    assert len(SECTIONS[title].strip().splitlines()) <= LONGEST
    (block,) = re.findall(r"^```python\n(.*?)^```$", SECTIONS[title], re.MULTILINE | re.DOTALL)
    return block


def _run_block(title, registry):
    """Execute the section's block; returns the one name that it registered."""
    before = set(registry.names())
    exec(compile(_block(title), f"CONTRIBUTING.md, {title}", "exec"), {"__name__": "contributing"})
    (name,) = set(registry.names()) - before
    return name


def _prune(model, decoded, *arguments, **settings):
    with prune(model, *arguments, **settings) as run:
        return run, decode(model, tokens(1, PROMPT + decoded, seed=5), PROMPT)


def test_add_a_score():
    name = _run_block("Add a score", SCORES)
    model, seen, ids = tiny("llama", seed=1), [], tokens(1, PROMPT + 4, seed=5)
    run = prune(model, "griffin", score=name, sparsity=0.5)
    run.on_selection = lambda remask, state: seen.append(state.selection)
    with run:
        logits = decode(model, ids, PROMPT)
    assert run.report().achieved_sparsity == 0.5
    assert not torch.equal(logits[:, PROMPT:], decode(model, ids, PROMPT)[:, PROMPT:])
    (selection,) = seen  # what it ranks highest is kept
    for mask, score in zip(selection.masks, selection.scores, strict=True):
        assert torch.equal(mask.ids, top_ids(score, len(score) // 2))


def test_add_a_budget():
    name = _run_block("Add a budget", BUDGETS)
    run, _ = _prune(tiny("llama"), 3, "griffin", budget=name, sparsity=0.5)
    kept = [layer.kept for layer in run.report().layers]
    assert kept == [32, 27, 21, 16]  # 48 neurons x 4 layers, half of them, falling by half


def test_add_a_drift_rule():
    name = _run_block("Add a drift rule", DRIFT_RULES)
    with pytest.raises(ConfigError, match=f'write "{name} N", N a whole number >= 0'):
        PruneConfig.build("dart", drift=f"{name} 2.5")
    written, rule = f"{name} 2", make_rule(f"{name} 2")
    assert rule.count == 2 and name not in DetectSettings(model="x").rule_names()
    config = PruneConfig.build("dart", drift=written)
    assert config.drift == PruneConfig.build("dart").drift.model_copy(update={"rule": written})
    run, _ = _prune(tiny("llama"), 2 * rule.window + 1, "dart", drift=written, sparsity=0.5)
    checks = [(check.window, check.step) for check in run.drift_checks]
    assert checks == [(1, rule.window), (2, 2 * rule.window)]


def test_add_a_per_token_rule():
    name = _run_block("Add a per-token rule", TOKEN_RULES)
    model = tiny("llama")
    run, logits = _prune(model, 4, name, sparsity=0.5)
    assert run.report().achieved_sparsity == 0.5 and run.config.token.rule == name
    assert torch.equal(logits, _prune(model, 4, "countdown", sparsity=0.5)[1])


def test_add_an_architecture():
    (model_type,) = re.findall(r'LAYER_NAMES\["(\w+)"\]', _block("Add an architecture"))
    CONFIGS[model_type] = (model_type, CONFIGS["llama"][1])
    model, ids = tiny(model_type), tokens(1, PROMPT + 4, seed=5)
    LAYERS.pop(model_type, None)
    with pytest.raises(UnsupportedModel, match=model_type):
        prune(model)
    exec(_block("Add an architecture"), {})
    dense = decode(model, ids, PROMPT)
    assert torch.equal(_prune(model, 4, "griffin", sparsity=0.0)[1], dense)
    run, masked = _prune(model, 4, "dart", sparsity=0.5, executor="masked")
    same, compact = _prune(model, 4, "dart", sparsity=0.5, executor="compact")
    assert run.report().achieved_sparsity == same.report().achieved_sparsity == 0.5
    assert apart(compact, masked) < 3e-6 < apart(masked, dense)
    assert torch.equal(decode(model, ids, PROMPT), dense)


def test_a_score_becomes_a_method():
    """The file by itself, and what a package says of it."""
    text = SECTIONS["Compare it with GRIFFIN"]
    (project,) = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    points = tomllib.loads(project)["project"]["entry-points"]
    assert set(points) == {SCORES.group, METHODS.group} == {"dart_llm.scores", "dart_llm.methods"}
    assert points[SCORES.group] == {"reach": "my_scores:reach"}
    assert points[METHODS.group] == {"griffin-reach": "my_scores:GRIFFIN_REACH"}
    exec(_block("Add a score"), names := {})
    assert SCORES.get("reach") is names["reach"]
    assert METHODS.get("griffin-reach") == names["GRIFFIN_REACH"]
    run, _ = _prune(tiny("llama"), 3, "griffin-reach", sparsity=0.5)
    assert (run.config.method, run.config.score.name) == ("griffin-reach", "reach")
    assert run.report().achieved_sparsity == 0.5


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(block, id=f"{path.stem}-{number}")
    for path in PAGES
    for number, block in enumerate(BLOCK.findall(path.read_text(encoding="utf-8")), 1)
    if "from openai" not in block  # tests/server asks a server by that client
]
SHORTER = {
    "layers=(0, 7)": "layers=(0, 3)",  # of four layers
    "layer7": "layer3",
    "max_loss=0.02": "max_loss=0.02, methods='griffin', slices=2, prompt_tokens=32, tokens=16",
}
"""What is swapped in a block, for the small model and to keep it short."""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model") / "small")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("block", BLOCKS)
def test_runs(block, small, monkeypatch, tmp_path):
    from dart_llm import prune

    model, tokenizer = small
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dart_llm.models.loading.load", lambda *given: small)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "PASSIVE")  # put back after a block that sets it
    inputs = tokenizer("The sky is blue because " * 10, return_tensors="pt")
    names = {"prune": prune, "model": model, "tokenizer": tokenizer, "inputs": inputs}
    for text, other in SHORTER.items():
        block = block.replace(text, other)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exec(compile(block, "a page", "exec"), names)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if "run" in names:
        assert names["run"].config.method in ("dart", "dart-token", "griffin", "dense")
