"""Models with weights in blocks: masks, numbers and reports of others, but for rounded inputs."""

import copy
import functools
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dart_llm.data import texts
from dart_llm.errors import ConfigError
from dart_llm.models.checkpoint import fingerprint
from dart_llm.models.describe import describe, weight_facts
from dart_llm.models.loading import load
from dart_llm.models.packed import PackedTensor
from dart_llm.models.packed_loading import round_weights
from dart_llm.patching.executors import native_ffn
from dart_llm.patching.executors.native_ffn import SelectionTimes
from dart_llm.pruning.accounting import Costs
from dart_llm.session.run import prune
from packed_cases import mapped
from prior_cases import SMALL as PRIOR
from steps import apart, decode, pruned, same_masks
from tiny import LAYERS, tiny, tokens

MEASURE = SelectionTimes.measure  # before the fixture that replaces it

pytestmark = pytest.mark.usefixtures("native")

ROUNDING = 3e-2
"""Of the largest logit: what four layers of inputs rounded to 8 bits make of it."""

SIZES = {"hidden_size": 64, "intermediate_size": 160}
WIDTH = 160
PROMPT, DECODED = 66, 8
IDS = tokens(1, PROMPT + DECODED, seed=3)
MODELS = (("llama", "q8_0"), ("qwen2", "q4_0"), ("gemma2", "q4_1"))


@functools.cache
def model_of(name, kind, dtype=torch.float32):
    """A tiny model, rounded; every test leaves it as it was."""
    model = tiny(name, dtype=dtype, **SIZES)
    assert round_weights(model, kind) == []
    return model


