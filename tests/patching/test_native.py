"""Executor native: whole decode steps, and what the model runs itself.  See test_executors.py."""

import contextlib
import copy
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dart_llm.errors import ConfigError
from dart_llm.models import growing_cache
from dart_llm.models.describe import describe
from dart_llm.models.packed_loading import round_weights
from dart_llm.models.steps import step_unsupported_reason
from dart_llm.native import build
from dart_llm.patching.executors.token_ffn import WHOLE_STEPS
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import prune
from products import SHAPES
from steps import (
    EVIDENCE,
    Same,
    apart,
    decode,
    generate,
    new_cache,
    picked,
    pruned,
    same_masks,
    shared_model,
    state_of,
    step,
    sums_of,
)
from tiny import CONFIGS, NAMES, VOCAB, tiny, tokens

pytestmark = pytest.mark.usefixtures("native")

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
STEPS = tuple(name for name in NAMES if step_unsupported_reason(shared_model(name)) is None)
WINDOWS = {"mistral", "gemma2", "gemma3"}
PROMPT, DECODED = 66, 8
IDS = tokens(1, PROMPT + DECODED, seed=3)
PRIOR = {"sequences": 2, "length": 24, "opening": 0}
REMASKS = {"drift": "interval 2", "self_stats": PRIOR, "sparsity": 0.5}
OFTEN = {"rule": "interval 2", "min_distance": 0, "max_dense_share": None}
BOTH = ("compact", "native")


RUN = tuple(name for name in NAMES if not name.startswith("opt"))
"""Models whose FFNs the kernels can run."""


@pytest.mark.parametrize(("rows", "dtype"), [*product((3, 8), DTYPES)], ids=str)
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


@pytest.mark.contract("same report whatever the batch")
@pytest.mark.parametrize("name", [name for name in SHAPES if name in STEPS])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("griffin", EVIDENCE),
        ("dart", {**EVIDENCE, "self_stats": PRIOR}),
        ("dart", {**REMASKS, "drift": OFTEN, "remask": {"observe_tokens": 1}}),
    ],
    ids=["activations", "streams", "drift"],
)
def test_observed_rows(name, method, settings):
    """Evidence of the rows' decoded tokens, and the masks that it leads to."""
    model, ids, sums = shared_model(name), tokens(3, 30, seed=6), []
    whole = [pruned(model, ids, 20, method=method, executor=one, **settings) for one in BOTH]
    for run, _, _ in whole:
        sums.append([known.sums for known in state_of(run).evidence])
    (_, wanted, logits), (run, masks, close) = whole
    assert run.report().executor == WHOLE_STEPS and run.report().decoded_tokens == 30
    assert apart(close, logits) < TOLERANCE[torch.float32]
    assert len(masks) == len(wanted) >= (3 if "remask" in settings else 0)
    for ours, theirs in zip(masks, wanted, strict=True):
        assert ours[0] == theirs[0] and same_masks(ours[2], theirs[2])
    for ours, theirs in zip(*sums, strict=True):
        for kind, known in ours.items():
            assert apart(known.total, theirs[kind].total) < 1e-4


def test_batches_that_a_whole_step_leaves_to_the_model():
    """Too many rows, and rows of other lengths; sizes that change go on with the room there is."""
    model, mask = shared_model(), torch.ones(3, 30, dtype=torch.int64)
    mask[1, :4] = 0
    with prune(model, "griffin", sparsity=0.5, executor="native") as run:
        for rows, steps in ((8, 10), (1, 10), (9, 0), (3, 10)):
            before, ids = run.patch.steps, tokens(rows, 30, seed=6)
            decode(model, ids, 20)
            assert run.patch.steps - before == steps
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
    """A cache that beams reorder; rows that continue with padding; candidates that are taken back,
    also from behind a window.
    """
    model, ids, result = shared_model(name), tokens(rows, 20, seed=6).repeat(1, 2), []
    for executor in BOTH:
        with prune(model, "griffin", sparsity=0.5, executor=executor) as run:
            result.append(generate(model, ids, 24, **way).sequences)
            assert rows == 1 or (run.patch.steps > 16) == (executor == "native")
    assert torch.equal(*result)


