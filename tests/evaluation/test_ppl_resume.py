"""An interrupted perplexity measurement resumes to the same numbers; documents of several rows."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from dart_llm.evaluation.masks_seen import count_masks, kept_flags, pack
from dart_llm.evaluation.perplexity import dense_where_pruned, document, measure_text
from dart_llm.experiments.stats import ratio_interval
from dart_llm.pruning.masks import LayerMask
from dart_llm.session.prepare import MemoryStore as Memory
from dart_llm.session.prepare import PreparedMethod as Candidate
from ppl_cases import INTERVAL, SLICES, STANDARD, TEXT, candidate, losses, measured
from ppl_cases import tokenizer as letters


class Saved(Memory):
    """Parts as a file keeps them: as JSON text."""

    def part(self, key: str) -> Any:
        found = super().part(key)
        return None if found is None else json.loads(found)

    def save_part(self, key: str, value: Any) -> None:
        super().save_part(key, json.dumps(value, allow_nan=False))


def stop_after(windows: int) -> Any:
    done: list[int] = []

    def advance(n: int) -> None:
        done.append(n)
        if len(done) == windows:
            raise KeyboardInterrupt

    return advance


@pytest.mark.contract("resume gives the same bytes")
@pytest.mark.parametrize(
    ("method", "protocol", "settings"),
    [
        ("dart", "decode", INTERVAL),
        ("random", "decode", {}),
        ("griffin", "full", {}),
        ("griffin", "published", {}),
        ("dart", "standard", {}),
        (None, "standard", {}),
    ],
)
def test_a_resumed_measurement_equals_an_uninterrupted_one(method, protocol, settings):
    options = replace(STANDARD if protocol == "standard" else SLICES, protocol=protocol, limit=4)
    own = candidate(method, **({} if method is None else {"sparsity": 0.5}), **settings)
    whole = measure_text(own, "a text", TEXT, options, Memory(), lambda n: None)
    saved = Saved()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measure_text(own, "a text", TEXT, options, saved, stop_after(2))
    assert len(saved.parts) == 2, "a finished window is not computed again"
    resumed = measure_text(own, "a text", TEXT, options, saved, lambda n: None)
    assert len(saved.parts) == 4
    assert resumed.to_dict() == whole.to_dict()
    assert json.dumps(resumed.to_dict()) == json.dumps(whole.to_dict())
    assert resumed.samples == whole.samples and resumed.masks == whole.masks
    assert len(resumed.counts) == len(whole.counts) == (0 if method is None else 4)
    assert all(torch.equal(a, b) for a, b in zip(resumed.counts, whole.counts, strict=True))


def test_parts_serve_only_what_they_were_computed_for():
    parts = Memory()

    def keys(own: Candidate, text: str = TEXT, **changes: Any) -> int:
        before = len(parts.parts)
        measure_text(own, "t", text, replace(SLICES, **changes), parts, lambda n: None)
        return len(parts.parts) - before

    griffin = candidate("griffin", sparsity=0.5)
    assert keys(griffin) == 3 and keys(griffin) == 0
    assert keys(candidate("griffin", sparsity=0.4)) == 3
    assert keys(candidate("griffin", sparsity=0.5, compensation=True)) == 3
    assert keys(replace(griffin, masks={0: [1, 2, 3]})) == 3
    assert keys(replace(griffin, masks={0: [1, 2, 4]})) == 3
    assert keys(candidate()) == 3
    assert keys(griffin, protocol="full") == 3
    assert keys(griffin, TEXT[::-1]) == 3
    assert keys(griffin, prompt_tokens=41) == 3
    assert keys(griffin, limit=2) == 0, "the first and the last slice are among the three"


def test_held_masks_are_used_and_counted_once_per_slice():
    own = candidate("griffin", sparsity=0.5)
    with own.run() as run, torch.no_grad():
        own.model(letters("some other text").input_ids)
        held = run.select()
    own = replace(own, held=held)
    for protocol in ("decode", "full"):
        options = replace(SLICES, protocol=protocol)
        found = measure_text(own, "t", TEXT, options, Memory(), lambda n: None)
        assert found.masks == 3 and found.metrics["pruned_tokens"] == 90
        for kept, mask in zip(found.counts, held, strict=True):
            assert kept.nonzero().flatten().tolist() == mask.ids.tolist()
            assert int(kept.max()) == 3


def test_masks_survive_packing():
    masks = (LayerMask(torch.tensor([0, 3, 8, 18]), 19), None, LayerMask(torch.tensor([7]), 8))
    packed = json.loads(json.dumps(pack(masks)))
    assert packed[1] is None
    assert kept_flags(packed[0]).nonzero().flatten().tolist() == [0, 3, 8, 18]
    counts, total = count_masks([{"masks": [packed, packed]}, {"masks": [pack((masks[0], None))]}])
    assert total == 3
    assert [len(layer) for layer in counts] == [19, 0, 8]
    assert counts[0][[0, 1, 18]].tolist() == [3, 0, 3] and counts[2].tolist() == 7 * [0] + [2]
    assert count_masks([]) == ((), 0)


def test_a_document_compares_on_all_tokens_and_on_those_that_ran_pruned():
    dense, pruned = measured(None, STANDARD), measured("griffin", STANDARD, sparsity=0.5)
    rows = [("dense", dense), ("griffin@0.5", pruned)]
    found = document(rows, "a text", {"window": 100, "stride": 100}, ratio_interval)
    first, second = found["rows"]
    assert (found["protocol"], found["slices"], found["window"]) == ("standard", 10, 100)
    assert (first["method"], first["ratio_to_dense"], first["interval"]) == ("dense", 1.0, None)
    assert (second["method"], second["sparsity"]) == ("griffin", 0.5)
    assert second["perplexity"] == pytest.approx(pruned.metrics["perplexity"])
    assert second["pruned_tokens"] == 9 * 99 and second["tokens"] == 990
    ratio = pruned.metrics["perplexity"] / dense.metrics["perplexity"]
    assert second["ratio_to_dense"] == pytest.approx(ratio)
    assert second["interval"][0] <= ratio <= second["interval"][1]
    same = [loss for sample in dense.samples[1:] for loss in sample["losses"]]
    assert second["dense_perplexity_pruned_tokens"] == pytest.approx(
        torch.tensor(same).double().mean().exp().item()
    )
    assert dense_where_pruned(dense, dense) is None
    assert found["losses"]["griffin@0.5"][3] == pruned.samples[3]["losses"]


def test_losses_are_kept_to_six_decimals_and_metrics_follow_from_them():
    found = measured("griffin", sparsity=0.5)
    assert losses(found) == [round(loss, 6) for loss in losses(found)]
    assert found.metrics["mean_loss"] == pytest.approx(sum(losses(found)) / 90, abs=1e-12)
