"""Calibration: its text, what is observed, what is cached, and what ``prepare`` makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dart_llm import (
    ConfigError,
    LoadError,
    PruneConfig,
    calibration,
    calibration_text,
    hub_data,
    own_text,
)
from dart_llm.calibration import calibrate, observe
from dart_llm.calibration_cache import fingerprint
from dart_llm.calibration_text import check_disjoint, documents, sequences, title
from dart_llm.candidate import Candidate
from dart_llm.measure import check_calibration
from dart_llm.measurement import MeasureOptions
from dart_llm.own_text import write_sequences
from dart_llm.prepare import prepare
from steps import Same, decode, forward_lengths, same_masks, shared_model
from tiny import LAYERS, VOCAB, WIDTH, tiny, tokens

WORDS = " ".join(f"word{i} and {i * i % 97}" for i in range(400))
SMALL = {"sequences": 10, "length": 16}


class Letters:
    """A tokenizer of characters: ids 3 to 95."""

    eos_token_id = 2

    def __init__(self, bos: int | None = None, adds: bool = False) -> None:
        self.bos_token_id, self.adds = bos, adds

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        start = [self.bos_token_id] if self.adds and add_special_tokens else []
        return {"input_ids": start + [3 + ord(letter) % 93 for letter in text]}


def letters(text: str) -> list[int]:
    return Letters()(text)["input_ids"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "calibration.txt"
    path.write_text(WORDS)
    return str(path)


def rows(path: Path, *given: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
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


# the text


def test_text_files_and_rows(tmp_path: Path, text: str) -> None:
    assert list(documents(text)) == [WORDS]
    source = rows(
        tmp_path / "rows.jsonl",
        {"document": "first", "summary": "no"},
        {"text": "second", "document": "no"},
        {"document": "third"},
    )
    assert list(documents(source)) == ["first", "second", "third"]
    assert list(documents(f"{source}#1")) == ["second", "third"]
    assert title(f"{source}#1") == "rows.jsonl from row 1 on"
    assert title(source) == "rows.jsonl"
    odd = tmp_path / "odd#1"
    odd.write_text("a file may be called so")
    assert list(documents(str(odd))) == ["a file may be called so"]


@pytest.mark.parametrize(
    ("name", "content", "source", "words"),
    [
        ("a.jsonl", '{"document": "x"}\n', "a.jsonl#1", "has 1 rows: it cannot be read from row 1"),
        ("a.jsonl", '{"answer": "x"}\n', "a.jsonl", "line 1 of .* neither a text nor a document"),
        ("a.txt", "x", "a.txt#5", "only a JSONL file has rows"),
        ("a.txt", "x", "b.txt", 'no calibration text ".*b.txt": give a text of your own with'),
        ("a.txt", "\udcff", "a.txt", "cannot read the calibration text"),
    ],
)
def test_texts_that_cannot_be_used(
    tmp_path: Path, name: str, content: str, source: str, words: str
) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=words):
        list(documents(str(tmp_path / source)))


def test_the_hub_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_data, "calibration_text", lambda: "from afar")
    for source in (None, "c4", "c4_train"):
        assert list(documents(source)) == ["from afar"]
        assert title(source) == "C4 (English, training split)"

    def away() -> str:
        raise LoadError(f"C4 could not be fetched; {hub_data.INSTEAD['text']}")

    monkeypatch.setattr(hub_data, "calibration_text", away)
    with pytest.raises(LoadError, match=r"^C4 could not be fetched; give a text of your own with"):
        list(documents(None))


def test_evaluated_files_are_refused(tmp_path: Path, text: str) -> None:
    other = tmp_path / "other.txt"
    other.write_text("x")
    check_disjoint(text, {str(other): None, "embedded": None})
    check_disjoint(None, {text: None})
    with pytest.raises(ConfigError, match="is evaluated and cannot be the calibration text too"):
        check_disjoint(text, {str(tmp_path / "." / "calibration.txt"): None})
    source = rows(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "b"})
    check_disjoint(f"{source}#1", {source: 1})
    with pytest.raises(ConfigError, match=r"another text, or start .*: .*rows\.jsonl#2$"):
        check_disjoint(f"{source}#1", {source: 2})
    with pytest.raises(ConfigError, match=r"another text$"):
        check_disjoint(f"{source}#1", {source: None})


def test_a_text_that_perplexity_spreads_over_is_refused_from_any_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slices lie all over the text, after that row too; so do documents without a limit."""
    few = MeasureOptions(limit=1)
    wanda = PruneConfig.build("wanda")
    source = rows(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "b"})
    check_calibration(wanda, f"{source}#1", [f"summarize:{source}"], few)
    for options in (MeasureOptions(), MeasureOptions(limit=1, sample_seed=0)):
        with pytest.raises(ConfigError, match="is evaluated"):
            check_calibration(wanda, f"{source}#1", [f"summarize:{source}"], options)
    with pytest.raises(ConfigError, match=r"rows.jsonl is evaluated .*: give another text$"):
        check_calibration(wanda, f"{source}#1", [f"perplexity:{source}"], few)
    check_calibration(PruneConfig.build("griffin"), source, [f"perplexity:{source}"], few)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "plain.txt").write_text("x")
    with pytest.raises(ConfigError, match="is evaluated"):
        check_calibration(wanda, "datasets/plain.txt", ["perplexity:plain"], few)


