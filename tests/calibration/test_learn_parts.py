"""What is learnt, in parts: by need, once for all configurations, and never from damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from damage import DAMAGES, TENSOR_DAMAGES
from dart_llm import cache as kept
from dart_llm.calibration.learn import BASIS, CURVATURE, REACH, SCORE, wanted
from dart_llm.calibration.learn import self_calibrate as learn
from dart_llm.pruning import weights
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import SCORES
from dart_llm.session.run import prune
from prior_cases import (
    ALL,
    CONFIG,
    SMALL,
    attached,
    equal,
    files,
    layers_of,
    learnt,
    tensors,
)
from steps import decode, forward_lengths, same_masks
from tiny import LAYERS, tiny, tokens

IDS = tokens(1, 30, seed=3)
PROXIES = ("max", "mean", "combined", "product")
GRIFFIN = PruneConfig.build("griffin", sparsity=0.5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, which ``prune`` finds too."""
    monkeypatch.setenv("DART_CACHE", str(tmp_path))
    return tmp_path


# by need


def test_what_each_configuration_reads() -> None:
    layers = layers_of(tiny())
    sums = [SCORE, "signed", "features"]
    for changes, names in (
        ({}, [CURVATURE, BASIS, *sums]),
        ({"score": "magnitude"}, [BASIS, *sums]),
        ({"score": "max"}, [REACH, BASIS, *sums]),
        ({"score": "max", "compensation": False}, [REACH, SCORE]),
        ({"score": "weight", "compensation": False}, []),
        ({"budget": "global", "compensation_rank": 0}, [CURVATURE, SCORE, "signed", "squares"]),
        ({"prior": {"tokens": 0}}, [CURVATURE, BASIS]),
        ({"sparsity": 0.7, "drift": "interval 5", "min_evidence": 3}, [CURVATURE, BASIS, *sums]),
    ):
        assert wanted(CONFIG.replace(changes), layers) == names, changes
    assert wanted(GRIFFIN, layers) == []
    assert wanted(GRIFFIN.replace({"score": "combined"}), layers) == [REACH]
    token = PruneConfig.build("dart-token", sparsity=0.5, score="magnitude", prior=SMALL)
    assert wanted(token, layers) == [CURVATURE, SCORE, "signed"], "tokens choose by gradients"


@pytest.mark.parametrize("score", ["max", "magnitude"])
def test_no_gradients_where_none_are_read(
    monkeypatch: pytest.MonkeyPatch, score: str, cache: Path
) -> None:
    def refuse(*args: Any, **settings: Any) -> None:
        raise AssertionError("a gradient")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    model = tiny()
    assert forward_lengths(model, attached(model, score=score)) == ALL
    found = learnt(model, cache, CONFIG.replace({"score": score}))
    assert all(layer.learnt is not None and layer.learnt.curvature is None for layer in found)


def test_no_text_is_written_for_what_the_weights_alone_say(cache: Path) -> None:
    model, config = tiny(), GRIFFIN.replace({"score": "combined"})
    assert forward_lengths(model, attached(model, config)) == []
    assert len(files(cache)) == 1


# once for all


