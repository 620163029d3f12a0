"""A drift folder is read whole, and what is damaged costs only what it held."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

import fake_drift
from dart_llm.errors import ResultsError
from dart_llm.files import write_json
from dart_llm.studies.drift import view as drift_view
from dart_llm.studies.drift.view import DriftCell, DriftView, Masks
from dart_llm.studies.drift.view import MaskSpan as Period
from fake_drift import FIRST, SECOND

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_drift.build(tmp_path_factory.mktemp("drift") / "run")


@pytest.fixture(scope="module")
def view(folder: Path) -> DriftView:
    return drift_view.read(folder)


def cell(view: DriftView, label: str, source: str = "01") -> DriftCell:
    return next(c for c in view.of(label) if c.source == source)


def test_everything_is_read(view: DriftView) -> None:
    assert view.problems == ()
    assert len(view.cells) == len(view.done) == 16
    assert view.labels == ("dense", "never@0.5", "published@0.5", "dart@0.5")
    dart = cell(view, "dart@0.5")
    assert dart.placed_topics == [
        ("tides", 0, FIRST),
        ("double-entry bookkeeping", FIRST, FIRST + SECOND),
    ]
    assert dart.changes == (FIRST,)
    assert len(dart.pieces) == len(dart.losses) == dart.decoded_tokens == FIRST + SECOND
    assert dart.checks == tuple(fake_drift.checks("01", "dart"))
    assert [(m.step, m.cause, m.observed) for m in dart.remasks] == [
        (0, "first", 0),
        (FIRST + 48, "drift", 16),
    ]
    assert view.dense_of(dart) is cell(view, "dense")
    assert view.summary["rows"][3]["loss"]["after"]["n"] == 4


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("results.jsonl", None, ""),
        (
            "results.jsonl",
            "{half",
            "results.jsonl: 1 line left out, no JSON objects; the first is line 1",
        ),
        ("results.jsonl", "[]\n7\n", "results.jsonl: 2 lines left out"),
        ("results.jsonl", '{"key": "x"}\n', "The cell x of results.jsonl lacks what it needs"),
        ("tokens.jsonl", "{half", "tokens.jsonl: 1 line left out"),
        ("tokens.jsonl", b"\xff", "tokens.jsonl cannot be read as UTF-8 text"),
        ("config.json", "{half", "config.json is not JSON"),
        ("detection.json", "[]", "detection.json is not what"),
        ("masks/forced-01-dart@0.5-0.safetensors", "x", "masks/forced-01-dart@0.5-0.safetensors"),
    ],
)
def test_a_broken_file_is_one_sentence(
    tmp_path: Path, name: str, content: str | bytes | None, words: str
) -> None:
    folder = fake_drift.build(tmp_path / "run", ("01",))
    path = folder / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = drift_view.read(folder)
    assert len(found.problems) == bool(words)
    assert not words or found.problems[0].startswith(words)


def test_a_line_being_written_and_a_failed_cell(tmp_path: Path) -> None:
    folder = fake_drift.build(tmp_path / "run", ("01",))
    lines = (folder / "results.jsonl").read_text("utf-8").splitlines()
    failed = {**json.loads(lines[3]), "status": "failed", "error": "no memory"}
    for name in ("checks", "remasks", "accounting", "loss", "decoded_tokens"):
        failed[name] = None
    text = "\n".join([*lines[:3], json.dumps(failed), lines[0][:100]])
    (folder / "results.jsonl").write_text(text, encoding="utf-8")
    found = drift_view.read(folder)
    assert [c.status for c in found.cells] == ["done", "done", "done", "failed"]
    assert found.cells[3].error == "no memory"
    assert found.problems == (
        "results.jsonl: 1 line left out, no JSON objects; the first is line 5.",
    )
    assert found.summary["rows"][3]["failed"] == 1


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="is not a results folder: give the folder"):
        drift_view.read(tmp_path / "nowhere")
    write_json(tmp_path / "config.json", {"kind": "sweep"})
    with pytest.raises(ResultsError, match="holds results of `dart-llm sweep`"):
        drift_view.read(tmp_path)


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    folder = fake_drift.build(tmp_path / "run", ("01",), ("dart",))
    key = fake_drift.key("forced", "01", "dart", 0)
    own = fake_drift.masks("01", "dart", 0, fake_drift.LAYERS, fake_drift.WIDTH)
    fake_drift.save_masks(folder, key, [own[0], [ids[1:] for ids in own[1]]])
    found = drift_view.read(folder)
    assert found.problems[0].endswith("speaks of: they are not shown.")
    assert found.cells[0].masks is None
    fake_drift.save_masks(folder, key, own, width=8)
    with pytest.raises(ResultsError, match="keep neurons beyond the 8 of layer 0: run the cell"):
        drift_view.read_masks(drift_view.read(folder).cells[0])


def test_masks_and_their_overlap(view: DriftView) -> None:
    dart = cell(view, "dart@0.5", "02")
    masks = drift_view.read_masks(dart)
    assert masks is not None and masks.steps == (0, FIRST + 48)
    own = fake_drift.masks("02", "dart", 0, fake_drift.LAYERS, fake_drift.WIDTH)
    for number in (0, 1):
        kept = [np.flatnonzero(live[number]).tolist() for live in masks.live]
        assert kept == own[number]
    expected = [len({*a} & {*b}) / len({*a} | {*b}) for a, b in zip(*own, strict=True)]
    assert drift_view.overlap(masks)[:, 1] == pytest.approx(expected)
    assert drift_view.overlap(masks)[:, 1] == pytest.approx(dart.remasks[1].jaccard)
    assert drift_view.overlap(masks)[:, 0].tolist() == [1.0] * fake_drift.LAYERS
    assert drift_view.chance(masks) == pytest.approx(1 / 3)  # half of each layer is kept
    flow = drift_view.flow(masks, 0, 1)
    both = sum(len({*a} & {*b}) for a, b in zip(*own, strict=True))
    half, total = fake_drift.LAYERS * fake_drift.WIDTH // 2, fake_drift.LAYERS * fake_drift.WIDTH
    counts = (flow.kept, flow.left, flow.joined, flow.out)
    assert counts == (both, half - both, half - both, total - 2 * half + both)
    assert drift_view.moved(masks) == int(np.argmin(expected))


def test_degenerate_masks() -> None:
    empty, full = np.zeros(4, dtype=np.bool_), np.ones(4, dtype=np.bool_)
    assert drift_view.jaccard(empty, empty) == 1.0
    assert drift_view.jaccard(empty, full) == 0.0
    same = Masks((0, 5), (np.stack([full, full]),))
    assert drift_view.flow(same, 0, 1).share_kept == 1.0
    assert drift_view.chance(same) == 1.0
    nothing = drift_view.flow(Masks((0, 5), (np.stack([empty, empty]),)), 0, 1)
    assert (nothing.share_kept, nothing.out) == (0.0, 4)


def test_periods_and_topics_of_masks(view: DriftView) -> None:
    end = FIRST + SECOND
    assert drift_view.periods(cell(view, "dart@0.5")) == [
        Period(0, 220, 0),  # the trigger's window ended there
        Period(220, 224, None),
        Period(224, FIRST + 48, None),
        Period(FIRST + 48, end, 1),
    ]
    assert drift_view.periods(cell(view, "never@0.5")) == [Period(0, end, 0)]
    released = cell(view, "never@0.5").model_copy(update={"dense_from": 100})
    assert drift_view.periods(released) == [Period(0, 100, 0), Period(100, end, None)]
    assert drift_view.periods(cell(view, "dense")) == [Period(0, end, None)]
    topics = ("tides", "double-entry bookkeeping")
    for label, masks in (("dart@0.5", [0, 1]), ("never@0.5", [0, 0]), ("dense", [])):
        assert drift_view.columns(cell(view, label)) == list(zip(topics, masks, strict=False))


def test_loss_around_the_change(view: DriftView) -> None:
    found = drift_view.around(view)
    assert list(found) == ["never@0.5", "published@0.5", "dart@0.5"]
    points = {point.start: point for point in found["dart@0.5"]}
    assert sorted(points) == list(range(-128, 224 - 15, 16))  # 224 tokens of the second topic
    for start in (-16, 0, 48):
        place = FIRST + start
        values = [
            fmean(
                fake_drift.losses(source, "dart")[n] - fake_drift.losses(source, "dense")[n]
                for n in range(place, place + 16)
            )
            for source in ("01", "02", "03", "04")
        ]
        assert points[start].value == pytest.approx(fmean(values), abs=1e-4)
        interval = points[start].interval
        assert interval is not None and interval.low <= fmean(values) <= interval.high
        assert points[start].n == 4


def test_without_dense_or_losses_there_is_no_curve(tmp_path: Path) -> None:
    alone = drift_view.read(fake_drift.build(tmp_path / "one", ("01",), ("dart",)))
    assert drift_view.around(alone) == {}
    folder = fake_drift.build(tmp_path / "two", ("01",))
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / "tokens.jsonl").read_text("utf-8").splitlines()
    ]
    for row in rows:
        row["losses"][FIRST + 5] = None  # its bin is left out, the others stay
    (folder / "tokens.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = drift_view.around(drift_view.read(folder))["dart@0.5"]
    starts = [point.start for point in found]
    assert 0 not in starts and {-16, 16} <= set(starts)
    assert all(point.interval is None and point.n == 1 for point in found)