@pytest.mark.parametrize("name", [name for name in STEPS if "-" not in name])
def test_a_static_cache(name):
    """Whose steps are the model's own, by generate too."""
    model, result = shared_model(name), {}
    for rows, executor in product((1, 3), BOTH):
        ids = tokens(rows, 40, seed=6)
        with prune(model, "griffin", sparsity=0.5, executor=executor) as run:
            cache = StaticCache(config=model.config, max_cache_len=48)
            logits = [step(model, ids[:, :16], cache)]
            logits += [step(model, ids[:, at : at + 1], cache) for at in range(16, 40)]
            taken = run.patch.steps
            assert int(cache.get_seq_length()) == 40
            done = generate(model, ids[:, :16], 12, cache_implementation="static")
            assert (taken, run.patch.steps) == (0, 0)
        result[rows, executor] = torch.cat(logits, 1), done
    for rows in (1, 3):
        (ours, done), (theirs, wanted) = (result[rows, executor] for executor in BOTH[::-1])
        assert apart(ours, theirs) < TOLERANCE[torch.float32]
        assert torch.equal(done.sequences, wanted.sequences)
        assert apart(done.logits, wanted.logits) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_static_cache_that_others_change(mode):
    """Cropped, continued by several tokens, full, and with masks that hide something."""
    model, ids, result = shared_model(), tokens(2, 40, seed=6), []
    for executor in BOTH:
        with prune(model, masks=picked(), executor=executor) as run, mode():
            cache = StaticCache(config=model.config, max_cache_len=32)
            logits = [step(model, ids[:, :16], cache)]
            logits += [step(model, ids[:, at : at + 1], cache) for at in range(16, 24)]
            cache.crop(-6)
            logits += [step(model, ids[:, at : at + 1], cache) for at in range(18, 20)]
            logits += [step(model, ids[:, 20:30], cache), step(model, ids[:, 30:31], cache)]
            taken = run.patch.steps
            for mask in (_seeing(slice(3, 32)), _seeing(slice(0, 40))):
                logits.append(step(model, ids[:, 31:32], cache, mask[..., :32]))
                cache.crop(-1)
            hidden = run.patch.steps - taken
            logits.append(step(model, ids[:, 31:32], cache, _seeing(slice(0, 32))))
            assert int(cache.get_seq_length()) == 32
            assert (taken, hidden) == (0, 0)
            with pytest.raises((IndexError, RuntimeError)):
                step(model, ids[:, 32:33], cache)
        result.append(torch.cat(logits, 1))
    assert apart(*result) < 1e-5


def _seeing(shown):
    """A mask of two rows for a static cache of 32 positions."""
    mask = torch.zeros(2, 1, 1, 32, dtype=torch.bool)
    mask[..., shown] = True
    return mask


@pytest.mark.contract("sparsity 0 is bit-identical")
@pytest.mark.parametrize(("name", "dtype"), [*product(RUN, DTYPES)], ids=str)
def test_sparsity_zero(name, dtype):
    """``auto`` runs the model's own forward; by the kernels dense is so within rounding."""
    kinds = {"llama", "llama-bias", "qwen2", "qwen3", "smollm3", "gemma", "olmo2", "phi3"}
    assert set(STEPS) == kinds | {"gpt2", "gpt_neox", "gpt_neox-serial"} | WINDOWS
    dense = decode(shared_model(name, dtype), IDS, PROMPT)
    for executor in ("auto", "native"):
        settings = {"method": "griffin", "sparsity": 0.0, "executor": executor}
        run, masks, logits = pruned(shared_model(name, dtype), IDS, PROMPT, **settings)
        assert masks == [] and run.report().decoded_tokens == DECODED
        assert apart(logits, dense) <= (TOLERANCE[dtype] if executor == "native" else 0)
        # windows are attended to in a cache that is laid out otherwise, whose sums may round so
        assert name in WINDOWS or torch.equal(logits[:, :PROMPT], dense[:, :PROMPT])


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "gpt2", "bloom"])
def test_generate_and_leave_nothing_behind(name):
    """Rows of neurons, and gpt2's attention by rows, lie as they did."""
    model = shared_model(name)
    down = describe(model).blocks[0].down.weight
    as_it_was = down.stride()
    laid = as_it_was if name == "gpt2" else (1, down.shape[0])  # it stores them by inputs
    with Same(model):
        with (
            contextlib.suppress(ZeroDivisionError),
            prune(model, "dart", executor="native", **REMASKS),
        ):
            generate(model, tokens(1, 70), 8)
            raise ZeroDivisionError
        run = prune(model, "griffin", sparsity=0.5, executor="native")
        for rows in (1, 3):
            with prune(model, "griffin", sparsity=0.5, executor="compact"):
                wanted = generate(model, tokens(rows, 20, seed=5), 12)
            with run:
                assert down.stride() == laid
                result = generate(model, tokens(rows, 20, seed=5), 12)
            assert down.stride() == as_it_was
            assert torch.equal(result.sequences, wanted.sequences)
            assert apart(result.logits, wanted.logits) < 1e-5


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_norms_that_change_while_attached_count_from_the_next_prompt(name):
    """The kernels read copies of what is not float32, or is one more than the weight."""
    model = tiny(name, dtype=torch.bfloat16)
    norms = [one for one in model.modules() if "Norm" in type(one).__name__]
    with prune(model, masks=picked(), executor="native"):
        before = decode(model, IDS, PROMPT)
        with torch.no_grad():
            for norm in norms:
                norm.weight.mul_(0.5)
        result = decode(model, IDS, PROMPT)
    with prune(model, masks=picked(), executor="masked"):
        expected = decode(model, IDS, PROMPT)
    assert apart(result, expected) < TOLERANCE[torch.bfloat16] < apart(before, expected)