@pytest.mark.parametrize(
    ("first", "second", "forwards"),
    [
        ({}, {"score": "max"}, []),
        ({}, {"score": "magnitude", "sparsity": 0.8}, []),
        ({}, {"budget": "uniform", "drift": "interval 5", "min_evidence": 9}, []),
        ({}, {"compensation_rank": 0}, []),
        ({}, {"compensation": False, "compensation_rank": 0, "score": "max"}, []),
        ({}, {"score": "normalized"}, [24]),  # another statistic
        ({}, {"budget": "global"}, [24]),  # one more sum
        ({}, {"compensation_rank": 4}, [24, 24]),  # another basis
        ({"score": "max"}, {}, [24]),  # the gradients
        ({"score": "normalized"}, {"score": "fisher"}, [24]),
    ],
)
def test_configurations_share_what_they_can(
    first: dict[str, Any], second: dict[str, Any], forwards: list[int], cache: Path
) -> None:
    """In this process, and by way of the disk in another; and it is what would be learnt alone."""
    model, other, alone = tiny(), tiny(), tiny()
    attached(model, **first)()
    assert forward_lengths(model, attached(model, **second)) == forwards
    assert forward_lengths(other, attached(other, **second)) == []
    with prune(other, CONFIG, **second) as run:
        decode(other, IDS, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DART_CACHE", str(cache / "other"))
        with prune(alone, CONFIG, **second) as wanted:
            decode(alone, IDS, 20)
    assert same_masks(list(run.masks().values()), list(wanted.masks().values()))
    assert equal(_held(run.layers), _held(wanted.layers))


def _held(layers: tuple[weights.FfnWeights, ...]) -> list[torch.Tensor]:
    found = []
    for layer in layers:
        prior = layer.learnt
        assert prior is not None
        found += [prior.evidence.sums[name].total for name in sorted(prior.evidence.sums)]
        found += [t for t in (prior.curvature, prior.basis) if t is not None]
        found += list(layer.known_reach or ())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_the_forward_with_gradients(dtype: torch.dtype, cache: Path) -> None:
    """To the bit, so that it does not matter which configuration came first."""
    whole = learnt(tiny(dtype=dtype), cache / "a")
    part = learnt(tiny(dtype=dtype), cache / "b", CONFIG.replace({"score": "magnitude"}))
    for one, other in zip(whole, part, strict=True):
        assert one.learnt is not None and other.learnt is not None
        for name, total in one.learnt.evidence.sums.items():
            assert torch.equal(total.total, other.learnt.evidence.sums[name].total)


def test_the_reach_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all four scores and for every process, and the scores are what they were."""
    model, config = tiny(), GRIFFIN.replace({"score": "combined"})
    calls: list[int] = []
    real = weights.reach_of

    def counted(down: torch.Tensor, rows: torch.Tensor) -> Any:
        calls.append(len(rows))
        return real(down, rows)

    monkeypatch.setattr("dart_llm.calibration.learn.reach_of", counted)
    monkeypatch.setattr("dart_llm.pruning.weights.reach_of", counted)
    for one in (model, model, tiny()):
        for score in PROXIES:
            with prune(one, config, score=score):
                decode(one, IDS, 20)
    assert len(calls) == LAYERS
    layers = learn(model, config, layers_of(model))
    fresh = layers_of(model)
    a = torch.ones(layers[0].width)
    for known, layer in zip(layers, fresh, strict=True):
        assert known.known_reach is not None
        assert torch.equal(SCORES.get("product")(a, known), SCORES.get("product")(a, layer))


# changed weights, and functions


def _scale(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data.mul_(
            torch.linspace(0.2, 3, layer.mlp.gate_proj.weight.shape[0])[:, None]
        )


def _copy(model: Any) -> None:
    for mine, other in zip(model.parameters(), tiny(seed=4).parameters(), strict=True):
        mine.data.copy_(other.data)


def _numpy(model: Any) -> None:
    view = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    np.multiply(view, 3, out=view)


def _act(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()


def _eps(model: Any) -> None:
    model.model.norm.variance_epsilon = 2.0


@pytest.mark.parametrize(
    ("change", "score"),
    [
        (_scale, "fisher"),
        (_copy, "fisher"),
        (_numpy, "max"),
        (_act, "fisher"),
        (_act, "max"),
        (_eps, "fisher"),
    ],
)
def test_changes_that_torch_does_not_count_are_noticed(
    change: Callable[[Any], None], score: str
) -> None:
    """Masks after a change are those of a fresh model with the same change."""
    model, fresh, config = tiny(), tiny(), CONFIG.replace({"score": score})
    attached(model, config)()
    change(model)
    change(fresh)
    assert forward_lengths(model, attached(model, config)) == ALL
    masks = []
    for one in (model, fresh):
        with prune(one, config) as run:
            decode(one, IDS, 20)
        masks.append(list(run.masks().values()))
    assert same_masks(*masks)


# damage


@pytest.mark.parametrize(
    "damage", [*DAMAGES.values(), *TENSOR_DAMAGES.values()], ids=[*DAMAGES, *TENSOR_DAMAGES]
)
def test_damaged_files_are_learnt_anew(
    cache: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever happened: the same masks, and a sentence for each file that was looked for.

    The features are not: they belong to a basis that is not there.
    """
    config = CONFIG.replace({"score": "max"})
    with prune(model := tiny(), config) as run:
        decode(model, IDS, 20)
    first = list(run.masks().values())
    whole = files(cache)
    assert len(whole) == 6
    for path in whole:
        damage(path)
    with prune(model := tiny(), config) as run:
        decode(model, IDS, 20)
    assert same_masks(first, list(run.masks().values()))
    assert [one.name for one in files(cache)] == [one.name for one in whole]
    assert len([one for one in caplog.records if "a damaged file" in one.getMessage()]) == 5
    caplog.clear()
    again = tiny()
    assert forward_lengths(again, attached(again, config)) == [] and not caplog.records


def test_one_damaged_part_is_learnt_alone(cache: Path) -> None:
    """The text is still known, and what comes out is the same to the bit."""
    first = tensors(learnt(tiny(), cache))
    for path in set(files(cache)) - set(_texts(cache)):
        DAMAGES["flip"](path)
        model = tiny()
        assert len(forward_lengths(model, attached(model))) in (1, 2)
        assert equal(tensors(learnt(model, cache)), first)


def _texts(cache: Path) -> list[Path]:
    return [path for path in files(cache) if b"learnt of a model: text" in path.read_bytes()]


def test_parts_of_two_texts_are_never_mixed(cache: Path) -> None:
    """Two machines that round otherwise write otherwise: what is read belongs to one text."""
    model = tiny()
    learnt(model, cache)
    (text,) = _texts(cache)
    ids = load(text.read_bytes())
    ids["0.ids.total"] = ids["0.ids.total"].flip(0).contiguous()
    text.unlink()
    kept.write(text.parent, text.name.rpartition("-")[0], ".safetensors", save(ids))
    other = tiny()
    assert forward_lengths(other, attached(other)) == [24, 24], "all but the text, of the other one"
    assert len(files(cache)) == 6 + 5
