"""The report page: the folder's numbers, escaped, in one file that asks nobody for anything."""

from __future__ import annotations

import base64
import json
import re
import sys
from importlib import resources
from pathlib import Path

import pytest

from dart_llm.errors import ResultsError
from dart_llm.studies.generate import report
from fake_results import PROMPT, perplexity, write_results
from html_page import Page

pytest.importorskip("matplotlib")
pytest.importorskip("cmcrameri")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_results(tmp_path_factory.mktemp("results") / "run")
    path = report.write(folder)
    assert path == folder / "report.html"
    assert path.stat().st_size < 3_000_000
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_head_names_the_run_and_its_checkpoint(page: Page) -> None:
    text = page.text
    assert "dart at 50 % on SmolLM2-135M-Instruct" in text
    for fact in ("43.8 % (generated text)", "Q4_K_M", "bfloat16", "ab12" * 16):
        assert fact in text
    assert "2026-03-04 05:06:07 UTC, took 132 s" in text
    assert "dart-llm run --prompt 'Why is the sky blue? <script>' --sparsity 0.5" in text


def test_conclusion_is_one_sentence_from_the_rows(page: Page) -> None:
    assert (
        "50 % of the FFN neurons removed = 30 % fewer weight bytes read per token (at most 1.42 x "
        "faster); perplexity x 2.1 (17.6 to 37.0); for this model start at up to 20 %."
    ) in page.text.replace("\xa0", " ")


def test_hostile_text_is_escaped(html: str, page: Page) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#39;prompt&#39;)&lt;/script&gt; &amp; &#34;quotes&#34;" in html
    assert "light &lt;b&gt;is&lt;/b&gt; bent" in html
    assert PROMPT in page.text
    assert page.attributes("script") == page.attributes("iframe") == []


