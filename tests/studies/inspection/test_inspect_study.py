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
from dart_llm.studies.inspection.study import InspectionStudy
from html_page import Page
from inspect_cases import A, B
from lm_cases import place
from tiny import LAYERS, WIDTH
from written import lines


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
    texts = {"prompt": f"{A}<script>1</script> & so on", "prompt_b": B, "ablation_seeds": 1}
    given = {"model": str(place() / "model"), "device": "cpu", "method": "griffin", **texts}
    settings = InspectSettings(results_dir=str(root), **given)
    folder = run_study(InspectionStudy(settings, (), Ui(quiet=True))).path
    return folder, json.loads((folder / "inspect.json").read_text("utf-8"))


def test_csv_files_have_the_numbers_of_the_json(whole):
    folder, kept = whole
    assert list(kept["sections"]) == list(TEXTS)
    assert [text["label"] for text in kept["texts"]] == ["A", "B"]
    assert {path.stem for path in folder.glob("*.csv")} == {*TEXTS, "activations"}
    rows = list(csv.DictReader((folder / "layers.csv").read_text("utf-8").splitlines()))
    for row, layer in zip(rows, kept["sections"]["layers"]["layers"], strict=True):
        assert float(row["output.s"]) == layer["output"]["s"]
    losses = [row["loss"] for row in kept["sections"]["ablation"]["rows"]]
    mean = kept["sections"]["overlap"]["mean"]["jaccard"]
    assert [line["value"] for line in lines(folder / "rows.jsonl")] == [mean, *losses]


def test_headline_plots_and_page(whole):
    folder, kept = whole
    mean = {key: f"{value:.3f}" for key, value in kept["sections"]["overlap"]["mean"].items()}
    words = f"a Jaccard of {mean['jaccard']}, where chance gives {mean['chance']}."
    assert words in (folder / "inspect.md").read_text("utf-8")
    drawn = {f"inspect_{name}" for name in ("layers", "activations", "overlap")}
    assert {path.stem for path in (folder / "plots").iterdir()} == drawn
    html = (folder / "report.html").read_text("utf-8")
    page = Page(html)
    assert html.count("<img ") == 3 and page.row("mean")[4] == mean["jaccard"]
    assert f"{A}<script>1</script> & so on" in page.text and "<script" not in html
    assert words in page.text.replace("\xa0", " ")


def test_what_is_looked_at_follows_from_the_texts():
    bare = document(inspect("--json"))
    assert list(bare["sections"]) == ["neurons"] and bare["texts"] == []
    one = document(inspect("layers", "--prompt", "the sea", "--json"))
    assert list(one["sections"]) == ["layers"] and one["texts"][0]["tokens_read"] == len("the sea")
    assert InspectSettings(prompt="x", prompt_b="y").chosen(()) == list(TEXTS)
    texts = ("--prompt", "the sea", "--prompt-b", "the moon")
    assert "no ablation: ablation needs 64 tokens" in inspect(*texts).stderr
    assert "needs 64 tokens" in str(inspect("ablation", *texts).exception)
    plain = document(inspect(*texts, "--method", "dense", "--json"))
    assert list(plain["sections"]) == ["layers", "neurons"]


def test_activations_are_kept_on_request():
    keep = ("--save-activations", "--activation-tokens", ":9", "--activation-tensors", "u,r")
    result = inspect("layers", "--prompt", A, "--prompt-b", B, *keep)
    assert result.exit_code == 0, result.exception
    (folder,) = Path("results").glob("*/*")
    for label in "ab":
        tensors = load_file(folder / f"activations-{label}.safetensors")
        assert tensors["layer3.u"].shape == (9, WIDTH) and len(tensors) == 2 * LAYERS + 1
    assert "give --prompt or --pass" in str(inspect("neurons", "--save-activations").exception)


def test_texts_of_passages_and_prompts():
    bees, loans = inspect_texts(InspectSettings(passage="01"))
    assert bees.text.startswith("When a honeybee finds") and loans.text.startswith("A mortgage is")
    assert (bees.label, loans.label) == ("A", "B") and "honeybee" not in loans.text
    sky, words = inspect_texts(InspectSettings(prompt="sky", prompt_b="my own\nwords"))
    assert (sky.name, words.title) == ("sky", "B (my own words)") and sky.text != "sky"


REFUSED = [
    ({"prompt_b": "y"}, "text B without text A"),
    ({"prompt": "x", "prompt_file": "f"}, "not both"),
    ({"prompt": "x", "passage": "01"}, "give prompts or --passage, not both"),
    ({"share": 1.0}, r"--share 1\.0 must be less than 1"),
    ({"prompt": " ", "prompt_b": "y"}, r"text A \(\) is empty"),
    ({"prompt": "x \udcff"}, "is not valid UTF-8"),
    ({"prompt_file": "none.txt"}, "there is no prompt file none.txt: give an existing"),
    ({"passage": "99"}, "unknown prompt or passage"),
    ({"what": "overlaps"}, "did you mean overlap"),
    ({"what": "layers"}, r"needs 1 text\(s\): give --prompt"),
    ({"what": "overlap", "prompt": "x"}, r"needs 2 text\(s\): give --prompt"),
    ({"what": "overlap", "passage": "01", "method": "wanda"}, "e.g. griffin"),
    ({"prompt": "x", "activation_layers": "9-1"}, "not a layer or a range"),
]


@pytest.mark.parametrize(("given", "problem"), REFUSED)
def test_what_cannot_be_inspected(given, problem):
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in given.items()]
    words = [word for flag in flags for word in flag if flag[0] != "--what"]
    result = inspect(*filter(None, [given.get("what")]), *words)
    assert isinstance(result.exception, ConfigError | UnknownName)
    assert re.search(problem, str(result.exception))
