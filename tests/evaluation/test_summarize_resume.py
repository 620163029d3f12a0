"""``summarize``: finished documents are never summarised again, and resuming changes nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dart_llm.evaluation import summarization as summary_parts
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.summarization import measure
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.prepare import PreparedMethod as Candidate
from dart_llm.session.run import prune
from summary_cases import OPTIONS, Both, Kept, candidate, load_writer, run, write_documents


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Both:
    return load_writer(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_documents(tmp_path_factory.mktemp("data") / "four.jsonl")


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The prompt lengths of all texts that were generated."""
    made: list[int] = []
    real = summary_parts.generate

    def counted(model: Any, tokenizer: Any, ids: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(ids.shape[1])
        return real(model, tokenizer, ids, *args, **kwargs)

    monkeypatch.setattr(summary_parts, "generate", counted)
    return made


@pytest.mark.parametrize("method", [None, "griffin", "dart"])
@pytest.mark.parametrize("protocol", ["decode", "full"])
def test_a_finished_measurement_computes_nothing_again(loaded, data, calls, method, protocol):
    parts, options = Kept(), MeasureOptions(max_output=12, protocol=protocol)
    first = run(candidate(loaded, method), data, options, parts)
    assert len(calls) == 4
    again = run(candidate(loaded, method), data, options, parts)
    assert len(calls) == 4
    assert again == first and again.to_dict() == first.to_dict()
    assert all(map(torch.equal, again.counts, first.counts))


@pytest.mark.contract("resume gives the same bytes")
@pytest.mark.parametrize("method", [None, "griffin", "dart"])
def test_a_resumed_measurement_equals_an_uninterrupted_one(loaded, data, calls, method):
    parts, done = Kept(), []

    def advance(n: int) -> None:
        done.append(n)
        if len(done) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        measure(candidate(loaded, method), data, OPTIONS, parts, advance)
    assert (len(calls), len(parts.parts)) == (2, 2)
    resumed = measure(candidate(loaded, method), data, OPTIONS, parts, done.append)
    assert (len(calls), sum(done)) == (4, 6)
    whole = run(candidate(loaded, method), data)
    assert resumed == whole
    assert json.dumps(resumed.to_dict()) == json.dumps(whole.to_dict())
    assert all(map(torch.equal, resumed.counts, whole.counts))


def test_nothing_is_reused_where_the_value_would_differ(loaded, data, calls):
    parts = Kept()
    for found, options in (
        (candidate(loaded), OPTIONS),
        (candidate(loaded), MeasureOptions(max_output=13)),
        (candidate(loaded, "griffin"), OPTIONS),
        (candidate(loaded, "griffin"), MeasureOptions(max_output=12, protocol="full")),
        (candidate(loaded, "griffin", executor="masked"), OPTIONS),
        (candidate(loaded, "random"), OPTIONS),
        (candidate(loaded, "random", seed=1), OPTIONS),
        (Candidate(*loaded, PruneConfig.build("dart"), masks={0: [1, 2]}), OPTIONS),
        (Candidate(*loaded, PruneConfig.build("dart"), masks={0: [1, 3]}), OPTIONS),
    ):
        before = len(calls)
        run(found, data, options, parts)
        assert len(calls) == before + 4


@pytest.mark.parametrize("protocol", ["decode", "full"])
def test_masks_held_from_calibration_serve_every_document(loaded, data, protocol, calls):
    model, tokenizer = loaded
    options, parts = MeasureOptions(max_output=12, protocol=protocol), Kept()
    config = PruneConfig.build("griffin", sparsity=0.5)
    for text in ("one two three", "zebras & quails"):
        with prune(model, config) as chooser, torch.inference_mode():
            model(tokenizer(text, return_tensors="pt").input_ids)
            held = chooser.select()
        measured = run(Candidate(*loaded, config, held=held), data, options, parts)
        assert measured.accounting is not None
        assert measured.accounting["sparsity_while_pruned"] == pytest.approx(0.5)
        assert measured.accounting["remask_causes"] == {"given": 4}
        kept = [mask.ids.tolist() for mask in held if mask is not None]
        assert [(layer == 4).nonzero().flatten().tolist() for layer in measured.counts] == kept
    assert len(calls) == 8
