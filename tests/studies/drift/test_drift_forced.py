"""Forced mode: tokens and changes of a passage, losses, masks at known moments, Jaccard."""

import copy

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
from dart_llm.studies.drift.masks import DriftRecorder, record, remasks
from dart_llm.studies.drift.settings import Candidate
from dart_llm.studies.drift.sources import Source, read_passage
from dart_llm.studies.drift.study import read_losses, triggers
from drift_cases import PROMPT, THREE, TWO
from lm_cases import break_position, loaded


def source(row):
    topics = tuple(Topic(t["name"], t["domain"]) for t in row["topics"])
    return Source(row["id"], row["text"], topics, tuple(row["changes"]))


def reading(row=TWO, longest=1024):
    return read_passage(source(row), loaded()[1], PROMPT, longest)


def timed(observed, moment):
    return Candidate("decay", None, observed, moment)


def config(method="dart", **changes):
    return PruneConfig.build(method, sparsity=0.5, **changes)


def test_tokens_changes_and_pieces():
    found = reading(THREE)  # a token is a character here
    assert found.starts == (0, *(change - PROMPT for change in THREE["changes"]))
    assert "".join(found.pieces) == THREE["text"][PROMPT:]
    assert found.decoded == len(found.pieces) == len(THREE["text"]) - PROMPT
    assert found.pieces[found.starts[1]] == "g" and not found.cut
    end = THREE["changes"][1] + 10
    cut = reading(THREE, end)  # a context that ends within the last topic
    assert (len(cut.ids), cut.cut, cut.decoded) == (end, True, end - PROMPT)
    assert "".join(cut.pieces) == THREE["text"][PROMPT:end]
    before = reading(THREE, THREE["changes"][1])
    assert len(before.starts) == len(before.source.topics) == 2
    (start,) = TWO["changes"]
    assert read_passage(source(TWO), loaded()[1], start - 2, None).starts == (0, 2)
    words = f'"two" has {start} tokens before its first change .* too few for a prompt of '
    with pytest.raises(ConfigError, match=f"{words}{start - 1} .* a smaller --prompt-tokens"):
        read_passage(source(TWO), loaded()[1], start - 1, None)
    with pytest.raises(ConfigError, match=r'"two" changes its topic after the 100 tokens of the'):
        reading(TWO, 100)


def step_by_step(run, model, found):
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


@pytest.mark.parametrize("method", ["interval 40", "published", "timed"])
def test_losses_are_those_of_one_forward_and_pruned_of_single_steps(method):
    model, found = loaded()[0], reading()
    own = {
        "timed": config(drift="never", remask={"observe_tokens": 12}),
        "published": config("published"),
    }.get(method) or config(drift={"rule": method, "min_distance": 0})

    def make():
        due = triggers(found, timed(12, 30))
        return ScheduledRun(model, own, due) if method == "timed" else Run(model, own)

    with make() as run:
        fast = read_losses(model, run, found)
        masks = [(r.step, r.cause, r.kept) for r in run.remasks]
    with make() as run:
        slow = step_by_step(run, model, found)
        assert [(r.step, r.cause, r.kept) for r in run.remasks] == masks
    assert fast[1:] == pytest.approx(slow, abs=2e-5)
    dense = read_losses(model, None, found)
    assert fast[1:] != pytest.approx(dense[1:], abs=0.01)
    with torch.inference_mode():
        logits = model(found.ids[None]).logits[0].float()
    direct = cross_entropy(logits[:-1], found.ids[1:], reduction="none")[PROMPT:]
    assert dense[0] is None and len(dense) == found.decoded
    assert dense[1:] == pytest.approx(direct.tolist(), abs=2e-5)


