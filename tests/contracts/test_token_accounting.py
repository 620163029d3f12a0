"""What token-level selection is said to cost, by hand, and what its doors say of it."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from dart_llm.data import texts
from dart_llm.errors import ConfigError
from dart_llm.evaluation.perplexity import score, slices
from dart_llm.experiments.artifacts import MaskRecorder, read_masks, write_masks
from dart_llm.reporting.words import bytes_sentence
from dart_llm.session.run import prune
from dart_llm.studies.drift.runs import remask_records
from steps import decode, pruned, shared_model
from tiny import tokens
from token_cases import LEARNT, PLAIN

L, I, D, K = 4, 48, 32, 12  # noqa: E741 - the method's own names
DENSE_BYTES = L * I * 3 * D * 4
PROXY_BYTES = L * I * (2 * (D // 2 + 2) + 4)
"""Half a byte per weight, one group of 32 with a scale per row; 4 for norm(w)."""
BYTES = PROXY_BYTES / DENSE_BYTES


def _run(rows=1, count=5, name="llama-bias", **settings):
    given = {"method": PLAIN, "sparsity": 0.75, **settings}
    return pruned(shared_model(name), tokens(rows, 12 + count), 12, **given)[0]


def _report(*arguments, **settings):
    return _run(*arguments, **settings).report()


@pytest.mark.contract("accounting equals a count by hooks")
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("executor", ["native", "masked", "compact"])
def test_what_a_token_costs(executor):
    """The native kernels read a token's winners where they lie; the others compute all neurons."""
    report = _report(executor=executor)
    share = K / I if executor == "native" else 1
    assert report.executor.startswith(executor) and report.achieved_sparsity == 0.75
    assert report.ffn_bytes_share == pytest.approx(share + BYTES)
    assert report.proxy_bytes_share == pytest.approx(BYTES)
    assert report.ffn_bytes_share_if_compact == pytest.approx(K / I + BYTES)
    limit = 1 / (1 - report.ffn_share_of_bytes * (0.75 - report.proxy_bytes_share))
    assert report.bytes_limit == pytest.approx(limit)
    assert f"at most {limit:.2f} x faster" in bytes_sentence(report.to_dict())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("executor", ["native", "compact"])
def test_a_batch_reads_each_rows_winners_or_runs_dense(executor):
    report = _report(rows=3, executor=executor)
    share = 3 * K / I if executor == "native" else 1
    assert report.executor.startswith(executor)
    assert report.ffn_bytes_share == pytest.approx(share + BYTES)
    assert report.ffn_bytes_share_if_compact == pytest.approx(3 * K / I + BYTES)
    most = _report(rows=5, executor=executor)
    assert most.ffn_bytes_share_if_compact == pytest.approx(1 + BYTES), "at most all"


def test_which_copies_are_read():
    """Of candidates alone, of fc alone in plain FFNs, and none while tokens run dense."""
    report = _report(token={"candidates": 0.5, "bits": 8, "group": 12})
    each = 2 * (D + 2 * 3) + 4  # three groups of 12, the last of 8
    assert report.proxy_bytes_share == pytest.approx(L * 24 * each / DENSE_BYTES)
    plain = _report(name="gpt2", method=LEARNT, count=3)
    fc = L * I * (D // 2 + 2 + 4) / (L * I * 2 * D * 4)
    assert plain.proxy_bytes_share == pytest.approx(fc)
    report = _report(masking_step=2)
    assert report.dense_token_share == pytest.approx(0.4)
    assert report.proxy_bytes_share == pytest.approx(0.6 * BYTES)


def test_compensation_reads_the_down_projection_once():
    plain, report = _report(), _report(compensation=True)
    more = (report.ffn_bytes_share - plain.ffn_bytes_share) * 5 * DENSE_BYTES
    assert more == pytest.approx(L * I * D * 4)
    preset = _report(method=LEARNT)  # what it learnt costs nothing more per token
    assert preset.ffn_bytes_share == pytest.approx(report.ffn_bytes_share)
    assert preset.proxy_bytes_share == plain.proxy_bytes_share


# doors


def test_files_and_drift_studies_hold_counts_and_say_why_no_masks(tmp_path):
    masks = MaskRecorder()
    run = prune(shared_model("llama-bias"), LEARNT, sparsity=0.75)
    run.on_selection = masks
    with run:
        decode(run.model, tokens(1, 20), 12)
    write_masks(tmp_path, masks, run, "tiny")
    found = json.loads((tmp_path / "masks.json").read_text())
    assert [remask["kept"] for remask in found["remasks"]] == [[K] * L]
    assert "no sequence mask" in found["note"]
    with pytest.raises(ConfigError, match="chooses for every token leaves none"):
        read_masks(str(tmp_path / "masks.safetensors"))
    other = tmp_path / "other.safetensors"
    save_file({"blk.0.ids": torch.zeros(1), "remask0.layer0": torch.zeros(1)}, other)
    with pytest.raises(ConfigError, match=r"holds no masks; expected keys like remask0\.layer3"):
        read_masks(str(other))
    found = remask_records(masks, [I] * L)
    assert [(one["kept"], one["jaccard"]) for one in found] == [([K] * L, None)]


@pytest.mark.smollm2
def test_smollm2_at_70_percent(smollm2):
    """One slice: near dense where a sequence mask is not; the copies err as on a Gaussian."""
    model, tokenizer = smollm2
    ids = tokenizer(texts.all_text(), return_tensors="pt").input_ids[0]
    windows = slices(ids, 1, 256, 256)
    dense = score(model, None, windows, 256).perplexity
    with prune(model, "dart-token", sparsity=0.7) as run:
        assert 1 < score(model, run, windows, 256).perplexity / dense < 1.3
    report = run.report()
    assert report.achieved_sparsity == pytest.approx(0.7, abs=1e-3)
    assert report.dense_token_share == 0 and report.remasks == 0
    assert report.proxy_error == pytest.approx(report.proxy_error_gaussian, rel=0.1)
    row = (math.ceil(576 / 2) + 2 * 18) * 2 + 4
    assert report.proxy_bytes_share == pytest.approx(row / (3 * 576 * torch.float32.itemsize))
    with prune(model, "griffin", sparsity=0.7) as run:
        assert score(model, run, windows, 256).perplexity / dense > 4