def test_nothing_is_asked_of_the_outside(html: str, page: Page) -> None:
    for _, attributes in page.seen:
        for name, value in attributes.items():
            if name in ("src", "srcset"):
                assert str(value).startswith("data:image/")
            if name == "href":
                assert str(value).startswith("#")
            assert not name.startswith("on")
    assert "url(" not in html and "@import" not in html and "http://" not in html
    assert "https://" not in html
    policy = next(a["content"] for a in page.attributes("meta") if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")


def test_plots_are_inline_and_described(page: Page) -> None:
    images = page.attributes("img")
    assert len(images) == len(page.attributes("source")) == 4
    for image in images:
        kind, _, data = str(image["src"]).partition(";base64,")
        assert kind == "data:image/svg+xml"
        assert b"</svg>" in base64.b64decode(data)
        assert len(str(image["alt"])) > 40
    assert "dense 17.6, dart 20 % 19.0" in str(images[2]["alt"])


def test_tokens_are_tinted_by_phase(page: Page) -> None:
    spans = [a for a in page.attributes("span") if a.get("title")]
    assert [span["class"] for span in spans] == [
        *("prefill", "observe", "pruned", "observe", "pruned", "observe", "pruned")
    ]
    assert spans[0]["title"] == "token 0: from the prompt's last forward, dense"
    assert spans[1]["title"] == "tokens 1 to 12: dense, observed to build a mask"
    assert spans[-1]["title"] == "tokens 287 to 399: masks in force"
    assert "400 tokens, 43.8 % of the FFN neurons removed, 2 re-masks" in page.text


def test_accounting_table(page: Page) -> None:
    assert page.row("quantity", "generated text")[1:] == [
        "generated text",
        "dart 20 % on embedded",
        "dart 50 % on embedded",
        "griffin 50 % on embedded",
    ]
    assert page.row("achieved sparsity (dense tokens count 0)")[1:] == [
        *("43.8 %", "20 %", "50 %", "50 %")
    ]
    assert page.row("decoded tokens that ran dense")[1] == "12.5 %"
    assert page.row("sparsity while pruned")[1] == "50 %"
    assert page.row("re-masks")[1] == "2"
    assert page.row("masks built, by cause")[1] == "first 1, drift 2"
    assert page.row("FFN FLOPs over dense, as executed")[1] == "0.567"
    assert page.row("FFN bytes over dense, if compact")[1] == "0.594"
    assert page.row("memory held beside the model")[1] == "53.4 MiB"
    assert page.row("executor")[1] == "compact"


def test_perplexity_table_has_its_costs_beside_it(page: Page) -> None:
    assert page.row("dense", "0 %")[1:] == [
        *("0 %", "0 %", "100 %", "0", "17.62", "1.00", "–", "2.869")
    ]
    assert page.row("dart", "50 %")[1:] == [
        *("50 %", "50 %", "0 %", "0", "37.00", "2.10", "1.98 to 2.25", "3.611")
    ]
    assert "embedded: 6 slices of 256 prompt + 256 scored tokens, protocol decode" in page.text


def test_timing_and_masks_tables(page: Page) -> None:
    assert page.row("time per decoded token, mean (ms)")[1:] == ["54.2", "44.5", "1.22 x"]
    assert page.row("tokens per second")[1:] == ["18.5", "22.5", "1.22 x"]
    assert page.row("most that the bytes read allow")[1:] == ["–", "–", "1.35 x"]
    assert page.row("1", "0", "174") == ["1", "0", "174", "drift", "58", "23,040", "71.3 %"]
    assert "Loading took 2.5 s, the whole run 132.0 s, peak memory 1.2 GiB." in page.text


def test_settings_versions_and_machine(page: Page) -> None:
    assert page.row("score.name")[1] == "normalized"
    assert page.row("torch")[1] == "2.13.0"
    assert page.row("processor")[1] == "Fast CPU"
    assert page.row("dirty")[1] == "yes"
    assert page.row("parameters")[1] == "134,515,008"
    assert not [row for row in page.rows if row[0] == "score.ema_decay"]  # was not given


def test_every_table_has_heads_and_a_caption(page: Page) -> None:
    tables = page.attributes("table")
    assert len(page.attributes("caption")) == len(tables) > 8
    assert all(head.get("scope") in ("col", "row") for head in page.attributes("th"))


@pytest.mark.parametrize(
    "keep",
    [
        (),
        ("config.json",),
        ("generation.jsonl",),
        ("perplexity.json",),
        ("masks.json",),
        ("drift.csv",),
        ("timing.json",),
    ],
)
def test_missing_files_leave_sections_out(tmp_path: Path, keep: tuple[str, ...]) -> None:
    folder = write_results(tmp_path / "run")
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()
    page = Page(report.write(folder).read_text(encoding="utf-8"))
    heads = {
        "generation.jsonl": "Text, dense and pruned",
        "perplexity.json": "Perplexity",
        "masks.json": "Kept neurons per layer",
        "drift.csv": "Similarity over time",
        "timing.json": "Time",
    }
    ids = {a.get("id") for a in page.attributes("h2")}
    assert "how" in ids
    for file, head in heads.items():
        if file in keep:
            assert head in page.text


def test_damaged_files_are_tolerated(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "run")
    document = perplexity()
    document["rows"][2]["perplexity"] = None
    document["rows"][2]["ratio_to_dense"] = None
    document["rows"][2]["accounting"] = None
    (folder / "perplexity.json").write_text(json.dumps({"texts": [document]}), encoding="utf-8")
    (folder / "timing.json").write_text('{"seconds_per_token": {"dense": null}}', encoding="utf-8")
    (folder / "masks.json").write_text('{"remasks": [{"step": 3}], "layers": [{}]}', "utf-8")
    with (folder / "drift.csv").open("a", encoding="utf-8") as file:
        file.write("0,0,nonsense\n0,0,1,2,3,nan,,0,0,armed\n")
    with (folder / "generation.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"half": ')
    page = Page(report.write(folder).read_text(encoding="utf-8"))
    assert page.row("dart", "50 %")[1:] == [
        "50 %",
        "–",
        "–",
        "–",
        "–",
        "–",
        "1.98 to 2.25",
        "3.611",
    ]
    assert "x 1.08 (17.6 to 19.0)" in page.text


def test_several_texts_and_own_counts(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "run")
    second = perplexity()
    second["text"] = "wikitext2"
    second["rows"] = [second["rows"][0], {**second["rows"][1], "sparsity": None}]
    texts = {"texts": [perplexity(), second]}
    (folder / "perplexity.json").write_text(json.dumps(texts), encoding="utf-8")
    page = Page(report.write(folder).read_text(encoding="utf-8"))
    assert "wikitext2: 6 slices of 256 prompt" in page.text
    assert page.row("dart", "set by the method")[2:4] == ["20 %", "0 %"]
    assert "dart, own counts on wikitext2: perplexity x 1.08" in page.text


def test_text_whose_tokens_do_not_fit_is_shown_plain(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "run")
    record = {"id": "a", "variant": "pruned", "method": "dart", "sparsity": 0.3, "text": "hi <i>",
              "tokens": ["h"], "phases": ["pruned"]}  # fmt: skip
    (folder / "generation.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    html = report.write(folder).read_text(encoding="utf-8")
    assert '<div class="text">hi &lt;i&gt;</div>' in html


@pytest.mark.parametrize("status", ["interrupted", "failed", "running"])
def test_an_unfinished_run_says_so(tmp_path: Path, status: str) -> None:
    folder = write_results(tmp_path / "run", {"status": status, "finished": None})
    page = Page(report.write(folder).read_text(encoding="utf-8"))
    assert f"This run is {status}." in page.text


def test_without_matplotlib_there_is_a_page_without_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(report.write(write_results(tmp_path / "run")).read_text(encoding="utf-8"))
    assert page.attributes("img") == []
    assert "No plots: this needs matplotlib, which is not installed" in page.text
    assert page.row("dart", "50 %")[5] == "37.00"


def test_no_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="is not a results folder"):
        report.write(tmp_path / "nowhere")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_contrast_in_light_and_dark(theme: int) -> None:
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
