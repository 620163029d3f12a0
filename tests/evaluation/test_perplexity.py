"""Perplexity as a measurement: exact losses, which tokens ran pruned, accounting, causality."""

import functools
import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dart_llm.errors import DartError
from dart_llm.evaluation.forced_decoding import CHUNK
from dart_llm.evaluation.likelihood import score_context
from dart_llm.evaluation.measurement import LEAK, MeasureOptions
from dart_llm.evaluation.parts import MemoryStore
from dart_llm.evaluation.perplexity import measure_windows, ran_pruned
from dart_llm.evaluation.windows import Window, cut, standard_windows
from dart_llm.models.describe import context_length
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import BoundMethod, Run, prepare
from tiny import VOCAB, tiny

TEXT = "".join(chr(32 + (i * i * 7 + i // 3 * 11) % 90) for i in range(1000))
SLICES = MeasureOptions(limit=3, prompt_tokens=40, scored_tokens=30)
STANDARD = MeasureOptions(protocol="standard", window=100)
INTERVAL = {
    "min_evidence": 0,
    "drift": {"rule": "interval 8", "min_distance": 0, "max_dense_share": 1.0},
    "remask": {"observe_tokens": 3},
}
shared = functools.cache(tiny)


def tokenizer(text, **options):
    """One token per character."""
    ids = [3 + ord(character) % (VOCAB - 3) for character in text]
    return SimpleNamespace(input_ids=torch.tensor([ids]))


IDS = tokenizer(TEXT).input_ids[0]


def candidate(method=None, model="llama", **settings):
    config = None if method is None else PruneConfig.build(method, **settings)
    return BoundMethod(shared(model), tokenizer, config)


def scored(bound, options=SLICES, text=TEXT, parts=None, advance=lambda n: None):
    windows, notes = cut(tokenizer(text).input_ids[0], options, context_length(bound.model))
    parts = MemoryStore() if parts is None else parts
    return measure_windows(bound, "perplexity:t", windows, options.protocol, parts, advance, notes)


def measured(method=None, options=SLICES, text=TEXT, **settings):
    return scored(candidate(method, **settings), options, text)


def losses(result):
    return [loss for sample in result.samples for loss in sample["losses"]]


def flags(result):
    return [flag for sample in result.samples for flag in ran_pruned(sample)]


@torch.no_grad()
def direct(model, begin, end, first):
    """Losses of the tokens from ``first`` on (all in tokens of the text), one plain forward."""
    ids = IDS[begin:end]
    logits = model(ids[None]).logits[0].float()
    per_token = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
    return per_token[first - begin - 1 :].tolist()


@pytest.mark.contract("sparsity 0 is bit-identical")
@pytest.mark.parametrize(("model", "sparsity"), [("llama", None), ("gpt2", 0.0), ("gemma3", None)])
def test_decode_slices_equal_a_plain_forward(model, sparsity):
    pruned = {} if sparsity is None else {"method": "dart", "sparsity": sparsity}
    result = measured(model=model, **pruned)
    starts = [sample["start"] for sample in result.samples]
    assert starts == [0, 465, 930]
    wanted = [x for s in starts for x in direct(shared(model), s, s + 70, s + 40)]
    assert losses(result) == pytest.approx(wanted, abs=1e-4)
    assert result.metrics == {
        "tokens": 90,
        "pruned_tokens": 0,
        "mean_loss": pytest.approx(sum(losses(result)) / 90, abs=1e-12),
        "perplexity": pytest.approx(math.exp(sum(wanted) / 90), rel=1e-4),
    }


@pytest.mark.parametrize(("window", "stride"), [(100, None), (100, 40), (64, 1), (500, None)])
def test_standard_windows_equal_plain_forwards(window, stride):
    limit = 5 if stride == 1 else None
    result = measured(None, replace(STANDARD, window=window, stride=stride, limit=limit))
    windows = standard_windows(IDS, window, stride)[:limit]
    spans = [(w.start, w.start + len(w.ids), w.start + w.first) for w in windows]
    wanted = [direct(shared("llama"), *span) for span in spans]
    assert [len(s["losses"]) for s in result.samples] == [len(w) for w in wanted]
    assert losses(result) == pytest.approx([x for w in wanted for x in w], abs=1e-4)
    mean = sum(map(sum, wanted)) / sum(map(len, wanted))
    assert result.metrics["mean_loss"] == pytest.approx(mean, abs=1e-5)
    assert result.accounting is None and result.notes == ()


@pytest.mark.parametrize("protocol", ["full", "published"])
def test_full_and_published_are_those_of_the_likelihood_tasks(protocol):
    result = measured("griffin", replace(SLICES, protocol=protocol), sparsity=0.5)
    bound = candidate("griffin", sparsity=0.5)
    with bound.run(likelihood=True) as run:
        for sample in result.samples:
            ids = IDS[sample["start"] : sample["start"] + 70].tolist()
            wanted, _ = score_context(bound.model, run, ids[:40], [ids[40:]], protocol)
            assert sample["losses"] == pytest.approx(wanted[0].losses, abs=1e-5)
    assert all(flags(result)) and result.accounting["dense_token_share"] == 0
    assert result.accounting["achieved_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert result.accounting["decoded_tokens"] == 3 * 69, "every fed position is counted"
    assert (LEAK in result.notes) == (protocol == "published")


def test_standard_takes_the_masks_of_a_window_from_the_text_before_it():
    result = measured("griffin", replace(STANDARD, window=300), sparsity=0.5)
    model, wanted = shared("llama"), [direct(shared("llama"), 0, 300, 1)]
    for begin, end in ((300, 600), (600, 900), (900, 1000)):
        with torch.no_grad(), candidate("griffin", sparsity=0.5).run() as run:
            model(IDS[None, begin - 300 : begin])
            ids = {layer: mask.ids for layer, mask in enumerate(run.select())}
        with Run(model, PruneConfig.build("griffin"), ids) as run, run.decoding(prompt=True):
            wanted.append(direct(model, begin, end, begin + 1))
    assert losses(result) == pytest.approx([x for w in wanted for x in w], abs=1e-4)
    assert flags(result) == [False] * 299 + [True] * (299 + 299 + 99)
    assert result.metrics["tokens"] == 996 and result.metrics["pruned_tokens"] == 697
    counted = {"decoded_tokens": 996, "dense_token_share": 299 / 996}
    counted |= {"sparsity_while_pruned": 0.5, "achieved_sparsity": 0.5 * 697 / 996}
    assert {name: result.accounting[name] for name in counted} == pytest.approx(counted, abs=0.01)
    assert len(result.notes) == 1 and result.notes[0].startswith("299 tokens ran dense")


@pytest.mark.contract("accounting equals a count by hooks")
def test_decode_says_which_tokens_ran_pruned():
    result = measured("griffin", sparsity=0.5, **INTERVAL)
    assert flags(result)[:30] == [True] * 8 + [False] * 3 + [True] * 8 + [False] * 3 + [True] * 8
    report = result.accounting
    dense = report["decoded_tokens"] * report["dense_token_share"]
    assert result.metrics["pruned_tokens"] == report["decoded_tokens"] - round(dense) == 3 * 24
    assert report["remasks"] == 6
    pruned = [x for x, flag in zip(losses(result), flags(result), strict=True) if flag]
    assert result.metrics["mean_loss_pruned_tokens"] == pytest.approx(sum(pruned) / 72)
    assert result.metrics["perplexity_pruned_tokens"] == pytest.approx(math.exp(sum(pruned) / 72))
    assert result.items[0]["pruned_tokens"] == 24


@pytest.mark.contract("causality")
@pytest.mark.parametrize(
    ("protocol", "method"),
    [("decode", "griffin"), ("decode", "dart"), ("full", "griffin"), ("published", "griffin")],
)
def test_later_tokens_reach_back_only_under_published(protocol, method):
    settings = INTERVAL if method == "dart" else {}
    options = replace(SLICES, protocol=protocol, limit=1)
    texts = (TEXT[:70], TEXT[:60] + TEXT[500:510])  # one slice each, different from token 60 on
    first, second = (losses(measured(method, options, t, sparsity=0.5, **settings)) for t in texts)
    apart = [abs(a - b) for a, b in zip(first, second, strict=True)]
    assert max(apart[20:]) > 0.1
    assert (max(apart[:20]) > 1e-3) is (protocol == "published")


def test_no_more_than_one_chunk_of_logits_is_alive():
    model, alive, most = tiny("llama", seed=1), [], []

    def after(module, arguments, output):
        alive.append(weakref.ref(output.logits))
        most.append(0 if output.logits.shape[1] <= CHUNK else 99)

    model.register_forward_pre_hook(lambda *_: most.append(sum(ref() is not None for ref in alive)))
    model.register_forward_hook(after)
    bound = BoundMethod(model, tokenizer, PruneConfig.build("griffin", sparsity=0.5))
    for protocol in ("decode", "full", "published", "standard"):
        scored(bound, replace(SLICES, protocol=protocol, window=500, scored_tokens=400))
    assert len(alive) > 12 and max(most) == 0


@pytest.mark.parametrize(("protocol", "method"), [("decode", None), ("standard", "griffin")])
def test_a_loss_that_is_not_finite_names_slice_and_token(protocol, method):
    model, text = tiny("llama", seed=1), "a" * 144 + "b" + "a" * 55

    def overflow(module, arguments, output):
        seen = arguments[0][:, -output.logits.shape[1] :]
        output.logits[seen == tokenizer("b").input_ids] = float("inf")

    model.register_forward_hook(overflow)
    bound = replace(candidate(method), model=model)
    options = replace(STANDARD, protocol=protocol, limit=2, prompt_tokens=40, scored_tokens=60)
    words = r"slice 1 \(it begins at token 100 of the text\): the loss of its token 45 is"
    with pytest.raises(DartError, match=words + r" the first that is not finite .*float32"):
        scored(bound, options, text)


def test_what_is_refused():
    griffin, late = (candidate("griffin", sparsity=0.5, min_evidence=n) for n in (0, 200))
    for bound, options, words in (
        (late, SLICES, r"griffin@0.5: all 30 scored tokens .* ran dense"),
        (griffin, replace(STANDARD, limit=1), r"the only window here is the first"),
        (candidate(), replace(SLICES, prompt_tokens=500), "longer than the model's context of 512"),
    ):
        with pytest.raises(DartError, match=words):
            scored(bound, options)


def test_parts_know_where_the_masks_of_a_window_come_from():
    parts, griffin = MemoryStore(), candidate("griffin", sparsity=0.5)
    for before in (IDS[:100], IDS[100:200]):
        window = Window(IDS[300:400], 1, 1, 300, before)
        measure_windows(griffin, "perplexity:t", [window], "standard", parts, lambda n: None)
    assert len(parts.parts) == 2


def test_dense_runs_by_the_executor_that_was_named():
    """Without one it is the untouched model, to the bit; with one the losses are the same."""
    model = tiny("llama")
    windows = [Window(torch.arange(3, 73) % VOCAB, 40)]
    losses_by = {}
    for executor in ("auto", "masked"):
        bound = prepare(model, None, PruneConfig.build("dense", executor=executor))
        run = bound.run()
        assert (run is None) == (executor == "auto")
        assert bound.label == ("dense" if run is None else "dense, masked")
        arguments = (bound, "perplexity:t", windows, "decode", MemoryStore(), lambda n: None)
        losses_by[executor] = measure_windows(*arguments).samples[0]["losses"]
    assert losses_by["masked"] == pytest.approx(losses_by["auto"], abs=1e-5)


def test_a_screened_head_is_what_is_measured():
    """In steps of one token, under a name of its own; a whole forward would score every word."""
    model = tiny("llama", vocab_size=2048, hidden_size=64)
    widths = []
    model.lm_head.register_forward_hook(lambda head, args, y: widths.append(args[0].shape[1]))
    learnt = {"sequences": 2, "length": 32, "opening": 0}
    config = PruneConfig.build("dense", head="screened 0.4", executor="compact", self_stats=learnt)
    bound = prepare(model, None, config)
    widths.clear()
    windows = [Window(torch.arange(3, 73) % VOCAB, 40)]
    result = measure_windows(
        bound, "perplexity:t", windows, "decode", MemoryStore(), lambda n: None
    )
    assert bound.label == "dense, screened head" and len(result.samples[0]["losses"]) == 30
    assert widths == [1] * len(widths)
