"""``dart-llm inspect``: texts, files, page, errors; resuming is in tests/experiments."""

import csv
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from dart_llm.cli.app import app
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments.study import run_study
from dart_llm.reporting.console import Ui
from dart_llm.studies.inspection.settings import TEXTS, InspectSettings, inspect_texts
from dart_llm.studies.inspection.study import SECTIONS, InspectionStudy
from html_page import Page
from inspect_cases import A, B
from lm_cases import place
from tiny import LAYERS, WIDTH

FILES = {
    *("layers", "weights", "activations", "concentration", "neurons", "overlap", "ablation"),
    *("space_layers", "space_windows", "space_tokens"),
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(InspectionStudy, "figures", lambda self: ())  # drawn once, for ``whole``
    monkeypatch.setattr(InspectionStudy, "write_page", lambda self: None)


def inspect(*arguments):
    """``dart-llm inspect ARGUMENTS`` on the tiny model."""
    words = ["inspect", *arguments, "--model", place() / "model", "--device", "cpu"]
    return CliRunner().invoke(app, list(map(str, words)))


def document(result):
    assert (result.exit_code, result.stderr) == (0, ""), result.exception
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of one inspection of everything, and its document; A has words of HTML."""
    root = tmp_path_factory.mktemp("inspected")
    given = {"prompt": f"{A}<script>1</script> & so on", "prompt_b": B, "ablation_seeds": 1}
    own = {"model": str(place() / "model"), "device": "cpu", "method": "griffin", **given}
    asked = InspectSettings(results_dir=str(root), **own)
    folder = run_study(InspectionStudy(asked, (), Ui(quiet=True))).path
    return folder, json.loads((folder / "inspect.json").read_text("utf-8"))


def test_csv_holds_the_numbers_of_the_json(whole):
    folder, kept = whole
    found = kept["sections"]
    assert list(found) == list(TEXTS)
    assert [text["label"] for text in kept["texts"]] == ["A", "B"]
    assert {path.stem for path in folder.glob("*.csv")} == FILES
    rows = list(csv.DictReader((folder / "layers.csv").read_text("utf-8").splitlines()))
    for row, layer in zip(rows, found["layers"]["layers"], strict=True):
        assert float(row["output.s"]) == layer["output"]["s"]


def test_headline_plots_and_page(whole):
    folder, found = whole
    mean = {key: f"{value:.3f}" for key, value in found["sections"]["overlap"]["mean"].items()}
    words = f"a Jaccard of {mean['jaccard']}, where chance gives {mean['chance']}."
    assert words in (folder / "inspect.md").read_text("utf-8")
    drawn = [
        shown.plot("x")
        for name, data in found["sections"].items()
        for shown in SECTIONS[name].show(data)
        if shown.panels
    ]
    assert {path.stem for path in (folder / "plots").iterdir()} == {one.name for one in drawn}
    assert len(drawn) == 9 and all(plot.alt and plot.small[:1] == "x" for plot in drawn)
    html = (folder / "report.html").read_text("utf-8")
    page = Page(html)
    assert html.count("<img ") == 9 and page.row("mean")[4] == mean["jaccard"]
    assert f"{A}<script>1</script> & so on" in page.text and "<script" not in html
    assert words in page.text.replace("\xa0", " ")
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text("utf-8").splitlines()]
    losses = [row["loss"] for row in found["sections"]["ablation"]["rows"]]
    assert [line["value"] for line in lines] == [
        found["sections"]["overlap"]["mean"]["jaccard"],
        *losses,
    ]


def test_what_is_looked_at_follows_from_the_texts():
    found = document(inspect("--json"))
    assert list(found["sections"]) == ["weights", "neurons"] and found["texts"] == []
    assert found["sections"]["weights"]["activations"] is None
    one = document(inspect("layers", "--prompt", "the sea", "--json"))
    assert list(one["sections"]) == ["layers"] and one["texts"][0]["tokens_read"] == len("the sea")
    both = InspectSettings(prompt="x", prompt_b="y")
    assert both.chosen(()) == list(TEXTS)
    texts = ("--prompt", "the sea", "--prompt-b", "the moon")
    assert "no ablation: ablation needs 64 tokens" in inspect(*texts).stderr
    assert "needs 64 tokens" in str(inspect("ablation", *texts).exception)
    plain = document(inspect(*texts, "--method", "dense", "--json"))
    assert "overlap" not in plain["sections"] and "space" in plain["sections"]


def test_activations_are_kept_on_request():
    keep = ("--save-activations", "--activation-tokens", ":9", "--activation-tensors", "u,r")
    result = inspect("layers", "--prompt", A, "--prompt-b", B, *keep)
    assert result.exit_code == 0, result.exception
    (folder,) = Path("results").glob("*/*")
    for label in "ab":
        found = load_file(folder / f"activations-{label}.safetensors")
        assert found["layer3.u"].shape == (9, WIDTH) and len(found) == 2 * LAYERS + 1
    assert "give --prompt or --pass" in str(inspect("weights", "--save-activations").exception)


def test_texts_of_runs_passages_and_prompts():
    folders = []
    for name, texts in (("one", ("sea", "sea")), ("two", ("moon", "hills and moon"))):
        folder = Path("runs") / name / "20260101-000000"
        folder.mkdir(parents=True)
        variants = zip(("pruned", "dense"), texts, strict=True)
        lines = [json.dumps({"variant": variant, "text": text}) for variant, text in variants]
        (folder / "generation.jsonl").write_text("".join(f"{line}\n" for line in lines))
        folders.append(str(folder))
    both = inspect_texts(InspectSettings(runs=",".join(folders)))
    assert [text.text for text in both] == ["sea", "moon"]
    assert both[0].name == "one/20260101-000000"
    own = inspect_texts(InspectSettings(runs=folders[1]))
    assert [text.text for text in own] == ["hills and moon", "moon"]
    bees, loans = inspect_texts(InspectSettings(passage="01"))
    assert bees.text.startswith("When a honeybee finds") and loans.text.startswith("A mortgage is")
    assert (bees.label, loans.label) == ("A", "B") and "honeybee" not in loans.text
    sky, words = inspect_texts(InspectSettings(prompt="sky", prompt_b="my own\nwords"))
    assert (sky.name, words.title) == ("sky", "B (my own words)") and sky.text != "sky"


REFUSED = [
    ({"prompt_b": "y"}, "text B without text A"),
    ({"prompt": "x", "prompt_file": "f"}, "not both"),
    ({"prompt": "x", "passage": "01"}, "one of the three"),
    ({"share": 1.0}, r"--share 1\.0 must be less than 1"),
    ({"neuron_score": "maxx"}, "did you mean max"),
    ({"prompt": " ", "prompt_b": "y"}, r"text A \(\) is empty"),
    ({"prompt": "x \udcff"}, "is not valid UTF-8"),
    ({"prompt_file": "none.txt"}, "there is no prompt file none.txt: give an existing"),
    ({"passage": "99"}, "unknown prompt or passage"),
    ({"runs": "a,b,c"}, "one results folder or two, not 3"),
    ({"what": "overlaps"}, "did you mean overlap"),
    ({"what": "layers"}, r"needs 1 text\(s\): give --prompt"),
    ({"what": "space", "prompt": "x"}, r"needs 2 text\(s\): give --prompt and"),
    ({"what": "space", "passage": "01", "layer": 4}, "this model has 4 layers"),
    ({"what": "overlap", "passage": "01", "method": "wanda"}, "e.g. griffin"),
]


@pytest.mark.parametrize(("given", "problem"), REFUSED)
def test_what_cannot_be_inspected(given, problem):
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in given.items()]
    words = [word for flag in flags for word in flag if flag[0] != "--what"]
    result = inspect(*filter(None, [given.get("what")]), *words)
    assert isinstance(result.exception, ConfigError | UnknownName)
    assert re.search(problem, str(result.exception))