def test_the_context_of_learned_positions_is_no_longer():
    model = shared_model("gpt2")
    with prune(model, "griffin", sparsity=0.5, executor="native"), torch.no_grad():
        output = model(tokens(1, 511), use_cache=True)
        output = model(tokens(1, 1), cache=output.cache)
        with pytest.raises(IndexError):
            model(tokens(1, 1), cache=output.cache)
        assert output.cache.get_seq_length() == 512


@pytest.mark.parametrize("name", [name for name in STEPS if "-" not in name])
def test_packed_weights_of_every_family(name, monkeypatch):
    """Whole steps on blocks are the model's own products on them; fused matrices in parts too."""
    kind, settings = CONFIGS[name]
    width = "n_inner" if name == "gpt2" else "intermediate_size"
    monkeypatch.setitem(CONFIGS, "packed", (kind, {**settings, width: 64}))
    model = tiny("packed")
    assert round_weights(model, "q8_0") == []
    rows = tokens(3, 46, seed=6)
    for ids, sparsity in ((IDS, 0.5), (rows, 0.5), (rows, 0.0)):
        result = []
        for executor in ("masked", "native"):
            run = prune(model, "griffin", sparsity=sparsity, executor=executor)
            with run:
                result.append(decode(model, ids, ids.shape[1] - DECODED))
            assert run.report().executor.startswith(executor)
        # inputs of products are rounded to 8 bits: rounding before decides between two levels
        assert apart(*result) < 5e-2


def _cropped(cache):
    cache.crop(-40)
    return 40


def _reordered(cache):
    cache.reorder_cache(torch.tensor([0]))
    return 0


def _appended(cache):
    """One more position, which the model did not write, in each layer."""
    for layer in cache.layers:
        layer.update(layer.keys[:, :, -1:], layer.values[:, :, -1:])
    return -1


@pytest.mark.parametrize(
    ("name", "change", "whole"),
    [
        *(("llama", change, False) for change in (_cropped, _reordered, _appended)),
        *(("gemma3", change, False) for change in (_reordered, _appended)),
        ("gemma3", _cropped, True),
        ("mistral", _cropped, True),
    ],
)
def test_a_changed_cache_and_a_long_one(monkeypatch, name, change, whole):
    """Room for keys and values grows, and every length is one at which it may end.

    ``whole``: a cache that keeps what a window leaves behind.
    """
    monkeypatch.setattr(growing_cache, "ROOM", 16)
    model, result = shared_model(name), []
    ids = tokens(1, 100, seed=9)
    for executor in BOTH:
        run = prune(model, "griffin", sparsity=0.5, executor=executor)
        with run, torch.no_grad():
            cache = DynamicCache() if whole else new_cache(model)
            step(model, ids[:, :20], cache)
            logits = [step(model, ids[:, at : at + 1], cache) for at in range(20, 100)]
            start = 100 - change(cache)
            logits += [
                step(model, ids[:, at - 10 : at - 9], cache) for at in range(start, start + 9)
            ]
            assert cache.get_seq_length() == start + 9
            result.append(torch.cat(logits))
        assert run.report().executor == {"native": WHOLE_STEPS}.get(executor, executor)
    assert apart(result[1], result[0]) < 1e-5


