"""The page of a drift study: self-contained, small, escaped, with every number accounted for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from pathlib import Path

import pytest

import fake_drift
from dart_llm.reporting import figures
from dart_llm.studies.drift import report, summary
from dart_llm.studies.drift.view import read
from html_page import Page

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("cmcrameri")
pytest.importorskip("plotly")

SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
BLOCK = re.compile(r'<script type="application/json"[^>]*>(.*?)</script>', re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_drift.with_detection(tmp_path_factory.mktemp("drift") / "run")


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    path = report.write(folder)
    assert path == folder / "report.html"
    assert path.stat().st_size < 8_000_000
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> str:
    methods = ("dense", "never", "dart")
    folder = fake_drift.build(tmp_path_factory.mktemp("free") / "run", ("a",), methods, mode="free")
    return report.write(folder).read_text(encoding="utf-8")


def page(html: str) -> Page:
    """Without the contents of its scripts."""
    return Page(BLOCK.sub("", SCRIPT.sub("", html)))


def test_one_script_is_allowed_and_it_is_plotly(html: str) -> None:
    (script,) = SCRIPT.findall(html)
    assert script == figures.script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in page(html).attributes("meta") if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}'; " in policy
    assert html.count("Plotly, Inc.") == script.count("Plotly, Inc.")  # one copy


def test_nothing_is_fetched(html: str, free: str) -> None:
    for text in (html, free):
        rest = SCRIPT.sub("", text)
        assert "http://" not in rest and "https://" not in rest and "@import" not in rest
        for _, attributes in page(text).seen:
            assert not any(name.startswith("on") for name in attributes)
            assert all(
                str(attributes.get(k, "data:")).startswith("data:") for k in ("src", "srcset")
            )
            assert str(attributes.get("href") or "#").startswith("#")


def test_every_block_is_json(html: str) -> None:
    blocks = BLOCK.findall(html)
    assert len(blocks) > 20
    assert all(isinstance(json.loads(block), dict) for block in blocks)
    assert not any("<" in block for block in blocks)


def test_everything_is_on_the_page(html: str) -> None:
    text = page(html).text
    wanted = [
        "Knowledge drift on SmolLM2-135M-Instruct", "Methods compared", "Similarity over time",
        "Masks, before and after", "Detection of the change", "Tokens of the passages",
        "How it was run",
    ]  # fmt: skip
    places = [text.index(words) for words in wanted]
    assert places == sorted(places)


def test_numbers_stand_beside_their_accounting(folder: Path, html: str) -> None:
    view = read(folder)
    row = page(html).row("dart@0.5")
    assert row == [*summary.table(view.summary, "").cells()[3]]
    assert row[1:4] == ["48.1%", "3.8%", "1.0"]
    text = page(html).text.replace("\xa0", " ")
    assert summary.sentence(view.summary) in text
    lost = view.lines[2]["loss"]["after_minus_dense"]["mean"]
    assert f"{lost:.2f} nats" in text


def test_masks_are_told(html: str) -> None:
    row = page(html).row("passage 01, dart@0.5", "240")
    assert row[2:5] == ["drift", "double-entry bookkeeping, token 48", "32"]
    assert row[7] == f"{fake_drift.LAYERS * fake_drift.WIDTH // 2:,}"


def test_tokens_carry_the_losses_of_every_method(folder: Path) -> None:
    passages, more = report.passage_texts(read(folder))
    assert len(passages) == 4 and not more
    data = json.loads(passages[0].data)
    assert data["pieces"][1] == " <i>&" and "<" not in passages[0].data
    assert list(data["losses"]) == ["never@0.5", "published@0.5", "dart@0.5", "dense"]
    wanted = [round(loss, 2) for loss in fake_drift.losses("01", "dart")]
    assert data["losses"]["dart@0.5"] == pytest.approx(wanted, abs=0.011)
    assert data["topics"][1] == {"name": "double-entry bookkeeping", "start": fake_drift.FIRST}
    assert passages[0].methods[0][1].endswith("dense, 0 re-masks")
    few, more = report.passage_texts(read(folder), room=1)
    assert len(few) == 1 and more


def test_free_texts_stand_side_by_side(free: str) -> None:
    assert "<script>alert" not in SCRIPT.sub("", free)
    assert "A ledger &lt;script&gt;alert(1)&lt;/script&gt; balances." in free
    text = page(free).text
    assert "Tell me of a & <tides>" in text
    for words in ("416 decoded tokens", "rougeL 0.", "3.8 % of the decoded tokens dense"):
        assert words in text
    places = [free.index(f"<article><h3>{name}") for name in ("dense", "never@0.5", "dart@0.5")]
    assert places == sorted(places)


def test_bars_curves_and_overlap_are_images(html: str) -> None:
    alts = [str(attributes["alt"]) for attributes in page(html).attributes("img")]
    assert [alt.partition(":")[0] for alt in alts[:5]] == ["Bars", "Lines", *["Heat map"] * 3]


def test_without_plotly_the_pictures_are_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    monkeypatch.setattr(figures, "render", lambda plot, kind, narrow=False: plot.name.encode())
    text = report.render(read(folder))
    found = page(text)
    assert len(found.attributes("img")) == 8 + 2  # three of overlap
    assert "needs plotly, which is not installed" in found.text
    assert not SCRIPT.search(text) and "script-src" not in text
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = page(report.render(read(folder)))
    assert not found.attributes("img")
    assert "No plots: this needs matplotlib" in found.text


@pytest.mark.parametrize("lines", [None, "", "{broken\n", '{"key": "x"}\n'])
def test_a_damaged_folder_still_has_a_page(tmp_path: Path, lines: str | None) -> None:
    folder = fake_drift.build(tmp_path / "run", ("01",), ("dense",), status="interrupted")
    (folder / "results.jsonl").unlink()
    if lines is not None:
        (folder / "results.jsonl").write_text(lines, encoding="utf-8")
    text = page(report.write(folder).read_text("utf-8")).text
    assert "Nothing was measured." in text and "This run is interrupted." in text
    assert ("results.jsonl" in text.split("Nothing was")[0]) == bool(lines)


def test_failed_cells_are_named(tmp_path: Path) -> None:
    folder = fake_drift.build(tmp_path / "run", ("01",), ("dense", "dart"))
    rows = [json.loads(x) for x in (folder / "results.jsonl").read_text("utf-8").splitlines()]
    rows[1] |= {"status": "failed", "error": "no <memory>", "remasks": [], "checks": []}
    (folder / "results.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = page(report.write(folder).read_text("utf-8")).text
    assert "forced/01/dart@0.5/0: no <memory>" in text
    assert "1 done, 1 failed" in text