@pytest.mark.parametrize(("observed", "moment"), [(16, 30), (30, 30), (1, 1)])
def test_masks_are_new_at_the_moment_after_every_change(observed, moment):
    model, found = loaded()[0], reading(THREE)
    due = triggers(found, timed(observed, moment))
    own = config(drift="never", remask={"evidence": "fresh", "observe_tokens": observed})
    with ScheduledRun(model, own, due) as run:
        read_losses(model, run, found)
    assert [(r.step, r.cause) for r in run.remasks] == [
        (0, "first"),
        *((start + moment, "forced") for start in found.starts[1:]),
    ]
    assert [r.evidence_tokens for r in run.remasks] == [PROMPT, observed, observed]
    report = run.report()
    assert (report.remasks, report.remask_causes) == (2, {"first": 1, "forced": 2})
    assert report.dense_token_share == pytest.approx(2 * observed / (found.decoded - 1))
    last = found.decoded - found.starts[2]  # the last topic is too short for later moments
    assert triggers(found, timed(4, last)) == [found.starts[1] + last - 4]
    assert triggers(found, timed(4, 10**6)) == []


def test_a_loss_that_is_not_finite_names_the_passage():
    model = break_position(copy.deepcopy(loaded()[0]), PROMPT + 20)
    with pytest.raises(
        DartError, match=r"^the passage two: the loss of its token \d+ is the first"
    ):
        read_losses(model, None, reading())


def test_jaccard_left_and_joined_per_layer():
    recorder = DriftRecorder()
    masks = [{0: [0, 1, 2], 1: [5, 6]}, {0: [2, 3, 4], 1: [5, 6]}, {0: [2, 3, 4]}]
    for number, ids in enumerate(masks):
        kept = tuple(len(ids.get(layer, range(8))) for layer in range(2))
        recorder.remasks.append(Remask(0, None, 10 * number, "drift", 1.0, kept, None))
        for layer, own in ids.items():
            recorder.tensors[f"remask{number}.layer{layer}.ids"] = torch.tensor(own).int()
    first, second, third = remasks(recorder, [8, 8])
    assert (first["jaccard"], first["left"], first["joined"]) == (None, None, None)
    assert (second["jaccard"], second["left"], second["joined"]) == ([0.2, 1.0], [2, 0], [2, 0])
    assert third["jaccard"] == [1.0, 0.25]  # the second layer runs dense now: all 8 neurons
    assert (third["left"], third["joined"], third["kept"]) == ([0, 0], [0, 6], [3, 8])


NEVER = {"drift": {"rule": "never"}}
FREE = {"min_distance": 0, "max_dense_share": None}


@pytest.mark.parametrize(
    ("changes", "steps", "released"),
    [
        ({**NEVER, "release_step": 90}, [0], 90),
        ({"drift": {"rule": "interval 50", **FREE}}, [0, 82, 164, 246, 328], None),
    ],
)
def test_the_record_of_a_run_its_masks_and_where_pruning_ended(changes, steps, released, tmp_path):
    found, recorder = reading(), DriftRecorder()
    run = Run(loaded()[0], config(**changes))
    run.on_selection = recorder
    with run:
        read_losses(loaded()[0], run, found)
    kept = record(run, recorder, [48] * 4)
    decoded = found.decoded - 1  # the last token is never fed
    assert [mask["step"] for mask in kept["remasks"]] == steps == [r.step for r in run.remasks]
    spans = [(start, start + 50, number) for number, start in enumerate(steps)]
    dense_spans = [(step - 32, step, None) for step in steps[1:]]
    whole = sorted([*spans[:-1], *dense_spans, (steps[-1], decoded, len(steps) - 1)])
    assert kept["spans"] == ([(0, 90, 0), (90, decoded, None)] if released else whole)
    assert kept["accounting"]["remasks"] == len(steps) - 1
    assert "sequences" not in kept["accounting"]
    dense = (decoded - released if released else 0) + 32 * (len(steps) - 1)
    assert kept["accounting"]["dense_token_share"] == pytest.approx(dense / decoded)
    recorder.write(tmp_path / "masks" / "a.safetensors", "tiny", "any")
    newest = read_masks(str(tmp_path / "masks" / "a.safetensors"))
    if released is None:
        own = {layer: ids.tolist() for layer, ids in run.masks().items()}
        assert {layer: ids.tolist() for layer, ids in newest.items()} == own
