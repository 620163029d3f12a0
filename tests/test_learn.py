"""What a model teaches before it is first pruned: once, kept, and without a trace on the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dart_llm import AttachError, ConfigError, DartError, PruneConfig, prune
from dart_llm.calibration import observing
from dart_llm.learn import learn
from dart_llm.weights import FfnWeights
from prior_cases import CONFIG, layers_of, learnt
from steps import CACHE, Same, decode, forward_lengths, new_cache, same_masks, shared_model, step
from test_accelerate import _dispatched, _on_the_host
from tiny import HIDDEN, LAYERS, WIDTH, tiny, tokens

IDS = tokens(1, 30, seed=3)
ONE_BY_ONE = [1] * 23
"""Two sequences of 24 tokens, of which the first is given."""

ALL = [*ONE_BY_ONE, 24, 24]
"""Then a forward for the bases, and one forward and backward."""


def lengths(model: Any, body: Callable[[], Any]) -> list[int]:
    return forward_lengths(model, body)


def attached(model: Any, config: PruneConfig = CONFIG, **changes: Any) -> Callable[[], None]:
    """Attach and leave."""

    def body() -> None:
        with prune(model, config, **changes):
            pass

    return body


def tensors(layers: tuple[FfnWeights, ...]) -> list[Tensor]:
    """Everything that was learnt."""
    found: list[Tensor] = []
    for layer in layers:
        assert layer.learnt is not None
        sums = layer.learnt.evidence.sums
        found += [sums[name].mean for name in sorted(sums)]
        found += [layer.learnt.curvature]
        found += [] if layer.learnt.basis is None else [layer.learnt.basis]
    return found


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, second, strict=True)
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, which ``prune`` finds too."""
    monkeypatch.setenv("DART_CACHE", str(tmp_path))
    return tmp_path


def files(cache: Path) -> list[Path]:
    return sorted((cache / "dart-llm" / "calibration").glob("*"))


# once


def test_a_model_learns_once(cache: Path) -> None:
    model = tiny()
    assert lengths(model, attached(model)) == ALL
    assert lengths(model, attached(model)) == []
    assert len(files(cache)) == 1 and files(cache)[0].suffix == ".safetensors"
    run = prune(model, CONFIG)
    assert lengths(model, lambda: [run.attach().detach() for _ in range(2)]) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": 0.7},
        {"prior": {"tokens": 5}},
        {"skip_sinks": False},
        {"budget": "uniform"},
        {"drift": "interval 5"},
        {"executor": "masked", "masking_step": 3},
    ],
)
def test_what_does_not_change_what_is_learnt(changes: dict[str, Any]) -> None:
    model = tiny()
    attached(model)()
    assert lengths(model, attached(model, **changes)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"compensation_rank": 4},
        {"prior": {"temperature": 1.0}},
        {"prior": {"top_p": 1.0}},
        {"prior": {"length": 23}},
        {"prior": {"sequences": 3}},
        {"score": "normalized"},
        {"budget": "global"},
    ],
)
def test_what_changes_what_is_learnt(changes: dict[str, Any]) -> None:
    model = tiny()
    attached(model)()
    assert len(lengths(model, attached(model, **changes))) >= 24
    assert lengths(model, attached(model, **changes)) == []
    assert lengths(model, attached(model)) == [], "the first is known still"


def test_without_low_rank_compensation_no_basis_is_looked_for(cache: Path) -> None:
    model = tiny()
    without = CONFIG.replace({"compensation_rank": 0})
    assert lengths(model, attached(model, without)) == [*ONE_BY_ONE, 24]
    assert all(layer.learnt.basis is None for layer in learnt(model, cache, without))
    plain = without.replace({"compensation": False})
    (first, *_) = learnt(model, cache, plain)
    assert set(first.learnt.evidence.sums) == {"score"}


def test_the_disk_gives_the_same_to_another_object(cache: Path) -> None:
    first, again = tiny(), tiny()
    wanted = tensors(learnt(first, cache))
    found: list[tuple[FfnWeights, ...]] = []
    assert lengths(again, lambda: found.append(learnt(again, cache))) == []
    assert equal(tensors(found[0]), wanted)
    files(cache)[0].unlink()
    anew = tiny()
    assert lengths(anew, lambda: found.append(learnt(anew, cache))) == ALL
    assert equal(tensors(found[1]), wanted), "the text is seeded"
    masks = []
    for model in (first, again):
        with prune(model, CONFIG) as run:
            decode(model, IDS, 20)
        masks.append(list(run.masks().values()))
    assert same_masks(*masks)


