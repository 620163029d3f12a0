"""Forced mode: tokens and changes of a passage, losses, masks at known moments, Jaccard."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from dart_llm.data.passages import Topic
from dart_llm.errors import ConfigError, DartError
from dart_llm.evaluation.forced_decoding import ScheduledRun
from dart_llm.experiments.artifacts import read_masks
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.records import Remask
from dart_llm.session.run import Run
from dart_llm.studies.drift.cells import Source
from dart_llm.studies.drift.record import DriftRecorder, record, remasks, write_masks
from dart_llm.studies.drift.runs import Reading, losses, read, triggers
from drift_cases import PROMPT, THREE, TWO
from lm_cases import break_position, loaded


def source(row: dict[str, Any]) -> Source:
    topics = tuple(Topic(t["name"], t["domain"]) for t in row["topics"])
    return Source(row["id"], row["text"], topics, tuple(row["changes"]))


def reading(row: dict[str, Any] = TWO, longest: int | None = 1024) -> Reading:
    return read(source(row), loaded()[1], PROMPT, longest)


def config(method: str = "dart", **changes: Any) -> PruneConfig:
    return PruneConfig.build(method, sparsity=0.5, **changes)


def test_tokens_changes_and_pieces() -> None:
    found = reading(THREE)  # a token is a character here
    assert found.starts == (0, *(change - PROMPT for change in THREE["changes"]))
    assert "".join(found.pieces) == THREE["text"][PROMPT:]
    assert found.decoded == len(found.pieces) == len(THREE["text"]) - PROMPT
    assert found.pieces[found.starts[1]] == "g" and not found.cut
    (start,) = TWO["changes"]
    assert read(source(TWO), loaded()[1], start - 2, None).starts == (0, 2)


def test_a_passage_longer_than_the_context_is_cut() -> None:
    end = THREE["changes"][1] + 10
    found = reading(THREE, end)
    assert (len(found.ids), found.cut, found.decoded) == (end, True, end - PROMPT)
    assert "".join(found.pieces) == THREE["text"][PROMPT:end]
    before = reading(THREE, THREE["changes"][1])
    assert len(before.starts) == len(before.source.topics) == 2
    with pytest.raises(ConfigError, match=r'"two" changes its topic after the 100 tokens of the'):
        reading(TWO, 100)


def test_a_prompt_that_leaves_nothing_of_the_first_topic_is_refused() -> None:
    (start,) = TWO["changes"]
    words = f"{start} tokens before its first change .* too few for a prompt of {start - 1} and"
    with pytest.raises(ConfigError, match=f'"two" has {words} .* a smaller --prompt-tokens'):
        read(source(TWO), loaded()[1], start - 1, None)


def test_a_slow_tokenizer_gives_the_same() -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, **options: Any) -> Any:
            return {"input_ids": loaded()[1](text).input_ids}

        def decode(self, ids: list[int], **options: Any) -> str:
            return str(loaded()[1].decode(ids, **options))

    found, same = read(source(THREE), Slow(), PROMPT, None), reading(THREE)
    assert (found.starts, found.pieces) == (same.starts, same.pieces)
    assert torch.equal(found.ids, same.ids)


def test_dense_losses_are_those_of_one_forward() -> None:
    model, found = loaded()[0], reading()
    own = losses(model, None, found)
    with torch.inference_mode():
        logits = model(found.ids[None]).logits[0].float()
    direct = cross_entropy(logits[:-1], found.ids[1:], reduction="none")[PROMPT:]
    assert own[0] is None and len(own) == found.decoded
    assert own[1:] == pytest.approx(direct.tolist(), abs=2e-5)


def step_by_step(run: Run, model: Any, found: Reading) -> list[float]:
    """One decode forward per token, and whatever the run does between them."""
    kept = []
    with torch.inference_mode():
        output = model(found.ids[None, :PROMPT], use_cache=True)
        for place in range(PROMPT, len(found.ids) - 1):
            run.tokens_until_change()
            with run.decoding():
                output = model(found.ids[None, place : place + 1], cache=output.cache)
            kept.append(float(cross_entropy(output.logits[0, -1:], found.ids[None, place + 1])))
    return kept


@pytest.mark.parametrize("method", ["never", "interval 40", "paper", "published", "timed"])
def test_pruned_losses_are_those_of_single_steps(method: str) -> None:
    model, found = loaded()[0], reading()
    own = {
        "timed": config(drift="never", remask={"observe_tokens": 12}),
        "published": config("published"),
    }.get(method) or config(drift={"rule": method, "min_distance": 0})

    def make() -> Run:
        due = triggers(found, 12, 30)
        return ScheduledRun(model, own, due) if method == "timed" else Run(model, own)

    with make() as run:
        fast = losses(model, run, found)
        masks = [(r.step, r.cause, r.kept) for r in run.remasks]
    with make() as run:
        slow = step_by_step(run, model, found)
        assert [(r.step, r.cause, r.kept) for r in run.remasks] == masks
    assert fast[1:] == pytest.approx(slow, abs=2e-5)
    dense = losses(model, None, found)
    assert fast[1:] != pytest.approx(dense[1:], abs=0.01)


@pytest.mark.parametrize(("observed", "moment"), [(1, 30), (16, 30), (30, 30), (1, 1)])
def test_masks_are_new_at_the_moment_after_every_change(observed: int, moment: int) -> None:
    model, found = loaded()[0], reading(THREE)
    due = triggers(found, observed, moment)
    assert due == [start + moment - observed for start in found.starts[1:]]
    own = config(drift="never", remask={"evidence": "fresh", "observe_tokens": observed})
    with ScheduledRun(model, own, due) as run:
        losses(model, run, found)
    assert [(r.step, r.cause) for r in run.remasks] == [
        (0, "first"),
        *((start + moment, "forced") for start in found.starts[1:]),
    ]
    assert [r.evidence_tokens for r in run.remasks] == [PROMPT, observed, observed]
    report = run.report()
    assert (report.remasks, report.remask_causes) == (2, {"first": 1, "forced": 2})
    assert report.dense_token_share == pytest.approx(2 * observed / (found.decoded - 1))


def test_a_topic_that_is_too_short_for_the_moment_keeps_its_masks() -> None:
    found = reading(THREE)
    last = found.decoded - found.starts[2]
    assert triggers(found, 4, last) == [found.starts[1] + last - 4]
    assert triggers(found, 4, 10**6) == []


def test_a_moment_before_the_first_masks_changes_nothing() -> None:
    model, found = loaded()[0], reading()
    own = config(drift="never", min_evidence=PROMPT + 20)
    with ScheduledRun(model, own, [5, 10]) as run:
        fast = losses(model, run, found)
    with Run(model, own) as run:
        # processors multiply float32 in different orders
        assert losses(model, run, found)[1:] == pytest.approx(fast[1:], abs=3e-5)
    assert [(r.step, r.cause) for r in run.remasks] == [(20, "first")]


def test_a_loss_that_is_not_finite_names_the_passage() -> None:
    model = break_position(copy.deepcopy(loaded()[0]), PROMPT + 20)
    with pytest.raises(
        DartError, match=r"^the passage two: the loss of its token \d+ is the first"
    ):
        losses(model, None, reading())


def test_jaccard_left_and_joined_per_layer() -> None:
    recorder = DriftRecorder()
    masks = [{0: [0, 1, 2], 1: [5, 6]}, {0: [2, 3, 4], 1: [5, 6]}, {0: [2, 3, 4]}]
    for number, ids in enumerate(masks):
        kept = tuple(len(ids.get(layer, range(8))) for layer in range(2))
        recorder.remasks.append(Remask(0, None, 10 * number, "drift", 1.0, kept, None))
        recorder.observed.append(number)
        for layer, own in ids.items():
            recorder.tensors[f"remask{number}.layer{layer}.ids"] = torch.tensor(own).int()
    first, second, third = remasks(recorder, [8, 8])
    assert (first["jaccard"], first["left"], first["joined"]) == (None, None, None)
    assert (second["jaccard"], second["left"], second["joined"]) == ([0.2, 1.0], [2, 0], [2, 0])
    assert third["jaccard"] == [1.0, 0.25]  # the second layer runs dense now: all 8 neurons
    assert (third["left"], third["joined"], third["kept"]) == ([0, 0], [0, 6], [3, 8])
    assert [m["observed"] for m in (first, second, third)] == [0, 1, 2]


def test_the_record_of_a_run_and_its_masks(tmp_path) -> None:
    model, found, recorder = loaded()[0], reading(), DriftRecorder()
    own = config(drift={"rule": "interval 50", "min_distance": 0, "max_dense_share": None})
    run = Run(model, own)
    run.on_selection = recorder
    with run:
        losses(model, run, found)
    kept = record(run, recorder, [48] * 4)
    assert [m["step"] for m in kept["remasks"]] == [r.step for r in run.remasks] and kept["remasks"]
    assert [m["observed"] for m in kept["remasks"]] == [0, 32, 32, 32, 32]
    assert kept["accounting"]["remasks"] == 4 and "sequences" not in kept["accounting"]
    old, new = (
        {k: set(recorder.tensors[f"remask{n}.layer{k}.ids"].tolist()) for k in range(4)}
        for n in (0, 1)
    )
    assert kept["remasks"][1]["jaccard"] == [
        len(old[k] & new[k]) / len(old[k] | new[k]) for k in range(4)
    ]
    path = tmp_path / "masks" / "a.safetensors"
    write_masks(path, recorder, "tiny", "interval:50@0.5")
    newest = read_masks(str(path))
    assert {layer: ids.tolist() for layer, ids in newest.items()} == {
        layer: ids.tolist() for layer, ids in run.masks().items()
    }


@pytest.mark.parametrize(
    ("changes", "dense_from"),
    [
        ({"drift": {"rule": "never"}}, None),
        ({"drift": {"rule": "never"}, "release_step": 90}, 90),
        ({"drift": {"rule": "interval 325", "min_distance": 0, "max_dense_share": None}}, 325),
    ],
)
def test_where_pruning_ended_is_kept(changes: dict[str, Any], dense_from: int | None) -> None:
    found, recorder = reading(), DriftRecorder()
    run = Run(loaded()[0], config(**changes))
    run.on_selection = recorder
    with run:
        losses(loaded()[0], run, found)
    kept = record(run, recorder, [48] * 4)
    decoded = found.decoded - 1  # the last token is never fed
    assert [mask["step"] for mask in kept["remasks"]] == [0]
    assert kept["dense_from"] == dense_from
    dense = 0 if dense_from is None else decoded - dense_from
    assert kept["accounting"]["dense_token_share"] == pytest.approx(dense / decoded)
