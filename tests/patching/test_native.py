"""Executor native: whole decode steps, and what the model runs itself.  See test_executors.py."""

import copy
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dart_llm.errors import ConfigError
from dart_llm.models import growing_cache
from dart_llm.models.steps import step_unsupported_reason
from dart_llm.native import build
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import prune
from steps import apart, decode, generate, new_cache, picked, pruned, shared_model, step, sums_of
from tiny import CONFIGS, NAMES, VOCAB, tiny, tokens

pytestmark = pytest.mark.usefixtures("native")

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
STEPS = tuple(name for name in NAMES if step_unsupported_reason(shared_model(name)) is None)
WINDOWS = {"mistral", "gemma2", "gemma3"}
PROMPT, DECODED = 66, 8
IDS = tokens(1, PROMPT + DECODED, seed=3)
BOTH = ("compact", "native")
RUN = tuple(name for name in NAMES if not name.startswith("opt"))
"""Models whose FFNs the kernels can run."""


@pytest.mark.parametrize(("rows", "dtype"), [*zip((8, 3), DTYPES, strict=True)], ids=str)
def test_rows_of_a_batch(rows, dtype):
    """Whole steps of several rows compute the model's own dense tokens, whoever else is there."""
    model, ids = shared_model("llama", dtype), tokens(rows, 40, seed=6)
    dense = generate(model, ids, 8)
    with prune(model, "griffin", sparsity=0.0, executor="native") as run:
        result = generate(model, ids, 8)
        assert run.patch.steps == 7
        parts = [decode(model, part, 36)[:, 36:] for part in (ids, *ids.split(1))]
        assert dtype != torch.float32 or torch.equal(parts[0], torch.cat(parts[1:]))
    same = (result.sequences == dense.sequences).all(1)
    assert same.any() and (dtype != torch.float32 or same.all())
    both = torch.stack(result.logits)[:, same], torch.stack(dense.logits)[:, same]
    assert apart(*both) < TOLERANCE[dtype]


def test_batches_that_a_whole_step_leaves_to_the_model():
    """Too many rows, and rows of other lengths; sizes that change go on with the room there is."""
    model, mask = shared_model(), torch.ones(3, 30, dtype=torch.int64)
    mask[1, :4] = 0
    with prune(model, "griffin", sparsity=0.5, executor="native") as run:
        for rows, count in ((8, 10), (1, 10), (9, 0), (3, 10)):
            before, ids = run.patch.steps, tokens(rows, 30, seed=6)
            decode(model, ids, 20)
            assert run.patch.steps - before == count
        before = run.patch.steps
        result = decode(model, tokens(3, 30, seed=6), 20, mask)
        assert run.patch.steps == before
    with prune(model, "griffin", sparsity=0.5, executor="compact"):
        wanted = decode(model, tokens(3, 30, seed=6), 20, mask)
    assert apart(result[[0, 2]], wanted[[0, 2]]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("name", "rows", "way"),
    [
        ("llama", 2, {"num_beams": 3}),
        ("llama", 2, {"eos_token_id": 7, "pad_token_id": 0}),
        ("llama", 1, {"prompt_lookup_num_tokens": 3}),
        ("gemma3", 1, {"prompt_lookup_num_tokens": 3}),
    ],
)
def test_ways_to_generate(name, rows, way):
    """Beams reorder the cache, ended rows continue with padding, candidates are taken back."""
    model, ids, result = shared_model(name), tokens(rows, 20, seed=6).repeat(1, 2), []
    for executor in BOTH:
        with prune(model, "griffin", sparsity=0.5, executor=executor) as run:
            result.append(generate(model, ids, 24, **way).sequences)
            assert rows == 1 or (run.patch.steps > 16) == (executor == "native")
    assert torch.equal(*result)


@pytest.mark.parametrize(("name", "rows"), [("llama", 3), ("gemma2", 1), ("gpt2", 3)])
def test_a_static_cache(name, rows):
    """Whose steps are the model's own, by generate too."""
    model, ids, results = shared_model(name), tokens(rows, 40, seed=6), []
    for executor in BOTH:
        with prune(model, "griffin", sparsity=0.5, executor=executor) as run:
            cache = StaticCache(config=model.config, max_cache_len=48)
            logits = [step(model, ids[:, :16], cache)]
            logits += [step(model, ids[:, at : at + 1], cache) for at in range(16, 40)]
            assert int(cache.get_seq_length()) == 40
            written = generate(model, ids[:, :16], 12, cache_implementation="static")
            assert run.patch.steps == 0
        results.append((torch.cat(logits, 1), written))
    (theirs, expected), (ours, written) = results
    assert apart(ours, theirs) < 1e-5 and apart(written.logits, expected.logits) < 1e-5
    assert torch.equal(written.sequences, expected.sequences)


