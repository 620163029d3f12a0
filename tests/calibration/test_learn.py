"""What a model teaches before it is first pruned: once, kept, and without a trace on the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dart_llm.pruning.weights import FfnWeights
from dart_llm.session.run import prune
from prior_cases import (
    ALL,
    CONFIG,
    ONE_BY_ONE,
    PARTS,
    attached,
    equal,
    files,
    learnt,
    tensors,
)
from steps import decode, forward_lengths, new_cache, same_masks, step
from tiny import tiny, tokens

IDS = tokens(1, 30, seed=3)
NO_TOKENIZER = "no tokenizer is at hand: the model's own text begins with its start token"
WHAT = (
    "learning gradients, features of compensation and mean activations from 2 x {} tokens of the "
    "model's own text, once"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, which ``prune`` finds too."""
    monkeypatch.setenv("DART_CACHE", str(tmp_path))
    return tmp_path


# once


def test_a_model_learns_once(cache: Path) -> None:
    model = tiny()
    assert forward_lengths(model, attached(model)) == ALL
    assert forward_lengths(model, attached(model)) == []
    assert len(files(cache)) == PARTS
    assert {path.suffix for path in files(cache)} == {".safetensors"}
    run = prune(model, CONFIG)
    assert forward_lengths(model, lambda: [run.attach().detach() for _ in range(2)]) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"prior": {"temperature": 1.0}},
        {"prior": {"top_p": 1.0}},
        {"prior": {"length": 23}},
        {"prior": {"sequences": 3}},
    ],
)
def test_what_changes_the_text(changes: dict[str, Any]) -> None:
    model = tiny()
    attached(model)()
    assert len(forward_lengths(model, attached(model, **changes))) >= 24
    assert forward_lengths(model, attached(model, **changes)) == []
    assert forward_lengths(model, attached(model)) == [], "the first is known still"


def test_without_low_rank_compensation_no_basis_is_looked_for(cache: Path) -> None:
    model = tiny()
    without = CONFIG.replace({"compensation_rank": 0})
    assert forward_lengths(model, attached(model, without)) == [*ONE_BY_ONE, 24]
    assert all(layer.learnt.basis is None for layer in learnt(model, cache, without))
    plain = without.replace({"compensation": False})
    (first, *_) = learnt(model, cache, plain)
    assert set(first.learnt.evidence.sums) == {"score"}


def test_a_variance_has_its_means_whatever_was_learnt_before(cache: Path) -> None:
    """``flap`` sums the squares that ``magnitude`` sums, and the values themselves."""
    model = tiny()
    plain = CONFIG.replace({"budget": "uniform", "compensation": False, "compensation_rank": 0})
    for score, sums in (("magnitude", {"score"}), ("flap", {"score", "signed"})):
        (first, *_) = learnt(model, cache, plain.replace({"score": score}))
        assert set(first.learnt.evidence.sums) == sums


def test_the_disk_gives_the_same_to_another_object(cache: Path) -> None:
    first, again = tiny(), tiny()
    wanted = tensors(learnt(first, cache))
    found: list[tuple[FfnWeights, ...]] = []
    assert forward_lengths(again, lambda: found.append(learnt(again, cache))) == []
    assert equal(tensors(found[0]), wanted)
    for path in files(cache):
        path.unlink()
    anew = tiny()
    assert forward_lengths(anew, lambda: found.append(learnt(anew, cache))) == ALL
    assert equal(tensors(found[1]), wanted), "the text is seeded"
    masks = []
    for model in (first, again):
        with prune(model, CONFIG) as run:
            decode(model, IDS, 20)
        masks.append(list(run.masks().values()))
    assert same_masks(*masks)


def test_a_run_is_the_same_to_the_bit_whether_learnt_or_read(cache: Path) -> None:
    """Layout and alignment too are those of what was learnt: kernels round by them."""
    logits = []
    for _ in range(4):
        model = tiny()
        with prune(model, CONFIG) as run:
            logits.append(decode(model, IDS, 20))
        for tensor in tensors(run.layers):
            assert tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
    assert all(torch.equal(one, logits[0]) for one in logits)


def test_a_run_made_before_the_weights_changed_learns_from_what_is_there() -> None:
    model, other = tiny(), tiny(seed=4)
    attached(model)()
    run = prune(model, CONFIG)
    model.load_state_dict(other.state_dict())
    assert forward_lengths(model, run.attach) == ALL
    decode(model, IDS, 20)
    run.detach()
    with prune(other, CONFIG) as wanted:
        decode(other, IDS, 20)
    assert same_masks(list(run.masks().values()), list(wanted.masks().values()))


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    blocked, news, model = tmp_path / "file", list[str](), tiny()
    blocked.write_text("")
    found = learnt(model, blocked, news=news)
    assert news[:2] == [WHAT.format(24), NO_TOKENIZER]
    assert len(news) == 3
    assert news[2].startswith("what was learnt is not kept for the next time: the cache folder")
    assert all(layer.learnt is not None for layer in found)
    assert forward_lengths(model, lambda: learnt(model, blocked)) == []


# nothing where nothing is needed


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.0},
        {"budget": {"table": "all:1.0"}},
        {"masks": {0: range(20)}},
        {"remove": {1: [3]}},
        {"masks": {}},
    ],
)
def test_nothing_is_learnt_where_nothing_is_chosen(cache: Path, settings: dict[str, Any]) -> None:
    model, config = tiny(), CONFIG.replace({"sparsity": None})
    assert forward_lengths(model, attached(model, config, **settings)) == []
    assert files(cache) == []


def test_masks_that_are_held_and_let_go() -> None:
    """Masks held before the run is attached: it learns all the same, for when it chooses again."""
    model = tiny()
    with prune(model, CONFIG) as first:
        step(model, IDS, new_cache(model))
        held = first.select()
    run = prune(model, CONFIG)
    run.hold(held)
    with run:
        decode(model, IDS, 20)
        assert run.report().remask_causes == {"given": 1}
        run.hold(None)
        decode(model, IDS, 20)
        chosen = run.masks()
    with prune(model, CONFIG) as plain:
        decode(model, IDS, 20)
    assert same_masks(list(chosen.values()), list(plain.masks().values()))


# what it holds
