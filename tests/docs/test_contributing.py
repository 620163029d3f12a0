"""The recipes of CONTRIBUTING.md: every Python block runs as it stands, and prunes a model."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dart_llm.errors import UnsupportedModel
from dart_llm.models.architectures import LAYER_NAMES as LAYERS
from dart_llm.models.describe import describe
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import top_ids
from dart_llm.pruning.registry import ALL, BUDGETS, DRIFT_RULES, METHODS, SCORES, Registry
from dart_llm.session.run import prune
from steps import apart, decode, selections
from tiny import CONFIGS, VOCAB, tiny, tokens

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
SECTIONS = ("Add a score", "Add a budget", "Add a drift rule", "Add an architecture")
LONGEST = 50
"""Lines of a section: well under a page."""
PROMPT = 80


def _sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _blocks(title: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", _sections()[title], re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Take back whatever a block registers."""
    names = [(registry, set(registry.names())) for registry in ALL]
    layers, configs = dict(LAYERS), dict(CONFIGS)
    yield
    for registry, before in names:
        for name in set(registry.names()) - before:
            registry.unregister(name)
        assert set(registry.names()) == before
    for table, old in ((LAYERS, layers), (CONFIGS, configs)):
        table.clear()
        table.update(old)


def _run_block(title: str, registry: Registry[Any]) -> str:
    """Execute the section's only block; returns the one name that it registered."""
    (block,) = _blocks(title)
    before = set(registry.names())
    exec(compile(block, f"CONTRIBUTING.md, {title}", "exec"), {"__name__": "contributing"})
    (name,) = set(registry.names()) - before
    return name


def _ids(decoded: int) -> Tensor:
    return tokens(1, PROMPT + decoded, seed=5)


def _prune(model: Any, decoded: int, *arguments: Any, **settings: Any) -> tuple[Any, Any, Tensor]:
    run = prune(model, *arguments, **settings)
    found = selections(run)
    with run:
        logits = decode(model, _ids(decoded), PROMPT)
    return run, found, logits


@pytest.mark.parametrize("title", SECTIONS)
def test_sections_are_short_and_hold_one_example(title: str) -> None:
    assert len(_sections()[title].strip().splitlines()) <= LONGEST
    assert len(_blocks(title)) == 1


def test_add_a_score() -> None:
    name = _run_block("Add a score", SCORES)
    rule = SCORES.get(name)
    assert rule.summary.endswith(".") and rule.source
    model = tiny("llama", seed=1)
    run, found, logits = _prune(model, 4, "griffin", score=name, sparsity=0.5)
    assert run.report().achieved_sparsity == 0.5
    assert not torch.equal(logits[:, PROMPT:], decode(model, _ids(4), PROMPT)[:, PROMPT:])
    magnitude = _prune(model, 4, "griffin", score="magnitude", sparsity=0.5)
    masks = found[0][2]
    for layer, weights in enumerate(describe(model).weights("output", 0)):
        a = torch.full((weights.width,), 2.0)
        expected = 2 * weights.down.abs().amax(0)
        torch.testing.assert_close(rule(a, weights), expected)
        assert len(masks[layer]) == weights.width // 2
    assert any(not torch.equal(a, b) for a, b in zip(masks, magnitude[1][0][2], strict=True))