def dense_twin(model, dtype=torch.float32):
    """The same weights, dequantised."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, PackedTensor):
            module.weight = nn.Parameter(weight.dequantise().clone(), requires_grad=False)
    return twin.to(dtype)


@pytest.mark.usefixtures("dequantised_prompts")
@pytest.mark.parametrize(
    ("model", "method"), [*product(MODELS, ["griffin"]), (MODELS[0], "static")], ids=str
)
def test_only_inputs_are_rounded(model, method):
    """The dense twin has the same masks, and compact, which rounds no input, its numbers."""
    packed, settings = model_of(*model), {"method": method, "sparsity": 0.5}
    settings |= {"self_stats": PRIOR} if method == "static" else {}
    _, theirs, wanted = pruned(dense_twin(packed), IDS, PROMPT, executor="masked", **settings)
    for executor in ("masked", "compact"):
        _, masks, logits = pruned(packed, IDS, PROMPT, executor=executor, **settings)
        assert apart(logits, wanted) < ROUNDING
        assert all(same_masks(a[2], b[2]) for a, b in zip(masks, theirs, strict=True))


@pytest.mark.contract("accounting equals a count by hooks")
@pytest.mark.parametrize("executor", ["masked", "native", "native, all rows of down"])
@pytest.mark.parametrize("rows", [1, 3])
def test_bytes_of_tokens_that_choose(executor, rows, monkeypatch):
    """Gate and up once for all rows, the selected neurons of down for each row, and norms."""
    executor, _, reads_all = executor.partition(", ")
    if reads_all:
        times = SelectionTimes(1.0, 0.98)  # not worth it
        monkeypatch.setattr(SelectionTimes, "measure", lambda *_: times)
    model, ids = model_of("llama", "q4_0"), tokens(rows, PROMPT + DECODED, seed=5)
    settings = {"sparsity": 0.75, "self_stats": PRIOR, "compensation": False, "executor": executor}
    report = pruned(model, ids, PROMPT, method="dart-token", **settings)[0].report()
    skips = executor == "native" and not reads_all
    norms, ffn = LAYERS * WIDTH * 4, ffn_bytes(model)
    down = sum(block.down.weight.nbytes for block in describe(model).blocks) / ffn
    selected = 1 - down * (1 - rows / 4)
    share = selected if skips else 1.0
    assert report.ffn_bytes_share == pytest.approx(share + norms / ffn)
    compact = 1.0 if reads_all else selected
    assert report.ffn_bytes_share_if_compact == pytest.approx(compact + norms / ffn)
    assert (report.selection is not None) == (executor == "native")
    # what the rows' chosen neurons leave of gate and up, and of down where all of it is read
    wide = (1 if reads_all else 1 - down) * (1 - rows / 4)
    assert report.proxy_bytes_share == pytest.approx(wide + norms / ffn)
    several = pruned(model, ids[:, : PROMPT + 1], PROMPT, method="dart-token", **settings)[0]
    assert several.report().proxy_bytes_share == report.proxy_bytes_share


def test_how_down_rows_are_read_is_measured_once(tmp_path, monkeypatch):
    """Times are kept by machine, kernels and shapes; skipping that gains little is left."""
    monkeypatch.setenv("DART_CACHE", str(tmp_path))
    monkeypatch.setattr(native_ffn, "PROBE_S", 0.001)
    model = model_of("llama", "q4_0")
    with prune(model, "dart-token", sparsity=0.5, executor="native", self_stats=PRIOR) as run:
        downs = run.patch.layout.downs
        assert len(downs) == LAYERS
        assert run.patch.layout.selection is not None  # known before the first prompt
        first, other = MEASURE(downs, 0.5), MEASURE(downs, 0.3)
        monkeypatch.setattr(native_ffn.ops(), "selection_times", None)  # would raise
        assert MEASURE(downs, 0.5) == first and MEASURE(downs, 0.3) == other
        monkeypatch.setattr(native_ffn, "built_name", lambda: "kernels of another version")
        with pytest.raises(TypeError):
            MEASURE(downs, 0.5)
    assert min(first) > 0
    assert len(list(tmp_path.glob("dart-llm/selection/*.json"))) == 2
    assert [SelectionTimes(1.0, skip).skips for skip in (0.5, 0.9, 0.91)] == [True, True, False]
    text = str(SelectionTimes(0.714, 0.92))
    assert "reads all down rows" in text and "0.71 ms" in text and "0.92 ms" in text


def ffn_bytes(model):
    return sum(p.weight.nbytes for block in describe(model).blocks for p in block.projections)


def _copies(run):
    """Addresses of the compact weights."""
    copies = [copy for layer in run.patch.layers for copy in layer.kept._copies]
    return [matrix.parts()[0].data_ptr() for matrix in copies]


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_compact_weights_where_there_is_memory_for_them(model, monkeypatch):
    """They stay at their address for all masks, and are freed with the run.

    Without memory for them neurons are read in place, with sums in another order.
    """
    packed, before = model_of(*model), fingerprint(model_of(*model))
    results, extra = [], []
    for left in (1 << 40, native_ffn.RESERVE):
        monkeypatch.setattr(native_ffn, "available", lambda left=left: left)
        with prune(packed, method="griffin", sparsity=0.5, executor="native") as run:
            results.append(decode(packed, IDS, PROMPT))
            assert fingerprint(packed) == before
            extra.append(run.report().extra_memory_bytes)
            addresses = _copies(run)
            first = [mask.ids for mask in run.select()]
            decode(packed, tokens(1, 90, seed=9), 80)
            assert not same_masks(first, [mask.ids for mask in run.select()])
            assert _copies(run) == addresses
            assert bool(addresses) == (left > native_ffn.RESERVE)
            patch = run.patch
        assert run.report() is not None and patch.layout.room is None
        assert not any(map(mapped, addresses[:1]))
    assert apart(*results) < 1e-3
    assert 0.45 < (extra[0] - extra[1]) / ffn_bytes(packed) < 0.6


@pytest.mark.contract("masked equals compact")
def test_neurons_are_skipped_where_there_is_memory_for_a_copy(monkeypatch):
    """Without it all of down is read, and the report says so."""
    model, results, reports = model_of("llama", "q4_0"), [], []
    for left in (1 << 40, native_ffn.RESERVE):
        monkeypatch.setattr(native_ffn, "available", lambda left=left: left)
        settings = {"sparsity": 0.5, "self_stats": PRIOR, "executor": "native"}
        with prune(model, "dart-token", **settings) as run:
            results.append(decode(model, IDS, PROMPT))
            reports.append(run.report())
    skipping, reading = reports
    assert apart(*results) < 1e-3
    assert "no memory for a copy" in reading.selection and "skips" in skipping.selection
    assert skipping.ffn_bytes_share < reading.ffn_bytes_share
    down = sum(block.down.weight.nbytes for block in describe(model).blocks)
    copied = skipping.extra_memory_bytes - reading.extra_memory_bytes
    assert copied == pytest.approx(down, rel=0.2)  # rows are padded


@pytest.mark.contract("exact restore")
def test_a_copied_model_is_not_touched_by_runs_on_the_first():
    """Nor the first by runs on the copy, in whatever order these end."""
    model = model_of("llama", "q8_0")
    other = copy.deepcopy(model)
    with prune(model, sparsity=0.5, method="dart-token", self_stats=PRIOR, executor="native"):
        wanted = decode(model, IDS, PROMPT)
        run = prune(other, sparsity=0.5, method="griffin", executor="native").attach()
        pruned_copy = decode(other, IDS, PROMPT)
        assert torch.equal(decode(model, IDS, PROMPT), wanted)
    assert torch.equal(decode(other, IDS, PROMPT), pruned_copy)
    run.detach()
    for each in (model, other):
        packed = [t for t in each.parameters() if isinstance(t, PackedTensor)]
        assert {t.matrix.order() for t in packed} == {"tiles"}
    assert torch.equal(decode(model, IDS, PROMPT), decode(other, IDS, PROMPT))


@pytest.mark.contract("accounting equals a count by hooks")
@pytest.mark.parametrize("kind", ["q8_0", "q4_1"])
def test_bytes_are_those_of_the_blocks(kind):
    model = model_of("llama", kind)
    view, ffn = describe(model), ffn_bytes(model)
    run = prune(model, "griffin", sparsity=0.5)
    costs = Costs(run.layers, view.parameter_bytes)
    inputs = model.get_input_embeddings().weight.nbytes
    assert view.parameter_bytes == sum(weight.nbytes for weight in model.parameters()) - inputs
    assert costs.bytes(None) == ffn < 0.3 * 3 * LAYERS * 64 * WIDTH * 4
    for keep in (1, 33, 80, 159, 160):
        share = costs.bytes([keep] * LAYERS) / costs.bytes(None)
        assert share == pytest.approx(keep / WIDTH, abs=1e-4)
    with run:
        decode(model, IDS, PROMPT)
    report = run.report()
    assert report.ffn_share_of_bytes == pytest.approx(ffn / view.parameter_bytes)
    assert report.ffn_bytes_share == pytest.approx(0.5, abs=0.02)


@pytest.mark.usefixtures("dequantised_prompts")
def test_a_layer_of_which_a_part_is_dense():
    """The kernels leave such a layer to compact."""
    model = tiny("llama", hidden_size=64, intermediate_size=96)
    assert round_weights(model, "q8_0") == []
    for layer, other in zip(model.model.layers, dense_twin(model).model.layers, strict=True):
        layer.mlp.down_proj.weight = other.mlp.down_proj.weight
    wanted = decode(dense_twin(model), IDS, PROMPT)
    assert apart(decode(model, IDS, PROMPT), wanted) < ROUNDING
    run, _, logits = pruned(model, IDS, PROMPT, sparsity=0.5)
    _, _, wanted = pruned(dense_twin(model), IDS, PROMPT, sparsity=0.5)
    assert run.report().executor == "compact" and apart(logits, wanted) < ROUNDING
    with pytest.raises(ConfigError, match="layer 0 has both quantized and other"):
        prune(model, "griffin", sparsity=0.5, executor="native")


def test_what_is_made_of_it_is_dense(tmp_path):
    """A narrower checkpoint is that of the dense twin."""
    model = model_of("llama", "q8_0")
    twin = dense_twin(model)
    assert weight_facts(model)["weight_bytes"] == sum(one.nbytes for one in model.parameters())
    for one, folder in ((model, tmp_path / "a"), (twin, tmp_path / "b")):
        with prune(one, masks=dict.fromkeys(range(LAYERS), range(0, WIDTH, 2))) as run:
            run.export(folder)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.smollm2
@torch.no_grad()
def test_the_default_model_in_its_own_blocks(smollm2):
    """Against its weights dequantised, float32: a prompt, then tokens one by one."""
    exact, tokenizer = smollm2
    model, _ = load()
    assert isinstance(model.lm_head.weight, PackedTensor) and model.dtype == torch.bfloat16
    ids = tokenizer(texts.all_text(), return_tensors="pt").input_ids[:, :128]
    wanted, modules = exact(ids).logits.log_softmax(-1), decode(model, ids, 96)
    with prune(model, "dense", executor="native") as run:
        steps = decode(model, ids, 96)[:, 96:]
    assert run.report().executor == "native, whole steps"
    for logits, theirs, alike in (
        (modules[:, :96], wanted[:, :96], 0.93),
        (modules[:, 96:], wanted[:, 96:], 0.9),
        (steps, wanted[:, 96:], 0.9),
    ):
        ours = logits.float().log_softmax(-1)
        assert float((theirs.exp() * (theirs - ours)).sum(-1).mean()) < 0.01
        assert float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()) > alike
