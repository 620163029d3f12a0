"""Traces: what they say ran is what ran, and others can read them."""

import contextlib
import json

import numpy as np
import pytest
import torch
from pandas import DataFrame
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dart_llm import read_trace
from dart_llm.errors import AttachError, ConfigError, ResultsError
from dart_llm.models.describe import describe
from dart_llm.session.run import prune
from dart_llm.session.trace import COLUMNS, PHASES
from steps import Same, apart, decode, generate, new_cache, selections, shared_model, step
from tiny import LAYERS, WIDTH, tokens
from token_cases import PLAIN, before_down

PROMPT = 10
IDS = tokens(1, 26, seed=4)
HALF = {"method": "griffin", "sparsity": 0.5}
OFTEN = {**HALF, "drift": {"rule": "interval 4", "min_distance": 0, "max_dense_share": None}}
OFTEN |= {"remask": {"observe_tokens": 2}, "compensation": False}
TOKENS = {"method": PLAIN, "sparsity": 0.6}


def traced(path, model, ids=IDS, **settings):
    """Decode ids and read the trace; also the run and its logits."""
    with prune(model, **settings) as run, run.trace(path):
        logits = decode(model, ids, PROMPT)
    return read_trace(path), run, logits


def dense_but_for(model, trace, ids=IDS):
    """Logits of decoding ids where the neurons that the trace leaves out are 0, by hooks."""
    fed, masks = dict.fromkeys(range(LAYERS), 0), trace.arrays["mask"].tolist()

    def keep(layer, _, u):
        rows = []
        for row in u.reshape(-1, u.shape[-1]):
            kept = torch.from_numpy(trace.neurons(masks[fed[layer]], layer))
            rows.append(row * torch.zeros_like(row).index_fill(0, kept, 1))
            fed[layer] += 1
        return torch.stack(rows).reshape(u.shape)

    with before_down(model, None, keep):
        return decode(model, ids, PROMPT)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("executor", ["masked", "compact", "native"])
@pytest.mark.parametrize("settings", [{**HALF, "compensation": False}, OFTEN, TOKENS])
def test_the_neurons_of_a_trace_are_those_that_ran(settings, executor, tmp_path):
    """Zeroed by hand in the dense model, the others give the logits of the run."""
    model = shared_model()
    trace, run, logits = traced(tmp_path / "a", model, **settings, executor=executor)
    report = run.report()
    assert report.executor == trace.facts["executor"] and report.executor.startswith(executor)
    assert apart(logits, dense_but_for(model, trace)) < 1e-5
    assert apart(logits, decode(model, IDS, PROMPT)) > 1e-3
    kept = sum(len(row["neurons"]) for row in trace.rows() if row["phase"] != "prefill")
    share = kept / (report.decoded_tokens * LAYERS * WIDTH)
    assert 1 - share == pytest.approx(report.achieved_sparsity)