def test_a_window_goes_on_in_the_models_own_steps():
    """What a step shows is what transformers' own layers hold: keys, values and the length."""
    model, ids, caches = shared_model("gemma3"), tokens(1, 60, seed=9), []
    for executor in ("compact", "native"):
        with prune(model, "griffin", sparsity=0.5, executor=executor):
            caches.append(new_cache(model))
            step(model, ids[:, :20], caches[-1])
            for at in range(20, 40):
                step(model, ids[:, at : at + 1], caches[-1])
            step(model, ids[:, 40:45], caches[-1])  # several tokens: the model's own
            for at in range(45, 60):
                step(model, ids[:, at : at + 1], caches[-1])
    for own, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        assert own.get_seq_length() == theirs.get_seq_length() == 60
        assert apart(own.keys, theirs.keys) < 1e-5 and apart(own.values, theirs.values) < 1e-5
        assert own.get_mask_sizes(1) == theirs.get_mask_sizes(1)


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
    mask = torch.ones(1, PROMPT + DECODED, dtype=torch.int64)
    mask[0, :5] = 0
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


@pytest.fixture
def undone():
    """What is known of the build is found out anew, before and after."""
    build.why_not.cache_clear()
    yield
    build.why_not.cache_clear()


@pytest.mark.usefixtures("undone")
def test_without_a_compiler_compact_runs(monkeypatch, tmp_path, caplog):
    """Switched off; none there, which is said once; one that refuses, which is quoted."""
    model = shared_model("llama")
    monkeypatch.setenv(build.SWITCH, "0")
    build.why_not.cache_clear()
    with pytest.raises(ConfigError, match=r'DART_NATIVE=0 keeps .* off; use executor "compact"'):
        prune(model, "griffin", sparsity=0.5, executor="native")
    assert prune(model, "griffin", sparsity=0.5).executor == "compact" and not caplog.records
    monkeypatch.setenv(build.SWITCH, "1")
    monkeypatch.setenv("DART_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    build.why_not.cache_clear()
    run = prune(model, "griffin", sparsity=0.5)
    assert run.executor == run.executor == "compact"
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "no C++ compiler" in caplog.text and "slower executor compact" in caplog.text
    with pytest.raises(ConfigError, match='use executor "compact" or "auto"'):
        prune(model, "griffin", sparsity=0.5, executor="native")
    monkeypatch.delenv("CXX")
    wrong = {**build.sources(), "kernels.cpp": '#error "not today"\n'}
    monkeypatch.setattr(build, "sources", lambda: wrong)
    build.why_not.cache_clear()
    assert "not today" in build.why_not() and len(caplog.records) == 2


def test_auto_is_the_fastest_that_can_run():
    wanted = {"llama": "native", "gpt2": "native", "bloom": "native", "opt": "masked"}
    for name, executor in wanted.items():
        assert prune(shared_model(name), "griffin", sparsity=0.5).executor == executor
        assert prune(shared_model(name), "griffin", sparsity=0.0).executor in ("compact", "masked")
    half = shared_model("llama", torch.float16)
    assert prune(half, "griffin", sparsity=0.5).executor == "compact"
    rows = prune(shared_model("llama"), "griffin", sparsity=0.5, batch="per_row")
    assert rows.executor == "masked"
    for model, executor, message in (
        (half, "native", "float16, not float32 or bfloat16"),
        (shared_model("opt"), "native", "no FFN module"),
    ):
        with pytest.raises(ConfigError, match=message):
            prune(model, "griffin", sparsity=0.5, executor=executor)
    run = prune(shared_model("phi"), "griffin", sparsity=0.5)
    with run:
        assert run.patch.no_steps.startswith("is a phi model, not one of gemma, ")
        decode(run.model, IDS, PROMPT)
    assert run.report().executor == "native"
    with pytest.raises(ConfigError, match="a mask per row"):
        PruneConfig.build("griffin", executor="native", batch="per_row")


def test_transformers_own_compiling_of_a_static_cache_stays_correct():
    """``generate`` compiles the forward of an attached model on its own where there is a GPU."""
    model, ids = tiny("llama"), tokens(1, 20, seed=5)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    compiling = CompileConfig(backend="eager", mode=None)
    compiling._compile_all_devices = True
    result = []
    for more in ({}, {"cache_implementation": "static", "compile_config": compiling}):
        with prune(model, "griffin", sparsity=0.5, executor="compact") as run:
            result.append(generate(model, ids, 5, **more).sequences)
        assert run.report().achieved_sparsity == 0.5 and run.report().decoded_tokens == 4
    assert torch.equal(result[0], result[1])