def test_a_damaged_file_is_learnt_anew(cache: Path) -> None:
    attached(tiny())()
    (path,) = files(cache)
    path.write_bytes(path.read_bytes()[:-3])
    model, again = tiny(), tiny()
    assert lengths(model, attached(model)) == ALL
    assert lengths(again, attached(again)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_part_of_the_weights(cache: Path, dtype: torch.dtype) -> None:
    attached(tiny())()
    model, again = tiny(dtype=dtype), tiny(dtype=dtype)
    assert lengths(model, attached(model)) == ALL
    wanted = learnt(model, cache)
    assert wanted[0].learnt.basis.dtype == dtype
    assert wanted[0].learnt.curvature.dtype == torch.float32
    assert equal(tensors(learnt(again, cache)), tensors(wanted))


def test_other_weights_are_learnt_anew(cache: Path) -> None:
    model = tiny()
    first = tensors(learnt(model, cache))
    with torch.no_grad():
        before = float(model.model.layers[2].mlp.up_proj.weight[7, 3])
        model.model.layers[2].mlp.up_proj.weight[7, 3] = 0.5
    found: list[tuple[FfnWeights, ...]] = []
    assert lengths(model, lambda: found.append(learnt(model, cache))) == ALL
    assert not equal(tensors(found[0]), first)
    assert lengths(model, lambda: learnt(model, cache)) == []
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[7, 3] = before
    assert lengths(model, lambda: found.append(learnt(model, cache))) == []
    assert equal(tensors(found[1]), first), "these weights were known"


def test_a_run_made_before_the_weights_changed_learns_from_what_is_there() -> None:
    model, other = tiny(), tiny(seed=4)
    attached(model)()
    run = prune(model, CONFIG)
    model.load_state_dict(other.state_dict())
    assert lengths(model, run.attach) == ALL
    decode(model, IDS, 20)
    run.detach()
    with prune(other, CONFIG) as wanted:
        decode(other, IDS, 20)
    assert same_masks(list(run.masks().values()), list(wanted.masks().values()))


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    blocked, news, model = tmp_path / "file", list[str](), tiny()
    blocked.write_text("")
    found = learnt(model, blocked, news=news)
    assert news == [
        "learning from 2 x 24 tokens of the model's own text, once",
        news[1],
    ]
    assert news[1].startswith("what was learnt is not kept for the next time: the cache folder")
    assert all(layer.learnt is not None for layer in found)
    assert lengths(model, lambda: learnt(model, blocked)) == []


def test_what_is_told() -> None:
    news: list[str] = []
    config = CONFIG.replace({"prior": {"length": 40}})
    learn(tiny(), config, layers_of(tiny()), None, news.append)
    assert news == [
        "learning from 2 x 40 tokens of the model's own text, once",
        "the model writes text to learn from: 32 of 40 tokens",
    ]
    assert learn(tiny(), config, layers_of(tiny()), None, news.append) and len(news) == 2


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
    assert lengths(model, attached(model, config, **settings)) == []
    assert files(cache) == []


def test_without_a_prior_the_layers_are_passed_on(cache: Path) -> None:
    model = tiny()
    layers = layers_of(model)
    assert learn(model, PruneConfig(sparsity=0.5), layers) == layers
    assert lengths(model, attached(model, PruneConfig(sparsity=0.5))) == []


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


# whatever state the model and the caller are in


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_of_the_caller(cache: Path, mode: Callable[[], Any]) -> None:
    """What is learnt, and what is read from the disk, serves later forwards of any mode."""
    wanted = tensors(learnt(tiny(), cache / "other"))
    for _ in range(2):  # learnt, then found on disk
        model = tiny()
        with mode(), prune(model, CONFIG) as run:
            decode(model, IDS, 20)
            assert run.report().achieved_sparsity == pytest.approx(0.5)
        assert equal(tensors(run._layers), wanted)
        assert not any(t.is_inference() for t in tensors(run._layers))
        with torch.enable_grad(), prune(model, CONFIG, executor="masked"):
            cache_of = new_cache(model)
            model(IDS[:, :20], **{CACHE: cache_of})
            model(IDS[:, 20:21], **{CACHE: cache_of}).logits.sum().backward()
        assert all(p.grad is not None for p in model.model.layers[0].mlp.parameters())
    assert len(files(cache)) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
def test_a_training_model_goes_on_training(name: str) -> None:
    """Dropout neither draws from the user's random numbers nor enters what is learnt."""
    model, calm = tiny(name).train(), tiny(name)
    state = torch.get_rng_state()
    run = prune(model, CONFIG)
    assert len(lengths(model, run.attach)) == 25
    run.detach()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert lengths(calm, attached(calm)) == [], "the same was learnt as by a calm model"


def test_random_numbers_of_the_user_are_not_drawn() -> None:
    model = tiny("gpt2")
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    attached(model)()
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "falcon", "opt"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = tiny(name)
    with Same(model):
        attached(model)()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_an_interrupted_lesson_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    model = tiny("gpt2").train()

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dart_llm.learn.gradients", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(model, CONFIG).attach()
    assert all(module.training for module in model.modules()) and files(cache) == []
    model.eval()
    with Same(model):
        assert lengths(model, attached(model)) == ALL


def test_nested_blocks_are_refused_before_anything_is_learnt(cache: Path) -> None:
    model = tiny()
    with prune(model, "griffin", sparsity=0.5):
        for inner in (model, model.model):
            run = prune(inner, CONFIG)
            handle = model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
            with pytest.raises(AttachError, match=r"dart_llm\.restore\(model\)"):
                run.attach()
            handle.remove()
    assert files(cache) == []


def test_models_that_accelerate_has_hooked() -> None:
    model = _dispatched(tiny(), None)
    with prune(model, CONFIG) as run:
        decode(model, IDS, 20)
    plain = tiny()
    with prune(plain, CONFIG) as wanted:
        decode(plain, IDS, 20)
    assert same_masks(list(run.masks().values()), list(wanted.masks().values()))


def test_a_rank_beyond_the_hidden_size(cache: Path) -> None:
    found = learnt(tiny(), cache, CONFIG.replace({"compensation_rank": 1000}))
    assert {tuple(layer.learnt.basis.shape) for layer in found} == {(HIDDEN, HIDDEN)}


# models that cannot be learnt from


def test_an_offloaded_model_is_refused() -> None:
    model = _on_the_host(tiny(), None)
    with pytest.raises(ConfigError, match="layer 0 is offloaded"):
        prune(model, CONFIG)
    config = PruneConfig(method="mine", sparsity=0.5, prior={"sequences": 2, "length": 24})
    run = prune(model, config)
    with pytest.raises(ConfigError) as caught:
        run.attach()
    assert str(caught.value) == (
        'method "mine" learns from gradients, which an offloaded model has not: load it without '
        "offloading, or use griffin"
    )


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = tiny()
    with pytest.raises(
        ConfigError, match=r'"x" learns .* torch\.inference_mode\(\) have not: load'
    ):
        prune(model, CONFIG).attach()
    with prune(model, "griffin", sparsity=0.5):
        decode(model, IDS, 20)


def test_a_decoder_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="LlamaModel has no language-model head"):
        prune(shared_model().model, CONFIG).attach()


@pytest.mark.parametrize("where", ["lm_head", "model.layers.1.mlp.down_proj"])
def test_weights_that_are_not_finite(cache: Path, where: str) -> None:
    model = tiny()
    with torch.no_grad():
        model.get_submodule(where).weight[5, 3] = float("nan")
    with pytest.raises(DartError, match="not finite"):
        prune(model, CONFIG).attach()
    assert files(cache) == []


def test_calibration_has_no_use_for_a_score_that_learns() -> None:
    config = PruneConfig.build("wanda", sparsity=0.5, score="fisher", prior={})
    with pytest.raises(ConfigError, match='score "fisher" learns from the model itself'):
        observing(config)


# what it holds


def test_bytes_of_what_was_learnt(cache: Path) -> None:
    """The five sums and the curvature are float32, the basis is as the weights."""
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        found = learnt(tiny(dtype=dtype), cache)
        floats = 3 * WIDTH + 8 + 8 * 8 + WIDTH * 8
        assert [layer.learnt.nbytes() for layer in found] == [
            4 * floats + size * 8 * HIDDEN
        ] * LAYERS