@pytest.mark.contract("sparsity 0 is bit-identical")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*product(RUN, DTYPES[:1]), ("llama", DTYPES[1]), ("gpt2", DTYPES[1])],
    ids=str,
)
def test_sparsity_zero(name, dtype):
    """By the kernels; test_executors.py compares the model's own forward, to the bit."""
    kinds = {"llama", "llama-bias", "qwen2", "qwen3", "smollm3", "gemma", "olmo2", "phi3"}
    assert set(STEPS) == kinds | {"gpt2", "gpt_neox", "gpt_neox-serial"} | WINDOWS
    dense = decode(shared_model(name, dtype), IDS, PROMPT)
    settings = {"method": "griffin", "sparsity": 0.0, "executor": "native"}
    run, masks, logits = pruned(shared_model(name, dtype), IDS, PROMPT, **settings)
    assert masks == [] and run.report().decoded_tokens == DECODED
    assert apart(logits, dense) <= TOLERANCE[dtype]
    # windows are attended to in a cache that is laid out otherwise, whose sums may round so
    assert name in WINDOWS or torch.equal(logits[:, :PROMPT], dense[:, :PROMPT])


def test_the_context_of_learned_positions_is_no_longer():
    model = shared_model("gpt2")
    with prune(model, "griffin", sparsity=0.5, executor="native"), torch.no_grad():
        output = model(tokens(1, 511), use_cache=True)
        output = model(tokens(1, 1), cache=output.cache)
        with pytest.raises(IndexError):
            model(tokens(1, 1), cache=output.cache)
        assert output.cache.get_seq_length() == 512


def _appended(cache):
    """One more position, which the model did not write, in each layer."""
    for layer in cache.layers:
        layer.update(layer.keys[:, :, -1:], layer.values[:, :, -1:])


CHANGES = {
    "cropped": (lambda cache: cache.crop(-40), 40),
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([0])), 0),
    "appended": (_appended, -1),
}
"""And how many positions that takes away."""


@pytest.mark.parametrize(
    ("name", "change", "whole"),
    [
        *product(["llama"], CHANGES, [False]),
        *(("gemma3", change, False) for change in ("reordered", "appended")),
        ("mistral", "cropped", True),
    ],
)
def test_a_changed_cache_and_a_long_one(monkeypatch, name, change, whole):
    """Its buffers grow; ``whole``: a cache that keeps what a window leaves behind."""
    monkeypatch.setattr(growing_cache, "ROOM", 16)
    model, result, (act, gone) = shared_model(name), [], CHANGES[change]
    ids = tokens(1, 100, seed=9)
    for executor in BOTH:
        with prune(model, "griffin", sparsity=0.5, executor=executor) as run, torch.no_grad():
            cache = DynamicCache() if whole else new_cache(model)
            step(model, ids[:, :20], cache)
            logits = [step(model, ids[:, at : at + 1], cache) for at in range(20, 100)]
            act(cache)
            logits += [step(model, part, cache) for part in ids[:, 50:59].split(1, 1)]
            assert cache.get_seq_length() == 100 - gone + 9
            result.append(torch.cat(logits))
            assert (run.patch.steps > 80) == (executor == "native")
    assert apart(result[1], result[0]) < 1e-5


@pytest.mark.parametrize("executor", ["masked", "compact", "native"])
def test_tokens_observed_after_a_second_prompt_are_those_of_the_untouched_model(executor):
    """Logits, evidence and accounting: the masks of the turn before have no part in them."""
    model, text = shared_model(), tokens(1, 40)
    settings = {"sparsity": 0.5, "min_evidence": 8, "remask": "decay", "executor": executor}
    with prune(model, "griffin", **settings) as run:
        cache = new_cache(model)
        for part in (text[:, :20], text[:, 20:21], text[:, 21:24]):
            step(model, part, cache)
        before = copy.deepcopy(cache)
        result = [step(model, text[:, at : at + 1], cache) for at in (24, 25, 26)]
        sums = sums_of(run)
        assert run.phase == "observe" and run.report().dense_token_share == 3 / 4
        step(model, text[:, 27:28], cache)
        assert run.phase == "pruned" and run.report().achieved_sparsity == 0.5 * 2 / 5
    dense = [step(model, text[:, at : at + 1], before) for at in (24, 25, 26)]
    assert apart(torch.cat(result), torch.cat(dense)) < 1e-5
    # GRIFFIN's statistic sums to 1 over each token's neurons
    assert [float(total.sum()) for total in sums] == pytest.approx([2 + 3 + 3] * 4, rel=1e-4)


