"""Perplexity as a measurement: exact losses, which tokens ran pruned, accounting, causality."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dart_llm.errors import ConfigError, DartError
from dart_llm.evaluation.forced_decoding import CHUNK
from dart_llm.evaluation.likelihood import score_context
from dart_llm.evaluation.measurement import LEAK
from dart_llm.evaluation.perplexity import count, measure, measure_text, score_window
from dart_llm.evaluation.windows import slice_windows
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.prepare import MemoryStore as Memory
from dart_llm.session.prepare import PreparedMethod as Candidate
from dart_llm.session.run import Run
from ppl_cases import (
    IDS,
    INTERVAL,
    SLICES,
    STANDARD,
    TEXT,
    candidate,
    flags,
    losses,
    measured,
    shared,
    tokenizer,
)
from tiny import tiny


@torch.no_grad()
def direct(model: Any, begin: int, end: int, first: int) -> list[float]:
    """Losses of the tokens from ``first`` on (all in tokens of the text), one plain forward."""
    ids = IDS[begin:end]
    logits = model(ids[None]).logits[0].float()
    found = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
    return found[first - begin - 1 :].tolist()


@pytest.mark.contract("sparsity 0 is dense")
@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma3", "falcon"])
@pytest.mark.parametrize("sparsity", [None, 0.0])
def test_decode_slices_equal_a_plain_forward(model, sparsity):
    method = None if sparsity is None else "dart"
    found = measured(method, model=model, **({} if sparsity is None else {"sparsity": sparsity}))
    starts = [sample["start"] for sample in found.samples]
    assert starts == [0, 465, 930]
    wanted = [x for s in starts for x in direct(shared(model), s, s + 70, s + 40)]
    assert losses(found) == pytest.approx(wanted, abs=1e-4)
    assert found.metrics["tokens"] == 90 and found.metrics["pruned_tokens"] == 0
    assert found.metrics["mean_loss"] == pytest.approx(sum(wanted) / 90, abs=1e-4)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(sum(wanted) / 90), rel=1e-4)
    assert "perplexity_pruned_tokens" not in found.metrics, "nothing ran pruned"


@pytest.mark.parametrize(
    ("window", "stride"), [(100, None), (100, 40), (64, 64), (64, 1), (333, 200), (500, None)]
)
def test_standard_windows_equal_plain_forwards(window, stride):
    limit = 5 if stride == 1 else None
    options = replace(STANDARD, window=window, stride=stride, limit=limit)
    found = measured(None, options)
    wanted, begin, done = [], 0, 1
    while done < len(IDS) and len(wanted) < (limit or len(IDS)):
        end = min(begin + window, len(IDS))
        wanted.append(direct(shared("llama"), begin, end, max(done, begin + 1)))
        begin, done = begin + (stride or window), end
    assert [len(s["losses"]) for s in found.samples] == [len(w) for w in wanted]
    assert losses(found) == pytest.approx([x for w in wanted for x in w], abs=1e-4)
    assert found.metrics["mean_loss"] == pytest.approx(
        sum(map(sum, wanted)) / sum(map(len, wanted)), abs=1e-5
    )
    assert found.accounting is None and found.notes == ()


@pytest.mark.parametrize("protocol", ["full", "published"])
def test_full_and_published_are_those_of_the_likelihood_tasks(protocol):
    found = measured("griffin", replace(SLICES, protocol=protocol), sparsity=0.5)
    own = candidate("griffin", sparsity=0.5)
    with own.run(likelihood=True) as run:
        for sample in found.samples:
            ids = IDS[sample["start"] : sample["start"] + 70].tolist()
            wanted, _ = score_context(own.model, run, ids[:40], [ids[40:]], protocol)
            assert sample["losses"] == pytest.approx(wanted[0].losses, abs=1e-5)
    assert all(flags(found)) and found.accounting["dense_token_share"] == 0
    assert found.accounting["achieved_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert found.accounting["decoded_tokens"] == 3 * 69, "every fed position is counted"
    assert (LEAK in found.notes) == (protocol == "published")
    dense = losses(measured(None))
    assert max(abs(a - b) for a, b in zip(losses(found), dense, strict=True)) > 0.1


def test_standard_takes_the_masks_of_a_window_from_the_text_before_it():
    found = measured("griffin", replace(STANDARD, window=300), sparsity=0.5)
    model, wanted = shared("llama"), [direct(shared("llama"), 0, 300, 1)]
    for begin, end in ((300, 600), (600, 900), (900, 1000)):
        with torch.no_grad(), candidate("griffin", sparsity=0.5).run() as run:
            model(IDS[None, begin - 300 : begin])
            masks = run.select()
        ids = {layer: mask.ids for layer, mask in enumerate(masks)}
        with Run(model, PruneConfig.build("griffin"), ids) as run, run.decoding(prompt=True):
            wanted.append(direct(model, begin, end, begin + 1))
    assert losses(found) == pytest.approx([x for w in wanted for x in w], abs=1e-4)
    assert flags(found) == [False] * 299 + [True] * (299 + 299 + 99)
    assert found.metrics["tokens"] == 996 and found.metrics["pruned_tokens"] == 697
    assert found.metrics["mean_loss_pruned_tokens"] == pytest.approx(
        sum(map(sum, wanted[1:])) / 697, abs=1e-4
    )
    report = found.accounting
    assert report["decoded_tokens"] == 996
    assert report["dense_token_share"] == pytest.approx(299 / 996)
    assert report["sparsity_while_pruned"] == pytest.approx(0.5, abs=0.01)
    assert report["achieved_sparsity"] == pytest.approx(0.5 * 697 / 996, abs=0.01)
    assert len(found.notes) == 1 and found.notes[0].startswith("299 tokens ran dense")


@pytest.mark.contract("accounting equals a count")
def test_decode_says_which_tokens_ran_pruned():
    found = measured("griffin", sparsity=0.5, **INTERVAL)
    assert flags(found)[:30] == [True] * 8 + [False] * 3 + [True] * 8 + [False] * 3 + [True] * 8
    report = found.accounting
    dense = report["decoded_tokens"] * report["dense_token_share"]
    assert found.metrics["pruned_tokens"] == report["decoded_tokens"] - round(dense) == 3 * 24
    assert report["remasks"] == 6
    pruned = [x for x, flag in zip(losses(found), flags(found), strict=True) if flag]
    assert found.metrics["mean_loss_pruned_tokens"] == pytest.approx(sum(pruned) / 72)
    assert found.metrics["perplexity_pruned_tokens"] == pytest.approx(math.exp(sum(pruned) / 72))
    assert found.items[0]["pruned_tokens"] == 24 and found.items[0]["tokens"] == 30
    assert found.samples[0]["pruned"][:2] == [[True, 8], [False, 3]]
    assert found.masks == 9 and len(found.counts) == 4
    assert all(0 < int(kept.max()) <= 9 and int(kept.sum()) == 9 * 24 for kept in found.counts)


@pytest.mark.parametrize(("protocol", "step", "pruned"), [("decode", 20, 20), ("full", 50, 11)])
def test_the_release_step_ends_pruning_where_it_says(protocol, step, pruned):
    """Counted from the first token that is fed in a decode forward."""
    options = replace(SLICES, protocol=protocol, limit=1)
    found = measured("griffin", options, sparsity=0.5, release_step=step)
    assert flags(found) == [True] * pruned + [False] * (30 - pruned)


def changed_texts() -> tuple[str, str]:
    """Two texts of one slice that differ from token 60 on."""
    return TEXT[:70], TEXT[:60] + TEXT[500:510]


@pytest.mark.contract("causality")
@pytest.mark.parametrize(
    ("protocol", "method", "settings"),
    [
        ("decode", "griffin", {}),
        ("decode", "dart", INTERVAL),
        ("full", "griffin", {}),
        ("published", "griffin", {}),
    ],
)
def test_later_tokens_reach_back_only_under_published(protocol, method, settings):
    options = replace(SLICES, protocol=protocol, limit=1)
    first, second = (
        losses(measured(method, options, text, sparsity=0.5, **settings))
        for text in changed_texts()
    )
    apart = [abs(a - b) for a, b in zip(first, second, strict=True)]
    assert max(apart[20:]) > 0.1
    assert (max(apart[:20]) > 1e-3) is (protocol == "published")


def test_dense_windows_of_standard_are_as_without_pruning():
    dense, pruned = measured(None, STANDARD), measured("griffin", STANDARD, sparsity=0.5)
    assert pruned.samples[0]["losses"] == dense.samples[0]["losses"]
    zero = measured("griffin", STANDARD, sparsity=0.0)
    assert losses(zero) == losses(dense)
    assert zero.accounting["dense_token_share"] == 1 and zero.accounting["decoded_tokens"] == 990
    assert [item["id"] for item in pruned.items] == [item["id"] for item in dense.items]


def test_no_more_than_one_chunk_of_logits_is_alive():
    model = tiny("llama", seed=1)
    alive: list[weakref.ref] = []
    most: list[int] = []

    def before(*arguments: Any) -> None:
        most.append(sum(logits() is not None for logits in alive))

    def after(module: Any, arguments: Any, output: Any) -> None:
        alive.append(weakref.ref(output.logits))
        most.append(0 if output.logits.shape[1] <= CHUNK else 99)

    hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    own = Candidate(model, tokenizer, PruneConfig.build("griffin", sparsity=0.5))
    for protocol in ("decode", "full", "published", "standard"):
        options = replace(SLICES, protocol=protocol, window=500, scored_tokens=400)
        measure_text(own, "a text", TEXT, options, Memory(), lambda n: None)
    for hook in hooks:
        hook.remove()
    assert len(alive) > 12 and max(most) == 0


@pytest.mark.parametrize("method", [None, "griffin"])
@pytest.mark.parametrize(("protocol", "token"), [("decode", 45), ("full", 45), ("standard", 45)])
def test_a_loss_that_is_not_finite_names_slice_and_token(method, protocol, token):
    model, text = tiny("llama", seed=1), "a" * 144 + "b" + "a" * 55

    def overflow(module: Any, arguments: Any, output: Any) -> None:
        seen = arguments[0][:, -output.logits.shape[1] :]
        output.logits[seen == tokenizer("b").input_ids] = float("inf")

    model.register_forward_hook(overflow)
    config = None if method is None else PruneConfig.build(method, sparsity=0.5)
    options = replace(STANDARD, protocol=protocol, limit=2, prompt_tokens=40, scored_tokens=60)
    words = rf"slice 1 \(it begins at token 100 of the text\): the loss of its token {token} is"
    with pytest.raises(DartError, match=words + r" the first that is not finite .*float32"):
        measure_text(
            Candidate(model, tokenizer, config), "a", text, options, Memory(), lambda n: None
        )


def test_scores_that_overflow_name_their_slice():
    model = tiny("llama", seed=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("b").input_ids] = float("nan")
    own = Candidate(model, tokenizer, PruneConfig.build("griffin", sparsity=0.5))
    with pytest.raises(
        DartError, match=r"slice 1 \(.* 100 .*\): the scores of layer 0 are not fin"
    ):
        measure_text(own, "a", "a" * 110 + "b" + "a" * 89, replace(SLICES, prompt_tokens=70,
                     limit=2), Memory(), lambda n: None)  # fmt: skip


def test_slices_that_would_measure_the_untouched_model_fail():
    with pytest.raises(
        ConfigError, match=r"griffin@0.5: all 30 scored tokens of a slice ran dense"
    ):
        measured("griffin", sparsity=0.5, min_evidence=200)
    with pytest.raises(ConfigError, match=r"the first window, which has none, is all there is"):
        measured("griffin", replace(STANDARD, limit=1), sparsity=0.5)
    assert measured("griffin", replace(STANDARD, limit=1), sparsity=0.0).metrics["tokens"] == 99


def test_a_slice_longer_than_the_context_is_refused_and_a_window_is_clipped():
    with pytest.raises(ConfigError, match="longer than the model's context of 512"):
        measured(None, replace(SLICES, prompt_tokens=500))
    found = measured(None, replace(STANDARD, window=2048))
    assert [item["tokens"] for item in found.items] == [511, 487]
    assert "windows of 512 tokens" in found.notes[0]


def test_measure_reads_the_text_by_name_and_count_agrees(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    for options in (SLICES, STANDARD, replace(STANDARD, window=4096, limit=None)):
        done: list[int] = []
        found = measure(candidate(), str(path), options, Memory(), done.append)
        assert found.task == f"perplexity:{path}" and found.protocol == options.protocol
        assert found.metric == "perplexity" and not found.higher_is_better
        assert sum(done) == len(found.items) == count(str(path), options, tokenizer, 512)


def test_a_text_that_is_counted_and_measured_is_tokenised_once(tmp_path):
    path, read = tmp_path / "text.txt", []
    path.write_text(TEXT[:200], encoding="utf-8")

    def counting(text: str, **options: Any) -> Any:
        read.append(text)
        return tokenizer(text, **options)

    own = Candidate(shared("llama"), counting, None)
    assert count(str(path), SLICES, counting, 512) == 2
    measure(own, str(path), SLICES, Memory(), lambda n: None)
    assert read == [TEXT[:200]]


def test_score_window_adds_sequences_to_a_run_under_decode():
    own = candidate("griffin", sparsity=0.5)
    windows = slice_windows(IDS, 2, 40, 30)
    with own.run() as run:
        for window in windows:
            found = score_window(own.model, run, window)
            assert all(found.pruned) and len(found.losses) == 30
    assert run.report().decoded_tokens == 60


@pytest.mark.smollm2
def test_standard_on_a_real_model(smollm2):
    """Exact against one plain forward per window; a pruned window costs what was recorded."""
    from dart_llm.data import texts

    model, real = smollm2
    text, options = texts.all_text(), replace(STANDARD, window=256, limit=2)
    dense = measure_text(Candidate(model, real, None), "t", text, options, Memory(), lambda n: None)
    ids = real(text, return_tensors="pt").input_ids[0]
    for sample in dense.samples:
        window = ids[sample["start"] : sample["start"] + 256]
        with torch.inference_mode():
            logits = model(window[None]).logits[0, :-1]
        wanted = F.cross_entropy(logits, window[1:], reduction="none").tolist()
        assert sample["losses"] == pytest.approx(wanted, abs=1e-4)
    config = PruneConfig.build("griffin", sparsity=0.5)
    own = Candidate(model, real, config)
    pruned = measure_text(own, "t", text, options, Memory(), lambda n: None)
    assert pruned.metrics["tokens"] == 2 * 255 and pruned.metrics["pruned_tokens"] == 255
    assert 1.2 < pruned.metrics["perplexity"] / dense.metrics["perplexity"] < 6
    assert pruned.accounting["sparsity_while_pruned"] == pytest.approx(0.5, abs=1e-3)