def test_a_score_keeps_what_it_ranks_highest() -> None:
    name = _run_block("Add a score", SCORES)
    model, seen = tiny("llama", seed=1), []
    run = prune(model, "griffin", score=name, sparsity=0.5)
    run.on_selection = lambda remask, state: seen.append(state.selection)
    with run:
        decode(model, _ids(2), PROMPT)
    (selection,) = seen
    for mask, score in zip(selection.masks, selection.scores, strict=True):
        assert torch.equal(mask.ids, top_ids(score, len(score) // 2))


def test_add_a_budget() -> None:
    name = _run_block("Add a budget", BUDGETS)
    run, _, _ = _prune(tiny("llama"), 3, "griffin", budget=name, sparsity=0.5)
    kept = [layer.kept for layer in run.report().layers]
    assert kept == [32, 27, 21, 16]  # 48 neurons x 4 layers, half of them, falling by half
    blend, _, _ = _prune(tiny("llama"), 3, "griffin", budget=f"blend {name} uniform", sparsity=0.5)
    mixed = [layer.kept for layer in blend.report().layers]
    assert sum(mixed) == 96 and all(
        abs(m - (k + 24) / 2) < 1 for m, k in zip(mixed, kept, strict=True)
    )


def test_add_a_drift_rule() -> None:
    name = _run_block("Add a drift rule", DRIFT_RULES)
    rule = DRIFT_RULES.get(name)()
    mu, sigma = torch.tensor([0.5]), torch.tensor([0.1])
    assert rule.threshold is not None
    torch.testing.assert_close(rule.threshold(mu, sigma), torch.tensor([0.3]))
    config = PruneConfig.build("dart", drift=name)
    assert config.drift == PruneConfig.build("dart").drift.model_copy(update={"rule": name})
    lifted = PruneConfig.build("dart", drift={"rule": name, "max_dense_share": None})
    assert lifted.drift.max_dense_share is None and lifted.drift.min_distance == 64
    decoded = 2 * rule.window + 1
    run, _, _ = _prune(tiny("llama"), decoded, "dart", drift=name, sparsity=0.5)
    checks = run.drift_checks
    assert [check.window for check in checks] == [1, 2]
    assert [check.step for check in checks] == [rule.window, 2 * rule.window]
    assert all(check.threshold is not None for check in checks)  # 76 tokens: 4 whole windows


def test_add_an_architecture() -> None:
    model_type = re.findall(r'LAYER_NAMES\["(\w+)"\]', _blocks("Add an architecture")[0])[0]
    CONFIGS[model_type] = (model_type, CONFIGS["llama"][1])
    model = tiny(model_type)
    LAYERS.pop(model_type, None)
    with pytest.raises(UnsupportedModel, match=model_type):
        prune(model)
    exec(_blocks("Add an architecture")[0], {})
    dense = decode(model, _ids(4), PROMPT)
    _, _, whole = _prune(model, 4, "griffin", sparsity=0.0)
    assert torch.equal(whole, dense)
    run, _, masked = _prune(model, 4, "dart", sparsity=0.5, executor="masked")
    same, _, compact = _prune(model, 4, "dart", sparsity=0.5, executor="compact")
    assert run.report().achieved_sparsity == same.report().achieved_sparsity == 0.5
    assert apart(compact, masked) < 3e-6 < apart(masked, dense)
    assert dense.shape == (1, PROMPT + 4, VOCAB)
    assert torch.equal(decode(model, _ids(4), PROMPT), dense)


def test_a_score_becomes_a_method() -> None:
    """Both files of the package, put together as an installation would."""
    text = _sections()["Measure it beside GRIFFIN"]
    (module,) = re.findall(r"^```py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (project,) = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    points = tomllib.loads(project)["project"]["entry-points"]
    assert set(points) == {SCORES.group, METHODS.group} == {"dart_llm.scores", "dart_llm.methods"}
    assert points[SCORES.group] == {"reach": "my_scores:reach"}
    (place,) = points[METHODS.group].items()
    _run_block("Add a score", SCORES)
    names: dict[str, Any] = {}
    exec(module, names)
    METHODS.register(place[0], names[place[1].partition(":")[2]])
    run = prune(tiny("llama"), "griffin-reach", sparsity=0.5)
    assert (run.config.method, run.config.score.name) == ("griffin-reach", "reach")
    with run:
        decode(run.model, tokens(1, PROMPT + 3), PROMPT)
    assert run.report().sequences[0].achieved_sparsity == 0.5