def _gradients(model):
    """Of a down and of a key projection: a prompt with gradients, a step without, one with."""
    ids, cache = IDS, DynamicCache()
    model(ids[:, :PROMPT], past_key_values=cache)
    with torch.no_grad():
        model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache)
    assert not cache.layers[0].keys.requires_grad
    model(ids[:, PROMPT + 1 : PROMPT + 2], past_key_values=cache).logits.sum().backward()
    layer = model.model.layers[1]
    parts = (layer.mlp.down_proj.weight, layer.self_attn.k_proj.weight)
    return torch.cat([part.grad.flatten() for part in parts])


def _steered(model):
    added = torch.linspace(-1, 1, 32)
    handle = model.model.layers[1].register_forward_hook(lambda module, args, out: out + added)
    steered = decode(model, IDS, PROMPT)
    handle.remove()
    plain = decode(model, IDS, PROMPT)
    assert apart(steered, plain) > 0.1
    return torch.stack([steered, plain])


def _padded(model):
    mask = (torch.arange(PROMPT + DECODED)[None] >= 5).long()
    return decode(model, IDS, PROMPT, mask)[:, 5:]


def _wide_heads():
    torch.manual_seed(0)
    settings = {**CONFIGS["qwen3"][1], "head_dim": 128}  # wider than the stream, together
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3"](**settings)).eval()


LEFT = {
    "gradients": (_gradients, tiny),
    "hooks": (_steered, tiny),
    "padding": (_padded, tiny),
    "wide heads": (lambda model: decode(model, IDS, PROMPT), _wide_heads),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_a_whole_step_leaves_to_the_model(case):
    run, make = LEFT[case]
    result = []
    for executor in BOTH:
        model = make()
        with prune(model, "griffin", sparsity=0.5, executor=executor):
            result.append(run(model))
    assert apart(*result) < (1e-4 if case == "gradients" else TOLERANCE[torch.float32])


@pytest.mark.parametrize("executor", ["native", "compact", "masked"])
def test_ids_outside_the_vocabulary_are_an_index_error(executor):
    for wrong in (VOCAB, -1):
        with prune(shared_model(), masks=picked(), executor=executor) as run:
            cache = new_cache(run.model)
            step(run.model, tokens(1, 24), cache)
            message = f"token id {wrong} is outside the vocabulary of {VOCAB}"
            with pytest.raises(IndexError, match=message if executor == "native" else None):
                step(run.model, torch.tensor([[wrong]]), cache)


def test_without_a_compiler_compact_runs(monkeypatch, tmp_path, caplog):
    """Switched off; none there, which is said once; one that refuses, which is quoted."""
    model, settings = shared_model("llama"), {"method": "griffin", "sparsity": 0.5}

    def build_with(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        build.why_not.cache_clear()

    try:
        build_with(**{build.SWITCH: "0"})
        with pytest.raises(ConfigError, match=r'DART_NATIVE=0 keeps .* off; use executor "comp'):
            prune(model, executor="native", **settings)
        assert prune(model, **settings).executor == "compact" and not caplog.records
        nothing = str(tmp_path / "no-compiler")
        build_with(**{build.SWITCH: "1", "DART_CACHE": str(tmp_path), "CXX": nothing})
        run = prune(model, **settings)
        assert run.executor == run.executor == "compact"
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert "no C++ compiler" in caplog.text and "slower executor compact" in caplog.text
        monkeypatch.delenv("CXX")
        wrong = dict.fromkeys(build.sources(), '#error "not today"\n')
        monkeypatch.setattr(build, "sources", lambda: wrong)
        build_with()
        assert "not today" in build.why_not() and len(caplog.records) == 2
    finally:
        monkeypatch.undo()
        build_with()


def test_auto_is_the_fastest_that_can_run():
    wanted = {"llama": "native", "gpt2": "native", "bloom": "native", "opt": "masked"}
    for name, executor in wanted.items():
        assert prune(shared_model(name), "griffin", sparsity=0.5).executor == executor
        assert prune(shared_model(name), "griffin", sparsity=0.0).executor in ("compact", "masked")
    half = shared_model("llama", torch.float16)
    assert prune(half, "griffin", sparsity=0.5).executor == "compact"
    rows = prune(shared_model("llama"), "griffin", sparsity=0.5, batch="per_row")
    assert rows.executor == "masked"
    for model, message in (
        (half, "float16, not float32"),
        (shared_model("opt"), "no.* FFN module"),
    ):
        with pytest.raises(ConfigError, match=message):
            prune(model, "griffin", sparsity=0.5, executor="native")
    run = prune(shared_model("phi"), "griffin", sparsity=0.5)
    with run:
        assert run.patch.no_steps.startswith("is a phi model, not one of gemma, ")
        decode(run.model, IDS, PROMPT)
    assert run.report().executor == "native"
    with pytest.raises(ConfigError, match="builds a mask for each row"):
        PruneConfig.build("griffin", executor="native", batch="per_row")
