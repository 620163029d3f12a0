"""What token-level selection is said to cost, by hand, and what its doors say of it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from dart_llm.data import texts
from dart_llm.errors import ConfigError
from dart_llm.evaluation.likelihood import score_context
from dart_llm.evaluation.perplexity import score, slices
from dart_llm.experiments.artifacts import MaskRecorder, read_masks, write_masks
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.records import add_dense, merge_reports
from dart_llm.reporting.words import bytes_sentence
from dart_llm.session.prepare import PreparedMethod as Candidate
from dart_llm.session.run import prune
from dart_llm.studies.drift.record import DriftRecorder, record
from dart_llm.studies.generate.report import report_table
from steps import decode, new_cache, shared_model, step
from tiny import tokens
from token_cases import LEARNT, PLAIN

L, I, D, K = 4, 48, 32, 12  # noqa: E741 - the method's own names
DENSE_FLOPS, DENSE_BYTES = L * I * 3 * D * 2, L * I * 3 * D * 4
PROXY_FLOPS = L * I * (2 * 2 * D + 6)
"""Gate and up of every neuron, and 6 comparisons to rank it."""
PROXY_BYTES = L * I * (2 * (D // 2 + 2) + 4)
"""Half a byte per weight, one group of 32 with a scale per row; 4 for norm(w)."""
SORT = L * I * 6
"""One mask is built: its scores are sorted."""


def _report(
    executor: str = "auto",
    rows: int = 1,
    count: int = 5,
    method: PruneConfig = PLAIN,
    **settings: Any,
):
    model, ids = shared_model("llama-bias"), tokens(rows, 12 + count)
    run = prune(model, method, sparsity=0.75, executor=executor, **settings)
    with run:
        decode(model, ids, 12)
    return run.report()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("executor", ["native", "slim"])
def test_the_native_kernels_read_a_tokens_winners_where_they_lie(executor: str) -> None:
    report, n = _report(executor), 5
    flops, moved = DENSE_FLOPS * K / I + PROXY_FLOPS, DENSE_BYTES * K / I + PROXY_BYTES
    assert report.executor == executor and report.achieved_sparsity == 0.75
    assert report.ffn_flops_share == pytest.approx((n * flops + SORT) / (n * DENSE_FLOPS))
    assert report.ffn_bytes_share == pytest.approx(moved / DENSE_BYTES)
    assert report.proxy_flops_share == pytest.approx(PROXY_FLOPS / DENSE_FLOPS)
    assert report.proxy_bytes_share == pytest.approx(PROXY_BYTES / DENSE_BYTES)
    once = (DENSE_BYTES * K / I + PROXY_BYTES) / DENSE_BYTES
    assert report.ffn_bytes_share_if_compact == pytest.approx(once)
    assert report.ffn_flops_share_if_compact == pytest.approx(report.ffn_flops_share)
    limit = 1 / (1 - report.ffn_share_of_bytes * (0.75 - report.proxy_bytes_share))
    assert report.bytes_limit == pytest.approx(limit)
    assert f"at most {limit:.2f} x faster" in bytes_sentence(report.to_dict())


@pytest.mark.parametrize("executor", ["masked", "compact"])
def test_the_others_compute_all_and_the_copies_on_top(executor: str) -> None:
    report, n = _report(executor), 5
    assert report.executor == executor
    assert report.ffn_bytes_share == pytest.approx(1 + PROXY_BYTES / DENSE_BYTES)
    wanted = 1 + PROXY_FLOPS / DENSE_FLOPS + SORT / (n * DENSE_FLOPS)
    assert report.ffn_flops_share == pytest.approx(wanted)
    assert report.ffn_bytes_share_if_compact == pytest.approx(K / I + PROXY_BYTES / DENSE_BYTES)


def test_a_batch_runs_dense_and_could_read_each_rows_winners() -> None:
    report = _report(rows=3)
    assert report.ffn_bytes_share == pytest.approx(1 + PROXY_BYTES / DENSE_BYTES)
    once = 3 * K / I + PROXY_BYTES / DENSE_BYTES
    assert report.ffn_bytes_share_if_compact == pytest.approx(once)
    flops = K / I + PROXY_FLOPS / DENSE_FLOPS + SORT / (15 * DENSE_FLOPS)
    assert report.ffn_flops_share_if_compact == pytest.approx(flops)
    assert _report(rows=5).ffn_bytes_share_if_compact == pytest.approx(
        1 + PROXY_BYTES / DENSE_BYTES
    ), "at most all"


def test_candidates_are_the_neurons_that_cost() -> None:
    report = _report(token={"candidates": 0.5, "bits": 8, "group": 12})
    each = 2 * (D + 2 * 3) + 4  # three groups of 12, the last of 8
    assert report.proxy_bytes_share == pytest.approx(L * 24 * each / DENSE_BYTES)
    assert report.proxy_flops_share == pytest.approx(L * 24 * (4 * D + 5) / DENSE_FLOPS)


def test_compensation_reads_the_down_projection_once() -> None:
    plain, report = _report(), _report(compensation=True)
    more = (report.ffn_bytes_share - plain.ffn_bytes_share) * 5 * DENSE_BYTES
    assert more == pytest.approx(L * I * D * 4)
    preset = _report(method=LEARNT)  # what it learnt costs nothing more per token
    assert preset.ffn_bytes_share == pytest.approx(report.ffn_bytes_share)
    assert preset.proxy_bytes_share == plain.proxy_bytes_share


def test_plain_ffns_copy_fc_alone() -> None:
    model, ids = shared_model("gpt2"), tokens(1, 15)
    with prune(model, LEARNT, sparsity=0.75) as run:
        decode(model, ids, 12)
    dense = L * I * 2 * D * 4
    assert run.report().proxy_bytes_share == pytest.approx(L * I * (D // 2 + 2 + 4) / dense)


def test_dense_tokens_have_no_copies_to_read() -> None:
    report = _report(masking_step=2)
    assert report.dense_token_share == pytest.approx(0.4)
    assert report.proxy_bytes_share == pytest.approx(0.6 * PROXY_BYTES / DENSE_BYTES)


def test_tokens_of_a_known_text_count_as_steps() -> None:
    model, ids = shared_model("llama-bias"), tokens(1, 17)
    with prune(model, LEARNT, sparsity=0.75) as run, run.decoding():
        cache = new_cache(model)
        step(model, ids[:, :12], cache)
        step(model, ids[:, 12:], cache)
    single = _report(method=LEARNT)
    assert run.report().ffn_bytes_share == pytest.approx(single.ffn_bytes_share)
    assert run.report().proxy_bytes_share == pytest.approx(single.proxy_bytes_share)


def test_errors_stand_beside_a_gaussians() -> None:
    report = _report()
    assert report.proxy_error == pytest.approx(report.proxy_error_gaussian, rel=0.03)
    assert 0.08 < report.proxy_error < 0.12, "tiny models have Gaussian weights"
    assert _report(token={"bits": 8}).proxy_error < 0.01
    model = shared_model("llama-bias")
    with prune(model, "griffin", sparsity=0.75) as run:
        decode(model, tokens(1, 14), 12)
    plain = run.report()
    assert plain.proxy_error is None and plain.proxy_error_gaussian is None
    assert plain.proxy_flops_share == plain.proxy_bytes_share == 0


def test_merged_reports_weigh_the_copies() -> None:
    one, two = _report().to_dict(), _report(masking_step=2, count=15).to_dict()
    merged = merge_reports([one, two])
    share = (5 * one["proxy_bytes_share"] + 15 * two["proxy_bytes_share"]) / 20
    assert merged["proxy_bytes_share"] == pytest.approx(share)
    assert merged["proxy_error"] == one["proxy_error"]
    more = add_dense(merged, 20)
    assert more["proxy_bytes_share"] == pytest.approx(share / 2)
    saved = more["achieved_sparsity"] - more["proxy_bytes_share"]
    assert more["bytes_limit"] == pytest.approx(1 / (1 - more["ffn_share_of_bytes"] * saved))


@pytest.mark.usefixtures("native")
def test_what_a_native_token_holds() -> None:
    """Copies, norms, and a bias per layer; masks count for themselves (test_token_select.py)."""
    model = shared_model("llama-bias")
    with prune(model, LEARNT, sparsity=0.75, executor="native") as run:
        decode(model, tokens(1, 14), 12)
        assert run.patch is not None
        held = run.patch.nbytes()
    assert held == PROXY_BYTES + L * D * 4


# doors


def test_files_of_a_run_hold_counts_and_scores_and_say_why(tmp_path: Any) -> None:
    model, recorder = shared_model("llama-bias"), MaskRecorder()
    run = prune(model, LEARNT, sparsity=0.75)
    run.on_selection = recorder
    with run:
        decode(model, tokens(1, 14), 12)
    write_masks(tmp_path, recorder, run, "tiny")
    found = json.loads((tmp_path / "masks.json").read_text())
    assert [remask["kept"] for remask in found["remasks"]] == [[K] * L]
    assert "no sequence mask" in found["note"]
    assert sorted(recorder.tensors) == [f"remask0.layer{layer}.scores" for layer in range(L)]
    with pytest.raises(ConfigError, match="chooses for every token leaves none"):
        read_masks(str(tmp_path / "masks.safetensors"))


def test_a_calibrated_score_chooses_the_candidates() -> None:
    """Held masks, as a calibrating method has them, carry candidates and counts."""
    model = shared_model("llama-bias")
    with prune(model, LEARNT, sparsity=0.75, token={"candidates": 0.5}) as run:
        step(model, tokens(1, 20, seed=4), new_cache(model))
        held = run.select()
    candidate = Candidate(model, None, run.config, held=held)
    again = candidate.run()
    assert again is not None
    with again:
        decode(model, tokens(1, 14), 12)
    report = again.report()
    assert report.achieved_sparsity == 0.75 and report.remask_causes == {"given": 1}
    assert report.proxy_bytes_share == pytest.approx(PROXY_BYTES / DENSE_BYTES / 2)


def test_drift_studies_record_counts_and_no_overlap() -> None:
    model, recorder = shared_model("llama-bias"), DriftRecorder()
    run = prune(model, LEARNT, sparsity=0.75, drift="interval 2")
    run.on_selection = recorder
    with run:
        decode(model, tokens(1, 20), 12)
    found = record(run, recorder, [I] * L)["remasks"]
    assert len(found) == 3 and all(one["kept"] == [K] * L for one in found)
    assert [one["jaccard"] for one in found] == [one["left"] for one in found] == [None] * 3


@pytest.mark.parametrize("protocol", ["decode", "full", "published"])
def test_likelihoods_under_every_protocol(protocol: str) -> None:
    """decode: the last context token and the continuation choose their own neurons."""
    model = shared_model("llama-bias")
    context, after = tokens(1, 20)[0].tolist(), tokens(1, 4, seed=2)[0].tolist()
    run = prune(model, LEARNT, sparsity=0.75)
    with run:
        (found,), reports = score_context(model, run, context, [after], protocol)
    (dense,), _ = score_context(model, None, context, [after], protocol)
    assert abs(found.logprob - dense.logprob) > 1e-3
    assert all(report["achieved_sparsity"] == 0.75 for report in reports if report)
    if protocol == "decode":
        with prune(model, LEARNT, sparsity=0.75):
            logits = decode(model, torch.tensor([context + after[:-1]]), 19)[0, 19:]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(after), reduction="none")
        assert found.losses == pytest.approx(losses.tolist(), abs=1e-4)


def test_tables_show_the_copies_apart() -> None:
    def cells(report: dict[str, Any]) -> dict[str, str]:
        table = report_table(report, {})
        names, values = (list(column.cells) for column in table.columns)
        return {str(name): str(value) for name, value in zip(names, values, strict=True)}

    found = cells(_report().to_dict())
    assert found["of the bytes, low-bit copies"] == f"{PROXY_BYTES / DENSE_BYTES:.3f}"
    assert (
        found["of the FLOPs, low-bit copies that rank neurons"]
        == f"{PROXY_FLOPS / DENSE_FLOPS:.3f}"
    )
    model = shared_model("llama-bias")
    with prune(model, "griffin", sparsity=0.75) as run:
        decode(model, tokens(1, 14), 12)
    assert not any("low-bit" in name for name in cells(run.report().to_dict()))
    assert "of it low-bit copies" in str(_report()) and "low-bit" not in str(run.report())


@pytest.mark.smollm2
def test_smollm2_at_70_percent(smollm2) -> None:
    """One slice: near dense where a sequence mask is not; the copies err as on a Gaussian."""
    model, tokenizer = smollm2
    ids = tokenizer(texts.all_text(), return_tensors="pt").input_ids[0]
    windows = slices(ids, 1, 256, 256)
    dense = score(model, None, windows, 256).perplexity
    found = {}
    for method in ("dart-token", "griffin"):
        with prune(model, method, sparsity=0.7) as run:
            found[method] = score(model, run, windows, 256).perplexity / dense
        if method == "dart-token":
            report = run.report()
    assert 1 < found["dart-token"] < 1.3 and found["griffin"] > 4
    assert report.achieved_sparsity == pytest.approx(0.7, abs=1e-3)
    assert report.dense_token_share == 0 and report.remasks == 0
    assert report.proxy_error == pytest.approx(report.proxy_error_gaussian, rel=0.1)
    row = (math.ceil(576 / 2) + 2 * 18) * 2 + 4
    assert report.proxy_bytes_share == pytest.approx(row / (3 * 576 * torch.float32.itemsize))
