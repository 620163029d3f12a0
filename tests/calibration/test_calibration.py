"""Calibration: its text, what is observed, what is cached, and what ``prepare`` makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration_cases import WORDS, Letters
from dart_llm.calibration import calibrate as calibration
from dart_llm.calibration.calibrate import calibrate, observe
from dart_llm.calibration.self_text import sample_sequences as write_sequences
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.prepare import PreparedMethod as Candidate
from dart_llm.session.prepare import prepare
from steps import Same, decode, forward_lengths, same_masks, shared_model
from tiny import LAYERS, WIDTH, tiny, tokens

SMALL = {"sequences": 10, "length": 16}


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "calibration.txt"
    path.write_text(WORDS)
    return str(path)


def config(method: str = "wanda", **changes: Any) -> PruneConfig:
    return PruneConfig.build(method, **{"sparsity": 0.5, "calibration": SMALL, **changes})


def run_calibration(model: Any, made: PruneConfig, source: str | None, cache: Path) -> Any:
    """What ``calibrate`` gives, and the lengths of the forwards that it made."""
    found: list[Any] = []
    lengths = forward_lengths(
        model,
        lambda: found.append(
            calibrate(model, Letters(), made, source, str(cache), lambda news: None)
        ),
    )
    return found[0], lengths


def ids_of(held: Any) -> list[Tensor]:
    return [mask.ids for mask in held]


# what is observed


@pytest.mark.parametrize("name", ["flap", "wanda"])
def test_batches_are_added_up(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    ids, made = tokens(10, 12), config(name, budget="blend depth global")
    together = observe(shared_model(), made, ids)
    monkeypatch.setattr(calibration, "BATCH", 3)
    apart = observe(shared_model(), made, ids)
    for first, second in zip(together, apart, strict=True):
        assert set(first.sums) == set(second.sums) >= {"score", "signed", "cosine", "squares"}
        for key, one in first.sums.items():
            assert one.weight == second.sums[key].weight == 120
            assert torch.allclose(one.total, second.sums[key].total, rtol=1e-5, atol=1e-5)


def test_the_model_is_left_as_it_was(tmp_path: Path, text: str) -> None:
    model = tiny()
    with Same(model):
        run_calibration(model, config("flap"), text, tmp_path)
        run_calibration(model, config("glass"), None, tmp_path)


def test_a_model_that_is_being_pruned_is_refused(tmp_path: Path) -> None:
    model = tiny()
    made = Candidate(model, None, PruneConfig.build("griffin"))
    with made.run(), pytest.raises(Exception, match="already being pruned"):
        observe(model, config(), tokens(2, 8))


# what is cached


def test_one_calibration_serves_all_sparsities_and_both_kinds_of_masks(
    tmp_path: Path, text: str
) -> None:
    model = tiny()
    first, lengths = run_calibration(model, config(), text, tmp_path)
    assert lengths == [16, 16]  # 8 sequences and 2
    for changes in (
        {"sparsity": 0.7, "compensation": True},
        {"budget": {"table": "0:0.5,1-3:auto"}},
        {"score": {"name": "magnitude", "strategy": "auto"}, "sparsity": None},
        {"method": "flap", "budget": "standardized"},
    ):
        method = changes.pop("method", "wanda")
        if changes.get("sparsity", 0) is None:
            made = PruneConfig.build(method, calibration=SMALL, score=changes["score"])
        else:
            made = config(method, **changes)
        _, lengths = run_calibration(model, made, text, tmp_path)
        assert lengths == [], changes
    _, lengths = run_calibration(model, config(score="normalized"), text, tmp_path)
    assert lengths == [16, 16]
    assert all(len(ids) == WIDTH // 2 for ids in ids_of(first.held))


@pytest.mark.parametrize("method", ["wanda", "flap", "glass"])
def test_the_disk_gives_the_same(tmp_path: Path, text: str, method: str) -> None:
    made = config(method, compensation=True)
    first, lengths = run_calibration(tiny(), made, text, tmp_path)
    assert lengths
    again, lengths = run_calibration(tiny(), made, text, tmp_path)  # another object, equal weights
    assert lengths == []
    assert first.note == again.note
    if method == "glass":
        assert all(torch.equal(a, b) for a, b in zip(first.prior, again.prior, strict=True))
    else:
        assert same_masks(ids_of(first.held), ids_of(again.held))
        for one, other in zip(first.held, again.held, strict=True):
            assert torch.equal(one.bias, other.bias)


def test_other_weights_texts_and_damaged_files_are_calibrated_anew(
    tmp_path: Path, text: str
) -> None:
    _, lengths = run_calibration(tiny(), config(), text, tmp_path)
    assert lengths == [16, 16]
    changed = tiny()
    with torch.no_grad():
        changed.model.layers[2].mlp.up_proj.weight[7, 3] += 0.01
    assert run_calibration(changed, config(), text, tmp_path)[1] == [16, 16]
    other = tmp_path / "other.txt"
    other.write_text(WORDS[1:])
    assert run_calibration(tiny(), config(), str(other), tmp_path)[1] == [16, 16]
    files = sorted((tmp_path / "dart-llm/calibration").iterdir())
    assert len(files) == 3 and all(path.suffix == ".safetensors" for path in files)
    for path in files:
        path.write_bytes(path.read_bytes()[:-5])
    assert run_calibration(tiny(), config(), text, tmp_path)[1] == [16, 16]
    assert run_calibration(tiny(), config(), text, tmp_path)[1] == []


# what the model writes


class Counting:
    """A model that is sure that token t + 1 follows token t."""

    device = torch.device("cpu")

    class config:
        class text:
            vocab_size = 7

        get_text_config = staticmethod(lambda: Counting.config.text)

    def __call__(
        self, ids: Tensor, *, use_cache: bool, logits_to_keep: int, cache: Any = None
    ) -> Any:
        assert use_cache and logits_to_keep == 1 and ids.shape[1] == 1
        logits = 100 * torch.nn.functional.one_hot((ids + 1) % 7, 7).float()
        return type("Output", (), {"logits": logits, "cache": "something"})


def test_written_sequences_follow_the_model() -> None:
    assert write_sequences(Counting(), [4], 2, 6, 0).tolist() == [[4, 5, 6, 0, 1, 2]] * 2
    free = write_sequences(Counting(), [], 50, 3, 0)
    assert set(free[:, 0].tolist()) == set(range(7))
    assert torch.equal(free[:, 1], (free[:, 0] + 1) % 7)


# prepare


def quiet(model: Any, made: PruneConfig | None, source: str | None, cache: Path, **more: Any):
    return prepare(model, Letters(), made, source, str(cache), lambda news: None, **more)


def test_dense_is_the_untouched_model(tmp_path: Path) -> None:
    for made in (None, PruneConfig.build("dense")):
        found = quiet(shared_model(), made, None, tmp_path)
        assert found.config is None and found.run() is None and found.label == "dense"
        assert found.model is shared_model()
        size = sum(4 * p.numel() for p in shared_model().parameters())
        assert found.facts["weight_bytes"] == found.facts["dtype_bytes"] == size
        assert found.facts["weight_bits"] == 32


def test_what_needs_nothing_is_passed_on(tmp_path: Path) -> None:
    made = PruneConfig.build("griffin", sparsity=0.0)
    assert quiet(shared_model(), made, None, tmp_path).config is made
    made = PruneConfig.build("wanda", sparsity=0.0)
    assert quiet(shared_model(), made, "no such file", tmp_path).held is None
    by_hand = quiet(shared_model(), config(), "no such file", tmp_path, masks={0: [1]})
    assert by_hand.label == "given masks" and by_hand.run().masks()[0].tolist() == [1]


def test_static_candidates_hold_their_masks(tmp_path: Path, text: str) -> None:
    found = quiet(shared_model(), config("flap"), text, tmp_path)
    assert found.notes == (
        "calibration: 10 sequences of 16 tokens (160 tokens) of calibration.txt",
    )
    assert found.label == "flap@0.5"
    for likelihood in (False, True):
        with found.run(likelihood) as run:
            decode(run.model, tokens(1, 24), 20)
        report = run.report()
        assert report.method == "flap" and report.requested_sparsity == 0.5
        assert report.achieved_sparsity == pytest.approx(0.5, abs=1 / (LAYERS * WIDTH))
        assert report.remask_causes == {"given": 1}
        assert same_masks([run.masks()[layer] for layer in range(LAYERS)], ids_of(found.held))


def test_a_short_text_is_said(tmp_path: Path, text: str) -> None:
    made = PruneConfig.build("wanda", calibration={"length": 200})
    found = quiet(shared_model(), made, text, tmp_path)
    count = len(WORDS) // 200
    assert 1 < count < 128
    assert found.notes == (
        f"calibration: {count} of 128 sequences of 200 tokens ({count * 200:,} tokens) of "
        "calibration.txt",
    )


def test_glass_candidates_have_a_prior(tmp_path: Path) -> None:
    found = quiet(shared_model(), config("glass"), None, tmp_path)
    assert found.notes[0].endswith("(160 tokens) of the model's own text")
    prompts = []
    for seed in (1, 2):
        with found.run(likelihood=True) as run:
            decode(run.model, tokens(1, 40, seed=seed), 36)
        assert run.report().achieved_sparsity == pytest.approx(0.5)
        prompts.append(list(run.masks().values()))
    assert not same_masks(*prompts)
    plain = Candidate(shared_model(), None, PruneConfig.build("griffin", sparsity=0.5)).run()
    with plain:
        decode(plain.model, tokens(1, 40, seed=2), 36)
    held = 4 * LAYERS * WIDTH
    assert run.report().extra_memory_bytes == plain.report().extra_memory_bytes + held