def test_masks_of_the_sequence_stand_once_per_remask(tmp_path):
    """With what grew and was dropped, as sets say it."""
    model = shared_model()
    with prune(model, **OFTEN) as run, run.trace(tmp_path / "a"):
        result = selections(run)
        decode(model, IDS, PROMPT)
    trace = read_trace(tmp_path / "a")
    assert [remask["step"] for remask in trace.remasks] == [0, 6, 12] == [s for s, *_ in result]
    assert trace.arrays["masks"].shape == (3, LAYERS * WIDTH // 8)
    before, table = [{*range(WIDTH)}] * LAYERS, list(trace.remask_rows())
    places = [(number, layer) for number in range(3) for layer in range(LAYERS)]
    assert [(row["remask"], row["layer"]) for row in table] == places
    for (number, layer), row in zip(places, table, strict=True):
        now = {*result[number][2][layer].tolist()}
        assert trace.neurons(number, layer).tolist() == sorted(now)
        assert row["grown"].tolist() == sorted(now - before[layer])
        assert row["dropped"].tolist() == sorted(before[layer] - now)
        before[layer] = now
    phases = [PHASES[phase] for phase in trace.arrays["phase"]]
    assert phases == ["prefill"] * 10 + (["pruned"] * 4 + ["observe"] * 2) * 2 + ["pruned"] * 4
    masks = [-1] * 10 + [0] * 4 + [-1] * 2 + [1] * 4 + [-1] * 2 + [2] * 4
    assert trace.arrays["mask"].tolist() == masks
    assert trace.arrays["token_id"].tolist() == IDS[0].tolist()
    assert trace.arrays["position"].tolist() == [*range(26)]
    assert run.report().remasks == 2


def test_rows_of_a_batch_with_masks_each(tmp_path):
    """Padding and what follows the end of a row are no tokens."""
    model, ids = shared_model(), tokens(2, 12, seed=5)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with prune(model, batch="per_row", **HALF) as run, run.trace(tmp_path / "a"):
        result = selections(run)
        generate(model, ids, 6, attention_mask=mask)
    trace = read_trace(tmp_path / "a")
    rows = trace.arrays["row"]
    assert [int((rows == row).sum()) for row in (0, 1)] == [9 + 5, 12 + 5]
    kept = {row: masks for _, row, masks in result}
    for row, number in zip(rows, trace.arrays["mask"], strict=True):
        for layer in range(LAYERS if number >= 0 else 0):
            assert trace.neurons(number, layer).tolist() == kept[row][layer].tolist()
    assert {remask["row"]: remask["mask"] for remask in trace.remasks} == {0: 0, 1: 1}
    assert trace.stayed.all()


@pytest.mark.parametrize("settings", [HALF, TOKENS], ids=["masks", "tokens"])
def test_candidates_that_were_taken_back(settings, tmp_path):
    """What stayed is the text, also where several tokens were decoded at once."""
    model, ids = shared_model(), tokens(1, 12, seed=5).repeat(1, 2)
    with prune(model, **settings) as run, run.trace(tmp_path / "a"):
        made = generate(model, ids, 20, prompt_lookup_num_tokens=4).sequences[0]
    trace = read_trace(tmp_path / "a")
    fed = trace.arrays["token_id"][trace.stayed].tolist()
    assert fed == made[: len(fed)].tolist() and len(fed) in (43, 44)
    decoded = int((trace.arrays["phase"] != 0).sum())
    assert decoded == run.report().decoded_tokens
    with prune(model, **settings) as run, run.trace(tmp_path / "b"):
        decode(model, ids, 20)
        generate(model, ids[:, :15], 4)
    assert set(read_trace(tmp_path / "b").arrays["sequence"].tolist()) == {0, 1}


def test_a_cache_that_is_cut_back(tmp_path):
    model, cache = shared_model(), new_cache(shared_model())
    with prune(model, **HALF) as run, run.trace(tmp_path / "a"):
        for part in (IDS[:, :9], IDS[:, 9:10], IDS[:, 10:11]):
            step(model, part, cache)
        cache.crop(-1)
        step(model, IDS[:, 12:13], cache)
    trace = read_trace(tmp_path / "a")
    assert trace.arrays["position"].tolist() == [*range(11), 10]
    assert trace.stayed.tolist() == [True] * 10 + [False, True]


@pytest.mark.contract("exact restore")
def test_an_error_in_the_block_leaves_the_trace_and_the_model(tmp_path):
    model = shared_model()
    with (
        Same(model),
        contextlib.suppress(ZeroDivisionError),
        prune(model, executor="masked", **HALF) as run,
        run.trace(tmp_path / "a"),
    ):
        decode(model, IDS, PROMPT)
        raise ZeroDivisionError
    assert len(read_trace(tmp_path / "a").arrays["mask"]) == 26
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with prune(model, **HALF) as run:
        with run.trace(tmp_path / "b"):
            pass
        plain = decode(model, IDS, PROMPT)
    assert torch.equal(plain, traced(tmp_path / "c", model, **HALF)[2])
    assert list(read_trace(tmp_path / "b").rows()) == []


def test_what_cannot_be_traced(tmp_path):
    model, path = shared_model(), tmp_path / "a"
    run = prune(model, executor="compact", **HALF)
    with pytest.raises(AttachError, match="needs an attached run: use it inside the with block"):
        run.trace(path).__enter__()
    with run:
        with pytest.raises(ResultsError, match=r"cannot write the trace .*: its folder does not"):
            run.trace(tmp_path / "no" / "a").__enter__()
        with pytest.raises(ConfigError, match="is a folder: give the name of a file"):
            run.trace(tmp_path).__enter__()
        with run.trace(path):
            with pytest.raises(AttachError, match="is being traced already: leave"):
                run.trace(path).__enter__()
            run.detach()
            with pytest.raises(AttachError, match="is being traced: leave the trace block"):
                run.attach()
            with pytest.raises(AttachError, match="leave the trace block before resetting"):
                run.reset()
        run.attach()
        run.reset()
    with pytest.raises(ConfigError, match="this trace has no mask -1 of layer 99"):
        next(read_trace(path).rows([0, 99]))
    teal = "method teal selects inputs of matrices, not neurons"
    with prune(model, "teal", sparsity=0.5) as run, pytest.raises(ConfigError, match=teal):
        run.trace(path).__enter__()


def test_files_that_are_not_traces(tmp_path):
    path = tmp_path / "a"
    traced(path, shared_model(), **HALF)
    whole, arrays = path.read_bytes(), load_file(path)
    for data in (whole[:100], whole[:-1], b"", b"hello" * 99):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=f"cannot read the trace {path}: .*trace it again"):
            read_trace(path)
    for facts in ({"format": "dart-llm trace 9"}, None):
        save_file(arrays, path, facts)
        with pytest.raises(ConfigError, match="is not in format dart-llm trace 1: give a file"):
            read_trace(path)
    with pytest.raises(ConfigError, match="cannot read the trace nowhere: No such file"):
        read_trace("nowhere")


