"""Pictures and page of a run: the folder's numbers, escaped, in one file that asks nobody."""

import base64
import json
import re
import sys
from dataclasses import replace
from importlib import resources

import pytest

from dart_llm.errors import MissingExtra, ResultsError
from dart_llm.experiments.store import read
from dart_llm.reporting import figures
from dart_llm.studies.generate import plots, report
from fake_results import PROMPT, drift_checks, kept_counts, perplexity, write_results
from html_page import Page

pytest.importorskip("matplotlib")
pytest.importorskip("cmcrameri")

PICTURES = {
    "kept_neurons": "masks.json",
    "similarity": "drift.csv",
    "perplexity": "perplexity.json",
    "time_per_token": "timing.json",
}
"""Pictures, and the file that each needs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("results") / "run")


@pytest.fixture(scope="module")
def view(folder):
    return read(folder)


def drawn(view, name, narrow=False):
    """The first axes of one plot."""
    from matplotlib.figure import Figure

    plot = next(plot for plot in plots.available(view) if plot.name == name)
    figure = Figure()
    with figures._style() as palette:
        plot.draw(figure, palette, narrow)
    return figure.axes[0]


def words(axes):
    return [text.get_text() for text in axes.texts]


def labels(axes):
    return list(axes.get_legend_handles_labels()[1])


# The pictures.


def test_every_picture_is_written(folder, view, tmp_path):
    paths = plots.write_all(folder)
    names = [path.relative_to(folder).as_posix() for path in paths]
    assert names == [f"plots/{name}.png" for name in PICTURES]
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") == 1600  # pixels wide: 8 inches at 200
    for plot in plots.available(view):
        svg = figures.render(plot, "svg", narrow=True)
        assert len(svg) < 150_000
        assert not any(word in svg for word in (b"<script", b"matplotlib.org", b"@import"))
    config = {**view.config, "checkpoint": {"name": "a$\\frac$b_{c"}}  # no mathematics
    plot = plots.available(replace(view, config=config))[0]
    assert figures.render(plot, "png").startswith(b"\x89PNG")
    assert plots.write_all(tmp_path) == [] == list(tmp_path.iterdir())
    for write in (plots.write_all, report.write):
        with pytest.raises(ResultsError, match="is not a results folder: give the folder"):
            write(tmp_path / "nowhere")


@pytest.mark.parametrize("package", ["matplotlib", "cmcrameri"])
def test_a_missing_package_is_one_sentence(folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"needs {package}.*'dart-llm\[plots\]'"):
        plots.write_all(folder)
    page = Page(report.render(read(folder)))
    assert page.attributes("img") == []
    assert f"No plots: this needs {package}, which is not installed" in page.text
    assert page.row("dart", "50 %")[5] == "37.00"


def test_kept_neurons(view):
    axes = drawn(view, "kept_neurons")
    heights = [bar.get_height() for bar in axes.patches[:30]]
    assert heights == pytest.approx([100 * kept / 1536 for kept in kept_counts()])
    assert labels(axes) == ["spread evenly: 50 %", "all 3 masks (re-masks keep the counts)"]
    other = {**view.remasks[2], "kept": [800] * 30}
    axes = drawn(replace(view, remasks=(*view.remasks[:2], other)), "kept_neurons")
    assert {"first mask (step 12)", "last mask (step 286, drift)"} <= set(labels(axes))


def test_similarity(view):
    axes = drawn(view, "similarity")
    counts = {line.get_label(): len(line.get_xdata()) for line in axes.lines}
    marks = ("low window", "trigger", "held: guards put it off", "arming: no threshold yet")
    assert [counts[name] for name in marks] == [4, 2, 1, 4]
    total = sum(counts[name] for name in counts if not str(name).startswith(("_", "thr")))
    assert total == len(drift_checks())
    assert words(axes) == ["first", "drift", "drift"] and "dense, observing" in labels(axes)
    checks = [replace(c, sequence=s, trigger=False) for s in range(6) for c in drift_checks()]
    checks += [replace(drift_checks()[-1], sequence=9, trigger=True)]
    shown = replace(view, drift=tuple(checks))
    titles = [a.get_title(loc="right") for a in drawn(shown, "similarity").figure.axes]
    assert titles == [f"sequence {number}, row 0" for number in (0, 1, 2, 9)]
    assert "4 of 7 sequences shown" in plots.available(shown)[1].small
    masks = tuple({**view.remasks[0], "step": step} for step in range(0, 400, 10))
    axes = drawn(replace(view, remasks=masks), "similarity")
    assert words(axes) == [] and "40 masks" in labels(axes)


def test_perplexity_bars_and_times(view):
    axes = drawn(view, "perplexity")
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert ends == pytest.approx([17.62, 17.62 * 1.08, 17.62 * 2.1, 17.62 * 2.52])
    assert axes.get_xscale() == "log"
    assert words(axes) == ["17.6", "19.0  (x 1.08)", "37.0  (x 2.10)", "44.4  (x 2.52)"]
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert names == ["dense", "dart 20 %", "dart 50 %", "griffin 50 %"]
    whiskers = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "|"]
    interval = view.perplexity[0]["rows"][2]["interval"]
    assert whiskers[2] == pytest.approx([17.62 * end for end in interval])
    hatches = [bar.get_hatch() for bar in axes.patches]
    assert hatches[1] == hatches[2] != hatches[3]  # methods differ without colours
    axes = drawn(view, "time_per_token")
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([54.2, 44.5])
    assert labels(axes) == ["least that the bytes read allow: 40.2 ms"]
    assert words(axes) == ["54.2 ms", "44.5 ms"]
    for low, high, ticks in (
        (10.0, 60.0, [10, 20, 50]),
        (15.0, 70.0, [20, 30, 40, 50, 60, 70]),
        (17.0, 19.0, [17, 18, 19]),
        (10.0, 1e9, [10.0**power for power in range(1, 10)]),
    ):
        assert figures._log_ticks(low, high, 9) == pytest.approx(ticks)


# The page.


@pytest.fixture(scope="module")
def html(view):
    return report.render(view)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_page_tells_the_run(html, page):
    text = page.text.replace("\xa0", " ")
    for fact in (
        "dart at 50 % on SmolLM2-135M-Instruct",
        "2026-03-04 05:06:07 UTC, took 132 s",
        "dart-llm run --prompt 'Why is the sky blue? <script>' --sparsity 0.5",
        "50 % of the FFN neurons removed = 30 % fewer weight bytes read per token (at most 1.42 x "
        "faster); perplexity x 2.1 (17.6 to 37.0); for this model start at up to 20 %.",
        "400 tokens, 43.8 % of the FFN neurons removed, 2 re-masks",
        "embedded: 6 slices of 256 prompt + 256 scored tokens, protocol decode",
        "Loading took 2.5 s, the whole run 132.0 s, peak memory 1.2 GiB.",
        PROMPT,
    ):
        assert fact in text
    assert "&lt;script&gt;alert(&#39;prompt&#39;)&lt;/script&gt; &amp; &#34;quotes&#34;" in html
    assert "light &lt;b&gt;is&lt;/b&gt; bent" in html
    spans = [a for a in page.attributes("span") if a.get("title")]
    kinds = ["prefill", "observe", "pruned", "observe", "pruned", "observe", "pruned"]
    assert [span["class"] for span in spans] == kinds
    assert spans[0]["title"] == "token 0: from the prompt's last forward, dense"
    assert spans[1]["title"] == "tokens 1 to 12: dense, observed to build a mask"
    assert spans[-1]["title"] == "tokens 287 to 399: masks in force"


def test_nothing_is_asked_of_the_outside(html, page):
    assert "<script" not in html and len(html) < 3_000_000
    for _, attributes in page.seen:
        for name, value in attributes.items():
            if name in ("src", "srcset"):
                assert str(value).startswith("data:image/")
            if name == "href":
                assert str(value).startswith("#")
            assert not name.startswith("on")
    assert not any(word in html for word in ("url(", "@import", "http://", "https://"))
    policy = next(a["content"] for a in page.attributes("meta") if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    images = page.attributes("img")
    assert len(images) == len(page.attributes("source")) == 4
    for image in images:
        kind, _, data = str(image["src"]).partition(";base64,")
        assert kind == "data:image/svg+xml" and b"</svg>" in base64.b64decode(data)
    assert "dense 17.6, dart 20 % 19.0" in str(images[2]["alt"])
    tables = page.attributes("table")
    assert len(page.attributes("caption")) == len(tables) > 8
    assert all(head.get("scope") in ("col", "row") for head in page.attributes("th"))


def test_tables(page, snapshot):
    """Costs beside every number, seconds, masks, layers, and where the run comes from."""
    assert [" | ".join(row) for row in page.rows] == snapshot


HEADS = {
    "generation.jsonl": "Text, dense and pruned",
    "perplexity.json": "Perplexity",
    "masks.json": "Kept neurons per layer",
    "drift.csv": "Similarity over time",
    "timing.json": "Time",
}


@pytest.mark.parametrize("keep", ["", *HEADS])
def test_missing_files_leave_pictures_and_sections_out(tmp_path, keep):
    folder = write_results(tmp_path / "run", {"status": "interrupted", "finished": None})
    for path in folder.iterdir():
        if path.name not in (keep, "config.json"):
            path.unlink()
    allowed = [plot.name for plot in plots.available(read(folder))]
    assert allowed == [name for name, file in PICTURES.items() if file == keep]
    page = Page(report.write(folder).read_text(encoding="utf-8"))
    assert "how" in {a.get("id") for a in page.attributes("h2")}
    assert "This run is interrupted." in page.text and HEADS.get(keep, "") in page.text


def test_damaged_files_and_several_texts(tmp_path):
    folder = write_results(tmp_path / "run")
    document, second = perplexity(), {**perplexity(), "text": "wikitext2"}
    document["rows"][2] |= {"perplexity": None, "ratio_to_dense": None, "accounting": None}
    second["rows"] = [second["rows"][0], {**second["rows"][1], "sparsity": None}]
    texts = {"texts": [document, second]}
    (folder / "perplexity.json").write_text(json.dumps(texts), encoding="utf-8")
    (folder / "timing.json").write_text('{"seconds_per_token": {"dense": null}}', encoding="utf-8")
    (folder / "masks.json").write_text('{"remasks": [{"step": 3}], "layers": [{}]}', "utf-8")
    with (folder / "drift.csv").open("a", encoding="utf-8") as file:
        file.write("0,0,nonsense\n0,0,1,2,3,nan,,0,0,armed\n")
    record = {"id": "a", "variant": "pruned", "method": "dart", "sparsity": 0.3, "text": "hi <i>"}
    record |= {"tokens": ["h"], "phases": ["pruned"]}  # these are not the text
    (folder / "generation.jsonl").write_text(json.dumps(record) + '\n{"half": ', encoding="utf-8")
    html = report.write(folder).read_text(encoding="utf-8")
    assert '<div class="text">hi &lt;i&gt;</div>' in html
    page = Page(html)
    cells = ["–", "–", "–", "–", "–", "1.98 to 2.25", "3.611"]
    assert page.row("dart", "50 %")[2:] == cells
    assert "x 1.08 (17.6 to 19.0)" in page.text
    assert "wikitext2: 6 slices of 256 prompt" in page.text
    assert page.row("dart", "set by the method")[2:4] == ["20 %", "0 %"]
    assert "dart, own counts on wikitext2: perplexity x 1.08" in page.text


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_contrast_in_light_and_dark(theme):
    css = (resources.files("dart_llm.reporting") / "templates" / "report.css").read_text(
        encoding="utf-8"
    )
    block = re.findall(r":root \{(.*?)\}", css, re.S)[theme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    grounds = ["paper", "raised", "strong", "prefill", "observe", "pruned", "released"]
    pairs = [("ink", ground) for ground in grounds]
    pairs += [("soft", "paper"), ("soft", "raised"), ("accent", "raised"), ("warn", "warn-paper")]
    for front, back in pairs:
        light, dark = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)