def test_windows_are_cut_from_the_joined_texts() -> None:
    found = sequences(Letters(), ["abcd", "efg", "hij"], 3, 4)
    assert found.tolist() == [letters("abcd"), letters("\n\nef"), letters("g\n\nh")]
    assert sequences(Letters(), ["abcd", "efg"], 9, 4).shape == (2, 4)
    with pytest.raises(ConfigError, match="has 4 tokens and one sequence needs 5"):
        sequences(Letters(), ["abcd"], 1, 5)


def test_every_window_starts_as_the_tokenizer_starts_a_text() -> None:
    starting = Letters(bos=1, adds=True)
    assert sequences(starting, ["abcdef"], 9, 4).tolist() == [
        [1, *letters("abc")],
        [1, *letters("def")],
    ]
    assert sequences(Letters(bos=1), ["abcd"], 9, 4).tolist() == [letters("abcd")]


def test_no_more_text_is_read_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_text, "PIECE", 8)

    def endless():
        while True:
            yield "abc" * 5

    found = sequences(Letters(), endless(), 3, 10)
    assert found.flatten().tolist() == letters("abc" * 5 + "\n\n" + "abc" * 5)[:30]


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


def test_a_swap_of_neurons_changes_the_fingerprint() -> None:
    model = tiny()
    before = fingerprint(model)
    assert fingerprint(tiny()) == before
    assert fingerprint(tiny(dtype=torch.bfloat16)) != before
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]].clone()
    assert fingerprint(model) != before


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, text: str) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    news: list[str] = []
    found = calibrate(tiny(), Letters(), config(), text, str(blocked), news.append)
    assert found.held is not None
    assert any("not kept for the next time" in line for line in news)


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


def test_written_sequences_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model()
    first = write_sequences(model, [1], 5, 12, 0)
    assert first.shape == (5, 12) and bool((first[:, 0] == 1).all()) and int(first.max()) < VOCAB
    torch.manual_seed(99)
    assert torch.equal(write_sequences(model, [1], 5, 12, 0), first)
    assert not torch.equal(write_sequences(model, [1], 5, 12, 1), first)
    assert len({tuple(row) for row in first.tolist()}) == 5
    monkeypatch.setattr(own_text, "WRITTEN", 2)
    assert write_sequences(model, [1], 5, 12, 0).shape == (5, 12)


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


def test_quantised_candidates_are_dense_runs_of_a_copy(tmp_path: Path) -> None:
    found = quiet(shared_model(), PruneConfig.build("dense-4bit"), None, tmp_path)
    assert found.config is None and found.run() is None and found.label == "dense-4bit"
    assert found.model is not shared_model() and found.facts["weight_bits"] == 4
    assert "Q4_1" in found.notes[0]