def test_others_read_it(tmp_path):
    """With safetensors and numpy alone; names are those of the model and of TransformerLens."""
    model, path = shared_model(), tmp_path / "a.safetensors"
    trace, *_ = traced(path, model, **OFTEN)
    arrays = load_file(path)
    with safe_open(path, "numpy") as file:
        facts = file.metadata()
    assert arrays.keys() == {*COLUMNS, "masks"}
    assert {str(arrays[name].dtype) for name in COLUMNS} == {"int32"}
    assert facts["method"] == "griffin" and facts["format"] == "dart-llm trace 1"
    layers = json.loads(facts["layers"])
    for layer, block in zip(layers, describe(model).blocks, strict=True):
        assert model.get_submodule(layer["module"]) is block.down and layer["width"] == WIDTH
        assert layer["hook"] == f"blocks.{block.index}.mlp.hook_post"
    bits = np.unpackbits(arrays["masks"], axis=1, bitorder="little").reshape(-1, LAYERS, WIDTH)
    assert bits[1, 2].nonzero()[0].tolist() == trace.neurons(1, 2).tolist()
    frame, remasks = DataFrame(trace.rows([2, 0])), DataFrame(trace.remask_rows())
    assert len(frame) == 26 * 2 and frame["layer"].tolist()[:3] == [2, 0, 2]
    each = frame[frame.phase != "prefill"].explode("neurons")
    pruned = each[(each.token == 12) & (each.layer == 2)]
    assert pruned["neurons"].tolist() == trace.neurons(0, 2).tolist()
    assert len(remasks) == 3 * LAYERS
    assert remasks["cause"].tolist()[:5] == ["first"] * 4 + ["interval"]
